"""What an import would change: the file's entries against those in Consul.

Pure. What a text file says of a key is compared with what smtpd is told for it now, however that is written in Consul;
an export of Consul's is compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from table_consul.ctl.entries import Entry, Parsed, Problem
from table_consul.errors import UNDECODABLE, EntryError, printable
from table_consul.kv import is_url_safe
from table_consul.services import MAX_KEY_BYTES, SERVICES, Service, Table, fold_key
from table_consul.services.entries import Entries, EntriesBuilder
from table_consul.services.values import parse_value

# Consul takes 512 KB a transaction (txn_max_req_len), in base64 and with the key; smtpd takes far less.
VALUE_MAX_BYTES = 376 << 10
_SHARED = (
    "in Consul this is a record of a user, which other services may share; change it there, or import a passwd file "
    "with --record"
)


_LOST = "in Consul this is the value of {}, which the record of the file has not, and would take the place of"


class Stored(NamedTuple):
    """An entry in Consul, by its whole key; ``modified`` is its ModifyIndex."""

    key: bytes
    value: bytes
    modified: int
    flags: int = 0


class Change(NamedTuple):
    """One key to be written: new where ``old`` is None, to be removed where ``value`` is None."""

    key: bytes
    old: Stored | None
    value: bytes | None
    flags: int = 0
    was: bytes | None = None
    """What smtpd is told now; None for nothing that it could be."""
    becomes: bytes | None = None

    @property
    def sign(self) -> str:
        """As in a diff: ``+``, ``~``, ``-``."""
        return "+" if self.old is None else "-" if self.value is None else "~"


class Plan(NamedTuple):
    """What is to be done, in the order of keys, and what is wrong with the file, in the order of its lines."""

    changes: list[Change]
    problems: list[Problem]
    unchanged: int


def duplicates(parsed: Parsed) -> list[tuple[Entry, Entry]]:
    """Entries whose key is that of an earlier one, differences of case aside; the earlier one first."""
    first: dict[bytes, Entry] = {}
    return [
        (former, entry)
        for entry in parsed.entries
        if (former := first.setdefault(fold_key(entry.key), entry)) is not entry
    ]


def duplicate_problems(parsed: Parsed, pairs: Iterable[tuple[Entry, Entry]]) -> list[Problem]:
    """A problem for each of the pairs, with both lines."""
    return [
        Problem(
            entry.line,
            f"{printable(entry.key)} stands in {parsed.unit} {former.line} already"
            + ("" if former.key == entry.key else f", spelled {printable(former.key)}"),
        )
        for former, entry in pairs
    ]


def stored_value(table: Table, service: Service, key: bytes, text: bytes) -> bytes:
    """How the text of a file is put into Consul so that it is read as just this text: as it stands, or as JSON.

    Text that begins like JSON would be decoded, and where the table is of JSON nothing else is read.
    """
    if not text or table.value_format == "text" or (table.value_format == "auto" and text[:1] not in b'"[{'):
        return text
    plain = msgspec.structs.replace(table, value_format="text")
    try:
        meant = parse_value(plain, service, key, text)
        candidates = (text, msgspec.json.encode(text.decode()))
    except (EntryError, UnicodeDecodeError):
        return text
    for candidate in candidates:
        try:
            if parse_value(table, service, key, candidate) == meant:
                return candidate
        except EntryError:
            continue
    return text


class _Reading:
    """What smtpd is told for each key of some entries."""

    def __init__(self, table: Table, service: Service, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        self._builder = EntriesBuilder(table, service)
        self._builder.take(pairs)

    def answer(self, key: bytes) -> bytes | None:
        key = fold_key(key)
        value = self._builder.values.get(key)
        return key if value == b"" and self._builder.service.answers == "entry" else value

    def belongs(self, key: bytes) -> bool:
        """Whether the entry is one of this service: a folder may hold records that say nothing for it."""
        return fold_key(key) not in self._builder.incomplete


def plan(
    table: Table,
    service: Service,
    parsed: Parsed,
    stored: Sequence[Stored],
    *,
    prune: bool = False,
    records: bool = False,
    others: Sequence[bytes] = (),
) -> Plan:
    """What has to be written for Consul to say what the file says.

    ``prune`` removes what the file does not have, but for folders, for entries below ``others`` (folders of other
    services within this one), and for records that say nothing for this service. ``records``: the file's values are
    records of users, whose fields go into the records that there are; else a record that other services read, too, is
    neither changed nor removed, but a problem.
    """
    path = table.path(service)
    sharing = _sharing(table, service)
    there = _There(table, service, stored)
    exported = parsed.format == "export"
    raw = [
        entry.value if records or exported else stored_value(table, service, entry.key, entry.value)
        for entry in parsed.entries
    ]
    mine = _Reading(table, service, zip((entry.key for entry in parsed.entries), raw, strict=True))
    problems: list[Problem] = []
    changes: list[Change] = []
    lines: dict[bytes, int] = {}
    kept: set[bytes] = set()
    for entry, given in zip(parsed.entries, raw, strict=True):
        old = there.find(entry.key)
        if old is None:
            change = Change(path + entry.key, None, given, entry.flags)
        else:
            kept.add(old.key)
            record = None if exported else _record(table, service, old.value)
            was = there.reading.answer(old.key[len(path) :])
            value: bytes | None = given
            if records:
                value = _merged(record, given)
            elif old.value == given or (not exported and was is not None and was == mine.answer(entry.key)):
                value = None
            if value is None:
                continue
            if record is not None and not records:
                problems.append(Problem(entry.line, f"{printable(entry.key)}: {_SHARED}"))
                continue
            if records and record is None and (owner := _lost(table, sharing, entry.key, old.value, value)):
                problems.append(Problem(entry.line, f"{printable(entry.key)}: {_LOST.format(owner.name)}"))
                continue
            change = Change(old.key, old, value, entry.flags or old.flags, was)
        lines[change.key] = entry.line
        changes.append(change)
    unchanged = len(parsed.entries) - len(changes) - len(problems)
    if exported:  # two spellings that stand in Consul just so are no business of an import
        touched = [
            (a, b) for a, b in duplicates(parsed) if a.key == b.key or lines.keys() & {path + a.key, path + b.key}
        ]
        problems += duplicate_problems(parsed, touched)
    problems += _unfit(path, changes, lines, service)
    new = _Reading(table, service, ((each.key[len(path) :], each.value) for each in changes))
    changes = [each._replace(becomes=new.answer(each.key[len(path) :])) for each in changes]
    problems += _judged(table, sharing, changes, lines)
    if prune:
        gone = there.without(kept, tuple(others))
        changes += gone
        if len(sharing) > 1 and not records and not exported:
            problems += [
                Problem(0, f"{printable(each.key[len(path) :])}: {_SHARED}")
                for each in gone
                if each.old is not None and _record(table, service, each.old.value) is not None
            ]
    return Plan(sorted(changes, key=lambda each: each.key), sorted(set(problems)), unchanged)


def _sharing(table: Table, service: Service) -> list[Service]:
    """The service, and those others of the table that read the same folder."""
    others = (SERVICES[name] for name in table.readable_services if name != service.name)
    return [service, *(other for other in others if table.path(other) == table.path(service))]


def _lost(table: Table, sharing: Iterable[Service], key: bytes, old: bytes, new: bytes) -> Service | None:
    """Whose value is lost when a record takes the place of this text; None for nobody's."""
    readers = [each for each in sharing if _reads(table, each, key, old)]
    # UID:GID:HOME looks like USER:PASSWORD as well.
    owner = next((each for each in readers if not each.hashed), next(iter(readers), None))
    return None if owner is None or _reads(table, owner, key, new) else owner


