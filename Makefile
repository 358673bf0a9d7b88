# Everything is installed into .venv; pip's usual settings (environment, configuration files) apply.
#   make demo PYTHON=python3.12          another interpreter
#   make demo PIP_ARGS="--find-links …"  further options for pip install, such as an index of CPU builds of torch

.DEFAULT_GOAL := help
SHELL := /bin/sh
.SUFFIXES:
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= $(shell expr 1 + $$(nproc))
ENDURANCE_ARGS ?=
SLURM_TEST_ARGS ?=
BENCH_ARGS ?=
MINUTES ?= 2
SOAK_ARGS ?=
STORM_ARGS ?=
FUZZ_ARGS ?=
MUTANTS_ARGS ?=
LOWEST_ARGS ?=
PYTHONS_ARGS ?=
SEEDS ?= 10000
SIMULATE_ARGS ?=
MODEL_ARGS ?=
JOBS ?= 200
KILLS ?= 10
LEASES ?= 2000000
STRESS_ARGS ?=
SECONDS ?= 60
FLOOD_ARGS ?=
JOBS_ARGS ?=

BIN := .venv/bin
# One more than there are cores keeps them busy. A few tests are sent at a time, as some take a hundred times as long as
# others.
PARALLEL := -n $(WORKERS) --maxschedchunk 4
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

.PHONY: help demo grpo check test test-slurm lint format bench bench-peers exchange simulate model soak storm stress flood fuzz jobs chain endurance devmode mutants mutmut lowest pythons integrations wheel clean docs

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: .venv/demo.stamp ## CartPole, learnt over dray by four processes on this machine; ends by itself when solved
	$(BIN)/dray run examples/cartpole/job.toml

grpo: .venv/demo.stamp ## a tiny transformer learns to sort digits by GRPO, rewards its only signal
	$(BIN)/dray run examples/grpo/job.toml

check: .venv/dev.stamp ## the quick tests: unit, property, contract
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/property tests/contract

test: .venv/dev.stamp ## every test but the long ones, with coverage (PYTEST_ARGS="-k name": some, one after the other)
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),$(PARALLEL) --durations=20 --cov --cov-report=)

exchange: .venv/dev.stamp ## contract and transport tests where the kernel refuses what direct leases need (PYTEST_ARGS)
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),$(PARALLEL)) --forbid membarrier tests/contract tests/unit/transport
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),$(PARALLEL)) --forbid pidfd_open --ignore tests/contract/test_redis_servers.py \
	  tests/contract tests/unit/transport

test-slurm: .venv/dev.stamp ## a Slurm of three virtual nodes, and all that dray does on one (SLURM_TEST_ARGS)
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm $(SLURM_TEST_ARGS)

lint: .venv/dev.stamp ## ruff, mypy, import-linter, codespell, and the words that the glossary does not allow
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python -m codespell_lib
	$(BIN)/python tests/words.py

format: .venv/dev.stamp ## let ruff put the code into shape
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: .venv/dev.stamp ## dray beside its limits and beside what people use instead: tables, outputs/benchmark.json
	$(BIN)/python -m benchmarks --json outputs/benchmark.json --plot outputs/benchmark.png $(BENCH_ARGS)

bench-peers: .venv/dev.stamp ## environments for what people use instead, in the user's cache; once
	$(BIN)/python -m benchmarks --install-peers

simulate: .venv/dev.stamp ## the data plane over simulated sockets and time, a seed for each run (SEEDS=10000, SIMULATE_ARGS)
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds $(SEEDS) $(SIMULATE_ARGS)

model: .venv/dev.stamp ## every interleaving of small scenarios of direct leases, and planted defects (MODEL_ARGS="--list")
	PYTHONPATH=tests $(BIN)/python -m model $(MODEL_ARGS)

soak: .venv/dev.stamp ## producers and consumers under random faults (MINUTES=2): a table, and outputs/soak.json
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(MINUTES) --json outputs/soak.json $(SOAK_ARGS)

