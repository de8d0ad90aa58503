"""``table-consulctl undo``: restore the entries that a write replaced."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from table_consul import config
from table_consul.ctl import main, writing
from table_consul.errors import TableConsulError, printable
from table_consul.services import SERVICES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from table_consul.ctl.plan import Change, Stored
    from table_consul.ctl.saves import Entry, Write


@click.command("undo")
@click.argument("number", metavar="[N]", type=click.IntRange(min=1), required=False)
@click.option("--list", "listed", is_flag=True, help="List the saved writes, the newest first.")
@writing.options
def command(settings: config.Config, *, number: int | None, listed: bool, options: writing.Options) -> int:
    """Restore the entries that write N replaced; without N, the newest write.

    A key that has changed since is listed and skipped. An undo is a write, so it can be undone too.

    Exit status: 0 everything is as before the write, 2 something was not restored or listed.

    \b
    Examples:
      table-consulctl undo --list
      table-consulctl undo 12
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl import saves

    folder = options.undo_folder
    numbers = saves.numbers(folder)
    if listed:
        return _print_list(folder, numbers, as_json=options.as_json)
    if number is None and not numbers:
        raise TableConsulError(f"{printable(folder)}: no saved writes")
    chosen = numbers[0] if number is None else number
    saved = saves.load(folder, chosen)
    hashed = saved.service not in SERVICES or SERVICES[saved.service].hashed
    target = writing.Target(saved.table, saved.service, saved.path.encode(), hashed)
    with writing.open_store(settings, options) as store:
        changes, changed = _changes(saved, store.entries(target.path))
        conflict = "changed in Consul since it was written; skipped"
        writer = writing.Writer(target, store, options, conflict)
        writer.show(changes)
        again = f" (to write the rest, run table-consulctl undo {chosen})"
        return writer.apply(changes, skipped=changed, again=again)


def _changes(saved: Write, stored: Sequence[Stored]) -> tuple[list[Change], list[bytes]]:
    """The changes that restore the entries, and the keys that have changed since the write."""
    from table_consul.ctl.plan import Change

    now = {each.key: each for each in stored}
    before, after = _by_key(saved.replaced), _by_key(saved.written)
    changes, changed = [], []
    for key in sorted({**before, **after}):
        entry, old, new = now.get(key), before.get(key), after.get(key)
        found = None if entry is None else (entry.value, entry.flags)
        if found == old:
            continue
        if found != new:
            changed.append(key)
            continue
        value, flags = old or (None, 0)
        changes.append(Change(key, entry, value, flags, new[0] if new else None, value))
    return changes, changed


def _by_key(entries: Sequence[Entry]) -> dict[bytes, tuple[bytes, int]]:
    return {each.key.encode(): (each.value, each.flags) for each in entries}


def _print_list(folder: str, numbers: Sequence[int], *, as_json: bool) -> int:
    """Print the writes, and return the exit status."""
    problems: dict[str, None] = {}  # that of the folder is one problem, not one for each write
    documents = [*_documents(folder, numbers, problems)]
    for problem in problems:
        click.echo(problem, err=True)
    status = main.FAILED if problems else 0
    if as_json:
        click.echo(json.dumps({"folder": os.fsdecode(folder), "writes": documents}))
        return status
    for each in documents:
        counts = f"+{each['added']} ~{each['changed']} -{each['removed']}"
        words = (each["time"], each["user"], each["table"], each["service"], counts)
        click.echo(f"{each['number']:>4}  {'  '.join(map(printable, words))}")
    return status


def _documents(folder: str, numbers: Sequence[int], problems: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield what is listed of each write; the problems of those that cannot be read go to ``problems``."""
    from table_consul.ctl import saves

    for number in numbers:
        try:
            saved = saves.load(folder, number)
        except TableConsulError as error:
            problems[str(error)] = None
            continue
        before, after = _by_key(saved.replaced), _by_key(saved.written)
        yield {
            "number": number,
            "time": saved.time,
            "user": saved.user,
            "table": saved.table,
            "service": saved.service,
            "command": saved.command,
            "added": len(after.keys() - before),
            "changed": len(before.keys() & after),
            "removed": len(before.keys() - after),
        }
