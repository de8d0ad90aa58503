"""Parse and validate the values stored in Consul.

Pure: bytes in, bytes out; independent of entries and their source. A value that is certainly invalid for its service is
an error; a suspicious one is served unchanged, and judge.py warns. No message contains any part of a value.
"""

from __future__ import annotations

import contextlib
import re

import msgspec

from table_consul.errors import UNDECODABLE, EntryError
from table_consul.services import DEFAULT_KEY, Service, Table, compiled, passwords
from table_consul.services.addresses import is_plain_list, split_list

# smtpd: LINE_MAX. expand_line() and table_parse_lookup() reject longer values without logging the reason.
LINE_MAX = 2048
# smtpd reads it as an id (to.c, text_to_userinfo: UID_MAX), and setresuid(2) takes it as "unchanged": root.
ID_MAX = 4294967295
# smtpd puts the key before the value and splits again (table.c, table_parse_lookup): the 0 of a key "gilles:0" would
# become the uid.
_COLON_IN_KEY = "the key contains a colon, which smtpd takes as the end of the user name"

# A JSON object that is not read as one: after white space, or without the quotes that a shell removes. {CRYPT}$6$... is
# text.
_LIKE_AN_OBJECT = rb"\s*\{\s*(?:[\"']|[A-Za-z_]+\s*:)"

# The file that is always allowed, and how sendmail's aliases(5) may write it; smtpd rejects a file name in quotes.
_DISCARD = b"/dev/null"
_QUOTED_DISCARD = rb'((?:\A|,)[ \t]*)"/dev/null"(?=[ \t]*(?:,|\Z))'


class MissingFields(EntryError):
    """A record without any field of this service, which another service may use."""


def is_valid_reply_value(value: bytes) -> bool:
    """Whether smtpd accepts this value: one line, no NUL, not empty (smtpd: table_proc.c, "empty response")."""
    return bool(value) and b"\n" not in value and b"\r" not in value and b"\0" not in value


def parse_value(table: Table, service: Service, key: bytes, raw: bytes | None) -> bytes:
    """The value of this service stored under a folded key: one line, or ``b""`` if there is no value.

    Raises:
        MissingFields: a record without any field of this service.
        EntryError: not a valid value of this service; the text names the expected form.
    """
    text = _decode(table, service, key, raw or b"").rstrip()
    if service.joined:
        text = _join_lines(text)
    if service.name == "alias" and b'"' in text:
        text = compiled(_QUOTED_DISCARD).sub(rb"\1" + _DISCARD, text)
    if text and not is_valid_reply_value(text):
        raise EntryError(f"the value contains a line break or a NUL; {service.name} takes a single line")
    if service.hashed:
        text = passwords.strip_scheme(text)
    if service.bounded and len(text) >= LINE_MAX:
        hint = " (split it into several aliases)" if service.name == "alias" else ""
        raise EntryError(f"the value has {len(text)} bytes; smtpd rejects {LINE_MAX} or more{hint}")
    if text:
        _validate(table, service, key, text)
    return text


def _decode(table: Table, service: Service, key: bytes, raw: bytes) -> bytes:
    if table.value_format == "text":
        return raw
    strict = table.value_format == "json"
    raw = raw.strip() if strict else raw.rstrip()
    decoded: str | list[str] | dict[str, object] | None = None
    if raw.startswith((b'"', b"[")) or (service.fields and raw.startswith(b"{")):
        with contextlib.suppress(*UNDECODABLE):
            decoded = msgspec.json.decode(raw, type=str | list[str] | dict[str, object])
    if decoded is None and service.fields and compiled(rb"\{" if strict else _LIKE_AN_OBJECT).match(raw):
        if raw[:1].isspace():
            raise EntryError("the value has white space before a JSON object (remove it)")
        raise EntryError("the value starts like a JSON object but is not valid JSON")
    if isinstance(decoded, dict):
        return _from_record(service, key, decoded)
    if decoded is None:
        if strict and raw not in (b"", b"null"):
            record_hint = f", or an object with {' and '.join(service.fields)}" if service.fields else ""
            raise EntryError(f'expected a JSON string or array of strings, such as "a" or ["a", "b"]{record_hint}')
        return b"" if strict else raw  # [2001:db8::1] and "|command" with a quote too many are text
    lines = [line.encode() for line in ([decoded] if isinstance(decoded, str) else decoded)]
    if service.name == "alias":
        lines = [_quote_command(line) for line in lines]
    if len(lines) > 1 and not service.joined:
        raise EntryError(f"the value is a list; {service.name} takes a single value")
    return b"\n".join(lines)


