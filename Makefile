# What this repository can do. Every target makes the virtual environment .venv itself if there is none.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
SEEDS ?= 10000

VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml requirements/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt

# Real data lies beside the repository on some machines; everything else needs none.
ifndef FOEDUS_DATA
ifneq ($(wildcard ../shared/data),)
export FOEDUS_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast pytest lint types docs simulate-faults bench bench-peers constraints clean

help:  ## this list
	@echo "foedus: federated learning. What you can make:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@echo
	@echo "The first time, packages are installed into $(VENV), which takes some minutes. On Linux the usual torch brings"
	@echo "libraries for graphics cards along (3 GB); without a card, save them by writing"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

demo: $(VENV)/.user  ## federated learning in two figures, on real data, offline, in about a minute
	$(BIN)/foedus demo

test: lint types pytest  ## everything that is checked: style, types, layers, all tests (the last takes some minutes)

test-fast: lint $(VENV)/.developer  ## style, layers and the quick tests
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow"

pytest: $(VENV)/.developer  ## all tests
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.developer  ## style (ruff), and which layer imports which (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.developer  ## types (mypy, strict)
	$(BIN)/mypy

docs: $(VENV)/.developer  ## the documentation, into site/
	$(BIN)/mkdocs build --strict

simulate-faults: $(VENV)/.developer  ## 10,000 federations in which everything goes wrong; a seed that fails is printed
	$(BIN)/python -m tests.faults --bugs
	$(BIN)/python -m tests.faults --seeds $(SEEDS) --workers $(WORKERS)

bench: $(VENV)/.developer  ## speed, beside bare loops; quiet machines give honest figures
	$(BIN)/python benchmarks/simulation.py --no-peers

bench-peers: $(VENV)/.developer  ## speed, beside other systems too, each in an environment of its own
	$(BIN)/python benchmarks/peers/install.py
	$(BIN)/python benchmarks/simulation.py

constraints: $(VENV)/.developer  ## write down the versions that are installed now, for others to install the same
	@{ sed -n '/^#/p' requirements/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	  | sed 's/+cpu$$//' | sort -f; } > requirements/constraints.new
	@mv requirements/constraints.new requirements/constraints.txt
	@touch $(VENV)/.developer $(VENV)/.user

clean:  ## remove what was made, the virtual environment included
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# --- the virtual environment: made once, and again when what is to be in it changes

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "foedus needs Python 3.11 or newer; write PYTHON=/path/to/python3.11 make ..."; exit 1; }
	@echo "Making the virtual environment $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(PINS) | $(BIN)/python
	@echo "Installing foedus with torch, jax, scikit-learn and matplotlib into $(VENV); the first time this takes minutes …"
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.developer: $(PINS) | $(BIN)/python
	@echo "Installing foedus and the tools of its developers into $(VENV); the first time this takes minutes …"
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[dev]'
	@touch $(VENV)/.user $@
