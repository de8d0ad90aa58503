"""``table-consulctl lint``: all that smtpd could not use, and all that answers nothing, before a mail meets it.

What an entry's own problem is, the bucket says, in the words of the daemon's log; here is what no bucket sees.
"""

from __future__ import annotations

import contextlib
import difflib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec.structs import replace

from table_consul.ctl.main import FAILED, NO, UNCUT, as_json, chosen_tables, pass_config
from table_consul.errors import Forbidden, SourceError, printable
from table_consul.services import SERVICES, Table, fold_key
from table_consul.services.entries import Entries

if TYPE_CHECKING:
    from table_consul.config import Config
    from table_consul.ctl.loader import Place, Reading, Stored

# Whoever asks here waits for the whole of a table that the daemon reads key by key.
LIST_SECONDS = 30.0
FOLDER = (
    "the key ends in /, so it is a folder and no entry, and its value answers nothing; move the value to the key "
    "without the /"
)
UNNAMEABLE = (
    "no URL can name this key, as it has an empty segment, a . or .., or a control character, so that neither the UI "
    "nor `consul kv put` can change it{lost}; delete it with `consul kv delete -recurse` of a beginning that it shares "
    "with nothing else"
)


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to be mended: the key (or folder) as it stands in Consul, and what is wrong, with the remedy."""

    key: str
    problem: str
    service: str | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was found in one table."""

    table: str
    source: list[str] = msgspec.field(default_factory=list)
    entries: int | None = None
    problems: list[Problem] | None = None
    error: str | None = None
    """Why there is no verdict."""


@click.command("lint")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--live", is_flag=True, help="Ask Consul, and not the copy on disk (snapshot).")
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], live: bool, as_json: bool) -> int:
    """Tell every problem of the data of TABLE: its key, what is wrong, and the remedy.

    These are the problems that the daemon logs when an entry comes, and what it never reads: entries below the table's
    folder that belong to no service, and keys that smtpd cannot ask for.

    Without TABLE: all tables with a section in the configuration, which itself is checked by table-consul --check.

    Exit status: 0 no problem, 1 problems, 2 of some table the data cannot be read.

    \b
    Examples:
      table-consulctl lint
      table-consulctl lint aliases --live
      table-consulctl lint --json | jq -r '.tables[].problems[].key'
    """  # noqa: D301 - the mark by which click keeps lines as they are
    from table_consul.ctl.loader import Reading

    chosen = chosen_tables(config, tables)
    paths = _paths_of({table.name: table for table in (*config.tables.values(), *chosen)}.values())
    reading = Reading(config, live=live)
    reports = []
    for table in chosen:
        try:
            reports.append(examine(reading, table, paths))
        except (SourceError, OSError) as error:  # what is to be said of the others is said
            reports.append(Report(table.name, error=str(error)))
        if not as_json:
            _show(reports[-1])
    if as_json:
        click.echo(msgspec.json.encode({"tables": reports}))
    if any(report.error is not None for report in reports):
        return FAILED
    return NO if any(report.problems for report in reports) else 0


def examine(reading: Reading, table: Table, paths: Iterable[bytes] = ()) -> Report:
    """All problems of this table; ``paths`` are the folders that other tables read their entries from.

    Raises:
        SourceError: some of it cannot be read, so that nothing can be said of the whole.
    """
    from table_consul.ctl.loader import below

    services = table.readable_services
    places = {name: reading.place(table, SERVICES[name]) for name in services}
    # A table that turned out to be too large is read directly, where capitals are not found.
    judged = replace(table, mode="direct") if any(place.large for place in places.values()) else table
    problems: list[Problem] = []
    if judged is not table:
        problems.append(
            Problem(
                printable(table.root),
                f"more than max_keys = {table.max_keys} keys: every answer reads Consul; raise max_keys, which costs "
                "memory, or split the table",
            )
        )
    buckets: list[Entries] = []
    for name in services:
        bucket = places[name].source.entries(judged, SERVICES[name], None, time.monotonic() + LIST_SECONDS)
        buckets.append(bucket)
        entries = dict(below(places[name].entries, bucket.path))
        problems += _of_the_bucket(bucket, entries)
    problems += _useless(buckets)
    folders = {bucket.path for bucket in buckets}
    if any(folder.startswith(table.root) for folder in folders):
        problems += strays(table, _below_the_root(reading, table, places.values()), {*paths, *folders})
    read = {place.origin: None for place in places.values()}
    return Report(table.name, list(read), sum(len(bucket) for bucket in buckets), problems)


def _paths_of(tables: Iterable[Table]) -> set[bytes]:
    return {table.path(SERVICES[name]) for table in tables for name in table.readable_services}


def _below_the_root(reading: Reading, table: Table, places: Iterable[Place]) -> Stored:
    """All that stands in the table's folder, as far as the token may see it: the daemon itself needs no more."""
    from table_consul.ctl.loader import below

    found: dict[bytes, bytes | None] = {}
    for place in places:
        found.update(below(place.entries, table.root))
    if any(place.reads is not None for place in places):
        client = reading.client()
        with contextlib.suppress(Forbidden), contextlib.closing(client):
            found = {**dict.fromkeys(client.keys(table.root, timeout=LIST_SECONDS)), **found}
    return found


