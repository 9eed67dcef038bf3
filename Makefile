# make demo    train a small language model, eager and optimised side by side
# make test    the whole CPU suite          (make test ARGS="-k parity")
# make test-gpu  the tests that need a GPU, on a machine with one
# make ecosystem   trainers, loggers and exporters, the slow cases too
# make lint    ruff, mypy, import-linter
# make bench   the parity table of docs/parity.md, and the training step on this CPU
# make zoo     train every language model type of transformers, against eager: docs/zoo.md
#              (resumes what an earlier run left; make zoo ARGS="llama gemma" for a few again)
# make docs    the pages and the API reference as a site in artifacts/docs
# make clean   remove what the others made
#
# Needs Python 3.10 or newer and a C++ compiler; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
STEP_ARGS ?=

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_VERBOSITY := error
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-gpu lint bench zoo clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.run
	$(BIN)/python bench/demo.py $(ARGS)

test: $(VENV)/.dev
	.ci/run $(ARGS)

test-gpu: $(VENV)/.dev
	bash tests/gpu.sh $(ARGS)

ecosystem: $(VENV)/.dev
	SLOW=1 .ci/run tests/test_trainer.py tests/test_trl.py tests/test_loops.py tests/test_distributed.py \
	  tests/test_integrations.py tests/test_multimodal.py tests/test_docs.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=src $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/parity_table.py $(ARGS)
	$(BIN)/python bench/bench_cpu_step.py $(STEP_ARGS)

zoo: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python bench/zoo.py $(ARGS)

docs: $(VENV)/.dev
	@$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) artifacts build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

# A stamp, so that the environment is made once and again when what it is made of changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Fusewright needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments (on Debian: apt install python3-venv)."; \
	  exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  echo "No C++ compiler found: Inductor's tests will fail and the demo runs as plain FX."
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing ..."
	@$(PIP) --editable '.[hf,report,bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing, development tools included ..."
	@$(PIP) --editable '.[hf,qlora,report,bench,dev]'
	@touch $(VENV)/.run $@
