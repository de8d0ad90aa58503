"""``table-consulctl export``: what stands in Consul as a file for smtpd, or for `consul kv import`."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from table_consul import config
from table_consul.ctl import files
from table_consul.ctl.entries import FormatError
from table_consul.ctl.main import SERVICE, UNCUT, pass_config
from table_consul.errors import SourceError, TableConsulError, printable
from table_consul.services import SERVICES, Service, Table, fold_key
from table_consul.services.entries import EntriesBuilder
from table_consul.sources.export import open_regular_file, read_bounded

if TYPE_CHECKING:
    from table_consul.ctl.plan import Stored

FORMATS = ("table", "aliases", "export")
PROBLEMS_SHOWN = 20


class UnsaidError(TableConsulError):
    """Some entries cannot be said in the format asked for."""


@click.command("export")
@click.argument("table_name", metavar="TABLE")
@click.argument("service_name", metavar="SERVICE", type=SERVICE)
@click.argument("file", metavar="[FILE]", default="-")
@click.option(
    "--format",
    "wanted",
    type=click.Choice(FORMATS),
    default="table",
    metavar="FORMAT",
    help=f"What to write, one of {', '.join(FORMATS)}; default: table.",
)
@pass_config
def command(settings: config.Config, *, wanted: str, table_name: str, service_name: str, file: str) -> int:
    """Write the entries of SERVICE in TABLE, as Consul has them now, to FILE or standard output.

    A table is a file for smtpd, for table NAME file:PATH. It holds what smtpd is told for each key, however that is
    written in Consul. What smtpd could not read from such a file (a key with a blank, ...), and what it cannot use, is
    told with its key, and nothing is written. aliases is the same, for alias. An export is what consul kv export
    writes, with every entry as it stands, but without folders.

    To import the file into the same TABLE and SERVICE changes nothing. FILE is replaced at once; where there may be
    passwords in it, only its owner can read it.

    Exit status: 0 it is written, 2 it is not.

    \b
    Examples:
      table-consulctl export aliases alias
      table-consulctl export aliases alias /etc/mail/aliases.copy
      table-consulctl export aliases credentials users.json --format export
    """  # noqa: D301 - the mark by which click keeps lines as they are
    table, service = settings.table(table_name), SERVICES[service_name]
    if wanted == "aliases" and service.name != "alias":
        raise click.UsageError(f"--format aliases is for alias, not for {service.name}")
    stored = [each for each in _stored(settings, table, service) if not each.key.endswith(b"/")]
    if wanted == "export":
        text = files.export_text((each.key, each.value, each.flags) for each in stored)
    else:
        text = _table_text(table, service, stored)
    if file == "-":
        click.echo(_readable(text) if sys.stdout is not None and sys.stdout.isatty() else text, nl=False)
    else:
        replace_file(file, text, private=bool(service.fields))
    return 0


def _readable(text: bytes) -> str:
    """The text for a terminal, without bytes that it could play with."""
    lines = ("\t".join(printable(part, UNCUT) for part in line.split(b"\t")) for line in text.split(b"\n"))
    return "\n".join(lines)


def _stored(settings: config.Config, table: Table, service: Service) -> Sequence[Stored]:
    from table_consul.ctl import (
        plan,
        txn,
    )

    path = table.path(service)
    address = settings.consul.addresses[0]
    if not address.startswith("file://"):
        with contextlib.closing(txn.Store(settings.consul)) as store:
            return store.entries(path)
    name = address.removeprefix("file://")
    try:
        with open(name, "rb", opener=open_regular_file) as file:
            parsed = files.read_export(read_bounded(file), service, path, path)
    except FormatError as error:
        raise SourceError(f"{printable(name)}: {error}") from None
    return [plan.Stored(path + each.key, each.value, 0, each.flags) for each in parsed.entries]


def _table_text(table: Table, service: Service, stored: Sequence[Stored]) -> bytes:
    path = table.path(service)
    builder = EntriesBuilder(table, service)
    builder.take((each.key[len(path) :], each.value) for each in stored)
    problems = [str(error) for key, error in builder.errors.items() if key not in builder.incomplete]
    text, unsaid = files.table_text(service, sorted(builder.values.items()))
    problems += [f"{printable(path + key)}: cannot be said in a file: table" for key in unsaid]
    spelled = {fold_key(each.key) for each in stored}
    if len(spelled) < len(stored):
        problems += map(str, builder.spelling)
    if not problems:
        return text
    for problem in problems[:PROBLEMS_SHOWN]:
        click.echo(problem, err=True)
    if len(problems) > PROBLEMS_SHOWN:
        click.echo(f"... and {len(problems) - PROBLEMS_SHOWN} more", err=True)
    raise UnsaidError(f"{len(problems)} of {len(stored)} entries stand in the way; --format export holds all of them")


def replace_file(path: str, data: bytes, *, private: bool) -> None:
    """Put the data in the place of a file: whoever reads it finds all of the old or all of the new.

    A private one can be read by this user alone; else a file that was there keeps its mode and, where this user may
    give files away, its owner. What is no file, such as /dev/stdout, is written to as it is. Raises OSError.
    """
    former = None
    try:
        former = os.stat(path)
        mode = former.st_mode
    except FileNotFoundError:
        umask = os.umask(0o077)
        os.umask(umask)
        mode = stat.S_IFREG | (0o666 & ~umask)
    if not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            file.write(data)
        return
    path = os.path.realpath(path)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=os.path.dirname(path))
    except OSError as error:
        error.filename = path  # nobody knows the temporary name
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            if former is not None and not private:
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), former.st_uid, former.st_gid)
            os.fchmod(file.fileno(), 0o600 if private else stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
