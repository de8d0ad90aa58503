"""``table-consulctl import``: write the entries of a file to Consul, after showing the changes."""

from __future__ import annotations

import io
import os
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from table_consul import config
from table_consul.ctl import formats, main, smtpdconf, writing
from table_consul.ctl.formats import FormatError, LineProblem, ParsedFile
from table_consul.errors import SourceError, counted, printable, problem_of
from table_consul.services import SERVICES, Service, Table
from table_consul.sources.export import iter_export

if TYPE_CHECKING:
    from table_consul.ctl.plan import Plan, Stored

# Enough for half a million users; /dev/zero does not fill the memory of the mail host.
FILE_MAX_BYTES = 1 << 30
# Enough to see that a file is not text, before an endless one is read up to the limit.
HEAD_BYTES = 1 << 20
# Without --max-removals: fewer are an ordinary edit of a small table.
REMOVALS_MIN = 10
_NUMBERS = re.compile(r"[0-9]+")


def _check_number(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[0-9]{1,9}%?", text):
        raise click.BadParameter("must be a number, such as 100, or a percentage, such as 20%")
    return text


@click.command("import")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=main.SERVICE)
@click.argument("file", type=main.FILE, metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@click.option("--prune", is_flag=True, help="Remove entries that FILE does not have.")
@click.option("--skip-refused", is_flag=True, help="Skip entries that smtpd could not use; write the rest.")
@click.option(
    "--max-removals", metavar="N", callback=_check_number, help="Ask before removing more than N or N% of the entries."
)
@click.option(
    "--format",
    "wanted",
    type=click.Choice(formats.FORMATS),
    default="auto",
    metavar="FORMAT",
    help=f"{', '.join(formats.FORMATS[:-1])} or {formats.FORMATS[-1]}.",
)
@click.option("--from", "below", metavar="NAME", help="Import this folder of an export, or table of smtpd.conf.")
@click.option("--record", is_flag=True, help="Write the users of a passwd file as JSON records.")
@writing.options
def command(  # noqa: PLR0913 - the command line
    settings: config.Config,
    *,
    wanted: str,
    below: str | None,
    record: bool,
    prune: bool,
    dry_run: bool,
    skip_refused: bool,
    max_removals: str | None,
    options: writing.Options,
    table_name: str,
    service_name: str,
    file: str,
) -> int:
    """Write the entries of FILE (standard input if -) to SERVICE of TABLE.

    Exit status: 0 written or unchanged; 1 something would change (--dry-run) or was left out (--skip-refused); 2 not
    written.

    \b
    Examples:
      table-consulctl import aliases alias /etc/aliases --dry-run
      table-consulctl import aliases alias /etc/aliases --prune

    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl import plan

    table, service = settings.table(table_name), SERVICES[service_name]
    path = table.path(service)
    name = "standard input" if file == "-" else printable(file)
    folders = {each.path(other) for each in (table, *settings.tables.values()) for other in SERVICES.values()}
    others = [folder for folder in folders if folder.startswith(path) and folder != path]
    limit = None if dry_run else writing.PROBLEMS_SHOWN
    with writing.open_store(settings, options) as store:
        parsed = _read(name, file, table, service, wanted, below, record=record)
        if prune and not parsed.entries and not parsed.problems:
            raise FormatError(f"{name}: no entries; --prune would remove every stored entry")
        target = writing.Target.with_note(table, service)
        # A line that cannot be read may be that of any stored entry, which --prune would remove.
        skip = skip_refused and not (prune and parsed.problems)
        try:
            stored = store.entries(path) if parsed.entries else []
        except SourceError:
            _echo_problems(name, parsed, parsed.problems, limit=limit)
            raise
        with main.patience("checking the entries"):
            planned = plan.plan(table, service, parsed, stored, prune=prune, records=record, skip=skip, others=others)
        _echo_problems(f"note: {name}", parsed, planned.notes, limit=limit)
        _echo_problems(name, parsed, sorted(planned.problems + planned.refused), limit=limit)
        conflict = "changed in Consul since it was read; skipped (run the import again)"
        report = _report(planned, parsed, dry_run=dry_run)
        writer = writing.Writer(target, store, options, conflict, report)
        removals = _excessive_removals(planned, stored, max_removals)
        del stored
        changes, status = planned.changes, 0
        if dry_run:
            if not options.as_json:
                _echo_changes(planned, target, report)
            _warn(removals, main.as_writer(settings.consul, options.token_file), planned)
        elif not planned.problems:
            ask = bool(removals) and file != "-" and not options.as_json

            def prepare() -> None:
                if not options.as_json:
                    _echo_changes(planned, target, report)
                if removals:
                    _confirm(name, removals, ask=ask)

            again = " (run the same command again to finish)"
            status = writer.apply(changes, refused=planned.refused, again=again, prepare=prepare)
    if options.as_json and (dry_run or planned.problems):
        click.echo(writer.document(changes, refused=planned.refused))
    if planned.problems:
        count = counted(len(planned.problems), "problem", "problems")
        hint = "fix them: --prune requires readable lines" if skip_refused else "use --skip-refused to write the rest"
        raise FormatError(f"{name}: {count} (read as {parsed.format}); nothing was written ({hint})")
    if status or (planned.refused and not skip):
        return main.FAILED
    return main.NO if planned.refused or (dry_run and changes) else 0


def _read(
    name: str, file: str, table: Table, service: Service, wanted: str, below: str | None, *, record: bool
) -> ParsedFile:
    try:
        parsed = parse(_content(file), table, service, wanted, below, record=record)
    except (FormatError, SourceError, OSError) as error:
        raise FormatError(f"{name}: {problem_of(error)}") from None
    for option, given, forms in (("--from", below is not None, ("export", "conf")), ("--record", record, ("passwd",))):
        if given and parsed.format not in forms:
            raise click.UsageError(
                f"{option} requires --format {' or '.join(forms)}, but {name} is read as {parsed.format}"
            )
    return parsed


def _excessive_removals(plan: Plan, stored: Sequence[Stored], limit: str | None) -> str:
    """The number of removals as text, if it exceeds the limit; otherwise empty."""
    count = sum(change.value is None for change in plan.changes)
    total = sum(not each.key.endswith(b"/") for each in stored)
    number = int((limit or "10%").rstrip("%"))
    allowed = number if limit and not limit.endswith("%") else total * number // 100
    allowed = allowed if limit else max(allowed, REMOVALS_MIN)
    return f"removes {count} of {counted(total, 'entry', 'entries')}" if count > allowed else ""


def _confirm(name: str, removals: str, *, ask: bool) -> None:
    """Ask for confirmation of an import that removes many entries.

    Raises:
        FormatError: there is no terminal, or the answer is no.
    """
    if not (ask and main.is_terminal(sys.stdin) and main.is_terminal(sys.stderr)):
        raise FormatError(f"{name}: {removals}; nothing was written (to allow this, use --max-removals)")
    if not click.confirm(f"This {removals}. Continue?", err=True):
        raise FormatError(f"{name}: nothing was written")


def _warn(text: str, consul: config.ConsulConfig, plan: Plan) -> None:
    """Warn about what a dry run does not reach: removals to confirm (``text``), and a token that may not write."""
    from table_consul.ctl import access, txn

    if text:
        click.echo(f"warning: {text}, which requires confirmation or --max-removals", err=True)
    sample = plan.changes[:: len(plan.changes) // access.AUTHORIZATIONS_MAX + 1]
    if denied := access.unwritable(consul, [change.key for change in sample]):
        click.echo(f"warning: the token may not write {printable(denied[0])} ({txn.POLICY_HINT})", err=True)


def _content(file: str) -> bytes:
    if file == "-" and sys.stdin is None:
        raise FormatError("closed")
    with click.open_file(file, "rb") as opened:
        data: bytes = opened.read(HEAD_BYTES)
        if b"\0" not in data:
            data += opened.read(FILE_MAX_BYTES)
    if len(data) > FILE_MAX_BYTES:
        raise FormatError(f"more than {FILE_MAX_BYTES >> 20} MiB (import it in parts)")
    return data


def parse(
    data: bytes, table: Table, service: Service, wanted: str, below: str | None = None, *, record: bool = False
) -> ParsedFile:
    """The entries of a file in the format ``wanted``, one of `formats.FORMATS`, for a service of the table.

    ``below`` is the folder of an export, or the table of an smtpd.conf, to import; ``record`` is for
    `formats.read_passwd`.

    Raises:
        FormatError: the file is not text, is not in this format, or could be in several.
        SourceError: the file is not an export.
    """
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise FormatError(f"not text: line {line} contains a NUL byte (decompress the file, or convert it to UTF-8)")
    data = data.removeprefix(BOM_UTF8)  # of Windows editors
    form = formats.detect_format(data, service) if wanted == "auto" else wanted
    if form == "export":
        folder = None if below is None else os.fsencode(f"{below.strip('/')}/".removeprefix("/"))
        return formats.entries_of_export([*iter_export(io.BytesIO(data))], service, table.path(service), folder)
    if form == "conf":
        return smtpdconf.inline_table(data, service, table.name, below)
    if form == "transport" and service.name == "relayhost":
        return formats.read_transport(data)
    if form == "aliases" and service.name == "alias":
        return formats.without_domains(formats.read_aliases(data, cautious=wanted == "auto"))
    if form == "passwd" and service.fields:
        return formats.read_passwd(data, service, record=record)
    if form == "table":
        return formats.read_table(data, service)
    raise FormatError(f"the format {form} is not for the service {service.name}")


def _echo_problems(name: str, parsed: ParsedFile, problems: Sequence[LineProblem], *, limit: int | None) -> None:
    """Print the problems, each kind once with all of its lines.

    Each starts with FILE:LINE, like the errors of a compiler, so that editors find the line.
    """
    groups: dict[tuple[bool, str], list[LineProblem]] = {}
    for problem in problems:
        groups.setdefault((problem.line > 0, _NUMBERS.sub("", problem.text)), []).append(problem)
    form, units = ("{}:{}", "lines") if parsed.unit == "line" else ("{}: entry {}", "entries")
    echoed = []
    for (numbered, _), (first, *others) in groups.items():
        where = form.format(name, first.line) if numbered else name
        text = f"{printable(first.key)}: {first.text}" if first.key else first.text
        if others:
            places = [str(each.line) if numbered else printable(each.key) for each in others[:limit]]
            more = f" and {len(others) - len(places)} more" if len(others) > len(places) else ""
            also = "also" if not numbered else f"also in {units if len(others) > 1 else parsed.unit}"
            text = f"{text}; {also} {', '.join(places)}{more}"
        echoed.append((where, text if limit is None else printable(text, 1000)))
    main.echo_problems(echoed, limit=limit)


def _report(plan: Plan, parsed: ParsedFile, *, dry_run: bool) -> dict[str, Any]:
    """Further fields for `writing.Writer.document`."""
    return {
        "format": parsed.format,
        "dry_run": dry_run,
        "unchanged": plan.unchanged,
        "left_out": parsed.left_out,
        "notes": writing.problem_documents(plan.notes),
        "problems": writing.problem_documents(plan.problems),
    }


def _echo_changes(plan: Plan, target: writing.Target, report: dict[str, Any]) -> None:
    limit = len(plan.changes) if report["dry_run"] else writing.CHANGES_SHOWN
    writing.echo_changes(plan.changes, target, limit=limit, more=" (use --dry-run to list all)")
    if report["left_out"]:
        click.echo(f"skipped {counted(report['left_out'], 'entry', 'entries')} in other folders", err=True)
    refused = f", {len(plan.refused)} refused" if plan.refused else ""
    click.echo(f"{writing.summary(plan.changes)}, {plan.unchanged} unchanged{refused}")
