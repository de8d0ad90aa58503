"""What smtpd's services are: how a key is found in a bucket, and what its value must be.

Knows nothing of Consul's HTTP, of smtpd's wire, or of time. A bucket is one folder of Consul's key-value store,
``<prefix>/<table>/<service>/``; its entries come in as bytes, and what comes out can be said to smtpd.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from table_consul.errors import EntryError, shown

if TYPE_CHECKING:
    from table_consul.patterns import Index

# smtpd: LINE_MAX. expand_line() and table_parse_lookup() refuse longer values, after the fact and without a word.
LINE_MAX = 2048
# smtpd reads it as an id (to.c, text_to_userinfo: UID_MAX), and setresuid(2) takes it as "leave it as it is": as root.
ID_MAX = 4294967295


class Service(NamedTuple):
    """One thing that smtpd asks tables for (smtpd: smtpd-api.h, enum table_service)."""

    name: str
    bit: int
    answers: str
    """``value``; ``entry``, where an entry without value answers with itself; ``check``, where there is no value."""
    joined: bool = False
    """Several lines are one list."""
    bounded: bool = False
    """smtpd refuses LINE_MAX bytes and more."""
    patterns: bool = False
    """An entry may answer for keys that are not equal to it, so the whole bucket is needed."""


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        service.name: service
        for service in (
            Service("alias", 0x001, "value", joined=True, bounded=True),
            Service("domain", 0x002, "entry", patterns=True),
            Service("credentials", 0x004, "value", bounded=True),
            Service("netaddr", 0x008, "entry", patterns=True),
            Service("userinfo", 0x010, "value"),
            Service("source", 0x020, "entry"),
            Service("mailaddr", 0x040, "entry", patterns=True),
            Service("addrname", 0x080, "value", patterns=True),
            Service("mailaddrmap", 0x100, "value", joined=True),
            Service("relayhost", 0x200, "entry"),
            Service("string", 0x400, "value"),
            Service("regex", 0x800, "entry", patterns=True),
            Service("auth", 0x1000, "check"),
        )
    }
)

# Registering auth takes password checks away from credentials (smtpd: lka.c, lka_authenticate): only when asked for.
DEFAULT_SERVICES = tuple(name for name in SERVICES if name != "auth")


class Table(msgspec.Struct, frozen=True):
    """How one table is laid out in Consul, read, and answered for; durations in seconds."""

    name: str
    prefix: str = ""
    mode: str = "mirror"
    services: tuple[str, ...] = DEFAULT_SERVICES
    deadline: float = 2.0
    max_age: float = 86400.0
    max_keys: int = 500_000
    snapshot: str | None = None
    value_format: str = "auto"
    fetch: str = "keys"
    allow_commands: bool = False
    allow_root: bool = False
    procexec_reply: str = "auto"
    paths: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))

    @property
    def root(self) -> bytes:
        """The folder of this table in Consul, ending in a slash; buckets named in ``paths`` may lie elsewhere."""
        return (f"{self.prefix}/{self.name}/" if self.prefix else f"{self.name}/").encode()

    def path(self, service: Service) -> bytes:
        """The folder in Consul that holds the entries of this service, ending in a slash."""
        named = self.paths.get(service.name)
        return self.root + service.name.encode() + b"/" if named is None else named.encode() + b"/"


def fold(key: bytes) -> bytes:
    """The key as smtpd would ask for it (smtpd: util.c, lowercase: byte by byte, ASCII alone)."""
    return key.lower()


class Builder:
    """Reads the pairs of one bucket, in as many goes as it takes. An entry that is no good harms no other."""

    def __init__(self, table: Table, service: Service, former: Bucket | None = None) -> None:
        """``former`` is what stood there before: what has not changed since is taken over as it is."""
        self.table = table
        self.service = service
        self.path = table.path(service)
        if former is not None and former.table != table:
            former = None  # what was judged by other rules, such as allow_commands, has not been judged
        self.former = former
        self.values: dict[bytes, bytes] = {}
        self.refused: dict[bytes, EntryError] = {}
        self.problems: list[str] = []
        self._spelled: dict[bytes, bytes] = {}
        # A value that stood there before, and that nothing decodes, has been judged before.
        self._known = {} if former is None or table.value_format == "json" else former.values
        self._decoded = (b'"', b"[") if table.value_format == "auto" else ()

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Read the pairs, whose keys are relative to the bucket."""
        values, refused, known, decoded = self.values, self.refused, self._known, self._decoded
        for key, raw in pairs:
            if not key or key[-1] == 0x2F:
                continue  # the bucket itself, and folders made in the UI
            folded = fold(key)
            if (folded != key or folded in values or folded in refused) and not self._spell(key, folded):
                continue
            if raw and known.get(folded) == raw and raw[:1] not in decoded:
                values[folded] = known[folded]
            else:
                self._read(folded, raw)

    def _spell(self, key: bytes, folded: bytes) -> bool:
        """Whether the key, of which there may be another spelling, is the one that answers."""
        wins = True
        if folded in self.values or folded in self.refused:
            rival = self._spelled.get(folded, folded)
            wins = key == folded
            winner, loser = (key, rival) if wins else (rival, key)
            self.problems.append(
                f"{shown(self.path + loser)}: smtpd asks in lower case, where this is the same key as "
                f"{shown(self.path + winner)}, which answers; delete one of them"
            )
        if wins:
            self._spelled[folded] = key
        return wins

    def _read(self, key: bytes, raw: bytes | None) -> None:
        self.values.pop(key, None)
        self.refused.pop(key, None)
        try:
            self.values[key] = read_value(self.table, self.service, key, raw)
        except EntryError as error:
            named = EntryError(f"{shown(self.path + key)}: {error}")
            self.refused[key] = named
            self.problems.append(str(named))

    def lost(self) -> Iterator[bytes]:
        """The keys that the former bucket had and this one has not."""
        if self.former is None:
            return
        for had in (self.former.values, self.former.refused):
            for key in had:
                if key not in self.values and key not in self.refused:
                    yield key

    def finish(self) -> Bucket:
        """The bucket; the former one itself if nothing has changed."""
        former = self.former
        if (
            former is not None
            and former.values == self.values
            and former.refused.keys() == self.refused.keys()
            and former.read_problems == self.problems
        ):
            return former
        return Bucket(self.table, self.service, builder=self)


