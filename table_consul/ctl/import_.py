"""``table-consulctl import``: a file's entries into Consul, shown before they are written."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import click
import msgspec

from table_consul import config
from table_consul.ctl import files
from table_consul.ctl.entries import FormatError, Parsed, Problem
from table_consul.ctl.main import FAILED, NO, SERVICE, as_json, as_writer, pass_config
from table_consul.ctl.passwd import PASSWD_SERVICES
from table_consul.errors import SourceError, printable
from table_consul.services import SERVICES, Service, Table

if TYPE_CHECKING:
    from table_consul.ctl.plan import Change, Plan
    from table_consul.ctl.txn import Progress

# Half a million users fit; /dev/zero does not fill the memory of the mail host.
FILE_MAX_BYTES = 64 << 20
READ_BYTES = 1 << 20
# So many problems help to mend a file; after more, something else is wrong with it.
PROBLEMS_SHOWN = 20
# Before writing; --dry-run shows all.
CHANGES_SHOWN = 100
VALUE_CHARACTERS = 60
# Fewer are written before a bar has been looked at.
BAR_CHANGES = 1000
_SIGNS = {"+": ("add", "green"), "~": ("change", "yellow"), "-": ("remove", "red")}


@click.command("import")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=SERVICE)
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@click.option("--prune", is_flag=True, help="Remove what FILE does not have.")
@click.option(
    "--format",
    "wanted",
    type=click.Choice(files.FORMATS),
    default="auto",
    metavar="FORMAT",
    help=f"What FILE is, one of {', '.join(files.FORMATS)}; default: auto.",
)
@click.option("--from", "below", metavar="FOLDER", help="Of an export: the folder whose keys are meant.")
@click.option(
    "--record", is_flag=True, help="Of a passwd file: one JSON object a user, for several services with one folder."
)
@click.option(
    "--token-file", metavar="PATH", help="The ACL token to write with; default: that of the environment, else as usual."
)
@as_json
@pass_config
def command(  # noqa: PLR0913 - the command line
    settings: config.Config,
    *,
    wanted: str,
    below: str | None,
    record: bool,
    prune: bool,
    dry_run: bool,
    token_file: str | None,
    as_json: bool,
    table_name: str,
    service_name: str,
    file: str,
) -> int:
    """Put the entries of FILE into Consul, for SERVICE of TABLE. A FILE of - is standard input.

    What is to be added (+), changed (~) and removed (-) is shown, and then written. Values of credentials and auth are
    not shown. What lint would complain of is refused, with its line, before anything is written.

    \b
    FILE may be
      aliases  aliases(5) of smtpd,
               Postfix or sendmail
      table    a file: table of smtpd's,
               mapping or list
      passwd   passwd(5), shadow(5),
               master.passwd(5), or a
               passwd-file of Dovecot's
      export   of consul kv export

    auto takes JSON for export, files for alias for aliases, files for credentials, auth and userinfo for passwd if
    each line has six colons after a name, and all else for table. Where a line could mean either, it asks you.

    The keys of an export may come from elsewhere: they are taken from the folder of TABLE and SERVICE if the file has
    that, else from the only folder called SERVICE/, else from the one that --from names. Its values are written as
    they are. Keys of other files come in lower case, and an entry that already answers what the file says stays.

    --prune wants a FILE with entries, and removes no record of a user that another service reads, too: for that give
    --record.

    A key is written only if nobody has changed it since it was read. One that somebody has is told and left alone,
    and the others are written. Run the same command again for the rest, as after ^C or when Consul went away.

    It writes with the token in --token-file, else with that of CONSUL_HTTP_TOKEN_FILE or CONSUL_HTTP_TOKEN, and only
    else with the configured one, which should not be able to.

    Exit status: 0 all is written, or there was nothing to write; 1 with --dry-run, something would change; 2 something
    was not done.

    \b
    Examples:
      table-consulctl import aliases alias /etc/aliases --dry-run
      table-consulctl import aliases alias /etc/aliases --prune
      table-consulctl import aliases credentials /etc/mail/passwd
      table-consulctl import aliases domain /etc/mail/domains
      consul kv export old/ | table-consulctl import aliases alias -
    """  # noqa: D301 - the mark by which click keeps lines as they are
    from table_consul.ctl import (
        plan,
        txn,
    )

    table, service = settings.table(table_name), SERVICES[service_name]
    _refuse_options(settings, service, wanted, below, record=record)
    name = "standard input" if file == "-" else printable(file)
    folder = None if below is None else os.fsencode(f"{below.strip('/')}/".removeprefix("/"))
    try:
        parsed = files.read(_contents(file), service, wanted, path=table.path(service), below=folder, record=record)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    except OSError as error:
        raise FormatError(f"{name}: {(error.strerror or str(error)).lower()}") from None
    if below is not None and parsed.format != "export":
        raise click.UsageError(f"--from is for `consul kv export`, and {name} is read as {parsed.format}")
    if record and parsed.format != "passwd":
        raise click.UsageError(f"--record is for passwd files, and {name} is read as {parsed.format}")
    if prune and not parsed.entries and not parsed.problems:
        raise FormatError(f"{name}: has no entries, and --prune would remove all there are")
    problems = list(parsed.problems)
    if parsed.format != "export":
        problems += plan.duplicate_problems(parsed, plan.duplicates(parsed))
    _refuse(name, parsed, problems)
    if not _asked_for(table, service):
        click.echo(
            f"note: smtpd does not ask {table.name} for {service.name}, which is not among its services", err=True
        )
    consul = msgspec.structs.replace(as_writer(settings.consul, token_file), consistency="consistent")
    store = txn.Store(consul)
    with contextlib.closing(store):
        planned = plan.plan(
            table,
            service,
            parsed,
            store.entries(table.path(service)),
            prune=prune,
            records=record,
            others=_folders_within(settings, table, service),
        )
        _refuse(name, parsed, planned.problems)
        report = _Report(table, service, planned, parsed, as_json=as_json, dry_run=dry_run)
        if dry_run:
            report.before()
            report.after()
            return NO if planned.changes else 0
        try:
            report.before()
            steps = functools.partial(txn.write, planned.changes, store)
            for progress in _with_bar(planned.changes, steps):
                report.take(progress)
            report.after()
        except BaseException:
            report.broken_off()
            raise
    return FAILED if report.conflicts else 0


def _refuse_options(settings: config.Config, service: Service, wanted: str, below: str | None, *, record: bool) -> None:
    if settings.consul.addresses[0].startswith("file://"):
        raise click.UsageError(f"import writes to Consul, and the configured address is {settings.consul.addresses[0]}")
    if wanted == "aliases" and service.name != "alias":
        raise click.UsageError(f"--format aliases is for alias, not for {service.name}")
    if (wanted == "passwd" or record) and service.name not in PASSWD_SERVICES:
        raise click.UsageError(f"a passwd file has nothing for {service.name} (allowed: {', '.join(PASSWD_SERVICES)})")
    if below is not None and wanted not in ("auto", "export"):
        raise click.UsageError(f"--from is for `consul kv export`, not for --format {wanted}")


def _asked_for(table: Table, service: Service) -> bool:
    # Who has no hash in auth may have it in credentials.
    return service.name in table.services or (service.name == "credentials" and "auth" in table.services)


def _contents(file: str) -> bytes:
    """All of the file; raises OSError, or FormatError when it is too large or certainly no text."""
    if file == "-":
        if sys.stdin is None:  # closed by whoever started this
            raise FormatError("there is none")
        return _bounded(sys.stdin.buffer)
    with open(file, "rb") as opened:
        if stat.S_ISBLK(os.fstat(opened.fileno()).st_mode):
            raise FormatError("this is a disk")
        return _bounded(opened)


def _bounded(opened: BinaryIO) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := opened.read(READ_BYTES):
        if not chunks:
            files.refuse_binary(chunk)
        chunks.append(chunk)
        size += len(chunk)
        if size > FILE_MAX_BYTES:
            raise FormatError(f"this is more than {FILE_MAX_BYTES >> 20} MB; import it in parts")
    return b"".join(chunks)


def _folders_within(settings: config.Config, table: Table, service: Service) -> list[bytes]:
    """Folders of other services, of this table or another one, that lie within the folder of this one."""
    path = table.path(service)
    tables = [table, *settings.tables.values()]
    found = {each.path(other) for each in tables for other in SERVICES.values()}
    return sorted(folder for folder in found if folder.startswith(path) and folder != path)


def _refuse(name: str, parsed: Parsed, problems: Sequence[Problem]) -> None:
    """Say what is wrong with which line, and raise FormatError, if anything is."""
    if not problems:
        return
    said = sorted(problems)
    for problem in said[:PROBLEMS_SHOWN]:
        # FILE:LINE, as compilers say it, so that editors find it.
        place = f"{name}:{problem.line}" if parsed.unit == "line" else f"{name}: entry {problem.line}"
        if not problem.line:  # what is to go has none
            place = name
        click.echo(f"{place}: {printable(problem.text, 1000)}", err=True)
    if len(said) > PROBLEMS_SHOWN:
        click.echo(f"... and {len(said) - PROBLEMS_SHOWN} more", err=True)
    count = f"{len(said)} problem{'s' if len(said) > 1 else ''}"
    raise FormatError(f"{name}: {count} (read as {parsed.format}); nothing was written")


def _with_bar(
    planned: Sequence[Change], steps: Callable[[Callable[[SourceError], None]], Iterator[Progress]]
) -> Iterator[Progress]:
    """The steps, and a bar of how far they are where a person waits for them."""

    def waiting(error: SourceError) -> None:
        click.echo(f"waiting: {printable(str(error), 1000)}", err=True)

    if len(planned) < BAR_CHANGES or sys.stderr is None or not sys.stderr.isatty():
        yield from steps(waiting)
        return
    with click.progressbar(length=len(planned), label="writing", file=sys.stderr, width=0) as bar:
        for progress in steps(waiting):
            bar.update(len(progress.written) + len(progress.conflicts))
            yield progress


class _Report:
    """What is said of an import, to a person or a program."""

    def __init__(
        self, table: Table, service: Service, plan: Plan, parsed: Parsed, *, as_json: bool, dry_run: bool
    ) -> None:
        self._table, self._service, self._plan, self._parsed = table, service, plan, parsed
        self._as_json, self._dry_run = as_json, dry_run
        self._path = table.path(service)
        self.written = 0
        self.conflicts: list[Change] = []

    def before(self) -> None:
        """Say what is to be done."""
        if self._as_json:
            return
        shown_now = self._plan.changes if self._dry_run else self._plan.changes[:CHANGES_SHOWN]
        for change in shown_now:
            click.echo(click.style(f"{change.sign} {self._described(change)}", fg=_SIGNS[change.sign][1]))
        if len(shown_now) < len(self._plan.changes):
            click.echo(f"... and {len(self._plan.changes) - len(shown_now)} more (--dry-run shows all)")
        if self._parsed.left_out:
            click.echo(f"left out, as they are in other folders: {self._parsed.left_out}", err=True)
        counted = Counter(change.sign for change in self._plan.changes)
        parts = [f"{counted[sign]} to {verb}" for sign, (verb, _) in _SIGNS.items()]
        click.echo(f"{', '.join(parts)}, {self._plan.unchanged} unchanged")

    def take(self, progress: Progress) -> None:
        """Take note of a transaction."""
        self.written += len(progress.written)
        self.conflicts += progress.conflicts

    def after(self) -> None:
        """Say what was done."""
        if self._as_json:
            click.echo(json.dumps(self._document()))
            return
        if self._dry_run:
            return
        for change in self.conflicts:
            click.echo(
                f"{printable(change.key)}: somebody changed it meanwhile; it was left alone (run this again)", err=True
            )
        if self._plan.changes:
            click.echo(f"{self.written} written")

    def broken_off(self) -> None:
        """Say how far it went."""
        click.echo(
            f"broken off: {self.written} of {len(self._plan.changes)} are known to be written; run the same command"
            " again for the rest",
            err=True,
        )
        if self._as_json:
            with contextlib.suppress(OSError):  # it may be what broke it off
                click.echo(json.dumps(self._document()))

    def _described(self, change: Change) -> str:
        key = printable(change.key[len(self._path) :])
        old, new = (printable(value or b"", VALUE_CHARACTERS) for value in (change.was, change.becomes))
        bare = change.old is None or change.value is None
        if self._service.hashed:
            return key if bare else f"{key} (not shown)"
        if bare:
            value = new if change.old is None else old
            return f"{key} {value}" if value and value != key else key
        return f"{key} {old} -> {new}" if old != new else f"{key} (the same for smtpd, written otherwise)"

    def _document(self) -> dict[str, object]:
        return {
            "table": self._table.name,
            "service": self._service.name,
            "path": self._text(self._path),
            "format": self._parsed.format,
            "dry_run": self._dry_run,
            "changes": [self._as_object(change) for change in self._plan.changes],
            "unchanged": self._plan.unchanged,
            "left_out": self._parsed.left_out,
            "written": self.written,
            "conflicts": [self._text(change.key) for change in self.conflicts],
        }

    def _as_object(self, change: Change) -> dict[str, str | None]:
        found: dict[str, str | None] = {
            "change": _SIGNS[change.sign][0],
            "key": self._text(change.key[len(self._path) :]),
        }
        if not self._service.hashed:
            found["from"] = None if change.was is None else self._text(change.was)
            found["to"] = None if change.becomes is None else self._text(change.becomes)
        return found

    @staticmethod
    def _text(data: bytes) -> str:
        return data.decode("utf-8", "backslashreplace")
