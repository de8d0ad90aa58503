# Targets for whoever works on table-consul, and for `make install`; `make help` lists them.
.POSIX:
.PHONY: help demo test lint cover wheel chaos bench install clean

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 16

$(VENV)/.stamp: pyproject.toml table_consul/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[metrics,regex]' --group dev
	touch $@

demo: $(VENV)/.stamp ## mail to root follows a key in Consul, before your eyes
	$(BIN)/python -m tests.rig.demo

test: $(VENV)/.stamp ## all tests, with a real Consul and real OpenSMTPDs where that is possible
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.stamp ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cover: $(VENV)/.stamp ## the tests that need no root, with branch coverage
	$(BIN)/python -m pytest -m 'not real' --cov --cov-report=term-missing:skip-covered $(ARGS)

chaos: $(VENV)/.stamp ## the long version of tests/chaos: a cluster of three that loses its members
	TABLE_CONSUL_CHAOS=long $(BIN)/python -m pytest -s tests/chaos $(ARGS)

bench: $(VENV)/.stamp ## speed and memory, as ratios to reference children
	$(PYTHON) -m venv --clear bench/build/venv
	bench/build/venv/bin/python -m pip install --quiet .
	$(BIN)/python -m bench.bench --program bench/build/venv/bin/table-consul $(ARGS)

clean: ## remove what the other targets made
	rm -rf $(VENV) dist build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache bench/build