def _reads(table: Table, service: Service, key: bytes, value: bytes) -> bool:
    try:
        return bool(parse_value(table, service, key, value))
    except EntryError:
        return False


class _There:
    """The bucket as it stands in Consul."""

    def __init__(self, table: Table, service: Service, stored: Sequence[Stored]) -> None:
        path = table.path(service)
        self.exact = {each.key[len(path) :]: each for each in stored}
        self.reading = _Reading(table, service, ((key, each.value) for key, each in self.exact.items()))
        self._folded: dict[bytes, Stored] = {}
        for key, each in self.exact.items():
            folded = fold_key(key)
            if key == folded or folded not in self._folded:
                self._folded[folded] = each

    def find(self, key: bytes) -> Stored | None:
        """The entry of this key; with other capitals, where none is spelled like this."""
        return self.exact.get(key) or self._folded.get(fold_key(key))

    def without(self, kept: Container[bytes], others: tuple[bytes, ...]) -> list[Change]:
        """The removal of every entry of this service that is not to be kept."""
        return [
            Change(each.key, each, None, was=self.reading.answer(key))
            for key, each in self.exact.items()
            if key
            and not key.endswith(b"/")
            and each.key not in kept
            and not each.key.startswith(others)
            and self.reading.belongs(key)
        ]


