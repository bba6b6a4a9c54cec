# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
READY := $(VENV)/.ready
UNSLOTH_VENV := .venv-unsloth
UNSLOTH_BIN := $(UNSLOTH_VENV)/bin
UNSLOTH_READY := $(UNSLOTH_VENV)/.ready
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: setup demo demo-cloud test test-full test-unsloth matrix lint openapi images locks bench chaos fuzz clean

setup: $(READY)

# The marker is written last, so an interrupted set-up starts over where pip left off. llama.cpp is built by
# infra.llama_cpp; --only-binary keeps pip from doing it by itself, unhashed.
$(READY): pyproject.toml Makefile infra/llama_cpp.py
	@echo "setup: making $(VENV) (once; some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m infra.llama_cpp
	@$(BIN)/pip install --quiet --disable-pip-version-check --only-binary llama-cpp-python -e ".[exporter,gguf,dev]"
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

# Unsloth patches what it is installed beside, so it has an environment of its own. torchvision goes where it cannot be
# loaded (the wheel built for CUDA beside a torch that is not): there it takes transformers down with it, and no merge
# needs it.
$(UNSLOTH_READY): pyproject.toml Makefile
	@echo "setup: making $(UNSLOTH_VENV) (once; 3 GB and some minutes)"
	@test -x $(UNSLOTH_BIN)/python || $(PYTHON) -m venv $(UNSLOTH_VENV)
	@$(UNSLOTH_BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(UNSLOTH_VENV)
	@$(UNSLOTH_BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(UNSLOTH_BIN)/pip install --quiet --disable-pip-version-check -e ".[exporter,dev,unsloth]"
	@$(UNSLOTH_BIN)/python -c "import torchvision" 2>/dev/null || $(UNSLOTH_BIN)/pip uninstall --quiet --yes torchvision
	@touch $@
	@echo "setup: done"

test-unsloth: $(UNSLOTH_READY)
	$(UNSLOTH_BIN)/pytest -n auto tests/unsloth

matrix: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.exporter.matrix

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.cloudbuild cloudbuild.yaml
	$(BIN)/hadolint --config .hadolint.yaml dispatcher/Dockerfile exporter/Dockerfile
	$(BIN)/python -m infra.openapi --check
	$(BIN)/python -m infra.locks --check

# What the API gateway is told, from the contract; `make lint` fails while the two differ.
openapi: setup
	$(BIN)/python -m infra.openapi

# The Dockerfiles' own commands (the exporter's without a GPU) in a fresh directory, without Docker; then what they made
# is started.
images: setup
	$(BIN)/python -m infra.images

# The images' dependencies with their hashes, from the pins in pyproject.toml; `make lint` fails while the two differ.
locks: setup
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[locks]"
	$(BIN)/python -m infra.locks

# Each parser of what strangers wrote gets so many seconds; what is found stays in .fuzz.
FUZZ_SECONDS ?= 600
fuzz: setup
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

bench: setup
	$(BIN)/python -m tests.bench

chaos: setup
	$(BIN)/python -m tests.chaos

clean:
	rm -rf $(VENV) $(UNSLOTH_VENV) .gemma-export .bench .chaos .fuzz