class Bucket:
    """The entries of one service in one table as they stood at one moment. Never changed once built."""

    __slots__ = ("_index", "_order", "path", "problems", "read_problems", "refused", "service", "table", "values")

    def __init__(
        self,
        table: Table,
        service: Service,
        pairs: Iterable[tuple[bytes, bytes | None]] = (),
        builder: Builder | None = None,
    ) -> None:
        """Read the pairs, whose keys are relative to the bucket; a builder may have read others already."""
        builder = builder or Builder(table, service)
        builder.take(pairs)
        self.table = table
        self.service = service
        self.path = builder.path
        self.values = builder.values
        self.refused = builder.refused
        self.problems = self.read_problems = builder.problems
        self._order: list[bytes] | None = None
        self._index: Index | None = None
        if service.patterns and (self.values or self.refused):
            from table_consul.patterns import INDEXES  # noqa: PLC0415 - its import would delay the handshake

            self._index = INDEXES[service.name]([*self.values, *self.refused])
            self.problems = self.problems + [f"{shown(self.path + key)}: {what}" for key, what in self._index.problems]

    def __len__(self) -> int:
        return len(self.values) + len(self.refused)

    def find(self, key: bytes) -> bytes | None:
        """The entry that answers for this key, which smtpd has folded; None when there is none."""
        if self._index is not None:
            return self._index.find(key)
        return key if key in self.values or key in self.refused else None

    def check(self, key: bytes) -> bool:
        """Whether the key is in the table. A key whose value is no good is in it all the same."""
        return self.find(key) is not None

    def lookup(self, key: bytes) -> bytes | None:
        """The value of the key, never empty, or None when the key is not in the table.

        Raises:
            EntryError: the key is there, but what stands under it is no value for this service.
        """
        entry = self.find(key)
        return None if entry is None else self._value(entry)

    def _value(self, entry: bytes) -> bytes:
        refused = self.refused.get(entry)
        if refused is not None:
            raise refused.with_traceback(None)  # else it grows with each raise
        value = self.values[entry]
        if not value and self.service.answers == "entry":
            value = entry
            if not sayable(value):
                raise EntryError(f"{shown(self.path + entry)}: the key holds a control character")
        if not value:
            raise EntryError(f"{shown(self.path + entry)}: there is no value, and {self.service.name} needs one")
        return value

    def after(self, last: bytes | None) -> tuple[bytes, bytes] | None:
        """The entry that follows ``last`` in the order of keys, wrapping, and what a fetch says of it.

        None when there is no entry at all. ``last`` need not be there any more: additions and removals between two
        fetches neither repeat nor skip the others. Entries that cannot be said are passed over.

        Raises:
            EntryError: there are entries, but none that can be said.
        """
        if self._order is None:
            self._order = sorted([*self.values, *self.refused])
        order = self._order
        start = 0 if last is None else bisect_right(order, last)
        failure: EntryError | None = None
        for step in range(len(order)):
            entry = order[(start + step) % len(order)]
            try:
                return entry, self._fetched(entry)
            except EntryError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None

    def _fetched(self, entry: bytes) -> bytes:
        if self.table.fetch == "values":
            return self._value(entry)
        if not sayable(entry):
            raise EntryError(f"{shown(self.path + entry)}: the key holds a control character")
        return entry


