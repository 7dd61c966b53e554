# `make demo` and `make test` set up all they need in .venv; PYTHON picks the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RELEASE_VENV := $(VENV)/release
DEMO_OUT ?= demo-results
# Processes that run tests. More than there are cores: many tests wait for processes that they started.
JOBS ?= 4
# Those of `make unit` hardly wait, and each process imports everything.
UNIT_JOBS ?= 3
PYTEST := $(BIN)/python -m pytest --dist worksteal --numprocesses

# With it, every process that a test starts would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install tools demo docs test unit check lint types suite format bench bench-perf kind kind-delete dist clean

help: ## list what make can do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvcluster needs Python 3.11 or later; $$($(PYTHON) --version) found. Use: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.release: deploy/release/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

install: $(VENV)/.dev $(VENV)/.release ## create .venv with everything development needs

tools: $(VENV)/.dev ## fetch kubectl and helm into .tools, for the tests that use them
	$(BIN)/python -m tests.kube.fetch_tools

demo: $(VENV)/.runtime ## serve a KVCluster on this machine under three strategies in turn and compare them
	$(BIN)/kvcluster compare examples/rag.yaml --workload rag \
	  --strategies cache_aware,round_robin,least_loaded --out $(DEMO_OUT)

docs: $(VENV)/.dev ## the documents as a site, in site/ (site/index.html opens without a server)
	$(BIN)/python -m deploy.docs.scripts
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test: lint $(VENV)/.release ## formatting, lint, types, import contract, and every test
	@$(MAKE) --no-print-directory --jobs=2 types suite

unit: $(VENV)/.dev ## the tests that start no processes and play no workloads (less than a minute)
	$(PYTEST) $(UNIT_JOBS) -m 'not process and not simulation and not envoy'

check: lint types ## ruff, mypy --strict, the import contract and oxlint

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/oxlint --quiet router/live/page

types: $(VENV)/.dev
	$(BIN)/mypy

suite: $(VENV)/.dev
	$(PYTEST) $(JOBS)

format: $(VENV)/.dev ## rewrite the code as ruff formats it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## micro-benchmarks of the index, the decision, the engine and the data path
	$(BIN)/python -m bench.micro.engine
	$(BIN)/python -m bench.micro.index
	$(BIN)/python -m bench.opponents

bench-perf: $(VENV)/.dev ## instructions of a request by stage (needs valgrind); CHECK=1 fails if one takes 10 % more than is committed
	$(BIN)/python -m bench.micro.request $(if $(CHECK),--check)

kind: ## a Kubernetes cluster in Docker with the controller and a KVCluster in it (needs docker, kind, kubectl, helm)
	deploy/kind/up.sh

kind-delete: ## remove that cluster
	deploy/kind/down.sh

dist: $(VENV)/.release ## build the files of a release into dist/: wheel, SBOM, chart (IMAGE=... DIGEST=... VERSION=...)
	deploy/release/build.sh $(RELEASE_VENV)/bin/python "$$IMAGE" "$$DIGEST" "$$VERSION" dist

clean: ## remove what the other targets made
	rm -rf $(VENV) .tools $(DEMO_OUT) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
