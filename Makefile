# `make run` serves the tiny model; `make check test faults` is what CI runs. Nothing to set up first.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
CONFIG ?= configs/tiny.yaml

.PHONY: install run check test faults format clean

install: $(READY)

# Made again only when the pins or the compiled code change.
$(READY): pyproject.toml $(wildcard serve_app/model/kernels/cpu/_cpu_*.[ch])
	@echo "Installing the pinned dependencies into $(VENV); the first time takes a minute or more."
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

run: install
	$(PYTHON) -m serve_app.check $(CONFIG)
	$(VENV)/bin/serve run $(CONFIG)

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: install
	$(PYTHON) -m pytest

faults: install
	$(PYTHON) -m pytest -m faults

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
