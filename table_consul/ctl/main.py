"""The command line of table-consulctl: options, exit statuses, and how errors and problems are printed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import shlex
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TextIO

import click
from msgspec.structs import replace

from table_consul import __version__, config
from table_consul.errors import TableConsulError, printable, problem_of
from table_consul.services import SERVICES, Table

NO = 1
"""Exit status of a command whose answer is no: not found, problems, differences."""
FAILED = 2
"""Exit status of a failure: an error on the command line or in the configuration, or Consul is unreachable."""
NAGIOS_UNKNOWN = 3
"""That of a Nagios plugin, whose 2 is CRITICAL."""
PATIENCE_SECONDS = 1.0
"""Work that takes longer is shown on a terminal."""
UNCUT = 1 << 30
"""The limit of `errors.printable` for data that is printed whole."""

# Module and summary of each command, the most used first: help imports no command.
COMMANDS = {
    "query": ("query", "Look up keys as smtpd does."),
    "lint": ("lint", "Check the data of a table."),
    "import": ("import_", "Fill a table from a file."),
    "export": ("export", "Write a table to a file."),
    "set": ("set_", "Write one entry."),
    "unset": ("unset", "Remove entries."),
    "edit": ("edit", "Edit the entries of a table."),
    "passwd": ("passwd", "Set the password of a user."),
    "undo": ("undo", "Restore the entries that a write replaced."),
    "expand": ("expand", "Show who gets the mail to an address."),
    "status": ("status", "Show the state of the running tables."),
    "accept": ("accept", "Accept held deletions."),
    "check": ("check", "Check everything between smtpd and Consul."),
    "policy": ("policy", "Print the ACL policy that the tables need."),
}

_ARGUMENTS = "table_consul.arguments"


class Commands(click.Group):
    """The commands, each imported when it is called."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        context.meta[_ARGUMENTS] = [*arguments]
        return super().parse_args(context, arguments)

    def get_help_option(self, context: click.Context) -> click.Option | None:
        """The option --help, which its own output does not list: it fits 24 lines."""
        option = super().get_help_option(context)
        if option is not None:
            option.hidden = True
        return option

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"table_consul.ctl.{COMMANDS[name][0]}").command
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


SERVICE = click.Choice(tuple(SERVICES))
FILE = click.Path(readable=False)
"""Makes the shell complete names of files; the file itself is checked where it is opened."""
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


def _choose_config(context: click.Context, _option: click.Parameter, path: str | None) -> None:
    if path is not None:
        context.find_root().obj = path


# -c may also follow the command.
late_config = click.option("-c", "--config", type=FILE, hidden=True, expose_value=False, callback=_choose_config)


def pass_config(function: Callable[..., int]) -> Callable[..., int]:
    """Pass the configuration to a command as its first argument. It is read when the command runs, not for help."""

    @late_config
    @functools.wraps(function)
    def called(**arguments: Any) -> int:  # noqa: ANN401 - those of the command
        return function(load_config(click.get_current_context().find_root().obj), **arguments)

    return called


def load_config(path: str | None) -> config.Config:
    """The configuration from the file and the environment.

    Raises:
        ConfigError: as `config.load`.
    """
    return config.load(path, os.environ)


def chosen_tables(settings: config.Config, names: Sequence[str]) -> list[Table]:
    """The tables with these names; without names, those that have a section in the configuration.

    Raises:
        UsageError: no names are given, and the configuration has no sections.
        ConfigError: a name is not a valid table name.
    """
    if not names and not settings.tables:
        raise click.UsageError(
            "missing TABLE: the configuration has no [tables.NAME] section, so name a table from smtpd.conf"
        )
    return [settings.table(name) for name in dict.fromkeys(names or settings.tables)]


def as_writer(consul: config.ConsulConfig, token_file: str | None) -> config.ConsulConfig:
    """The Consul settings with the token of ``token_file``, the environment or the configuration, in this order."""
    path, token = token_file or os.environ.get("CONSUL_HTTP_TOKEN_FILE"), os.environ.get("CONSUL_HTTP_TOKEN")
    if path:  # a token file takes precedence over a token (consul: api/api.go, NewClient)
        return replace(consul, token=None, token_file=os.path.abspath(path))
    return replace(consul, token=token, token_file=None) if token else consul


def command_line() -> str:
    """The command that runs, as a shell takes it."""
    # An argument need not be UTF-8, but the saves of undo are.
    return json_text(os.fsencode(shlex.join(["table-consulctl", *click.get_current_context().meta[_ARGUMENTS]])))


def editor() -> str:
    """The command of the operator's editor, which may have arguments."""
    chosen = (os.environ.get(name, "").strip() for name in ("VISUAL", "EDITOR"))
    return next(filter(None, chosen), "vi")


