# make demo: set up .venv and run the digits experiment.   make test: set up and run lint, types and tests.
PYTHON ?= python3
VENV ?= .venv
# Tests run in so many processes.
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: help demo install install-test lint types test test-all servers clean

help:
	@echo "make demo   set up $(VENV), install, and learn from corrupted digits (about 3 minutes after installing)"
	@echo "make test   set up $(VENV), then run lint, types and tests (JOBS=$(JOBS) processes)"
	@echo "make test-all  likewise, with the tests that take minutes each"
	@echo "make servers  put s3rver and azurite into tests/node_modules, for more tests (needs Node.js)"
	@echo "make clean  remove $(VENV) and caches; runs/ stays"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "DiffEM needs Python 3.11 or newer but $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

# The stamps make a second call start at once; a change of pyproject.toml installs anew.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

demo: install
	$(BIN)/diffem run deploy/experiments/digits.yaml

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-all: lint types
	$(BIN)/python -m pytest

# Two more object stores for the tests, where Node.js is: without them those tests are skipped.
servers:
	npm install --no-audit --no-fund --no-save --prefix tests s3rver@3 azurite@3 axe-core@4

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
