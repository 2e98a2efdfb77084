# Every command makes its own environment in .venv from nothing; needs python3 with venv, and a package index.
PYTHON ?= python3
# Test processes; each runs torch on one thread.
JOBS ?= 2
# Passed on to the command behind `make demo`, `make test` and `make mutants`, e.g. make test ARGS='-k dpo -x'
ARGS ?=
# What `make trainers` proves: a framework, or one release of it (ONLY=trl-0.24.0); empty for all.
ONLY ?=

# What `make quick` runs.
QUICK := tests/test_deprecated.py tests/test_feedback.py tests/test_logratios.py tests/test_metrics.py tests/test_registry.py \
	tests/losses/test_against_oracle.py tests/losses/test_traits.py tests/data \
	tests/diagnosis/test_findings.py tests/training/test_batch.py tests/training/test_checks.py \
	tests/training/test_collator.py tests/integrations/trl/test_options.py tests/integrations/test_binding.py

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
demo test quick proof mutants: export HF_HUB_OFFLINE := 1
test quick proof mutants: export OMP_NUM_THREADS := 1
test quick proof mutants: export MKL_NUM_THREADS := 1
test quick proof mutants: export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test quick proof mutants trainers lint format types evidence docs dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train a small model on the built-in preference data, on CPU, offline
	$(BIN)/prefloss train $(ARGS)

test: $(INSTALLED) ## all tests and docstring examples
	$(BIN)/pytest -n $(JOBS) $(ARGS)

quick: $(INSTALLED) ## the tests of the core, in under a minute
	$(BIN)/pytest -n $(JOBS) $(QUICK) $(ARGS)

proof: $(INSTALLED) ## the losses alone: every kit check, every oracle point, counted in the closing line
	$(BIN)/pytest -n $(JOBS) tests/losses tests/oracle tests/testing $(ARGS)

mutants: $(INSTALLED) ## change code at random places and see whether a test fails: ARGS='prefloss/logratios.py --sample 50'
	$(BIN)/python .ci/mutants.py $(ARGS)

trainers: $(INSTALLED) ## releases of TRL, LLaMA-Factory, ms-swift ..., each in its own environment: ONLY=swift
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/trainers.py $(ONLY)

lint: $(INSTALLED) ## ruff: rules and format; import-linter: layers and circles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED) ## rewrite the code to what `make lint` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## pyright over prefloss/
	$(BIN)/pyright --pythonpath $(BIN)/python

evidence: $(INSTALLED) ## run every experiment and renew the results in docs/evidence: under ten minutes
	$(BIN)/prefloss reproduce --all --output docs/evidence/results

docs: $(INSTALLED) ## HTML docs into docs/_build/html; a warning fails
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

dist: $(INSTALLED) ## source distribution and wheel for this platform into dist, checked
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean: ## remove the environment, build outputs and caches
	rm -rf $(VENV) build dist docs/_build .benchmarks .hypothesis .pytest_cache .ruff_cache
	find prefloss tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Torch by exact version and first: where a CPU build is on offer, that one is taken, not gigabytes of CUDA.
# The build backend comes pinned too, hence no build isolation.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 hatchling hatch-fancy-pypi-readme editables
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[all,test,docs,dev]'
	@touch $@
