"""The command line of table-consulctl: its options, its exit statuses, and what becomes of an error.

Each command is a module of this package, imported when it is called, whose ``command`` is the click command.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import click
from msgspec.structs import replace

from table_consul import __version__, config
from table_consul.errors import ConfigError, TableConsulError, printable
from table_consul.services import SERVICES, Table

P = ParamSpec("P")
R = TypeVar("R")

NO = 1
"""Exit status of a command whose answer is no: not found, problems, differences."""
FAILED = 2
"""Exit status when there is no answer: a mistake on the command line or in the configuration, Consul away."""

# Wider lines are hard to read; narrower ones there are no words for.
HELP_COLUMNS = (30, 100)
ERROR_CHARACTERS = 2000
UNCUT = 1 << 30
"""For errors.printable: what was asked for is shown whole."""


class Module(NamedTuple):
    """Where a command is, and what the list of all commands says of it, so that the list imports none of them."""

    name: str
    summary: str


# In the order in which help lists them: how often they are wanted.
COMMANDS = {
    "query": Module("query", "Ask a table as smtpd does."),
    "lint": Module("lint", "Tell every problem of the data."),
    "import": Module("import_", "Fill a table from a file."),
    "export": Module("export", "Write a table to a file."),
    "status": Module("status", "Tell how the running tables are."),
    "policy": Module("policy", "Write the ACL policy that the tables need."),
}

EPILOG = f"""\
Without -c: {config.DEFAULT_PATH} if there is one, else defaults and the environment of the consul command
(CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, CONSUL_CACERT, ...).

Exit status: 0 as asked, 1 the answer is no (not found, problems, differences), 2 there is no answer.

What a command does, with examples: table-consulctl COMMAND --help
"""


class Commands(click.Group):
    """The commands, each imported when it is called."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"table_consul.ctl.{COMMANDS[name].name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, module.summary) for name, module in COMMANDS.items()])


SERVICE = click.Choice(tuple(SERVICES))
"""A service of smtpd's, as an argument of a command."""

as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
"""The option of a command whose output a program may want to read."""


def pass_config(function: Callable[Concatenate[config.Config, P], R]) -> Callable[P, R]:
    """Gives a command the configuration as its first argument; it is read then, so that help needs none.

    Raises:
        ConfigError: when the command is called; see config.load.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        given = click.get_current_context().find_root().obj
        loaded = given if isinstance(given, config.Config) else config.load(given, os.environ)
        return function(loaded, *args, **kwargs)

    return called


def chosen_tables(settings: config.Config, names: Sequence[str]) -> list[Table]:
    """The tables of these names; without any, those that have a section in the configuration.

    Raises:
        UsageError: it has none: smtpd.conf, which names the others, is not read here.
        ConfigError: there can be no table of such a name.
    """
    if names:
        return [settings.table(name) for name in dict.fromkeys(names)]
    if not settings.tables:
        raise click.UsageError("which TABLE, of those in smtpd.conf? The configuration has no [tables.NAME] to go by.")
    return list(settings.tables.values())


def as_writer(consul: config.ConsulConfig, token_file: str | None) -> config.ConsulConfig:
    """Consul as the person at the command line may use it, who may write what a mail server only reads.

    ``token_file`` comes first, then what the ``consul`` command takes from the environment, then the configured token.
    """
    path = token_file or os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    token = os.environ.get("CONSUL_HTTP_TOKEN")
    if path:  # a token file beats a token (consul: api/api.go, NewClient)
        return replace(consul, token=None, token_file=os.path.abspath(path))
    return replace(consul, token=token, token_file=None) if token else consul


def duration(seconds: float) -> str:
    """The time span in the largest unit of which there are two: ``90 s``, ``12 min``, ``5 h``, ``3 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


@click.group(
    "table-consulctl",
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-c", "--config", "path", metavar="CONFIG", help="The configuration of table-consul, a TOML file.")
@click.option("--debug", is_flag=True, help="Say what is logged at level debug, and where an unforeseen error arose.")
@click.version_option(__version__, "--version", message="table-consulctl %(version)s")
@click.pass_context
def program(context: click.Context, path: str | None, debug: bool) -> None:  # noqa: FBT001 - click's way
    """Ask, check, fill and watch the tables that table-consul serves."""
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.DEBUG if debug else logging.ERROR, stream=sys.stderr
    )
    context.obj = path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Whatever goes wrong is said in one line on standard error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error; a terminal may lack letters of a key
    try:
        status = program.main(given, prog_name="table-consulctl", standalone_mode=False, terminal_width=_columns() - 2)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except click.UsageError as error:
        with contextlib.suppress(OSError):
            error.show()
        return FAILED
    except click.ClickException as error:
        return _failed(error.format_message())
    except click.Abort:  # ^C, or the end of input at a question
        return _failed("broken off")
    except (BrokenPipeError, SystemExit) as error:
        # The latter is how click ends at the former, whose reader has seen enough, and, with 0, after completion.
        _silence()
        return 0 if isinstance(error, SystemExit) and error.code == 0 else FAILED
    except ConfigError as error:
        return _failed(error, *getattr(error, "__notes__", ()))
    except TableConsulError as error:
        _silence()
        return _failed(error)
    except OSError as error:
        _silence()
        what = (error.strerror or str(error)).lower()
        return _failed(what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}")
    except Exception as error:  # noqa: BLE001 - an operator is helped by a line, and we by the rest of it
        if "--debug" in given:
            traceback.print_exc()
        return _failed(f"unforeseen: {type(error).__name__}: {error} (please report this, with what --debug says)")
    return status if isinstance(status, int) else 0


def _columns() -> int:
    """How wide help may be. By itself click takes no terminal for narrower than 50 columns."""
    least, most = HELP_COLUMNS
    return max(least, min(shutil.get_terminal_size().columns, most))


def _silence() -> None:
    """Where standard output takes no more, drop what is left for it: Python would complain about that when it ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(*lines: object) -> int:
    with contextlib.suppress(OSError):  # standard error takes no more; the status still tells
        for line in lines:
            click.echo(f"table-consulctl: {printable(str(line), ERROR_CHARACTERS)}", err=True)
    return FAILED