def operator() -> str:
    """The user who runs the command, and the one behind sudo."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid {os.getuid()}"
    sudo_user = os.environ.get("SUDO_USER")
    return f"{sudo_user} as {user}" if sudo_user else user


def json_text(data: bytes) -> str:
    """The bytes as text for JSON, with escapes for bytes that are not UTF-8."""
    return data.decode("utf-8", "backslashreplace")


def duration(seconds: float) -> str:
    """The time span in the largest unit of which there are at least two: ``90 s``, ``12 min``, ``5 h``, ``3 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; it is None if the parent process has closed it."""
    return stream is not None and stream.isatty()


def standard_input() -> BinaryIO:
    """Standard input in bytes.

    Raises:
        TableConsulError: the parent process has closed it.
    """
    if sys.stdin is None:
        raise TableConsulError("standard input: closed")
    return sys.stdin.buffer


@contextlib.contextmanager
def patience(text: str) -> Iterator[None]:
    """Print the text to a terminal if the block takes longer than `PATIENCE_SECONDS`."""
    if not is_terminal(sys.stderr):
        yield
        return
    timer = threading.Timer(PATIENCE_SECONDS, lambda: click.secho(f"{text} ...", dim=True, err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def terminal_columns() -> int:
    """The width to wrap text at: that of the terminal, but at least 40 and at most 100."""
    return max(40, min(shutil.get_terminal_size().columns, 100))


def echo_problems(problems: Sequence[tuple[str, str]], *, limit: int | None = None, err: bool = True) -> None:
    """Print each problem as ``WHERE: WHAT``, one line each; on a terminal WHAT is wrapped below WHERE.

    Beyond ``limit`` only the number of problems is printed. ``err`` prints to standard error, else standard output.
    """
    stream = sys.stderr if err else sys.stdout
    columns = terminal_columns() if is_terminal(stream) else 0
    for where, what in problems[:limit]:
        if columns:
            click.secho(where, bold=True, err=err)
        click.echo(click.wrap_text(what, columns, "    ", "    ") if columns else f"{where}: {what}", err=err)
    if limit is not None and len(problems) > limit:
        click.echo(f"... and {len(problems) - limit} more", err=err)


@click.group(
    "table-consulctl",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,  # else click exits with 0 up to 8.1, and with 2 from 8.2 on
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.option("-c", "--config", "path", type=FILE, metavar="CONFIG", help=f"Read CONFIG, not {config.DEFAULT_PATH}.")
@click.option("--debug", is_flag=True, help="Log at level debug, with tracebacks of internal errors.")
@click.version_option(__version__, "--version", message="table-consulctl %(version)s")
@click.pass_context
def program(context: click.Context, path: str | None, debug: bool) -> None:  # noqa: FBT001 - click's way
    """Query, check, fill and monitor the tables that table-consul serves."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(FAILED)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.DEBUG if debug else logging.ERROR)
    context.obj = path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Every error becomes one line on standard error."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error: the terminal may lack letters of a key
        sys.stdout.reconfigure(errors="backslashreplace")
    width = terminal_columns() - 2  # without it, click never goes below 50
    color = False if os.environ.get("NO_COLOR") else None  # None: colours on a terminal
    try:
        status = program.main(
            argv, prog_name="table-consulctl", standalone_mode=False, terminal_width=width, color=color
        )
        if sys.stdout is not None:  # None if the parent process has closed it
            sys.stdout.flush()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - every error becomes one line
        with contextlib.suppress(OSError):  # standard error is full or closed: the exit status still counts
            for line in _explanation(error, debug="--debug" in argv):
                click.echo(f"table-consulctl: {printable(line, 2000)}", err=True)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):  # Python would fail at exit, with status 120
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, SystemExit) and error.code == 0:  # shell completion
            return 0
        return NAGIOS_UNKNOWN if "--nagios" in argv else FAILED
    return status if isinstance(status, int) else 0


def _explanation(error: BaseException, *, debug: bool) -> Iterator[str]:
    match error:
        case click.UsageError():
            error.show()
        case SystemExit() | BrokenPipeError():  # click turns the second into the first
            pass
        case click.Abort():  # ^C, or the end of input at a prompt
            yield "interrupted"
        case click.ClickException() | TableConsulError():  # the notes of a ConfigError are further errors
            yield from (str(error), *getattr(error, "__notes__", ()))
        case OSError():
            where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            yield where + problem_of(error)
        case _:
            if debug:
                traceback.print_exception(error)
            yield f"internal error: {type(error).__name__}: {error} (please report it, with the output of --debug)"