def _record(table: Table, service: Service, value: bytes) -> dict[str, object] | None:
    if not service.fields or table.value_format == "text" or not value.lstrip().startswith(b"{"):
        return None
    try:
        return msgspec.json.decode(value, type=dict[str, object])
    except UNDECODABLE:
        return None


def _merged(record: Mapping[str, object] | None, value: bytes) -> bytes | None:
    """The record with the fields of another one; None where it has them already."""
    fields: dict[str, object] = msgspec.json.decode(value)
    if record is None:
        return value
    merged = {**record, **fields}
    return None if merged == record else msgspec.json.encode(merged)


def _unfit(path: bytes, changes: Sequence[Change], lines: Mapping[bytes, int], service: Service) -> list[Problem]:
    """What Consul, or smtpd, would not take as a key or for its size."""
    problems = []
    for key, old, value, *_ in changes:
        name = key[len(path) :]
        text = ""
        if old is None:
            if not is_url_safe(key):
                text = (
                    "no URL can name this key (allowed: UTF-8 without control characters, //, and the parts . and ..)"
                )
                if service.name == "relayhost" and b"://" in name:
                    text += '; make it the value of a key of your own choice, and set fetch = "values"'
            elif len(name) > MAX_KEY_BYTES and not service.patterns:
                text = f"the key has {len(name)} bytes, and smtpd asks for {MAX_KEY_BYTES} at most"
        if value is not None and len(value) > VALUE_MAX_BYTES:
            text = f"the value has {len(value)} bytes, and a transaction of Consul's takes {VALUE_MAX_BYTES} of it"
        if text:
            problems.append(Problem(lines[key], f"{printable(name)}: {text}"))
    return problems


def _judged(
    table: Table, sharing: Sequence[Service], changes: Sequence[Change], lines: Mapping[bytes, int]
) -> Iterator[Problem]:
    """What lint would say of the new entries, for each service that reads them, with their lines."""
    path = table.path(sharing[0])
    pairs = [(change.key[len(path) :], change.value) for change in changes]
    for service in sharing:
        if not list(_complaints(table, service, pairs)):
            continue
        of_whom = "" if service is sharing[0] else f" (for {service.name}, which reads the same folder)"
        for pair in pairs:
            for problem in _complaints(table, service, [pair]):
                yield Problem(lines[path + pair[0]], problem + of_whom)


def _complaints(table: Table, service: Service, pairs: Iterable[tuple[bytes, bytes | None]]) -> Iterator[str]:
    bucket = Entries(table, service, pairs)
    for problem in bucket.problems:
        yield str(problem).removeprefix(printable(bucket.path))
