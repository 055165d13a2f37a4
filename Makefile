SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := libs/common libs/sim services/ingress services/scheduler services/discovery services/mirror libs/cli
STAMP := $(VENV)/.synced
ARGS ?=

# What a benchmark measures is what images run: machine code, where there is a C compiler.
BENCHES := bench bench-discovery bench-limits bench-mirror bench-pd bench-replicas bench-scheduler bench-traces

.PHONY: help sync up test unit integration soak lint types contracts check compile compiled machine-code $(BENCHES) fmt docs

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

sync: $(STAMP) ## set up .venv with every package and the tools, nothing else

$(STAMP): constraints.txt requirements-dev.txt $(PACKAGES:%=%/pyproject.toml)
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 or newer is needed: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian, apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt $(PACKAGES:%=-e %)
	@touch $@

up: sync ## start the whole stack with simulated engines (ARGS="--sim 4 --port 9000")
	@exec $(BIN)/penstock up $(ARGS)

test: unit integration ## every test: unit, contract, integration with real servers

unit: sync ## tests of the packages
	$(BIN)/pytest -n 2 libs services tests/fuzz tests/deploy $(ARGS)

integration: sync ## services as processes, real servers
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder tests/integration $(ARGS)

soak: sync ## outages for a minute each, then at random for a minute (PENSTOCK_SOAK_SECONDS=600 PENSTOCK_SEED=1)
	PENSTOCK_SOAK_SECONDS=$${PENSTOCK_SOAK_SECONDS:-60} $(BIN)/pytest -s --timeout 0 tests/soak tests/deploy/test_images.py tests/integration/test_failures.py tests/integration/test_outages.py tests/integration/test_scaling.py tests/integration/test_etcd_failover.py tests/integration/test_leaks.py tests/integration/test_limits.py tests/integration/test_limit_stores.py tests/integration/test_disaggregation.py $(ARGS)

lint: sync ## style, the one place for subjects, no stray __init__.py, generated docs in step
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_tree.py
	$(BIN)/python -m penstock.cli.docs --check

types: sync ## mypy, strict
	$(BIN)/mypy libs services tests

contracts: sync ## the arrows between packages
	$(BIN)/lint-imports

check: lint types contracts unit ## what a change must pass before review

compile: sync ## the ingress's data path and what the scheduler decides by as machine code, for their next start (needs a C compiler)
	@$(BIN)/python services/ingress/compile.py
	@$(BIN)/python services/scheduler/compile.py

machine-code: sync
	-@$(BIN)/python services/ingress/compile.py
	-@$(BIN)/python services/scheduler/compile.py

compiled: compile ## the tests of ingress and scheduler on machine code
	$(BIN)/python -m penstock.common.machine_code penstock.ingress pytest services/ingress $(ARGS)
	$(BIN)/python -m penstock.common.machine_code penstock.scheduler pytest services/scheduler $(ARGS)

bench: machine-code ## the gateway beside nginx, CPU per request (ARGS="--quick", PEERS=1 for other routers)
	$(BIN)/python -m penstock.cli.bench $(ARGS)

bench-discovery: sync ## what discovery costs with 2,000 engines, and how soon a change in each store counts (ARGS="--source etcd")
	PYTHONPATH=tests $(BIN)/python -m discovery_bench $(ARGS)

bench-mirror: machine-code ## what clients notice of the mirror, off, on and in trouble (ARGS="--rate 200 --rounds 3")
	PYTHONPATH=tests $(BIN)/python -m mirror_bench $(ARGS)

bench-pd: machine-code ## pairs of prefill and decode against neutral instances, and what the gateway adds (ARGS="--trace FILE --no-live")
	PYTHONPATH=tests $(BIN)/python -m pd_bench $(ARGS)

bench-replicas: machine-code ## schedulers over the bus, and sessions through 8 ingress workers and 32 engines (ARGS="--no-bus")
	PYTHONPATH=tests $(BIN)/python -m replica_bench $(ARGS)

bench-limits: machine-code ## what limits and API keys cost a request, by store (ARGS="--rounds 7 --only off+nats")
	PYTHONPATH=tests $(BIN)/python -m limits_bench $(ARGS)

bench-scheduler: machine-code ## decisions a second of a scheduler in one process (ARGS="--help")
	$(BIN)/python -m penstock.common.machine_code penstock.scheduler penstock.scheduler.bench $(ARGS)

bench-traces: machine-code ## what traces cost a request, off and at 1 % (ARGS="--rounds 30 --percent 1,100")
	PYTHONPATH=tests $(BIN)/python -m trace_bench $(ARGS)

docs: sync ## write the generated tables in docs/
	$(BIN)/python -m penstock.cli.docs

fmt: sync ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
