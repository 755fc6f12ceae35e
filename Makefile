# Octavo: one command to serve, one to test. Every target sets up what it needs and is quick the second time.
#
#   make serve                      serve the small default model on http://127.0.0.1:8000
#   make serve MODEL=… ARGS="…"     serve another one, with options of `octavo serve`
#   make test                       every test that needs no GPU
#
# A torch (2.11 or newer) that PYTHON has already is used. Where there is none, and no GPU, TORCH is installed.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
MODEL  ?=
ARGS   ?=

BIN     := $(VENV)/bin
SOURCES := pyproject.toml hatch_build.py $(wildcard kernels/octavo_cpu/*.c kernels/octavo_cpu/*.h)
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet

HAS_TORCH = import torch; raise SystemExit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

.PHONY: help serve test lint types bench clean install
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'
	@echo "targets: serve test lint types bench install clean"

$(BIN)/python:
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  echo "using the torch that $(PYTHON) has"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi

# torch comes first and alone: what is installed after it finds it there and asks for no other build
$(VENV)/.torch: | $(BIN)/python
	@if ! $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then \
	  if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) 'torch>=2.11' 'triton>=3.6'; else $(PIP) '$(TORCH)'; fi; \
	fi
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) --editable '.[$*]'
	@touch $@

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@$(if $(MODEL),,$(BIN)/python -m octavo.default_model)
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

# one thread: tests run beside each other, and spinning threads on a small machine slow everything down
test: $(VENV)/.installed-test
	@$(BIN)/python -m octavo.default_model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	@$(if $(MODEL),,$(BIN)/python -m octavo.default_model)
	$(BIN)/octavo bench throughput $(MODEL) $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis kernels/octavo_cpu/kernels-*.so
