# Targets for development, and `make install`; `make help` lists them.
.POSIX:
.PHONY: help demo test quick lint cover chaos bench dist deb image release install install-files uninstall clean venv

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

# The folder where smtpd looks for its tables: Debian /usr/libexec/opensmtpd, OpenBSD /usr/local/libexec/smtpd, FreeBSD
# /usr/local/libexec/opensmtpd, Alpine /usr/lib/opensmtpd. Manual pages of OpenBSD are in /usr/local/man.
PREFIX = /usr/local
LIBEXECDIR = /usr/libexec/opensmtpd
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man
APPDIR = $(PREFIX)/lib/table-consul
EXAMPLESDIR = $(PREFIX)/share/doc/table-consul/examples
BASHDIR = $(PREFIX)/share/bash-completion/completions
ZSHDIR = $(PREFIX)/share/zsh/site-functions
FISHDIR = $(PREFIX)/share/fish/vendor_completions.d
EXTRAS = metrics
# A folder of wheels to install from, without a network.
WHEELS =

# One worker for each processor, up to four; WORKERS=0 runs one test after the other and prints each result immediately.
WORKERS = auto
# Tests start hundreds of processes: each would compile the package, and unbuffered output hides failures to write.
PYTEST = PYTHONDONTWRITEBYTECODE= PYTHONUNBUFFERED= $(BIN)/python -m pytest
PARALLEL = -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# DESTDIR, for packages, prefixes each path that is written to, but appears in no file. APPDIR contains the package.
APP = $(DESTDIR)$(APPDIR)
LIBEXEC = $(DESTDIR)$(LIBEXECDIR)
SBIN = $(DESTDIR)$(SBINDIR)
MAN = $(DESTDIR)$(MANDIR)
EXAMPLES = $(DESTDIR)$(EXAMPLESDIR)
BASHCOMP = $(DESTDIR)$(BASHDIR)
ZSHCOMP = $(DESTDIR)$(ZSHDIR)
FISHCOMP = $(DESTDIR)$(FISHDIR)

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 16

venv:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y python3-venv; } || \
	    { echo 'python3-venv is missing: apt-get install python3-venv'; exit 1; }

$(VENV)/.stamp: pyproject.toml table_consul/__init__.py
	@$(MAKE) venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[metrics,regex]' --group dev
	@$(BIN)/python -m pip install --quiet --editable '.[auth]' >$(VENV)/auth.log 2>&1 || \
	    echo 'the service auth is missing: crypt-r needs a C compiler (see $(VENV)/auth.log)'
	touch $@

demo: $(VENV)/.stamp ## show mail to root follow a key in Consul
	$(BIN)/python -m tests.rig.demo

test: $(VENV)/.stamp ## run all tests, with a real Consul and real OpenSMTPDs if possible
	$(PYTEST) $(PARALLEL) $(ARGS)

quick: $(VENV)/.stamp ## run the tests that need neither root nor network, with one version of Consul
	@# Six workers, because these tests wait more than they compute.
	$(PYTEST) $(PARALLEL) -n "$$([ '$(WORKERS)' = auto ] && echo 6 || echo '$(WORKERS)')" --maxprocesses 6 \
	    -m 'not real and not slow' -k 'not 1.8.7 and not 1.21.5 and not 1.22.4' --hypothesis-profile=quick $(ARGS)

lint: $(VENV)/.stamp ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cover: $(VENV)/.stamp ## run the tests that need no root, with branch coverage
	$(PYTEST) $(PARALLEL) -m 'not real' --cov --cov-report=term-missing:skip-covered $(ARGS)

chaos: $(VENV)/.stamp ## run the long version of tests/chaos: a cluster of three that loses its members
	TABLE_CONSUL_CHAOS=long $(BIN)/python -m pytest -s tests/chaos $(ARGS)

bench: $(VENV)/.stamp ## measure speed and memory, as ratios to reference child processes
	$(PYTHON) -m venv --clear bench/build/venv
	bench/build/venv/bin/python -m pip install --quiet '.[regex]'
	$(BIN)/python -m bench.bench --program bench/build/venv/bin/table-consul $(ARGS)

deb: $(VENV)/.stamp ## build the Debian package in dist/, in a clean root of Debian 13 (as root, needs mmdebstrap)
	mkdir -p dist
	$(BIN)/python -m tests.rig.deb dist

image: $(VENV)/.stamp ## build the container image as an OCI archive in dist/ (as root, needs buildah)
	mkdir -p dist
	$(BIN)/python -m tests.rig.image dist

release: dist ## build sdist, wheel, Debian package, image and their checksums in dist/, reproducibly
	$(MAKE) deb
	$(MAKE) image
	cd dist && sha256sum *.tar* *.whl *.deb >SHA256SUMS

