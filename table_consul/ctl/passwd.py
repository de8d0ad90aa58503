"""Users of passwd(5), shadow(5), master.passwd(5), and of passwd-files of Dovecot's; pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from table_consul.ctl.entries import BLANKS, Entry, FormatError, Parsed, Problem, content
from table_consul.services import Service, fold_key

# name, password, uid, gid, gecos, home; a shell and more may follow, as in passwd-files of Dovecot's.
_FIELDS = 6
# master.passwd(5) of the BSDs: name, password, uid, gid, class, change, expire, gecos, home, shell.
_MASTER_FIELDS = 10
# A password of nothing but the marks of shadow(5), `!*` among them.
LOCKED = b"*"
# More digits make no id, and int() of very many takes long.
_ID_DIGITS = 20


def read_passwd(data: bytes, service: Service, *, record: bool = False) -> Parsed:
    """Users of a passwd(5), shadow(5), master.passwd(5) or passwd-file of Dovecot's, as values of the service.

    ``record``: as one JSON object a user, which serves ``credentials``, ``auth`` and ``userinfo`` alike.
    """
    value_of: Callable[[list[bytes]], bytes] = _record if record else _SERVED[service.name]
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, line in content(data):
        try:
            fields = _fields(line)
            entries.append(Entry(fold_key(fields[0]), value_of(fields), number))
        except FormatError as error:
            problems.append(Problem(number, str(error)))
    return Parsed("passwd", entries, problems)


def _fields(line: bytes) -> list[bytes]:
    fields = [field.strip(BLANKS) for field in line.split(b":")]
    if not fields[0]:
        raise FormatError("has no user")
    if fields[0].startswith((b"+", b"-")):
        raise FormatError("refers to NIS, and names no user of this file")
    if len(fields) < 2:
        raise FormatError("has no colon, so this is no user")
    if len(fields) == _MASTER_FIELDS and not fields[5].startswith(b"/") and fields[8].startswith(b"/"):
        del fields[4:7]
    return fields


def _password(fields: list[bytes]) -> bytes:
    if fields[1] == b"x":
        raise FormatError("has its password elsewhere (import /etc/shadow)")
    if not fields[1]:
        raise FormatError("has no password")
    return fields[1] if fields[1].strip(b"*!") else LOCKED


def _user(fields: list[bytes]) -> bytes:
    if len(fields) < _FIELDS or not (fields[2] and fields[3] and fields[5]):
        raise FormatError("has no uid, gid and home")
    return b":".join((fields[2], fields[3], fields[5]))


def _record(fields: list[bytes]) -> bytes:
    try:
        found: dict[str, object] = {"password": fields[1].decode()} if fields[1] not in (b"", b"x") else {}
        if len(fields) >= _FIELDS:
            for name, text in zip(("uid", "gid"), fields[2:4], strict=True):
                if text:
                    found[name] = int(text) if text.isdigit() and len(text) <= _ID_DIGITS else text.decode()
            if fields[5]:
                found["home"] = fields[5].decode()
    except UnicodeDecodeError:
        raise FormatError("holds what is no UTF-8, and JSON must be") from None
    if not found:
        raise FormatError("has neither a password nor uid, gid and home")
    return msgspec.json.encode(found)


_SERVED = {"credentials": _password, "auth": _password, "userinfo": _user}
PASSWD_SERVICES = tuple(_SERVED)
"""The services that a passwd file has something for."""