def _from_record(service: Service, key: bytes, record: dict[str, object]) -> bytes:
    """The value of this service from the record of one user, as Dovecot and others store it."""
    missing = [field for field in service.fields if record.get(field) in (None, "")]
    if missing not in ([], ["home"]):  # smtpd delivers without a home
        text = f"the record has no {' and no '.join(missing)}, which {service.name} needs"
        raise (MissingFields if len(missing) == len(service.fields) else EntryError)(text)
    values: list[bytes] = []
    for field in service.fields:
        value, number = "" if record.get(field) is None else record[field], field in ("uid", "gid")
        if number and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or (number and not value.encode().isdigit()):
            raise EntryError(f"the record's {field} is not a {'whole number' if number else 'string'}")
        values.append(value.encode())
    if service.hashed and b":" in values[0]:
        if b":" in key:
            raise EntryError(_COLON_IN_KEY)
        values.insert(0, key)  # a relay password; for smtpd the user ends at the first colon
    return b":".join(values)


def _quote_command(line: bytes) -> bytes:
    """An alias command with its quotes: ``"|command, with comma"`` is aliases(5), not a JSON string."""
    if line.lstrip().startswith(b"|"):
        return b'"' + line.strip().replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return line


def _join_lines(text: bytes) -> bytes:
    text = text.strip()
    if b"\n" not in text and not text.startswith(b"#"):
        return text
    lines = (line.strip().rstrip(b",").rstrip() for line in text.replace(b"\r\n", b"\n").split(b"\n"))
    return b", ".join(line for line in lines if line and not line.startswith(b"#"))


def _validate(table: Table, service: Service, key: bytes, text: bytes) -> None:
    """Reject values that smtpd cannot use, or that would let anyone with write access to the key control this host."""
    if service.joined:
        if is_plain_list(text):
            return
        elements = split_list(text)
        if service.name != "alias" or table.allow_commands:
            return
        for element in elements:
            unquoted = element.removeprefix(b'"').lower()
            if unquoted.startswith((b"|", b"/", b":include:", b"include:")) and element != _DISCARD:
                raise EntryError(
                    "the value contains a |command, a /file or an :include:, which would let anyone who can write this "
                    "key run commands on this host; set allow_commands = true to permit them"
                )
    elif service.hashed:
        if passwords.has_fields_after_hash(text):
            raise EntryError("the value continues after its hash with a colon; store nothing but the hash")
        name, colon, password = text.partition(b":")
        if len(text) < 3 or (colon and not (name and password)):
            relay = " or, to relay, USER:PASSWORD" if service.name == "credentials" else ""
            raise EntryError(f"not a credential (expected HASH, USER:HASH{relay})")
    elif service.name == "userinfo":
        _validate_user(table, key, text)


def _validate_user(table: Table, key: bytes, text: bytes) -> None:
    uid, _, rest = text.partition(b":")
    gid, colon, home = rest.partition(b":")
    if not (uid.isdigit() and gid.isdigit() and colon):  # the home may be any text (smtpd: to.c, text_to_userinfo)
        raise EntryError("not a user (expected UID:GID:HOME, such as 1000:1000:/home/gilles)")
    if b":" in key:
        raise EntryError(_COLON_IN_KEY)
    if not all(len(number) <= 20 and int(number) < ID_MAX for number in (uid, gid)):
        raise EntryError(f"uid or gid out of range (1 to {ID_MAX - 1})")
    if 0 in (int(uid), int(gid)) and not table.allow_root:
        raise EntryError("uid or gid 0 would deliver mail as root; set allow_root = true to permit it")
    if key == DEFAULT_KEY and re.search(rb"%(?![und])", home.replace(b"%%", b"")):
        raise EntryError("the default home directory contains an unknown placeholder (use %u, %n, %d or %%)")
    if key == DEFAULT_KEY and b"%" in home and {b".", b".."}.intersection(home.split(b"/")):
        raise EntryError("the default home directory contains . or .. as a segment")


def expand_home(text: bytes, key: bytes) -> bytes | None:
    """The value of the default entry of userinfo for this user, with ``%u``, ``%n`` and ``%d`` in its home filled in.

    None if the name cannot be a user: it is not valid in a path, or would change the ids for smtpd. Anyone may send
    mail to such a name.

    Raises:
        EntryError: the home contains ``%d``, and the user name no domain.
    """
    uid, gid, home = text.split(b":", 2)
    name, at, domain = key.rpartition(b"@")
    parts = {b"%u": key, b"%n": name if at else key, b"%d": domain if at else b"", b"%%": b"%"}
    used = re.findall(rb"%[und%]", home)
    home = re.sub(rb"%[und%]", lambda match: parts[match[0]], home)
    if not key or re.search(rb"[\0-\x1f\x7f/:]", key):  # for the colon, see _COLON_IN_KEY
        return None
    if b"%d" in used and not at:
        raise EntryError("the user name has no domain for the %d of the default home")
    if used and (not all(parts[each] for each in used) or {b".", b".."}.intersection(home.split(b"/"))):
        return None
    return b":".join((uid, gid, home))