dist: $(VENV)/.stamp ## build the sdist and the wheel in dist/, reproducibly
	rm -rf dist
	$(BIN)/python -m build --no-isolation .
	$(BIN)/twine check --strict dist/*

# The new package is built beside the old one and then replaces it, when it is on disk: a renamed file may be empty after
# a power failure. Restart smtpd afterwards: a running table imports parts of the package when it first needs them.
install: ## install the programs, pages and examples (DESTDIR, PREFIX, LIBEXECDIR, EXTRAS; WHEELS=DIR: no network)
	@case '$(APPDIR)' in */table-consul) ;; *) \
	    echo 'APPDIR: must end with /table-consul, because the whole folder is replaced'; exit 1;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is required: set PYTHON")'
	if [ ! -e '$(APP)' ] && [ -e '$(APP).old' ]; then mv '$(APP).old' '$(APP)'; fi # was interrupted
	rm -rf '$(APP).new' '$(APP).old'
	umask 022 && mkdir -p '$(APP).new' && \
	    $(PYTHON) -I contrib/install/dependencies.py '$(APP).new' '$(EXTRAS)' '$(WHEELS)' && \
	    rm -rf '$(APP).new/bin' '$(APP).new/share' && cp -R table_consul '$(APP).new' && \
	    find '$(APP).new/table_consul' -name __pycache__ -prune -exec rm -r {} + && \
	    $(PYTHON) -m compileall -q -s '$(APP).new' -p '$(APPDIR)' '$(APP).new/table_consul'
	chmod -R u=rwX,go=rX '$(APP).new'
	sync
	if [ -e '$(APP)' ]; then mv '$(APP)' '$(APP).old'; fi
	mv '$(APP).new' '$(APP)'
	rm -rf '$(APP).old'
	@$(MAKE) install-files
	@echo 'Installed. Restart smtpd if it runs table-consul already.'

# Everything but the Python package. For packages of other systems: APPDIR= if Python finds table_consul without it.
install-files:
	umask 022 && mkdir -p '$(LIBEXEC)' '$(SBIN)' '$(MAN)/man5' '$(MAN)/man8'
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)') && umask 022 && appdir='$(APPDIR)' && \
	install_program() { \
	    { printf '#!%s -I\n' "$$python" && cat; } >"$$1.new" && chmod 755 "$$1.new" && sync && mv "$$1.new" "$$1"; \
	} && \
	path="$${appdir:+sys.path.insert(0, \"$$appdir\")}" && \
	for module in cli:table-consul procexec:table-procexec; do \
	    { cat table_consul/fallback.py && printf '\n\n%s\nsys.exit(run("table_consul.%s"))\n' "$$path" "$${module%:*}"; } | \
	        install_program '$(LIBEXEC)'/"$${module#*:}" || exit 1; \
	done && \
	printf 'import sys\n\n%s\nfrom table_consul.ctl.main import main\n\nsys.exit(main())\n' "$$path" | \
	    install_program '$(SBIN)/table-consulctl'
	for page in man/*.[58]; do \
	    target="$(MAN)/man$${page##*.}/$${page#man/}" && cp "$$page" "$$target" && chmod 644 "$$target" || exit 1; \
	done
	umask 022 && complete() { \
	    mkdir -p "$$2" && PYTHONPATH='$(APP)' _TABLE_CONSULCTL_COMPLETE=$${1}_source $(PYTHON) -B -c \
	        'import sys; from table_consul.ctl.main import main; sys.exit(main())' >"$$2/$$3"; \
	} && \
	complete bash '$(BASHCOMP)' table-consulctl && complete zsh '$(ZSHCOMP)' _table-consulctl && \
	    complete fish '$(FISHCOMP)' table-consulctl.fish
	umask 022 && rm -rf '$(EXAMPLES)' && mkdir -p '$(EXAMPLES)' && \
	    cp -R contrib/*.example contrib/*.py contrib/grafana contrib/policies contrib/prometheus contrib/terraform \
	        '$(EXAMPLES)' && chmod -R u=rwX,go=rX '$(EXAMPLES)'

uninstall: ## remove what install installed (with the same variables), but no configuration or data
	case '$(APPDIR)' in */table-consul) rm -rf '$(APP)' '$(APP).new' '$(APP).old';; esac
	rm -f '$(LIBEXEC)/table-consul' '$(LIBEXEC)/table-procexec' '$(SBIN)/table-consulctl'
	for page in man/*.[58]; do rm -f "$(MAN)/man$${page##*.}/$${page#man/}"; done
	rm -f '$(BASHCOMP)/table-consulctl' '$(ZSHCOMP)/_table-consulctl' '$(FISHCOMP)/table-consulctl.fish'
	rm -rf '$(EXAMPLES)'
	rmdir '$(DESTDIR)$(PREFIX)/share/doc/table-consul' 2>/dev/null || true

clean: ## remove the files of the other targets
	rm -rf $(VENV) dist build bench/build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