def _of_the_bucket(bucket: Entries, entries: Stored) -> list[Problem]:
    """What is wrong with the entries of one service, in the order of their keys."""
    told = [Problem(_escaped(key), text, bucket.service.name) for key, text in _told(bucket, entries)]
    beyond = [Problem(_escaped(key), text, bucket.service.name) for key, text in _beyond(bucket, entries)]
    return sorted([*told, *beyond], key=lambda problem: problem.key)


def _told(bucket: Entries, entries: Stored) -> Iterator[tuple[bytes, str]]:
    """What the bucket itself says, or its answer, with the key as it stands in the store."""
    from table_consul.ctl.loader import spelled

    path = bucket.path
    stored = spelled(entries, path)
    refused = {key: str(error) for key, error in bucket.errors.items() if key not in bucket.incomplete}
    by_entry = [*refused.items(), *((key, str(each)) for key, each in bucket.warnings.items())]
    for key, problem in by_entry:
        yield path + stored.get(key, key), problem.removeprefix(f"{printable(path + key)}: ")
    # The rest, of spellings and patterns, has its key in its text alone, where a long one is cut.
    rest = Counter(map(str, bucket.problems)) - Counter(problem for _, problem in by_entry)
    names: dict[str, list[bytes]] = {}
    for key in entries:
        for name in {printable(key), printable(path + fold_key(key[len(path) :]))}:
            names.setdefault(name, []).append(key)
    for problem in rest.elements():
        head, _, text = problem.partition(": ")
        while head not in names and ": " in text:
            more, _, text = text.partition(": ")
            head = f"{head}: {more}"
        keys = names.get(head) or [head.encode()]
        yield keys.pop(0) if len(keys) > 1 else keys[0], text


def _beyond(bucket: Entries, entries: Stored) -> Iterator[tuple[bytes, str]]:
    """Keys that are no entries, and keys that nobody can change."""
    from table_consul.kv import is_url_safe

    lost = ", and mode direct does not find it" if bucket.table.mode == "direct" else ""
    for key, value in entries.items():
        if not key.endswith(b"/"):
            if not is_url_safe(key):
                yield key, UNNAMEABLE.format(lost=lost)
        elif value:
            yield key, FOLDER


def _useless(buckets: Iterable[Entries]) -> Iterator[Problem]:
    """Records in which no service that reads their folder finds what it needs; one alone may well not."""
    folders: dict[bytes, list[Entries]] = {}
    for bucket in buckets:
        folders.setdefault(bucket.path, []).append(bucket)
    for path, readers in folders.items():
        lacking = Counter(key for reader in readers for key in reader.incomplete)
        for key, times in lacking.items():
            if times == len(readers):
                names = " nor ".join(reader.service.name for reader in readers)
                fields = ", ".join(dict.fromkeys(field for reader in readers for field in reader.service.fields))
                yield Problem(
                    _escaped(path + key),
                    f"the record has nothing that {names} could use (allowed: {fields})",
                    readers[0].service.name if len(readers) == 1 else None,
                )


def strays(table: Table, entries: Stored, paths: Iterable[bytes]) -> Iterator[Problem]:
    """What stands below the table's folder, but in none of the folders that are read."""
    root = table.root
    known = tuple(paths)
    folders: Counter[bytes] = Counter()
    for key, value in entries.items():
        if key.startswith(known) or (key.endswith(b"/") and not value):
            continue
        first, slash, _ = key.removeprefix(root).partition(b"/")
        if slash:
            folders[first] += 1
        else:
            yield Problem(
                _escaped(key),
                f"no service is named between table and key, so this is no entry "
                f"(allowed: {printable(root)}SERVICE/KEY, such as {printable(root)}alias/{printable(first)})",
            )
    for folder, number in folders.items():
        yield Problem(
            f"{_escaped(root + folder)}/",
            f"{number} {'entry' if number == 1 else 'entries'} that nothing asks for: {_why(table, folder)}",
        )


def _why(table: Table, folder: bytes) -> str:
    name = printable(folder)
    service = SERVICES.get(name)
    if service is None:
        close = difflib.get_close_matches(name.lower(), [*SERVICES, *(f"{known}s" for known in SERVICES)], 1, 0.6)
        meant = next((known for known in SERVICES if close and close[0] in (known, f"{known}s")), None)
        guess = f"rename the folder to {meant}" if meant else f"allowed: {', '.join(SERVICES)}"
        return f"smtpd has no service {name} ({guess})"
    if service.name not in table.services:
        return f"{name} is not among the services of table {printable(table.name)} (allowed: add it to `services`)"
    return f"the entries of {name} are read from {printable(table.path(service))}, as `paths` says"


def _show(report: Report) -> None:
    a_line_each = sys.stdout is None or not sys.stdout.isatty()
    columns = max(20, shutil.get_terminal_size().columns)
    problems = report.problems or []
    for problem in problems:
        if a_line_each:
            click.echo(str(problem))
        else:
            click.secho(problem.key, bold=True)
            click.echo(click.wrap_text(problem.problem, columns, "    ", "    "))
    if report.error is not None:
        click.echo(f"{printable(report.table)}: no verdict: {printable(report.error, UNCUT)}", err=True)
        return
    click.echo(
        f"{printable(report.table)}: {report.entries} {'entry' if report.entries == 1 else 'entries'}, "
        f"{len(problems) or 'no'} {'problem' if len(problems) == 1 else 'problems'} ({'; '.join(report.source)})",
        err=True,
    )


def _escaped(key: bytes) -> str:
    return printable(key, UNCUT)
