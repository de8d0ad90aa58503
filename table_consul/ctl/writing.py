"""Shared by the commands that write: options, the display of changes, saving, writing and logging."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import syslog
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from msgspec.structs import replace

from table_consul import config
from table_consul.ctl import main
from table_consul.ctl.main import json_text
from table_consul.errors import Forbidden, TableConsulError, counted, printable
from table_consul.services import Service, Table, fold_key

if TYPE_CHECKING:
    from table_consul.ctl.formats import LineProblem
    from table_consul.ctl.plan import Change, Plan
    from table_consul.ctl.txn import Progress, Store

VALUE_CHARACTERS = 60
# Before writing; import --dry-run shows all.
CHANGES_SHOWN = 100
# More than these usually have one cause.
PROBLEMS_SHOWN = 20
STYLES = {"add": ("+", "green"), "change": ("~", "yellow"), "remove": ("-", "red")}
ROOT_FOLDER = "/var/lib/table-consul/undo"
USER_FOLDER = "~/.local/state/table-consul/undo"


class Target(NamedTuple):
    """The table and the service that a command writes to, and their folder."""

    table: str
    service: str
    path: bytes
    hashed: bool
    """Its values are not shown."""

    @classmethod
    def of(cls, table: Table, service: Service) -> Target:
        # Users' values are shown without the fields of other services, and all others whole.
        readers = [service] if service.fields else table.sharing(service)
        return cls(table.name, service.name, table.path(service), any(each.hashed for each in readers))

    @classmethod
    def with_note(cls, table: Table, service: Service) -> Target:
        """As `of`, but prints a note if the table does not have the service."""
        # Users without a hash in auth may have one in credentials.
        if service.name not in table.readable_services:
            click.echo(f"note: {service.name} is not among the services of table {table.name}", err=True)
        return cls.of(table, service)


class Options(NamedTuple):
    """The options of every command that writes."""

    token_file: str | None
    as_json: bool
    undo_folder: str
    """The folder of saved writes."""
    saves: bool
    """Whether the replaced entries are saved there."""


def options(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options of every command that writes, and pass them as one `Options`, after the configuration."""
    with_config = main.pass_config(function)

    @functools.wraps(with_config)
    def called(
        *,
        token_file: str | None,
        as_json: bool,
        undo_dir: str | None,
        no_undo: bool,
        **arguments: Any,  # noqa: ANN401 - those of the command
    ) -> int:
        folder = os.path.expanduser(undo_dir or (ROOT_FOLDER if os.geteuid() == 0 else USER_FOLDER))
        return with_config(options=Options(token_file, as_json, folder, not no_undo), **arguments)

    folder_help = "Save the replaced entries in PATH."
    folder = click.option(
        "--undo-dir", type=main.FILE, metavar="PATH", envvar="TABLE_CONSUL_UNDO_DIR", help=folder_help
    )
    file_help = "Read the ACL token to write with from PATH."
    token_file = click.option("--token-file", type=main.FILE, metavar="PATH", help=file_help)
    no_undo = click.option("--no-undo", is_flag=True, help="Do not save the replaced entries.")
    return token_file(main.as_json(folder(no_undo(called))))


@contextlib.contextmanager
def open_store(settings: config.Config, options: Options) -> Iterator[Store]:
    """A client that writes with the operator's token, open within the block.

    Raises:
        UsageError: the tables are read from a file.
    """
    from table_consul.ctl import txn

    if settings.consul.file is not None:
        name, address = click.get_current_context().info_name, settings.consul.addresses[0]
        raise click.UsageError(f"{name} writes to Consul, but the configured address is {address}")
    consul = replace(main.as_writer(settings.consul, options.token_file), consistency="consistent")
    with contextlib.closing(txn.Store(consul)) as store:
        yield store


def _written(target: Target, changes: Sequence[Change], store: Store) -> Generator[Progress, None, None]:
    """As `txn.write`, with a line in syslog, and a progress bar on a terminal."""
    from table_consul.ctl import txn

    written: Counter[str] = Counter()
    conflicts = 0
    try:
        on_retry = lambda error: click.echo(f"retrying: {printable(str(error), 1000)}", err=True)  # noqa: E731
        for progress in _with_bar(txn.write(changes, store, on_retry), len(changes)):
            written.update(change.kind for change in progress.written)
            conflicts += len(progress.conflicts)
            yield progress
    finally:
        if written or conflicts:
            _log(target, written, conflicts)


