# `make run` serves the tiny model; `make check test faults` is what CI runs. Nothing to set up first.
# `make PYTHON=python3.12` names the Python of .venv; else it is .venv's own, or the first that fits.
SHELL := /bin/bash
VENV := .venv
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
CONFIG ?= tiny
# Processes that run tests side by side; 0 runs them one after another in one process.
WORKERS ?= 2
# tests/conftest.py makes the groups, and says in which order they start.
SIDE_BY_SIDE = -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# The Pythons of `requires-python` in pyproject.toml.
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
version_of = $(shell $(1) -c '$(VERSION)' 2>/dev/null)
PYTHON := $(shell for it in $(PY) python3 python3.12 python3.11; do \
  $$it -c '$(FITS)' 2>/dev/null && echo $$it && break; done)

# A .venv of another Python is not kept: everything in it is made again.
ifneq ($(call version_of,$(PYTHON)),$(call version_of,$(PY)))
RENEW := rm -rf $(VENV)
.PHONY: $(VENV)/.installed $(VENV)/.installed-dev $(UV)
endif

.PHONY: install install-dev lock run check test coverage faults image-test format clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# pip installs torch, because uv does not read pip's configuration: there a machine without a GPU can
# name a folder or an index with torch's build for a CPU. Without that, pip takes the default build,
# which is for CUDA. uv installs the rest, which is three times as fast, and leaves torch as it is.
# The compiled code is built while torch is on its way.
$(VENV)/.installed: pyproject.toml requirements.txt $(wildcard serve_app/model/kernels/cpu/_cpu_*.[ch]) | $(UV)
	@echo "Installing into $(VENV): torch, then the packages in requirements.txt. This takes one to three minutes."
	$(UV) pip install --quiet --python $(PY) --no-deps -e . & \
	  $(PY) -m pip install -c requirements.txt torch && wait $$! && \
	  $(UV) pip install --quiet --python $(PY) --no-deps -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(UV) pip install --quiet --python $(PY) --no-deps -r requirements-dev.txt
	@touch $@

$(UV):
	@$(or $(PYTHON),false) -c '$(FITS)' 2>/dev/null || { echo "mixtral-serve needs Python 3.11 or 3.12;" \
	  "$(or $(PYTHON),python3) is $(or $(call version_of,$(or $(PYTHON),python3)),not a Python)." \
	  "Name one that fits: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(RENEW)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PY) -m pip install --quiet uv==$(UV_VERSION)

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
	$(VENV)/bin/hadolint Dockerfile

test: install-dev
	$(PY) -m pytest $(SIDE_BY_SIDE)

# The same tests, counting lines, also those of processes that they start; of kernels none.
coverage: install-dev
	$(PY) -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term-missing:skip-covered

faults: install-dev
	$(PY) -m pytest -m faults

# Builds the container's image and runs it, as root, with Debian's packages buildah, crun and
# debootstrap. The first time takes a quarter of an hour on two cores, and 4 GB in IMAGES, which a
# later run takes layers from.
image-test: install-dev
	$(PY) -m pytest -n0 -m image tests/image

format: install-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage .hypothesis .import_linter_cache *.egg-info
