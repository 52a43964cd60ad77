# Everything a user or CI runs; `make help` lists it.
#   PYTHON=python3.12   the interpreter to make the environment with (default: the first of 3.12, 3.11)
#   VENV=folder         the environment to use (default .venv; an existing one is updated in place)
#   MODEL=path-or-name  the model of `make demo` (default: a small one, made on first use)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?=
VENV ?= .venv
MODEL ?=

PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
PYTEST := $(PY) -m pytest

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

##### What people run

.PHONY: demo
demo: setup ## start a real server and ask it questions over a few documents (MODEL=...)
	$(PY) -m examples.demo $(if $(MODEL),--model '$(MODEL)')

.PHONY: test
test: lint unit gpu-test engine-test ## every check: lint, unit tests, GPU tests, engine tests

.PHONY: lint
lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: unit
unit: setup ## the unit tests (a minute)
	$(PYTEST) tests/unit --timeout 60

.PHONY: engine-test
engine-test: setup ## the tests that start a real engine (minutes, on the CPU if need be)
	$(PYTEST) tests/engine

.PHONY: gpu-test
gpu-test: setup ## the tests that need a GPU (skipped, with the reason, where there is none)
	$(PYTEST) tests/gpu

.PHONY: clean
clean: ## remove build output and caches, not the environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name '.?*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

##### The environment

STAMP := $(VENV)/.sglang-ape
IS_SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))

CHECK_VENV = $(PY) -c '$(IS_SUPPORTED)' || { echo "$(VENV) does not run Python 3.11 or 3.12:" \
  "remove it, or name another with VENV=" >&2; exit 1; }

.PHONY: setup
setup: $(STAMP) ## make the environment, or bring it up to date

# The stamp holds the checkout that the environment's editable install points at: for any other one
# (a shared environment, a copied tree) it counts as out of date.
ifneq ($(shell cat '$(STAMP)' 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt | $(UV)
	@rm -f '$@'
	@$(CHECK_VENV)
	@echo "Installing into $(VENV) (about 9 GB with SGLang and PyTorch)"
	$(UV) pip install --python $(PY) --compile-bytecode -c constraints.txt -e '.[test,bench,demo]' uv
	@echo '$(CURDIR)' > '$@'

$(UV):
	@test -x $(PY) || { python=$$($(MAKE) -s which-python) && "$$python" -m venv '$(VENV)'; }
	@$(CHECK_VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --quiet -c constraints.txt uv

.PHONY: which-python
which-python: ## print the interpreter that a new environment is made with
	@for python in $(or $(PYTHON),python3.12 python3.11 python3 python); do \
	  if "$$python" -c '$(IS_SUPPORTED)' 2>/dev/null; then command -v "$$python"; exit; fi; \
	done; \
	echo "Python 3.11 or 3.12 with its venv and ensurepip modules is needed;" \
	  "$(if $(PYTHON),$(PYTHON) is not one,the PATH has none): install one (Debian: python3.11 and" \
	  "python3.11-venv), or name it with PYTHON=" >&2; exit 1

.PHONY: constraints
constraints: | $(UV) ## pin the newest versions that fit together into constraints.txt
	printf 'uv\n' | $(UV) pip compile --quiet --upgrade --no-annotate --no-emit-index-url \
	  --custom-compile-command 'make constraints' \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
	  --extra test --extra bench --extra demo pyproject.toml - -o constraints.txt
	printf 'uv\n' | $(UV) pip compile --quiet -c constraints.txt --no-header --no-annotate \
	  --no-emit-index-url --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
	  --extra test --extra bench --extra demo pyproject.toml - | diff <(grep -v '^#' constraints.txt) - \
	  || { echo "Python 3.12 needs other pins than 3.11 (above)" >&2; exit 1; }