def _with_bar(steps: Iterator[Progress], count: int) -> Iterator[Progress]:
    """The steps; on a terminal, with a progress bar once they have taken `main.PATIENCE_SECONDS`."""
    begun, done = time.monotonic(), 0
    bar = click.progressbar(length=count, label="writing", file=sys.stderr, width=0)
    with contextlib.ExitStack() as shown:
        for progress in steps:
            done += len(progress.written) + len(progress.conflicts)
            if bar.pos or (main.is_terminal(sys.stderr) and time.monotonic() - begun >= main.PATIENCE_SECONDS):
                if not bar.pos:
                    shown.enter_context(bar)
                bar.update(done - bar.pos)
            yield progress


def _save(target: Target, changes: Sequence[Change], folder: str) -> int:
    from table_consul.ctl import saves
    from table_consul.ctl.saves import Entry

    old, new = [each.old for each in changes], [each for each in changes if each.value is not None]
    return saves.save(
        folder,
        saves.Write(
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            main.operator(),
            main.command_line(),
            target.table,
            target.service,
            target.path.decode(),
            [Entry(each.key.decode(), each.flags, each.value) for each in old if each is not None],
            [Entry(each.key.decode(), each.flags, each.value or b"") for each in new],
        ),
    )


def _log(target: Target, written: Counter[str], conflicts: int) -> None:
    """Log the user, the command and the counts, without keys and values."""
    parts = (main.operator(), click.get_current_context().info_name, target.table, target.service)
    counts = f"{written['add']} added, {written['change']} changed, {written['remove']} removed"
    more = f", {conflicts} skipped" if conflicts else ""
    who, *what = (printable(part or "") for part in parts)
    syslog.openlog("table-consulctl", 0, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_NOTICE, f"{who}: {' '.join(what)}: {counts}{more}")


def documents(changes: Iterable[Change], target: Target) -> Iterator[dict[str, Any]]:
    """The changes as --json prints them."""
    for change in changes:
        answers = {} if target.hashed else {"from": change.old_answer, "to": change.new_answer}
        texts = {name: None if answer is None else json_text(answer) for name, answer in answers.items()}
        yield {"change": change.kind, "key": json_text(change.key[len(target.path) :]), **texts}


def problem_documents(problems: Iterable[LineProblem]) -> list[dict[str, Any]]:
    """The problems as --json prints them."""
    return [{"line": each.line, "key": json_text(each.key), "text": each.text} for each in problems]


def echo_changes(
    changes: Sequence[Change], target: Target, *, limit: int = CHANGES_SHOWN, more: str = "", err: bool = False
) -> None:
    """Print the changes, one coloured line each; beyond ``limit``, their number and ``more``.

    ``err`` prints to standard error, else standard output.
    """
    for change in documents(islice(changes, limit), target):
        sign, colour = STYLES[change["change"]]
        click.secho(f"{sign} {_description(change)}", fg=colour, err=err)
    if len(changes) > limit:
        click.echo(f"... and {len(changes) - limit} more{more}", err=err)


def summary(changes: Sequence[Change]) -> str:
    """How many changes there are of each kind."""
    counts = Counter(change.kind for change in changes)
    return ", ".join(f"{counts[word]} to {word}" for word in STYLES)


def _description(change: dict[str, Any]) -> str:
    key = printable(change["key"])
    old, new = (printable(change.get(name) or "", VALUE_CHARACTERS) for name in ("from", "to"))
    if change["change"] != "change":
        value = old or new
        return f"{key} {value}" if value and value != key else key
    if "from" not in change:
        return f"{key} (not shown)"
    if old == new:
        return f"{key} (same value for smtpd, stored differently)"
    return f"{key} {old or '(none)'} -> {new or '(none)'}"


def folded_key(table: Table, service: Service, key: bytes) -> tuple[bytes, str | None]:
    """The key as smtpd looks it up, and why folding changes its meaning. Prints a note if the key differs."""
    from table_consul.services.judge import key_problem

    name = fold_key(key.strip())
    problem = key_problem(table, service, name, key) if service.name == "regex" else None
    if name != key and not problem:
        click.echo(f"note: {printable(key)} is stored as {printable(name)}, as smtpd looks it up", err=True)
    return name, problem


