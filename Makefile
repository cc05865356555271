# Every target works from a bare checkout with Python >= 3.11 and GNU make >= 3.81: it makes .venv and installs what it needs.

PYTHON ?= python3
JOB ?= lm_cpu
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
comma := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

# One stamp per set of packages. `unfinished` exists while pip works: an environment left with it is half made and starts over.
DEMO := $(VENV)/ready-demo
DEV := $(VENV)/ready-dev
DOCS := $(VENV)/ready-docs
UNFINISHED := $(VENV)/unfinished

.DEFAULT_GOAL := help
.PHONY: demo test lint docs bench clean help

help:
	@echo "make demo    train a small Mamba-2 on the built-in text, then let it write (about 4 minutes on 2 cores)"
	@echo "make test    lint, layers, dependencies, types and all tests"
	@echo "make lint    the same without the tests"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   time the 130M language model on the CPU; make bench JOB=... runs another job"
	@echo "make clean   delete .venv and everything that was built or cached"
	@echo "Another interpreter: make PYTHON=python3.12 test"

demo: $(DEMO)
	@$(BIN)/dualscan demo

test: lint
	@echo "== pytest"
	@$(BIN)/python -m pytest -n 2

# Each check runs even when one before it failed, so that one run shows everything there is to mend.
lint: $(DEV)
	@status=0; \
	echo "== ruff"; $(BIN)/ruff check . || status=1; $(BIN)/ruff format --check . || status=1; \
	echo "== import-linter"; $(BIN)/lint-imports --no-logo || status=1; \
	echo "== deptry"; $(BIN)/deptry dualscan || status=1; \
	echo "== pyrefly"; $(BIN)/pyrefly check || status=1; \
	exit $$status

docs: $(DOCS)
	@$(BIN)/mkdocs build --strict

bench: $(DEV)
	@$(BIN)/dualscan bench $(JOB)

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find dualscan tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

define install
	@touch $(UNFINISHED)
	@$(PIP) --no-build-isolation --editable '.[$(1)]'
	@rm $(UNFINISHED)
	@touch $@
endef

$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dualscan needs Python >= 3.11, but $(PYTHON) is `$(PYTHON) --version 2>&1`; use make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@if test -e $(UNFINISHED) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Creating $(VENV) with `$(PYTHON) --version`"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing dualscan and PyTorch into $(VENV) (once; a minute or two, most of it the download of PyTorch)"
	@$(PIP) hatchling
	$(call install,cpu$(comma)plot)

$(DEV): $(DEMO)
	@echo "Installing the development tools into $(VENV)"
	$(call install,dev)

$(DOCS): $(DEMO)
	@echo "Installing the documentation tools into $(VENV)"
	$(call install,docs)
