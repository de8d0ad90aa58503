"""The command line of table-consul, for smtpd and for a person who wants help or `--check`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from table_consul import __version__, config
from table_consul.errors import ConfigError
from table_consul.log import start as start_log
from table_consul.server import Server, claim_stdio
from table_consul.tables import Tables

if TYPE_CHECKING:
    import argparse

    from table_consul.metrics import Exporter

DESCRIPTION = """\
OpenSMTPD starts table-consul to look up aliases, users and domains in Consul:
the key <prefix>/<table>/<service>/<key> holds the value. In smtpd.conf:

    table aliases consul
    action "local" maildir alias <aliases>
"""

EPILOG = f"""\
Without CONFIG, {config.DEFAULT_PATH} is read if it exists. The
environment of the consul command (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, ...)
applies where the file sets nothing. In smtpd.conf: table aliases consul:/PATH

To look up a key as smtpd does: table-consulctl query aliases alias root
"""


def _parser() -> argparse.ArgumentParser:
    import argparse

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("table-consul", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="the configuration, a TOML file")
    check_help = "check the configuration and the files it names; exit 0 or 2"
    parser.add_argument("--check", action="store_true", help=check_help)
    parser.add_argument("--version", action="version", version=f"table-consul {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, or 2 for a mistake in the command line or the configuration."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    path = words[0] if words else None
    if len(words) > 1 or (path is not None and not path.startswith("/")):  # a person: smtpd passes at most one path
        options = _parser().parse_args(words)
        path = options.config
        if options.check:
            return check(path)
    if os.isatty(0):
        return _print_help()
    return serve(path)


def check(path: str | None) -> int:
    """Print the problems of the configuration and return the exit status, 0 or 2."""
    from table_consul.check import check_files

    try:
        loaded = config.load(path, os.environ)
        lines = check_files(loaded)
    except ConfigError as error:
        lines = [str(error), *getattr(error, "__notes__", [])]
    sys.stderr.writelines(f"{line}\n" for line in lines)
    if not lines:
        sys.stdout.write(f"{loaded.path or loaded.summary}: ok\n")
    return 2 if lines else 0


def serve(path: str | None) -> int:
    """Answer smtpd until it closes the conversation and return the exit status, 2 if it sent nothing."""
    read_from, write_to = claim_stdio()
    environ = dict(os.environ)
    for variable in environ:
        if variable.startswith("CONSUL_"):  # a library must not use it as its own configuration
            del os.environ[variable]
    exporter: Exporter | None = None
    table_name = ""

    def load() -> config.Config:
        loaded = config.load(path, environ)
        start_log(loaded.log.level, loaded.log.target, table_name)
        if table_name:
            report(loaded)
        return loaded

    def on_table_name(name: str) -> None:
        nonlocal table_name
        table_name = name
        settings = tables.config.log if tables.config else config.LogConfig()
        start_log(settings.level, settings.target, name)
        if tables.config is not None:
            report(tables.config)

    def report(loaded: config.Config) -> None:
        logging.getLogger("table_consul").info("configuration: %s", loaded.summary)

    def on_change() -> None:
        nonlocal exporter
        if exporter is not None and exporter.is_alive():
            exporter.changed.set()
        elif tables.config is not None and tables.config.metrics != config.MetricsConfig():
            from table_consul.metrics import Exporter

            exporter = Exporter(tables.table(tables.name or "").name, tables)
            exporter.start()

    tables = Tables(load, on_change)
    if tables.broken is not None:
        on_table_name("")
        hint = "returning errors until it is fixed (then run: smtpctl update table NAME)"
        logging.getLogger("table_consul").error("%s; %s", tables.broken, hint)
    server = Server(tables, on_table_name, counters=tables.counters, procexec_reply=tables.procexec_reply)
    return 0 if server.serve(read_from, write_to) else _print_help()


def _print_help() -> int:
    if sys.stderr is not None:  # the parent may have closed it; argparse would use stdout instead
        _parser().print_help(sys.stderr)
    return 2