storm: .venv/dev.stamp ## streams whose processes are killed, stopped and started at random (MINUTES=2, STORM_ARGS): outputs/streams.json
	PYTHONPATH=tests $(BIN)/python -m soak.streams --minutes $(MINUTES) --json outputs/streams.json $(STORM_ARGS)

stress: .venv/dev.stamp ## direct leases against a ring that wraps all the time, under faults (LEASES=2000000, STRESS_ARGS)
	PYTHONPATH=tests $(BIN)/python -m stress --leases $(LEASES) --json outputs/stress.json $(STRESS_ARGS)

flood: .venv/dev.stamp ## CartPole while strangers connect to all that listens (SECONDS=60, FLOOD_ARGS): outputs/flood.json
	PYTHONPATH=tests $(BIN)/python -m soak.flood --seconds $(SECONDS) --json outputs/flood.json $(FLOOD_ARGS)

fuzz: .venv/fuzz.stamp ## parsers and sessions against inputs that follow the code's branches (MINUTES=2, FUZZ_ARGS)
	$(BIN)/python tests/fuzz/fuzzer.py --minutes $(MINUTES) $(FUZZ_ARGS)

jobs: .venv/dev.stamp ## short jobs in a row, a replica killed in half of them (JOBS=200, JOBS_ARGS="--seed 7")
	PYTHONPATH=tests $(BIN)/python tests/process/job_series.py --jobs $(JOBS) $(JOBS_ARGS)

chain: .venv/dev.stamp ## one job that is killed and resumed repeatedly (KILLS=10, CHAIN_ARGS="--seed 7")
	PYTHONPATH=tests $(BIN)/python tests/process/job_chain.py --kills $(KILLS) $(CHAIN_ARGS)

endurance: .venv/dev.stamp ## the long tests, CartPole over ten other seeds and GRPO over five among them
	$(BIN)/python -m pytest -m endurance $(ENDURANCE_ARGS)

devmode: .venv/dev.stamp ## every test in Python's development mode: warnings and leaks are errors (PYTEST_ARGS as in test)
	PYTHONDEVMODE=1 PYTHONFAULTHANDLER=1 $(BIN)/python -bb -m pytest $(PYTEST_ARGS)

mutants: .venv/dev.stamp ## plant known defects, one at a time: the model or the simulation finds each (MUTANTS_ARGS)
	$(BIN)/python tests/mutants $(MUTANTS_ARGS)

mutmut: .venv/dev.stamp ## mutate the code of slots and sessions: what no test notices is explained
	@$(PIP_INSTALL) 'mutmut>=3.8,<4'
	$(BIN)/python tests/mutants/mutation.py

lowest: .venv/dev.stamp ## the lowest versions that pyproject.toml declares, installed elsewhere: unit tests and jobs (LOWEST_ARGS)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/lowest_versions.py $(LOWEST_ARGS)

pythons: .venv/dev.stamp ## the quick tests with each Python that is found, 3.11 to 3.14, and a table (PYTHONS_ARGS="--python 3.13")
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/pythons.py $(PYTHONS_ARGS)

integrations: .venv/dev.stamp ## dray behind the frameworks it integrates with, each installed in the user's cache: a table (INTEGRATIONS_ARGS=ray)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/integrations/run.py $(INTEGRATIONS_ARGS)

wheel: .venv/dev.stamp ## the source distribution and the wheel, in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

docs: .venv/dev.stamp ## the pages of docs/ and the API as HTML in site/, every hyperlink checked
	$(BIN)/python tests/docs_site.py

clean: ## remove .venv, caches and build products; outputs/ stays
	rm -rf .venv build dist site htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dray needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)."; \
	  echo "Name another one: make PYTHON=python3.11 …"; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv || { \
	  echo "This Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

.venv/demo.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "installing dray and what the demo needs into .venv (the first time takes minutes)"
	@$(PIP_INSTALL) --editable '.[demo]'
	@touch $@

.venv/dev.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "installing dray, the demo and the development tools into .venv (the first time takes minutes)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch .venv/demo.stamp $@

.venv/fuzz.stamp: .venv/dev.stamp
	@$(PIP_INSTALL) --editable '.[fuzz]'
	@touch $@
