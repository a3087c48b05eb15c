# `make run` serves the tiny model; `make check test faults` is what CI runs. Nothing to set up first.
SHELL := /bin/bash
VENV := .venv
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
CONFIG ?= tiny
# Processes that run tests side by side; 0 runs them one after another in one process.
WORKERS ?= 2
# tests/conftest.py makes the groups, and says in which order they start.
SIDE_BY_SIDE = -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: install install-dev lock run check test coverage faults format clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# pip installs torch, because uv does not read pip's configuration: there a machine without a GPU can
# name a folder or an index with torch's build for a CPU. Without that, pip takes the default build,
# which is for CUDA. uv installs the rest, which is three times as fast, and leaves torch as it is.
# The compiled code is built while torch is on its way.
$(VENV)/.installed: pyproject.toml requirements.txt $(wildcard serve_app/model/kernels/cpu/_cpu_*.[ch]) | $(UV)
	@echo "Installing into $(VENV): torch, then the packages in requirements.txt. This takes one to three minutes."
	$(UV) pip install --python $(PYTHON) --no-deps -e . & \
	  $(PYTHON) -m pip install -c requirements.txt torch && wait $$! && \
	  $(UV) pip install --python $(PYTHON) --no-deps -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(UV) pip install --python $(PYTHON) --no-deps -r requirements-dev.txt
	@touch $@

$(UV):
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet uv==$(UV_VERSION)

# torch pins CUDA's libraries and triton itself, and they belong to a GPU machine only: the lock
# leaves them to torch, save what pyproject.toml names. requirements-dev.txt is what comes on top.
lock: $(UV)
	$(COMPILE) --output-file requirements.txt
	sed -i -E '/mixtral-serve/b; /^(cuda|nvidia|triton)\b/d' requirements.txt
	$(COMPILE) --extra dev --constraint requirements.txt --output-file requirements-dev.txt
	sed -i -E '/-c requirements.txt/d; /mixtral-serve/b; /^(cuda|nvidia)\b/d' requirements-dev.txt

COMPILE = $(UV) pip compile --quiet pyproject.toml --universal --python-version 3.11 --strip-extras \
  --annotation-style line --custom-compile-command 'make lock'

run: install
	@$(VENV)/bin/mixtral-serve run $(CONFIG)

check: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: install-dev
	$(PYTHON) -m pytest $(SIDE_BY_SIDE)

# The same tests, counting lines, also those of processes that they start; of kernels none.
coverage: install-dev
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term-missing:skip-covered

faults: install-dev
	$(PYTHON) -m pytest -m faults

format: install-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage .hypothesis .import_linter_cache *.egg-info
