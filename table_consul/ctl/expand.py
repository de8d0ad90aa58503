"""``table-consulctl expand``: show the recipients of mail to an address, and the lookups that find them.

The files that smtpd reads besides the tables are read here: included ones, as smtpd's user if root runs this, and
~/.forward, which smtpd itself opens as root.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from table_consul.check import as_smtpd_user
from table_consul.config import Config
from table_consul.ctl import recipients
from table_consul.ctl.main import FAILED, NO, UNCUT, as_json, json_text, pass_config
from table_consul.ctl.query import ask
from table_consul.ctl.recipients import PERMANENT, TEMPORARY, File
from table_consul.errors import SourceError, printable, problem_of
from table_consul.files import current_user, open_regular_file, parents, read_bounded, smtpd_user
from table_consul.protocol import FOUND, NOT_FOUND, Failed, Found, Reply
from table_consul.responder import OUTCOMES, Responder
from table_consul.services import SERVICES, Table
from table_consul.services.addresses import Element

if TYPE_CHECKING:
    from table_consul.ctl.loader import Loader

SYSTEM = "the system"
_WORDS = {"user": "user", "file": "file", "command": "command", "include": "the recipients in", "address": ""}
INCLUDE_BYTES = 16 << 20
# smtpd: forward.c, MAX_FORWARD_SIZE.
FORWARD_BYTES = 4 << 10
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


@click.command("expand")
@click.argument("table", metavar="TABLE")
@click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True)
@click.option("--virtual", metavar="TABLE", help="The table of virtual in smtpd.conf.")
@click.option("--userinfo", metavar="TABLE", help="The table of userbase (default: system users).")
@click.option("--live", is_flag=True, help="Read Consul instead of the snapshot file.")
@as_json
@pass_config
def command(
    config: Config,
    *,
    table: str,
    addresses: tuple[str, ...],
    virtual: str | None,
    userinfo: str | None,
    live: bool,
    as_json: bool,
) -> int:
    """Show each lookup that smtpd makes for mail to ADDRESS, and the recipients.

    TABLE is the table of alias in smtpd.conf. Without --virtual, it expands every ADDRESS; with --virtual, only users
    of this host. Included files and ~/.forward are read on this host. Other domains are not followed.

    Exit status: 0 smtpd accepts every ADDRESS, 1 it rejects one, 2 temporarily.

    \b
    Examples:
      table-consulctl expand aliases root
      table-consulctl expand aliases vera@example.org --virtual domains
    """  # noqa: D301 - click does not wrap the lines after a \b
    from table_consul.ctl.loader import Loader

    named = {"alias": table, "virtual": virtual, "userinfo": userinfo}
    tables = {use: config.table(name) for use, name in named.items() if name is not None}
    loader, responder = Loader(config, live=live), Responder()

    @functools.cache
    def lookup(use: str, key: bytes) -> Reply:
        if use not in tables:
            return _system_user(key)
        service = "userinfo" if use == "userinfo" else "alias"
        return ask(tables[use], service, "lookup", key, loader, responder)[0]

    def lists(use: str, domain: bytes) -> bool:
        return domain != b"" and ask(tables[use], "domain", "check", domain, loader, responder)[0] == FOUND

    here = {b"", b"localhost", os.fsencode(socket.gethostname()).lower()}
    asked = {recipients.parse_address(os.fsencode(address)).domain.lower() for address in addresses} - here
    inside = asked | (_domains(loader, tables["virtual"]) if virtual is not None else set())
    setup = recipients.Tables(
        lookup,
        local=lambda domain: domain in here or (virtual is None and (domain in asked or lists("alias", domain))),
        virtual=lambda domain: (
            virtual is not None and domain not in here and (domain in inside or lists("virtual", domain))
        ),
        delimiter=tables["alias"].subaddress_delimiter.encode(),
        include=include,
        forward=forward,
    )
    status = 0
    for address in addresses:
        outcome = recipients.expand(os.fsencode(address), setup)
        names = {use: printable(tables[use].name) if use in tables else SYSTEM for use in named}
        if as_json:
            click.echo(msgspec.json.encode(_json(address, outcome, names)))
        else:
            for line in _lines(address, outcome, names):
                click.echo(line)
        if outcome.rejection is not None:
            status = max(status, NO if outcome.rejection.startswith("5") else FAILED)
    return status


def _system_user(name: bytes) -> Reply:
    try:
        user = pwd.getpwnam(os.fsdecode(name))
    except (KeyError, ValueError):
        return NOT_FOUND
    return Found(os.fsencode(f"{user.pw_uid}:{user.pw_gid}:{user.pw_dir}"))


def _domains(loader: Loader, table: Table) -> set[bytes]:
    """The domains of the keys; direct mode reads keys one by one, and knows none in advance."""
    folder = table.path(SERVICES["alias"])
    if "alias" not in table.services:
        return set()
    try:
        loaded = loader.load(table, SERVICES["alias"])
    except SourceError:  # the lookups report it
        return set()
    keys = (key.removeprefix(folder).lower() for key in loaded.pairs if key.startswith(folder))
    return {key.rpartition(b"@")[2] for key in keys if b"@" in key} - {b""}


def include(path: bytes) -> File:
    """The file of ``:include:PATH`` (smtpd: aliases.c, aliases_expand_include)."""
    definite = os.geteuid() == 0 and smtpd_user() is not None
    with as_smtpd_user():
        try:
            with open(path, "rb", opener=open_regular_file) as file:
                return File(path, read_bounded(file, INCLUDE_BYTES))
        except PermissionError:
            if not definite:
                return _unreadable(path)
            return File(path, problem=f"not readable by {current_user()}; smtpd ignores it", ignored=True)
        except IsADirectoryError:
            return File(path, b"", problem="a folder, which smtpd reads as an empty file")
        except OSError as error:
            if error.errno == errno.EINVAL:  # of open_regular_file
                return File(path, problem=f"not followed: {problem_of(error)}")
            return File(path, problem=f"{problem_of(error)}; smtpd ignores it", ignored=True)
        except SourceError as error:
            return File(path, problem=f"not followed: {error}")


def forward(userinfo: bytes) -> File | None:
    """The file .forward in the home directory of ``UID:GID:HOME``; None if there is none.

    This is smtpd's parent_forward_open (smtpd.c) and secure_file (util.c).
    """
    uid, _, home = (*userinfo.split(b":", 2), b"", b"")[:3]
    path = home + b"/.forward"
    try:
        if os.stat(home).st_mode & stat.S_ISVTX:
            return File(path, problem="the home directory has the sticky bit (try: chmod -t)", reply=TEMPORARY)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if where := _insecure(file.fileno(), path, home, int(uid)):
                problem = f"{where}: must belong to uid {int(uid)}, and no other user may write it"
                return File(path, problem=problem, reply=PERMANENT)
            data = file.read(FORWARD_BYTES)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        return _unreadable(path) if os.geteuid() else File(path, problem=problem_of(error), reply=PERMANENT)
    except (OSError, ValueError) as error:
        link = isinstance(error, OSError) and error.errno == errno.ELOOP
        problem = "is a symbolic link, which smtpd does not follow" if link else problem_of(error)
        return File(path, problem=problem, reply=PERMANENT)
    if len(data) == FORWARD_BYTES:
        return File(path, problem=f"{FORWARD_BYTES} bytes or more", reply=TEMPORARY)
    return File(path, data)


def _unreadable(path: bytes) -> File:
    return File(path, problem=f"not readable by {current_user()}, but perhaps by smtpd (run this as root)")


def _insecure(descriptor: int, path: bytes, home: bytes, uid: int) -> str:
    """The file or folder that another user may write, empty if there is none."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != uid or status.st_mode & _WRITABLE:
        return printable(path)
    top = os.fsdecode(os.path.realpath(home))
    folders = [*parents(os.fsdecode(os.path.realpath(path)))]
    for folder in folders[folders.index(top) if top in folders else 0 :]:
        with contextlib.suppress(OSError):
            status = os.stat(folder)
            if status.st_uid not in (0, uid) or status.st_mode & _WRITABLE:
                return printable(folder)
    return ""


