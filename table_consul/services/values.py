"""What may stand under a key in Consul: how its value is read, and whether smtpd could use it.

Pure: bytes in, bytes out; knows neither buckets nor where entries come from. What is certain to be no value of its
service is refused; what only looks wrong is told, and answered as it stands.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import msgspec

from table_consul.errors import UNDECODABLE, EntryError
from table_consul.services import passwords

if TYPE_CHECKING:
    from table_consul.services import Service, Table

# smtpd: LINE_MAX. expand_line() and table_parse_lookup() refuse longer values, after the fact and without a word.
LINE_MAX = 2048
# smtpd reads it as an id (to.c, text_to_userinfo: UID_MAX), and setresuid(2) takes it as "leave it as it is": as root.
ID_MAX = 4294967295
# smtpd: smtpd-defines.h, SMTPD_MAXLOCALPARTSIZE; smtpd.h, EXPAND_BUFFER. Without the NUL.
USER_BYTES = 255
COMMAND_BYTES = 1023
# The entry that answers for every key without one, where a service has such a default.
DEFAULT_KEY = b"*"

_BARE_LOCKS = (b"*", b"!", b"!!")
_NO_JSON = 'the value is no JSON string or array of strings (allowed: "gilles", ["gilles", "eric"])'


class MissingFields(EntryError):
    """A record is there, but says nothing of what this service asks; another service may well use it."""


def is_valid_reply_value(value: bytes) -> bool:
    """Whether smtpd can be told this value: one line, no NUL, not empty (smtpd: table_proc.c, "empty response")."""
    return bool(value) and not any(c in value for c in (b"\n", b"\r", b"\0"))


def parse_value(table: Table, service: Service, key: bytes, raw: bytes | None) -> bytes:
    """What stands under a key in Consul as a value of this service, one line; ``b""`` when there is none.

    Raises:
        EntryError: it is no value for this service; the text says what would be, and holds no part of the value.
    """
    text = _decode(table, service, key, raw or b"").rstrip()
    if service.joined:
        text = _joined(text)
    if b"\n" in text or b"\r" in text or b"\0" in text:
        raise EntryError(f"the value has several lines or a NUL, and {service.name} takes one line")
    if service.hashed and (b"{" in text or b"$2y$" in text or text in _BARE_LOCKS):
        text = _unmarked(text)
    if service.bounded and len(text) >= LINE_MAX:
        raise EntryError(
            f"the value has {len(text)} bytes, and smtpd refuses {LINE_MAX} and more"
            + ("; split it into several aliases" if service.name == "alias" else "")
        )
    if text:
        _judge(table, service, key, text)
    return text


def _decode(table: Table, service: Service, key: bytes, raw: bytes) -> bytes:
    if table.value_format == "text":
        return raw.rstrip()
    strict = table.value_format == "json"
    raw = raw.strip() if strict else raw.rstrip()
    opening = raw[:1]
    if opening == b"{" and service.fields and (record := _record(raw, strict=strict)) is not None:
        return _from_record(service, key, record)
    lines = _lines(raw) if opening in (b'"', b"[") else None
    if lines is None:
        if strict and raw not in (b"", b"null"):
            allowed = f", or an object with {' and '.join(service.fields)}" if service.fields else ""
            raise EntryError(_NO_JSON + allowed)
        return b"" if strict else raw  # [2001:db8::1] and "|command" with a quote too many are text
    if service.name == "alias":
        lines = [_requoted(line) for line in lines]
    if len(lines) > 1 and not service.joined:
        raise EntryError(f"the value is a list, and {service.name} takes one")
    return b"\n".join(lines)


def _lines(raw: bytes) -> list[bytes] | None:
    try:
        decoded = msgspec.json.decode(raw, type=str | list[str])
        return [line.encode() for line in ([decoded] if isinstance(decoded, str) else decoded)]
    except UNDECODABLE:
        return None


def _record(raw: bytes, *, strict: bool) -> dict[str, object] | None:
    """The JSON object; None for text that only begins like one, such as ``{CRYPT}$6$...``.

    Raises:
        EntryError: it was meant for an object: nothing else begins with a brace and a quote.
    """
    try:
        return msgspec.json.decode(raw, type=dict[str, object])
    except UNDECODABLE:
        if strict or raw[1:].lstrip()[:1] in (b'"', b"'"):
            raise EntryError("the value begins as a JSON object, but is none") from None
        return None


def _from_record(service: Service, key: bytes, record: dict[str, object]) -> bytes:
    """The value of this service out of a record of one user, as Dovecot and others keep it."""
    missing = [field for field in service.fields if record.get(field) in (None, "")]
    if missing:
        text = f"the record has no {' and no '.join(missing)}, which {service.name} needs"
        raise (MissingFields if len(missing) == len(service.fields) else EntryError)(text)
    values = [_field(field, record[field]) for field in service.fields]
    if service.hashed and b":" in values[0]:
        if b":" in key:
            raise EntryError("the key holds a colon, which smtpd would take for the end of the user's name")
        values.insert(0, key)  # a password to relay with; smtpd takes all before the first colon for its user
    return b":".join(values)


def _field(name: str, value: object) -> bytes:
    number = name in ("uid", "gid")
    if isinstance(value, int) and not isinstance(value, bool) and number:
        value = str(value)
    text = value.encode() if isinstance(value, str) else None
    if text is None or (number and not text.isdigit()):
        raise EntryError(f"the record's {name} is no {'whole number' if number else 'text'}")
    return text


def _unmarked(text: bytes) -> bytes:
    """The credential with a hash that crypt(3) can read; a bare lock as one that smtpd does not find too short."""
    user, colon, rest = text.partition(b":")
    if not colon:
        return passwords.LOCKED_ACCOUNT if text in _BARE_LOCKS else passwords.strip_scheme(text)
    return user + colon + passwords.strip_scheme(rest)


def _requoted(line: bytes) -> bytes:
    """An alias command with its quotes: ``"|command, with comma"`` is aliases(5), not a JSON string."""
    if line.lstrip().startswith(b"|"):
        return b'"' + line.strip().replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return line


def _joined(text: bytes) -> bytes:
    text = text.strip()
    if b"\n" not in text and not text.startswith(b"#"):
        return text
    lines = (line.strip().rstrip(b",").rstrip() for line in text.replace(b"\r\n", b"\n").split(b"\n"))
    return b", ".join(line for line in lines if line and not line.startswith(b"#"))


@functools.cache
def _plain_list() -> re.Pattern[bytes]:
    """Lists of users and addresses with nothing in them that needs a second look: nearly all there are."""
    element = rb"[A-Za-z0-9_.+-]+(?:@[A-Za-z0-9.-]+)?"
    return re.compile(rb"%b(?:, ?%b)*" % (element, element))


def is_plain_list(text: bytes) -> bool:
    """Whether smtpd reads this as users and addresses, whatever it is asked for: no quotes, no commands."""
    return len(text) <= USER_BYTES and _plain_list().fullmatch(text) is not None


def split_list(text: bytes) -> list[bytes]:
    """The elements of a list as smtpd splits and unescapes them (smtpd: expand_line_split, mailaddr_line_split).

    Raises:
        EntryError: smtpd refuses the whole list: a quote or an escape is left open.
    """
    nodes: list[bytes] = []
    node = bytearray()
    escaped = double = single = False
    for c in text:
        if escaped:
            node.append(c)
            escaped = False
        elif c == 0x5C:
            escaped = True
        elif c == 0x2C and not double and not single:
            nodes.append(bytes(node).strip())
            node.clear()
        else:
            node.append(c)
            double ^= c == 0x22 and not single
            single ^= c == 0x27 and not double
    if escaped or double or single:
        raise EntryError("the value ends within a quote or an escape, and smtpd would refuse it")
    nodes.append(bytes(node).strip())
    return [node for node in nodes if node]


def _judge(table: Table, service: Service, key: bytes, text: bytes) -> None:
    """Refuse what smtpd could not use, and what would hand this host to whoever may write the key."""
    if service.joined:
        if is_plain_list(text):
            return
        nodes = split_list(text)
        if service.name != "alias" or table.allow_commands:
            return
        for node in nodes:
            if node.removeprefix(b'"').lower().startswith((b"|", b"/", b":include:", b"include:")):
                raise EntryError(
                    "the value holds a |command, a /file or an :include:, with which whoever may write this key runs "
                    "commands on this host; set allow_commands = true if that is wanted"
                )
    elif service.hashed:
        name, colon, password = text.partition(b":")
        if len(text) < 3 or (colon and not (name and password)):
            relay = ", or USER:PASSWORD to relay with" if service.name == "credentials" else ""
            raise EntryError(f"the value is no credential (allowed: HASH, USER:HASH{relay})")
    elif service.name == "userinfo":
        _judge_user(table, key, text)


def _judge_user(table: Table, key: bytes, text: bytes) -> None:
    uid, _, rest = text.partition(b":")
    gid, _, home = rest.partition(b":")
    if not (uid.isdigit() and gid.isdigit() and home.startswith(b"/")):
        raise EntryError("the value is no user (allowed: UID:GID:HOME, such as 1000:1000:/home/gilles)")
    if b":" in key:
        # smtpd puts the key before the value and splits again (table.c, table_parse_lookup): a key "gilles:0"
        # would make any uid out of a harmless value.
        raise EntryError("the key holds a colon, which smtpd would take for the end of the user's name")
    if not all(len(number) <= 20 and int(number) < ID_MAX for number in (uid, gid)):
        raise EntryError(f"the value gives a uid or gid that no user has (allowed: 1 to {ID_MAX - 1})")
    if 0 in (int(uid), int(gid)) and not table.allow_root:
        raise EntryError("the value gives uid or gid 0; set allow_root = true if mail is to be delivered as root")
    if key == DEFAULT_KEY and re.search(rb"%(?![und])", home.replace(b"%%", b"")):
        raise EntryError("the home of all others holds an unknown % (allowed: %u the user, %n and %d around its @, %%)")


def expand_default_home(text: bytes, key: bytes) -> bytes:
    """The value of the default entry of userinfo for this user: ``%u``, ``%n`` and ``%d`` in its home filled in.

    Raises:
        EntryError: this name cannot be part of a path, or would tell smtpd other ids; the text does not hold it.
    """
    # A colon would shift the ids: smtpd puts the key before the value and splits again (see _judge_user).
    if not key or re.search(rb"[\0-\x1f\x7f/:]", key):
        raise EntryError("the user asked for has a name that cannot be part of a home")
    ids, slash, home = text.partition(b"/")
    if b"%" not in home:
        return text
    name, at, domain = key.rpartition(b"@")
    parts = {b"%u": key, b"%n": name if at else key, b"%d": domain if at else b"", b"%%": b"%"}

    def filled(match: re.Match[bytes]) -> bytes:
        part = parts[match[0]]
        if not part:
            raise EntryError(f"the user asked for has no {match[0].decode()}, which the home here needs")
        return part

    home = re.sub(rb"%[und%]", filled, home)
    if {b".", b".."}.intersection(home.split(b"/")):
        raise EntryError("the user asked for has a name that cannot be part of a home")
    return ids + slash + home
