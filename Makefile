# Needs only make and a Python of 3.11 or newer; everything else goes into .venv.
# PYTHON=... names the Python, ACCELERATOR=cpu or =cuda overrides what the machine shows.

PYTHON ?= python3
BIN := .venv/bin

# Runs deploy/environment.py with the first Python that is new enough; $(1) is the set to install.
environment = @for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec "$$python" deploy/environment.py $(1); fi; done; \
	echo 'tutelage: Python 3.11 or newer is required and none was found; name one with PYTHON=...' >&2; exit 2

.PHONY: help quickstart env test lint format

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

quickstart: ## Install into .venv and run the main job (some minutes on 2 cores)
	$(call environment,base)
	@$(BIN)/tutelage train deploy/recipes/quickstart.yaml

env: ## Install into .venv everything the tests need
	$(call environment,test)

test: lint ## Install, lint, type-check and run the tests
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

lint: env ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
