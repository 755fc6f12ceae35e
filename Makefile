# What one types to run, test and measure Octavo. Every target sets up what it needs and is quick the second time.

PYTHON ?= python3
VENV ?= .venv
# Installed where PYTHON has no torch of its own and there is no GPU; with a GPU it is torch from the registry.
# Anything that pip takes: a version, a wheel, options.
TORCH ?= torch==2.13.0
MODEL ?=
ARGS ?=

BIN := $(VENV)/bin
# Prints where the default model is; fetches it when it is not on this machine.
FETCH = $(BIN)/python -m octavo.default_model
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve chat test lint types format bench report build clean

help: ## this list
	@echo 'make TARGET [PYTHON=python3.12] [TORCH=torch==2.13.0] [MODEL=…] [ARGS="…"]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-10s%s\n", $$1, $$2}'

serve: $(VENV)/.installed-base ## install, and serve MODEL (default: a small one that is fetched once) to OpenAI clients
	$(if $(MODEL),,@$(FETCH))
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

chat: $(VENV)/.installed-base ## talk to MODEL in the terminal
	$(if $(MODEL),,@$(FETCH))
	@exec $(BIN)/octavo chat $(MODEL) $(ARGS)

test: $(VENV)/.installed-test ## every test that needs no GPU
	@$(FETCH)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' $(ARGS)

lint: $(VENV)/.installed-lint ## format and style; changes nothing
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: $(VENV)/.installed-lint ## mypy, strict
	$(BIN)/python -m mypy

format: $(VENV)/.installed-lint ## mend format and style where that can be done by itself
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed-bench ## tokens a second with MODEL, offline; benchmarks/ holds the comparisons
	$(if $(MODEL),,@$(FETCH))
	$(BIN)/octavo bench throughput $(MODEL) $(ARGS)

report: $(VENV)/.installed-base ## write the table of measurements into the documentation
	$(BIN)/python benchmarks/report.py

build: $(VENV)/.installed-test ## the source distribution and the wheel, in dist/
	$(BIN)/python -m build

clean: ## remove the environment and everything that was built; fetched models stay in the user's cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kernels/octavo_cpu/*.so kernels/octavo_cpu/build_error.txt
	find benchmarks core kernels plugins tests examples -name __pycache__ -prune -exec rm -rf {} +

# --- the environment ------------------------------------------------------------------------------------------------

# Prints the folders of PYTHON's packages when a torch that will do is among them, so that it need not come twice.
define FIND_TORCH
import importlib.metadata, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(f"Octavo needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 …")
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
if tuple(int(number) for number in version.split(".")[:2]) >= (2, 11):
    print(*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, sep="\n")
endef
export FIND_TORCH

$(VENV)/.torch:
	@packages=$$($(PYTHON) -c "$$FIND_TORCH") && \
	echo "creating $(VENV)" && \
	$(PYTHON) -m venv $(VENV) && \
	if [ -n "$$packages" ]; then \
	  echo "using the torch of $(PYTHON)"; \
	  into=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "$$packages" | sed 's/.*/import site; site.addsitedir("&")/' > "$$into/torch-of-$(notdir $(PYTHON)).pth"; \
	elif command -v nvidia-smi > /dev/null; then \
	  echo "installing torch" && $(BIN)/python -m pip install --quiet 'torch>=2.11' 'triton>=3.6'; \
	else \
	  echo "installing $(TORCH)" && $(BIN)/python -m pip install --quiet $(TORCH); \
	fi
	@touch $@

# The install is editable: only metadata and what is compiled need another.
$(VENV)/.installed-%: pyproject.toml hatch_build.py $(wildcard kernels/octavo_cpu/*.[ch]) kernels/octavo_cpu/build.py | $(VENV)/.torch
	@echo 'installing octavo$(if $(filter-out base,$*),[$*])'
	@$(BIN)/python -m pip install --quiet --editable '.$(if $(filter-out base,$*),[$*])'
	@touch $@