def sayable(value: bytes) -> bool:
    """Whether smtpd can be told this value: one line, no NUL, not empty (smtpd: table_proc.c, "empty response")."""
    return bool(value) and not any(c in value for c in (b"\n", b"\r", b"\0"))


def read_value(table: Table, service: Service, key: bytes, raw: bytes | None) -> bytes:
    """What stands under a key in Consul as a value of this service, one line; ``b""`` when there is none.

    Raises:
        EntryError: it is no value for this service; the text says what would be, and holds no part of the value.
    """
    text = _decode(table, service, raw or b"").rstrip()
    if service.joined:
        text = _joined(text)
    if b"\n" in text or b"\r" in text or b"\0" in text:
        raise EntryError(f"the value has several lines or a NUL, and {service.name} takes one line")
    if service.bounded and len(text) >= LINE_MAX:
        raise EntryError(
            f"the value has {len(text)} bytes, and smtpd refuses {LINE_MAX} and more"
            + ("; split it into several aliases" if service.name == "alias" else "")
        )
    if text:
        _judge(table, service, key, text)
    return text


def _decode(table: Table, service: Service, raw: bytes) -> bytes:
    raw = raw.strip() if table.value_format == "json" else raw.rstrip()
    if table.value_format == "text" or raw[:1] not in (b'"', b"["):
        if table.value_format == "json" and raw not in (b"", b"null"):
            raise EntryError('the value is no JSON string or array of strings (allowed: "gilles", ["gilles", "eric"])')
        return b"" if table.value_format == "json" else raw
    try:
        decoded = msgspec.json.decode(raw, type=str | list[str])
        lines = [line.encode() for line in ([decoded] if isinstance(decoded, str) else decoded)]
    except ValueError:  # msgspec's DecodeError, and what is no UTF-8
        if table.value_format == "json":
            raise EntryError(
                'the value is no JSON string or array of strings (allowed: "gilles", ["gilles", "eric"])'
            ) from None
        return raw  # [2001:db8::1] and "|command" with a quote too many are text
    if service.name == "alias":
        lines = [_requoted(line) for line in lines]
    if len(lines) > 1 and not service.joined:
        raise EntryError(f"the value is a list, and {service.name} takes one")
    return b"\n".join(lines)


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


def alias_nodes(text: bytes) -> list[bytes]:
    """The elements of an alias as smtpd splits and unescapes them (smtpd: expand.c, expand_line_split).

    Raises:
        EntryError: smtpd refuses the whole alias: a quote or an escape is left open.
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
    if service.name == "alias":
        for node in alias_nodes(text):
            if table.allow_commands:
                continue
            if node.removeprefix(b'"').lower().startswith((b"|", b"/", b":include:", b"include:")):
                raise EntryError(
                    "the value holds a |command, a /file or an :include:, with which whoever may write this key runs "
                    "commands on this host; set allow_commands = true if that is wanted"
                )
    elif service.name == "credentials":
        name, colon, password = text.partition(b":")
        if len(text) < 3 or (colon and not (name and password)):
            raise EntryError("the value is no credential (allowed: HASH, USER:HASH, or USER:PASSWORD to relay with)")
    elif service.name == "userinfo":
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