@contextlib.contextmanager
def handling(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """Have signals call the handler, except those that nohup(1) ignores. A child process does not inherit a handler."""
    former = {number: signal.getsignal(number) for number in numbers}
    former = {number: before for number, before in former.items() if before is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Let a closed terminal and SIGTERM interrupt the block as ^C does."""
    return handling(_abort, signal.SIGHUP, signal.SIGTERM)


def _abort(*_: object) -> None:
    raise click.Abort


class Writer(NamedTuple):
    """Writes the changes of one command, and reports the result."""

    target: Target
    store: Store
    options: Options
    conflict: str = "changed in Consul since it was read; skipped (run the command again)"
    report: Mapping[str, Any] = MappingProxyType({})
    """Further fields that --json prints."""

    def show(self, changes: Sequence[Change]) -> None:
        """Print the changes, unless the command prints JSON at its end."""
        if not self.options.as_json:
            echo_changes(changes, self.target)

    def judge_and_apply(self, plan: Plan, *, force: bool | None = None) -> int:
        """Write a plan that has no problems, and return the exit status.

        Raises:
            TableConsulError: the plan has problems, and ``force`` is not true or does not help.
        """
        problems = plan.problems
        found = [(printable(self.target.path + each.key), each.text) for each in (*problems, *plan.refused)]
        main.echo_problems(found, limit=PROBLEMS_SHOWN)
        if problems and not (force and plan.changes):
            if self.options.as_json:
                click.echo(self.document(plan.changes, refused=[*problems, *plan.refused]))
            hint = "use --force to write it" if plan.changes and force is not None else ""
            raise TableConsulError(f"{counted(len(problems), 'problem', 'problems')}; nothing was written", hint)
        self.show(plan.changes)
        status = self.apply(plan.changes, refused=plan.refused)
        return main.FAILED if plan.refused else status

    def apply(
        self,
        changes: Sequence[Change],
        *,
        skipped: Sequence[bytes] = (),
        refused: Sequence[LineProblem] = (),
        again: str = "",
        prepare: Callable[[], None] | None = None,
    ) -> int:
        """Write the changes, and return the exit status. ``skipped`` lists further keys to report as conflicts.

        ``refused`` are problems that have been printed. ``again`` is the hint after an interruption, when some of the
        changes are written. ``prepare`` shows the changes and asks; an interruption is then reported in any case.

        Raises:
            TableConsulError: ``prepare`` raised it, the entries cannot be saved, or Consul does not answer.
        """
        from table_consul.ctl import saves

        written, conflicts, number = 0, list(skipped), 0
        steps: Generator[Progress, None, None] | None = None
        with interruptible():
            try:
                if prepare:
                    prepare()
                if changes and self.options.saves:
                    number = _save(self.target, changes, self.options.undo_folder)
                steps = _written(self.target, changes, self.store)
                for progress in steps:
                    written += len(progress.written)
                    conflicts += [change.key for change in progress.conflicts]
                if number and not written:
                    saves.discard(self.options.undo_folder, number)
                if self.options.as_json:
                    click.echo(self.document(changes, written, conflicts, refused=refused))
                else:
                    main.echo_problems([(printable(key), self.conflict) for key in conflicts])
                    if changes or not prepare:
                        click.echo(f"{written} written" if changes else "nothing to write")
            except BaseException as error:
                # Without steps it is not confirmed, or the entries cannot be saved.
                begun = steps is not None or not isinstance(error, TableConsulError)
                if steps is not None:
                    steps.close()  # which logs what is written
                if (
                    number and not written and isinstance(error, Forbidden)
                ):  # other errors may leave a write unconfirmed
                    saves.discard(self.options.undo_folder, number)
                if self.options.as_json:
                    with contextlib.suppress(OSError):  # standard output may be what failed
                        click.echo(self.document(changes, written, conflicts, refused=refused))
                if begun and (written or prepare):
                    keys = counted(len(changes), "key", "keys")
                    with contextlib.suppress(OSError):  # the terminal may be closed
                        click.echo(f"interrupted: {written} of {keys} written{again}", err=True)
                raise
        return main.FAILED if conflicts else 0

    def document(
        self,
        changes: Sequence[Change],
        written: int = 0,
        conflicts: Sequence[bytes] = (),
        *,
        refused: Sequence[LineProblem],
    ) -> str:
        """The report that --json prints."""
        report = {
            "table": self.target.table,
            "service": self.target.service,
            "path": json_text(self.target.path),
            **self.report,
            "changes": [*documents(changes, self.target)],
            "written": written,
            "conflicts": [json_text(key) for key in conflicts],
            "refused": problem_documents(refused),
        }
        return json.dumps(report)
