"""``table-consulctl unset``: remove entries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import click

from table_consul import config
from table_consul.ctl import main, writing
from table_consul.ctl.formats import ParsedFile
from table_consul.errors import printable
from table_consul.services import SERVICES, fold_key


@click.command("unset")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=main.SERVICE)
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Remove an alias even if another one needs it.")
@writing.options
def command(
    settings: config.Config,
    *,
    table_name: str,
    service_name: str,
    keys: tuple[str, ...],
    force: bool,
    options: writing.Options,
) -> int:
    """Remove each KEY. From the record of a user, only the fields of SERVICE are removed.

    Exit status: 0 removed, 1 some KEY not found and the others removed, 2 not removed.

    \b
    Examples:
      table-consulctl unset aliases alias root
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl import plan

    table, service = settings.table(table_name), SERVICES[service_name]
    target = writing.Target.of(table, service)
    with writing.open_store(settings, options) as store:
        stored = store.entries(target.path)
        found = dict(_found(keys, [each.key[len(target.path) :] for each in stored]))
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        main.echo_problems([(printable(key), "not found") for key in missing])
        parsed = ParsedFile("text", [], [])
        planned = plan.plan_edits(table, service, parsed, stored, [*dict.fromkeys(found.values())])
        report = {"not_found": [main.json_text(os.fsencode(key)) for key in missing]}
        status = writing.Writer(target, store, options, report=report).judge_and_apply(planned, force=force)
        gone = set(found.values())
        folded = {fold_key(key): key for key in gone}
        for each in stored:
            key = each.key[len(target.path) :]
            if key not in gone and (other := folded.get(fold_key(key))):
                problem = f"differs only in case from {printable(other)} and still answers (remove it too)"
                click.echo(f"note: {printable(each.key)}: {problem}", err=True)
        return status or (main.NO if missing else 0)


def _found(keys: Sequence[str], stored: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield each key that is found, with the stored key, which may differ in case."""
    folded = {fold_key(key): key for key in stored}
    exact = set(stored)
    for key in keys:
        name = os.fsencode(key)
        if name in exact or fold_key(name) in folded:
            yield key, name if name in exact else folded[fold_key(name)]
