# `make demo` and `make test` do all their own set-up: the first run makes .venv and installs the
# package with the versions of constraints.txt, later runs go straight on.

PYTHON ?= python3
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a small torch.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tested pair, installed together: see src/cafe/model/torchvision_pair.py.
TORCH_PAIR := $(shell grep -E '^(torch|torchvision)==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick check cli-page clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install everything

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  "error: cafe needs Python 3.11, 3.12 or 3.13; this is %d.%d. Try: make PYTHON=python3.12" % v)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt $(TORCH_PAIR) -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## fine-tune the bundled model and see it retrieve (minutes, no GPU needed)
	$(BIN)/cafe demo

check: $(STAMP)  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo --no-cache

# Two processes of one thread each finish sooner than one of two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test: check  ## check, then every test
	$(PYTEST)

quick: $(STAMP)  ## the tests that are not slow, two at a time, without the checks
	$(PYTEST) -m "not slow"

cli-page: $(STAMP)  ## write docs/cli.md anew from the commands' own help
	COLUMNS=100 $(BIN)/python -m typer cafe.cli utils docs --name cafe --title "Command line" --output docs/cli.md

clean:  ## remove caches and build outputs; keeps .venv and your runs
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
