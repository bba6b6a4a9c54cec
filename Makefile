# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
READY := $(VENV)/.ready
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: setup demo demo-cloud test test-full lint bench clean

setup: $(READY)

# The marker is written last, so an interrupted set-up starts over where pip left off.
$(READY): pyproject.toml Makefile
	@echo "setup: making $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[exporter,dev]"
	@touch $@
	@echo "setup: done"

demo: setup
	$(BIN)/gemma-export demo

demo-cloud: setup
	$(BIN)/python -m infra.local.demo

test: setup
	$(BIN)/pytest -n auto --dist loadgroup -m "not full"

test-full: setup
	$(BIN)/pytest -n auto --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) .gemma-export .bench