def _json(address: str, outcome: recipients.Outcome, names: dict[str, str]) -> dict[str, object]:
    def answer(reply: Reply) -> str | None:
        return json_text(reply.value or b"") if isinstance(reply, Found) else getattr(reply, "reason", None)

    return {
        "address": json_text(os.fsencode(address)),
        "accepted": outcome.rejection is None,
        "reply": outcome.rejection or None,
        "cause": outcome.cause or None,
        "recipients": [{"kind": each.kind, "name": json_text(bytes(each))} for each in outcome.recipients],
        "lookups": [
            {
                "table": names.get(table, SYSTEM),
                "service": _service(table),
                "key": json_text(key),
                "result": OUTCOMES[type(reply)],
                "answer": answer(reply),
                "nested": nested,
            }
            for table, key, reply, nested in outcome.lookups
        ],
    }


def _lines(address: str, outcome: recipients.Outcome, names: dict[str, str]) -> Iterator[str]:
    yield printable(os.fsencode(address), UNCUT)
    homes = {}
    unread = {lookup.key for lookup in outcome.lookups if isinstance(lookup.reply, Failed)}
    for table, key, reply, nested in outcome.lookups:
        answer = "not found"
        if isinstance(reply, Found):
            answer = printable(reply.value or b"(no recipients)", UNCUT)
            if table == "userinfo":
                homes[key] = (reply.value or b"").split(b":", 2)[-1]
        elif isinstance(reply, Failed):
            answer = "error" if table in names else reply.reason
        folder = f"{names[table]}/{_service(table)}: " if table in names else ""
        folder = f"{SYSTEM}: " if names.get(table) == SYSTEM else folder
        yield f"{'  ' * (nested + 1)}{folder}{printable(key, UNCUT)}: {answer}"
    for each in outcome.recipients:
        words = f"{_WORDS[each.kind]} {printable(bytes(each), UNCUT)}".lstrip()
        yield f"  -> {words}{_remark(each, homes, unread)}"
    if outcome.rejection is not None:
        yield f"  -> rejected: {outcome.rejection}{outcome.rejection and '; '}{printable(outcome.cause, UNCUT)}"


def _service(table: str) -> str:
    return "alias" if table == "virtual" else table


def _remark(element: Element, homes: dict[bytes, bytes], unread: set[bytes]) -> str:
    if element.kind == "address":
        return " (another domain: smtpd.conf decides)"
    home = homes.get(element.text.lower(), b"") if element.kind == "user" else b""
    if element.kind == "include" or home + b"/.forward" in unread:
        return f" ({'~/.forward ' if home else ''}not read)"
    return ""
