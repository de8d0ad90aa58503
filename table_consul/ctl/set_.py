"""``table-consulctl set``: write one entry."""

from __future__ import annotations

import os

import click

from table_consul import config
from table_consul.ctl import main, writing
from table_consul.ctl.formats import FileEntry, ParsedFile
from table_consul.errors import TableConsulError, printable
from table_consul.services import SERVICES


@click.command("set")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=main.SERVICE)
@click.argument("key", metavar="KEY")
@click.argument("value", metavar="[VALUE]", default="")
@click.option("--force", is_flag=True, help="Write even what lint would report.")
@writing.options
def command(
    settings: config.Config,
    *,
    table_name: str,
    service_name: str,
    key: str,
    value: str,
    force: bool,
    options: writing.Options,
) -> int:
    """Store VALUE under KEY. If VALUE is -, it is read from standard input.

    A value that lint would report is rejected. In the record of a user, only the fields of SERVICE change.

    Exit status: 0 written or unchanged, 2 not written.

    \b
    Examples:
      table-consulctl set aliases alias root gilles,eric
      table-consulctl set domains domain example.org
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl import plan

    table, service = settings.table(table_name), SERVICES[service_name]
    name, problem = writing.folded_key(table, service, os.fsencode(key))
    if problem and not force:
        raise TableConsulError(f"{printable(name)}: {problem}; nothing was written")
    parsed = ParsedFile("text", [FileEntry(name, _value(value), 1)], [])
    target = writing.Target.with_note(table, service)
    with writing.open_store(settings, options) as store:
        stored = store.entries(target.path)
        if not stored:
            click.echo(f"note: {printable(target.path)} has no entries yet", err=True)
        planned = plan.plan_edits(table, service, parsed, stored)
        writer = writing.Writer(target, store, options)
        return writer.judge_and_apply(planned, force=force)


def _value(text: str) -> bytes:
    """The value from the command line, or from standard input without the newline at its end."""
    from table_consul.ctl import plan

    if text != "-":
        return os.fsencode(text)
    data = main.standard_input().read(plan.VALUE_MAX_BYTES + 1)
    if len(data) > plan.VALUE_MAX_BYTES:
        raise TableConsulError(f"standard input: more than the {plan.VALUE_MAX_BYTES} bytes that Consul accepts")
    return data.rstrip(b"\r\n")
