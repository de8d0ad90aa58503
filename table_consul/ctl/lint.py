"""``table-consulctl lint``: report entries that smtpd cannot use, and keys that are never read."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import click
import msgspec

from table_consul.config import Config
from table_consul.ctl.main import FAILED, NO, UNCUT, as_json, chosen_tables, echo_problems, pass_config, patience
from table_consul.errors import Forbidden, SourceError, counted, printable
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.services.parts import REPLACEMENT

if TYPE_CHECKING:
    from table_consul.ctl.loader import Loaded

# lint reads a whole table even if the daemon reads it key by key.
LIST_SECONDS = 30.0
# In the summary of a table; each key or folder has its own line before.
PLACES_SHOWN = 3
# Names that are not UTF-8 take some hundred requests each.
RESOLVED_MAX = 20
FOLDER = "the key ends in /, so it is a folder, and its value is never read (move the value to the key without the /)"
UNSAFE_KEY = (
    "no URL can name this key (an empty segment, . or .., or a control character), so neither the UI nor "
    "`consul kv put` can change it{unfound} (use `consul kv delete -recurse` with a prefix that no other key has)"
)
NOT_UTF8 = (
    "the key is not UTF-8 or has a U+FFFD, so no lookup finds it (delete it with the HTTP request DELETE /v1/kv/{})"
)
MISSING = "no keys in this folder (check the name of the table, `prefix` and `paths`)"
RENAME = " (store the entry under another key, and delete this one with `table-consulctl import --prune`)"


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key or folder as stored in Consul, its problem, and how to fix it."""

    key: str
    problem: str
    service: str | None = None


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result for one table."""

    table: str
    source: list[str] = msgspec.field(default_factory=list)
    entries: int | None = None
    problems: list[Problem] | None = None
    error: str | None = None


@click.command("lint")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@click.option("--live", is_flag=True, help="Read Consul instead of the snapshot file.")
@as_json
@pass_config
def command(config: Config, *, tables: tuple[str, ...], live: bool, as_json: bool) -> int:
    """Check the data of TABLE: one line per problem, with its key and a hint.

    Problems are entries that smtpd cannot use, aliases that it cannot expand, keys that are never read, and keys that
    the token may not read (to find all of these, set CONSUL_HTTP_TOKEN to an operator's token). check checks everything
    else.

    Without TABLE: all tables with a section in the configuration.

    Exit status: 0 no problems, 1 problems, 2 some data cannot be read.

    \b
    Examples:
      table-consulctl lint
      table-consulctl lint aliases --live
      table-consulctl lint --json | jq -r '.tables[].problems[].key'
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl.loader import Loader

    chosen = chosen_tables(config, tables)
    every = (*config.tables.values(), *chosen)
    paths = {table.path(SERVICES[name]) for table in every for name in table.readable_services}
    loader = Loader(config, live=live)
    reports = []
    for table in chosen:
        try:
            data = {
                service: loader.load(table, service) for service in map(SERVICES.__getitem__, table.readable_services)
            }
            with patience(f"checking {printable(table.name)}"):
                reports.append(_check(data, config, table, paths))
        except (SourceError, OSError) as error:  # the other tables are still checked
            reports.append(Report(table.name, error=str(error)))
        if not as_json:
            _print(reports[-1])
    if as_json:
        click.echo(msgspec.json.encode({"tables": reports}))
    return max(FAILED if report.error is not None else NO if report.problems else 0 for report in reports)


def _check(data: Mapping[Service, Loaded], config: Config, table: Table, paths: Iterable[bytes]) -> Report:
    """Every problem of this table. ``paths`` are folders that other tables read."""
    from table_consul import kv

    problems: list[Problem] = []
    if table.mode != "direct" and any(each.direct for each in data.values()):
        hint = "raise max_keys, which costs memory, or split the table"
        text = f"more than max_keys = {table.max_keys} keys, so every lookup reads Consul ({hint})"
        problems.append(Problem(printable(table.root), text))
    hidden = _hidden(config, table, data)
    problems += [Problem(printable(where, UNCUT), text) for where, text in hidden]
    entries: list[Entries] = []
    failure: SourceError | None = None
    for service, source in data.items():
        try:
            entries.append(source.entries(table, service, None, time.monotonic() + LIST_SECONDS))
        except SourceError as unread:
            if not any(where.startswith(table.path(service)) for where, _ in hidden):
                raise
            failure = unread
    if failure is not None and not entries:
        raise failure
    pairs = {key: value for source in data.values() for key, value in source.pairs.items()}
    stored = _stored(config, data)
    for each in entries:
        problems += sorted(_of_service(each, pairs, stored), key=lambda problem: problem.key)
    problems += _unused_records(entries)
    folders = {each.path for each in entries}
    if any(folder.startswith(table.root) for folder in folders):
        if any(each.direct for each in data.values()):  # elsewhere in the table only the keys matter
            with contextlib.suppress(Forbidden), contextlib.closing(kv.Client(config.consul)) as client:
                keys, hides = client.visible_keys(table.root, timeout=LIST_SECONDS)
                if not hides:
                    pairs = {**dict.fromkeys(keys), **pairs}
        problems += unread_keys(table, pairs, {*paths, *folders})
    if not hidden and not any(key.startswith((table.root, *folders)) for key in pairs):
        problems += [Problem(printable(folder, UNCUT), MISSING) for folder in table.folders()]
    origins = dict.fromkeys(source.origin() for source in data.values())
    places = [printable(where, UNCUT) for where, _ in hidden[:PLACES_SHOWN]]
    places += [f"{len(hidden) - PLACES_SHOWN} more"] if len(hidden) > PLACES_SHOWN else []
    error = f"not checked in full: the token may not read all of {', '.join(places)}" if hidden else None
    return Report(table.name, list(origins), sum(map(len, entries)), problems, error)


def _hidden(config: Config, table: Table, data: Mapping[Service, Loaded]) -> Sequence[tuple[bytes, str]]:
    """The keys and folders that the token may not read, in folders that come from Consul, and why."""
    from table_consul.ctl import access

    folders = dict.fromkeys(table.path(service) for service, each in data.items() if each.origin().startswith("Consul"))
    return access.check(config.consul, [*folders]).unreadable if folders else []


def _stored(config: Config, data: Mapping[Service, Loaded]) -> Mapping[bytes, Sequence[bytes]]:
    """The keys that are not UTF-8, by the name that Consul lists, as far as a few requests find them."""
    from table_consul.ctl import access

    live = [each for each in data.values() if each.origin().startswith("Consul")]
    listed = {key: None for each in live for key in each.pairs if REPLACEMENT in key}
    stored: dict[bytes, Sequence[bytes]] = {}
    if listed:
        # Consul 1.21.5 refuses to read such names.
        with contextlib.closing(access.Client(config.consul)) as client, contextlib.suppress(SourceError):
            stored = {key: client.stored_as(key) for key in [*listed][:RESOLVED_MAX]}
    return stored


def _of_service(
    entries: Entries, pairs: Mapping[bytes, bytes | None], stored: Mapping[bytes, Sequence[bytes]]
) -> Iterator[Problem]:
    """Yield the problems of a service's entries, and those of keys in its folder that are not entries.

    ``stored`` has keys that are not UTF-8, by the name that Consul lists.
    """
    from table_consul.ctl import recipients
    from table_consul.kv import is_url_safe, modern_name_problem

    name = entries.service.name
    own = [key for key in pairs if key.startswith(entries.path)]
    refused = {key: text for key in own if is_url_safe(key) and (text := modern_name_problem(key))}
    unsafe = {problem.key for problem in entries.warnings.values() if not is_url_safe(problem.key)}
    for key, text in entries.problems:  # smtpd may reject the same key
        if key in unsafe or stored.get(key):
            continue  # reported below
        more = f"; {refused.pop(key)}{RENAME}" if key in refused else ""
        yield Problem(printable(key, UNCUT), text + more, name)
    if name == "alias":
        aliases = {**dict.fromkeys(entries.errors, b""), **entries.values}
        for key, text in recipients.rejected_aliases(aliases, entries.table.subaddress_delimiter.encode()):
            yield Problem(printable(entries.path + entries.original_case.get(key, key), UNCUT), text, name)
    unfound = ", and direct mode does not find it" if entries.table.mode == "direct" else ""
    for key in own:
        for each in stored.get(key, ()):
            yield Problem(printable(each, UNCUT), NOT_UTF8.format(quote(each, safe="/@")), name)
        if key.endswith(b"/"):
            if pairs[key]:
                yield Problem(printable(key, UNCUT), FOLDER, name)
        elif key in refused:
            yield Problem(printable(key, UNCUT), refused[key] + RENAME, name)
        elif not is_url_safe(key):
            yield Problem(printable(key, UNCUT), UNSAFE_KEY.format(unfound=unfound), name)


def _unused_records(entries: Sequence[Entries]) -> Iterator[Problem]:
    """Yield records that have no field for any service that reads their folder; one service alone may find none."""
    for path in dict.fromkeys(each.path for each in entries):
        readers = [each for each in entries if each.path == path]
        fields = ", ".join(dict.fromkeys(field for each in readers for field in each.service.fields))
        names = " or ".join(each.service.name for each in readers)
        for key in readers[0].incomplete.intersection(*(each.incomplete for each in readers)):
            text = f"the record has no field for {names} (add one of: {fields})"
            service = readers[0].service.name if len(readers) == 1 else None
            yield Problem(printable(path + readers[0].original_case.get(key, key), UNCUT), text, service)


def unread_keys(table: Table, pairs: Mapping[bytes, bytes | None], paths: Iterable[bytes]) -> Iterator[Problem]:
    """Yield the keys below the table's folder that no service reads, with one problem per folder."""
    root, read = table.root, tuple(paths)
    folders: Counter[bytes] = Counter()
    for key, value in pairs.items():
        if not key.startswith(root) or key.startswith(read) or (key.endswith(b"/") and not value):
            continue
        first, slash, _ = key.removeprefix(root).partition(b"/")
        if slash:
            folders[first] += 1
            continue
        use = f"{printable(root)}SERVICE/KEY, such as {printable(root + b'alias/' + first)}"
        yield Problem(printable(key, UNCUT), f"not an entry: no service between table and key (use {use})")
    for folder, number in folders.items():
        text = f"{counted(number, 'entry is', 'entries are')} never read: {_hint(table, printable(folder))}"
        yield Problem(f"{printable(root + folder, UNCUT)}/", text)


def _hint(table: Table, folder: str) -> str:
    if folder in table.services:
        return (
            f"`paths` sets the folder of {folder} to {printable(table.path(SERVICES[folder]))} (move the entries there)"
        )
    if folder in SERVICES:
        return f"{folder} is not among the services of table {printable(table.name)} (add it to `services`)"
    close = difflib.get_close_matches(folder.lower(), SERVICES, 1)
    what = f"rename the folder to {close[0]}" if close else f"use one of {', '.join(SERVICES)}"
    return f"smtpd has no service {folder} ({what})"


def _print(report: Report) -> None:
    problems = [(each.key, each.problem) for each in report.problems or ()]
    echo_problems(problems, err=False)
    found = counted(len(problems), "problem", "problems") if problems else "no problems"
    text = f"{counted(report.entries or 0, 'entry', 'entries')}, {found} ({'; '.join(report.source)})"
    if report.error is not None:
        text = f"{text}; {report.error}" if report.source else f"not checked: {printable(report.error, UNCUT)}"
    click.echo(f"{printable(report.table)}: {text}", err=True)
