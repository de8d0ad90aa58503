# Targets for whoever works on table-consul, and for `make install`; `make help` lists them.
.POSIX:
.PHONY: help demo test lint cover chaos bench install clean

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

# Where smtpd looks for its tables: /usr/libexec/opensmtpd on Debian; OpenBSD /usr/local/libexec/smtpd, FreeBSD
# /usr/local/libexec/opensmtpd, Alpine /usr/lib/opensmtpd.
PREFIX = /usr/local
LIBEXECDIR = /usr/libexec/opensmtpd
APPDIR = $(PREFIX)/lib/table-consul
EXTRAS = metrics

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 16

$(VENV)/.stamp: pyproject.toml table_consul/__init__.py
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
	    apt-get install -q -y python3-venv; } || { echo 'needs python3-venv: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[metrics,regex]' --group dev
	-$(BIN)/python -m pip install --quiet --editable '.[auth]' # from Python 3.13 on this needs a C compiler
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
	bench/build/venv/bin/python -m pip install --quiet '.[regex]'
	$(BIN)/python -m bench.bench --program bench/build/venv/bin/table-consul $(ARGS)

install: ## the programs where smtpd looks for them (DESTDIR, PREFIX, LIBEXECDIR)
	$(PYTHON) -m venv build/installer
	build/installer/bin/python -m pip install --quiet --upgrade --target '$(DESTDIR)$(APPDIR)' '.[$(EXTRAS)]'
	rm -rf '$(DESTDIR)$(APPDIR)/bin'
	mkdir -p '$(DESTDIR)$(LIBEXECDIR)'
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)') && \
	for each in table-consul:cli table-procexec:procexec; do \
	    program='$(DESTDIR)$(LIBEXECDIR)'/$${each%:*}; \
	    printf '#!%s -I\nimport sys\nsys.path.insert(0, "%s")\nfrom table_consul.%s import main\nsys.exit(main())\n' \
	        "$$python" '$(APPDIR)' "$${each#*:}" >"$$program.new" && \
	    chmod 755 "$$program.new" && mv "$$program.new" "$$program" || exit 1; \
	done

clean: ## remove what the other targets made
	rm -rf $(VENV) dist build bench/build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
