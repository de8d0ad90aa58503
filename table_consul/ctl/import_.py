"""``table-consulctl import``: write the entries of a file to Consul, after showing what changes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from table_consul import config
from table_consul.ctl import files, main, writing
from table_consul.ctl.files import FormatError, LineProblem, ParsedFile
from table_consul.ctl.main import json_text
from table_consul.errors import SourceError, counted, printable
from table_consul.services import SERVICES, Service, Table
from table_consul.sources.export import iter_export

if TYPE_CHECKING:
    from table_consul.ctl.plan import Plan

# Half a million users fit; /dev/zero does not fill the memory of the mail host.
FILE_MAX_BYTES = 1 << 30
# As much as shows whether a file is text; an endless one is not read to the limit.
HEAD_BYTES = 1 << 20


@click.command("import")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=main.SERVICE)
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@click.option("--prune", is_flag=True, help="Remove entries that FILE does not have.")
@click.option(
    "--format",
    "wanted",
    type=click.Choice(files.FORMATS),
    default="auto",
    metavar="FORMAT",
    help=f"The format of FILE, one of {', '.join(files.FORMATS)}; default: auto.",
)
@click.option("--from", "below", metavar="FOLDER", help="With an export: the folder whose keys to import.")
@click.option("--record", is_flag=True, help="With a passwd file: write JSON objects that several services can share.")
@click.option("--token-file", metavar="PATH", help="The ACL token to write with, before that of the environment.")
@main.as_json
@writing.with_undo
@main.pass_config
def command(  # noqa: PLR0913 - the command line
    settings: config.Config,
    *,
    wanted: str,
    below: str | None,
    record: bool,
    prune: bool,
    dry_run: bool,
    token_file: str | None,
    undo: writing.Undo,
    as_json: bool,
    table_name: str,
    service_name: str,
    file: str,
) -> int:
    """Write the entries of FILE to Consul, for SERVICE of TABLE. If FILE is -, standard input is read.

    The entries to add (+), change (~) and remove (-) are shown and then written. If smtpd could not use an entry, its
    line is printed and nothing is written. A new key that newer releases of Consul can neither show nor delete is
    printed and left out. Keys that somebody else changes at the same time are skipped: to write them, or the rest after
    ^C or an outage of Consul, run the same command again.

    FILE is in the format aliases (aliases(5) of smtpd, Postfix or sendmail), table (a file: table of smtpd), passwd
    (passwd(5), shadow(5), master.passwd(5), or a passwd-file of Dovecot) or export (of consul kv export). auto tells
    them apart by SERVICE and by how the lines look. If a line could mean either, it asks for --format.

    Exit status: 0 everything is written, or nothing needed to be; 1 with --dry-run, something would change; 2
    something was not written.

    \b
    Examples:
      table-consulctl import aliases alias /etc/aliases --dry-run
      table-consulctl import aliases alias /etc/aliases --prune
      table-consulctl import aliases credentials /etc/mail/passwd
      table-consulctl import aliases domain /etc/mail/domains
      consul kv export old/ | table-consulctl import aliases alias -
    """  # noqa: D301 - click keeps the lines after a \b as they are
    from table_consul.ctl import plan

    table, service = settings.table(table_name), SERVICES[service_name]
    path = table.path(service)
    writing.check_address(settings)
    name = "standard input" if file == "-" else printable(file)
    folder = None if below is None else os.fsencode(f"{below.strip('/')}/".removeprefix("/"))
    try:
        parsed = parse(_content(file), service, wanted, path, folder, record=record)
    except (FormatError, SourceError, OSError) as error:
        text = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
        raise FormatError(f"{name}: {text}") from None
    for option, given, form in (("--from", below is not None, "export"), ("--record", record, "passwd")):
        if given and parsed.format != form:
            raise click.UsageError(f"{option} is for --format {form}, but {name} is read as {parsed.format}")
    if prune and not parsed.entries and not parsed.problems:
        raise FormatError(f"{name}: no entries; with --prune every stored entry would be removed")
    duplicates = [] if parsed.format == "export" else plan.duplicate_problems(parsed)
    _raise_problems(name, parsed, parsed.problems + duplicates)
    folders = {each.path(other) for each in (table, *settings.tables.values()) for other in SERVICES.values()}
    others = [folder for folder in folders if folder.startswith(path) and folder != path]
    target = writing.Target.with_note(table, service)
    with contextlib.closing(writing.open_store(settings, token_file)) as store:
        stored = store.entries(path)
        planned = plan.plan(table, service, parsed, stored, prune=prune, records=record, others=others)
        _raise_problems(name, parsed, planned.problems)
        refused = _with_lines(name, parsed, planned.refused)
        main.echo_problems(refused, limit=None if dry_run else writing.PROBLEMS_SHOWN)
        report = _report(table, service, planned, parsed, dry_run=dry_run)
        try:
            if not as_json:
                _echo_changes(report)
            for progress in [] if dry_run else writing.write(target, planned.changes, store, undo):
                report["written"] += len(progress.written)
                report["conflicts"] += [json_text(change.key) for change in progress.conflicts]
            _echo_result(report, as_json=as_json)
        except BaseException:
            if not dry_run:
                keys = counted(len(planned.changes), "key", "keys")
                text = f"interrupted: {report['written']} of {keys} written"
                click.echo(f"{text}; run the same command again to finish", err=True)
                if as_json:
                    with contextlib.suppress(OSError):  # standard output may be the reason
                        click.echo(json.dumps(report))
            raise
    if report["conflicts"] or "refused" in report:
        return main.FAILED
    return main.NO if dry_run and planned.changes else 0


def _content(file: str) -> bytes:
    if file == "-" and sys.stdin is None:
        raise FormatError("closed")
    with click.open_file(file, "rb") as opened:
        data: bytes = opened.read(HEAD_BYTES)
        if b"\0" not in data:
            data += opened.read(FILE_MAX_BYTES)
    if len(data) > FILE_MAX_BYTES:
        raise FormatError(f"more than {FILE_MAX_BYTES >> 20} MB; import it in parts")
    return data


def parse(data: bytes, service: Service, wanted: str, path: bytes, below: bytes | None, *, record: bool) -> ParsedFile:
    """The content of a file in the format ``wanted``, one of `files.FORMATS`.

    ``path`` and ``below`` are for `files.entries_of_export`, ``record`` for `files.read_passwd`.

    Raises:
        FormatError: it is not text, not in the format, or it is not clear in which.
        SourceError: it is not an export.
    """
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise FormatError(f"not text: line {line} contains a NUL byte (decompress the file, or convert it to UTF-8)")
    data = data.removeprefix(files.BYTE_ORDER_MARK)
    form = files.detect_format(data, service) if wanted == "auto" else wanted
    if form == "export":
        return files.entries_of_export([*iter_export(io.BytesIO(data))], service, path, below)
    if form == "aliases" and service.name == "alias":
        return files.read_aliases(data, cautious=wanted == "auto")
    if form == "passwd" and service.fields:
        return files.read_passwd(data, service, record=record)
    if form == "table":
        return files.read_table(data, service)
    raise FormatError(f"a file of the format {form} has nothing for {service.name}")


def _raise_problems(name: str, parsed: ParsedFile, problems: Sequence[LineProblem]) -> None:
    """Print each problem with its line; raise FormatError if there is one."""
    if not problems:
        return
    main.echo_problems(_with_lines(name, parsed, problems), limit=writing.PROBLEMS_SHOWN)
    count = counted(len(problems), "problem", "problems")
    raise FormatError(f"{name}: {count} (read as {parsed.format}); nothing was written")


def _with_lines(name: str, parsed: ParsedFile, problems: Sequence[LineProblem]) -> list[tuple[str, str]]:
    """Each problem with its place: FILE:LINE, as compilers print it, for editors."""
    form = "{}:{}" if parsed.unit == "line" else "{}: entry {}"
    return [(form.format(name, line) if line else name, printable(text, 1000)) for line, text in sorted(problems)]


def _report(table: Table, service: Service, plan: Plan, parsed: ParsedFile, *, dry_run: bool) -> dict[str, Any]:
    """The document that --json prints, from which the text is made as well."""
    target = writing.Target.of(table, service)
    return {
        "table": table.name,
        "service": service.name,
        "path": json_text(target.path),
        "format": parsed.format,
        "dry_run": dry_run,
        "changes": writing.documents(plan.changes, target, hashed=service.hashed),
        "unchanged": plan.unchanged,
        "left_out": parsed.left_out,
        "written": 0,
        "conflicts": [],
        **({"refused": [printable(text, 1000) for _, text in plan.refused]} if plan.refused else {}),
    }


def _echo_changes(report: dict[str, Any]) -> None:
    changes = report["changes"]
    limit = None if report["dry_run"] else writing.CHANGES_SHOWN
    writing.echo_changes(changes, limit=limit, more=" (--dry-run shows all)")
    if report["left_out"]:
        click.echo(f"skipped {counted(report['left_out'], 'entry', 'entries')} in other folders", err=True)
    counts = Counter(change["change"] for change in changes)
    refused = f", {len(report['refused'])} refused" if "refused" in report else ""
    click.echo(
        ", ".join(f"{counts[word]} to {word}" for word in writing.STYLES)
        + f", {report['unchanged']} unchanged{refused}"
    )


def _echo_result(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
    elif not report["dry_run"]:
        conflict = "changed in Consul since it was read; skipped (run the import again)"
        main.echo_problems([(printable(key), conflict) for key in report["conflicts"]])
        if report["changes"]:
            click.echo(f"{report['written']} written")
