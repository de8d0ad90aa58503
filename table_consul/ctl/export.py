"""``table-consulctl export``: write entries of Consul to a file for smtpd, or for `consul kv import`."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from table_consul import config
from table_consul.ctl import formats, writing
from table_consul.ctl.formats import FormatError
from table_consul.ctl.main import FILE, NO, SERVICE, UNCUT, echo_problems, is_terminal, pass_config
from table_consul.errors import counted, printable
from table_consul.files import replace_file
from table_consul.services import SERVICES, Service, Table
from table_consul.services.entries import Entries
from table_consul.sources.export import export_entry

if TYPE_CHECKING:
    from table_consul.ctl.plan import Stored

FORMATS = ("table", "aliases", "export")


@click.command("export")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=SERVICE)
@click.argument("file", type=FILE, metavar="[FILE]", default="-")
@click.option(
    "--format",
    "wanted",
    type=click.Choice(FORMATS),
    default="table",
    metavar="FORMAT",
    help=f"One of {', '.join(FORMATS)} (default: table).",
)
@click.option("--skip-refused", is_flag=True, help="Skip entries that FORMAT cannot hold.")
@pass_config
def command(
    settings: config.Config, *, wanted: str, skip_refused: bool, table_name: str, service_name: str, file: str
) -> int:
    """Write the entries of SERVICE in TABLE to FILE or standard output.

    table and aliases are files for smtpd; export is the format of consul kv export, with every entry as stored.
    Importing the file into the same TABLE and SERVICE changes nothing. FILE is replaced atomically; if it may contain
    passwords, only its owner can read it.

    Exit status: 0 written, 1 written without the entries listed, 2 not written.

    \b
    Examples:
      table-consulctl export aliases alias
      table-consulctl export aliases alias /etc/mail/aliases.copy
      table-consulctl export aliases credentials users.json --format export
    """  # noqa: D301 - click does not wrap the lines after a \b
    table, service = settings.table(table_name), SERVICES[service_name]
    if wanted == "aliases" and service.name != "alias":
        raise click.UsageError(f"--format aliases requires the service alias, not {service.name}")
    stored = [each for each in _stored(settings, table, service) if not each.key.endswith(b"/")]
    refused = 0
    if wanted == "export":
        text = _export_text(stored)
    else:
        text, refused = _table_text(table, service, stored, skip=skip_refused)
    if file == "-":
        click.echo(_readable(text) if is_terminal(sys.stdout) else text, nl=False)
    else:
        write_file(file, text, private=any(each.fields for each in table.sharing(service)))
    return NO if refused else 0


def _export_text(stored: Sequence[Stored]) -> bytes:
    entries = [export_entry(each.key, each.value, each.flags) for each in stored]
    return b"[\n" + b",\n".join(entries) + b"\n]\n" if entries else b"[]\n"


def _readable(text: bytes) -> str:
    """The text for a terminal, with escapes in place of control characters other than tabs and newlines."""
    return "\n".join("\t".join(printable(part, UNCUT) for part in line.split(b"\t")) for line in text.split(b"\n"))


def _stored(settings: config.Config, table: Table, service: Service) -> Sequence[Stored]:
    from table_consul.ctl import loader, plan, txn

    path = table.path(service)
    if settings.consul.file is not None:
        exported, _ = loader.read_file(settings.consul.file)
        return [plan.Stored(each.key, each.value, 0, each.flags) for each in exported if each.key.startswith(path)]
    with contextlib.closing(txn.Store(settings.consul)) as store:
        return store.entries(path)


def _table_text(table: Table, service: Service, stored: Sequence[Stored], *, skip: bool) -> tuple[bytes, int]:
    """The text of the file, and the number of entries left out."""
    path = table.path(service)
    entries = Entries(table, service, ((each.key[len(path) :], each.value) for each in stored))
    text, left_out = formats.table_text(service, sorted(entries.values.items()))
    problems = [(error.key, error.text) for key, error in entries.errors.items() if key not in entries.incomplete]
    problems += [(path + key, "cannot be written to a file: table") for key in left_out]
    problems += entries.spelling
    if problems:
        echo_problems([(printable(key), what) for key, what in problems], limit=writing.PROBLEMS_SHOWN)
        count = f"{len(problems)} of {counted(len(stored), 'entry', 'entries')} cannot be written in this format"
        if not skip:
            raise FormatError(f"{count}; use --format export, or --skip-refused to write the rest")
    return text, len(problems)


def write_file(path: str, data: bytes, *, private: bool) -> None:
    """Replace the content of a file atomically: a reader finds all of the old content or all of the new.

    If ``private``, only this user may read the file. Otherwise an existing file keeps its mode and, if this user may
    set it, its owner. A file that is not regular, such as /dev/stdout, is written directly.

    Raises:
        OSError: it cannot be written; the file is unchanged.
    """
    former = None
    with contextlib.suppress(FileNotFoundError):
        former = os.stat(path)
    if former is not None and not stat.S_ISREG(former.st_mode):
        with open(path, "wb") as file:
            file.write(data)
        return
    umask = os.umask(0o077)
    os.umask(umask)
    mode = 0o600 if private else stat.S_IMODE(former.st_mode) if former else 0o666 & ~umask
    owner = None if private or former is None else (former.st_uid, former.st_gid)
    replace_file(os.path.realpath(path), data, mode=mode, owner=owner)
