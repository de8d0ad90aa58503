"""The changes of an import: the entries of a file compared with those in Consul.

This module reads neither Consul nor files. A value from a text file is compared with the value that smtpd gets now,
however it is stored in Consul; an export is compared byte by byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec

from table_consul.ctl import recipients
from table_consul.ctl.formats import FileEntry, LineProblem, ParsedFile
from table_consul.errors import UNDECODABLE, EntryError, printable
from table_consul.kv import is_url_safe, modern_name_problem
from table_consul.services import MAX_KEY_BYTES, Service, Table, fold_key
from table_consul.services.entries import WRONG_CASE, Entries
from table_consul.services.parts import REPLACEMENT
from table_consul.services.values import parse_value

# Consul accepts 512 KB per transaction (txn_max_req_len), with the key and in base64; smtpd accepts far less.
VALUE_MAX_BYTES = 376 << 10

_NOT_UTF8 = (
    "the key may have other bytes than Consul lists, and a transaction names only UTF-8 (delete it over HTTP;"
    " table-consulctl lint --live prints the request)"
)
_SHARED = "stored as a record that several services read (edit it in Consul, or use --record with a passwd file)"

_Record = dict[str, object]
"""The JSON record of a user; each service reads some of its fields."""


class Stored(NamedTuple):
    """An entry in Consul, by its whole key."""

    key: bytes
    value: bytes
    modify_index: int
    flags: int = 0


class Change(NamedTuple):
    """One key to write: new if ``old`` is None, removed if ``value`` is None."""

    key: bytes
    old: Stored | None
    value: bytes | None
    flags: int = 0
    old_answer: bytes | None = None
    """The value that smtpd gets for the key now; None if it gets none."""
    new_answer: bytes | None = None

    @property
    def kind(self) -> str:
        """``add``, ``change`` or ``remove``."""
        return "add" if self.old is None else "remove" if self.value is None else "change"


class Plan(NamedTuple):
    """The changes in the order of keys, and the problems of the file in the order of its lines."""

    changes: list[Change]
    problems: list[LineProblem]
    """If there are any, nothing may be written."""
    unchanged: int
    refused: list[LineProblem]
    """Entries that are left out of the changes."""
    notes: list[LineProblem]
    """Lines that repeat others, and entries of a backup that smtpd cannot use."""


def stored_value(table: Table, service: Service, key: bytes, text: bytes) -> bytes:
    """The text of a file, or a JSON string of it if the stored text would not be read back as this text.

    Text that starts like JSON would be decoded, and a table whose ``value_format`` is json stores only JSON.
    """
    if not text or table.value_format == "text" or (table.value_format == "auto" and text[:1] not in b'"[{'):
        return text
    meant = _parsed(msgspec.structs.replace(table, value_format="text"), service, key, text)
    quoted = msgspec.json.encode(text.decode(errors="replace"))
    again = _parsed(table, service, key, quoted)
    return quoted if meant is not None and _parsed(table, service, key, text) != meant == again else text


def plan(
    table: Table,
    service: Service,
    parsed: ParsedFile,
    stored: Sequence[Stored],
    *,
    prune: bool = False,
    records: bool = False,
    skip: bool = False,
    others: Sequence[bytes] = (),
) -> Plan:
    """The changes that give Consul the entries of the file.

    ``prune`` removes entries that the file does not have, except folders, entries below ``others`` (folders of other
    services within this one) and records without a field of this service. With ``records`` the file's values are
    records of users, whose fields are merged into the stored records; without it, a change to a record that another
    service also reads is a problem. With ``skip``, entries with a problem are refused, and the others are kept.
    """
    planner = _Planner(table, service, stored, parsed, records=records)
    planner.compare()
    planner.validate()
    if prune:
        planner.prune(tuple(others))
    problems = sorted({*parsed.problems, *planner.problems})
    refused = [each for each in planner.refuse() if each.key not in planner.bad]  # one problem per key is enough
    if skip:
        for key in planner.bad:
            planner.changes.pop(key, None)
        problems, refused = [], sorted(problems + refused)
    changes = [planner.changes[key] for key in sorted(planner.changes)]
    return Plan(changes, problems, planner.unchanged, refused, sorted([*parsed.notes, *planner.notes]))


def plan_edits(
    table: Table, service: Service, parsed: ParsedFile, stored: Sequence[Stored], remove: Sequence[bytes] = ()
) -> Plan:
    """As `plan`, for entries that an operator edits: in a record only the fields of this service change.

    ``remove`` lists stored keys, relative to the folder. Aliases that smtpd could no longer expand are problems too.
    """
    planner = _Planner(table, service, stored, parsed._replace(restores=False), edits=True)
    planner.compare()
    planner.validate()
    for key in remove:
        planner.remove(key)
    planner.expand()
    problems, refused = sorted({*parsed.problems, *planner.problems}), planner.refuse()
    changes = [planner.changes[key] for key in sorted(planner.changes)]
    return Plan(changes, problems, planner.unchanged, refused, planner.notes)


class _Planner:
    """The state of one plan. All keys are relative to the folder of the service, in their stored case."""

    def __init__(
        self,
        table: Table,
        service: Service,
        stored: Sequence[Stored],
        parsed: ParsedFile,
        *,
        records: bool = False,
        edits: bool = False,
    ) -> None:
        self._table, self._service, self._parsed = table, service, parsed
        self._exported = parsed.format == "export"
        self._records, self._edits, self._verbatim = records, edits, records or self._exported
        self._path = table.path(service)
        self._sharing = table.sharing(service)
        self._stored = {each.key[len(self._path) :]: each for each in stored}
        self._now = Entries(table, service, ((key, old.value) for key, old in self._stored.items()))
        self._file: dict[bytes, FileEntry] = {}
        self.changes: dict[bytes, Change] = {}
        self.bad: set[bytes] = set()
        """The keys of changes with a problem."""
        self.problems: list[LineProblem] = []
        self.notes: list[LineProblem] = []
        self.unchanged = 0

    def compare(self) -> None:
        """Find the entries that must be written."""
        table, service, entries = self._table, self._service, self._parsed.entries
        if not self._verbatim:
            as_stored = ((each, stored_value(table, service, each.key, each.value)) for each in entries)
            entries = [each if value is each.value else each._replace(value=value) for each, value in as_stored]
        read = () if self._verbatim else entries
        wanted = Entries(table, service, ((entry.key, entry.value) for entry in read))
        for entry in entries:
            key = self._original_case(entry.key)
            former = self._file.setdefault(key, entry)
            if former is not entry:
                self._repeat(entry, former)
                continue
            old = self._stored.get(key)
            if old is None:
                self._add(key, entry)
                continue
            record = None if self._exported else _record_of(table, service, old.value)
            value = entry.value
            if record is not None and self._records:
                fields: _Record = msgspec.json.decode(value)
                # 1000.0 equals 1000, but is not an id.
                same = all(
                    name in record and type(record[name]) is type(field) and record[name] == field
                    for name, field in fields.items()
                )
                value = old.value if same else msgspec.json.encode(record | fields)
            answer = _answer(self._now, key)
            flags = entry.flags if self._parsed.restores else entry.flags or old.flags
            stored_alike = (value, flags) == (old.value, old.flags)
            if stored_alike or not (self._verbatim or answer is None or answer != _answer(wanted, entry.key)):
                self.unchanged += 1
                if key != entry.key and self._now.only_lower_case and not self._edits:  # edit shows untouched entries
                    self._add_problem(key, WRONG_CASE)
            elif record is not None and self._edits:
                if (merged := self._merged(key, record, value)) is not None:
                    self.changes[key] = Change(old.key, old, merged, old.flags, answer)
            elif record is not None and not self._records:
                self._add_problem(key, _SHARED)
            elif record is None and self._records and (owner := self._overwritten_service(key, old.value, value)):
                self._add_problem(key, f"would overwrite the stored {owner} value, which the file does not have")
            else:
                self.changes[key] = Change(old.key, old, value, flags, answer)

    def _add(self, key: bytes, entry: FileEntry) -> None:
        value: bytes | None = entry.value
        if self._edits and self._holds_records:
            value = self._merged(key, {}, entry.value)
        if value is not None:
            self.changes[key] = Change(self._path + key, None, value, entry.flags)

    def _original_case(self, key: bytes) -> bytes:
        """The stored key that a key of the file changes: itself, or one in another case that the file lacks."""
        if key in self._stored:
            return key
        folded = fold_key(key)
        other = self._now.original_case.get(folded, folded)
        return other if other in self._stored and other not in self._exported_keys else key

    @cached_property
    def _exported_keys(self) -> Container[bytes]:
        return {entry.key for entry in self._parsed.entries} if self._exported else ()

    def _repeat(self, entry: FileEntry, former: FileEntry) -> None:
        """Note an exact repetition; one with another value, or in another case, is a problem."""
        place = f"{self._parsed.unit} {former.line}"
        if entry.key != former.key:
            self.problems.append(LineProblem(entry.line, f"already in {place} as {printable(former.key)}", entry.key))
        elif entry.value != former.value:
            self.problems.append(LineProblem(entry.line, f"already in {place} with another value", entry.key))
        else:
            self.notes.append(LineProblem(entry.line, f"repeats {place}", entry.key))

    def validate(self) -> None:
        """Find the problems that lint would report, for each service that reads the folder, and unwritable changes."""
        after = [
            Entries(self._table, service, ((key, change.value) for key, change in self.changes.items()))
            for service in self._sharing
        ]
        for key, change in self.changes.items():
            if text := _invalid(self._service, key, change):
                self._add_problem(key, text)
            self.changes[key] = change._replace(new_answer=_answer(after[0], key))
        invalid = {*self.bad}
        for entries in after:
            suffix = "" if entries is after[0] else f" (for {entries.service.name}, which reads the same folder)"
            for problem in entries.problems:
                key = problem.key[len(self._path) :]
                if self._parsed.restores:
                    self.notes.append(LineProblem(self._line(key), problem.text + suffix, key))
                elif key not in invalid:  # one problem per key is enough
                    self._add_problem(key, problem.text + suffix)

    def refuse(self) -> list[LineProblem]:
        """Remove new keys from the changes that, once written, no URL could read or delete."""
        new = {key: each for key, each in self.changes.items() if each.old is None}
        texts = {key: text for key, each in new.items() if (text := modern_name_problem(each.key))}
        for key in texts:
            del self.changes[key]
        return sorted(LineProblem(self._line(key), text, key) for key, text in texts.items())

    def prune(self, others: tuple[bytes, ...]) -> None:
        """Remove the entries that the file does not have, as `plan` describes."""
        for key, old in self._stored.items():
            folder = not key or key.endswith(b"/") or old.key.startswith(others)
            if folder or key in self._file or fold_key(key) in self._now.incomplete:
                continue
            self._replace(key, old, None)
            if len(self._sharing) > 1 and not self._verbatim and _record_of(self._table, self._service, old.value):
                self._add_problem(key, _SHARED)

    def remove(self, key: bytes) -> None:
        """Remove an entry, or from a record only the fields of this service."""
        old = self._stored[key]
        record = None if self._exported else _record_of(self._table, self._service, old.value)
        value = None if record is None else _without_value(self._service, record)
        self._replace(key, old, value)

    def _replace(self, key: bytes, old: Stored, value: bytes | None) -> None:
        self.changes[key] = Change(old.key, old, value, old.flags, _answer(self._now, key))
        if REPLACEMENT in key:
            self._add_problem(key, _NOT_UTF8)

    def expand(self) -> None:
        """Find the aliases that smtpd can expand now, but not after the changes."""
        if self._service.name != "alias" or not self.changes:
            return
        before = {**dict.fromkeys(self._now.errors, b""), **self._now.values}
        after = {**before, **{fold_key(key): change.new_answer or b"" for key, change in self.changes.items()}}
        for key, change in self.changes.items():
            if change.value is None:
                after.pop(fold_key(key), None)
        delimiter = self._table.subaddress_delimiter.encode()
        if found := dict(recipients.rejected_aliases(after, delimiter)):
            for key in found.keys() - dict(recipients.rejected_aliases(before, delimiter)):
                self._add_problem(self._now.original_case.get(key, key), found[key])

    @cached_property
    def _holds_records(self) -> bool:
        """Whether a new user of this folder gets a record."""
        if self._exported or not self._service.fields or self._table.value_format == "text":
            return False
        values = [each.value for each in self._stored.values()]
        shared = len({each.fields for each in self._sharing}) > 1
        return shared or _are_records(self._table, self._service, values)

    def _merged(self, key: bytes, record: _Record, value: bytes) -> bytes | None:
        try:
            return _with_value(self._table, self._service, fold_key(key), record, value)
        except EntryError as error:
            self._add_problem(key, str(error))
            return None

    def _line(self, key: bytes) -> int:
        return self._file[key].line if key in self._file else 0

    def _add_problem(self, key: bytes, text: str) -> None:
        self.bad.add(key)
        self.problems.append(LineProblem(self._line(key), text, key))

    def _overwritten_service(self, key: bytes, old: bytes, new: bytes) -> str:
        """The name of the service whose value is lost when a record replaces this text; empty if there is none."""
        readers = [service for service in self._sharing if _parsed(self._table, service, key, old)]
        readers.sort(key=lambda service: service.hashed)  # UID:GID:HOME looks like USER:PASSWORD as well
        return readers[0].name if readers and not _parsed(self._table, readers[0], key, new) else ""


def _record_of(table: Table, service: Service, value: bytes) -> _Record | None:
    """The value as a record; None if it is anything else, or the service has no records."""
    if service.fields and table.value_format != "text" and value.lstrip().startswith(b"{"):
        with contextlib.suppress(*UNDECODABLE):
            return msgspec.json.decode(value, type=_Record)
    return None


def _are_records(table: Table, service: Service, values: Iterable[bytes]) -> bool:
    """Whether most of the values are records."""
    found = [_record_of(table, service, value) is not None for value in values] if service.fields else []
    return 2 * sum(found) > len(found)


def _with_value(table: Table, service: Service, key: bytes, record: _Record, value: bytes) -> bytes:
    """The record with the fields of this service set from ``value``, which is a record or text.

    Raises:
        EntryError: the text is not a value of this service, or its fields cannot hold it.
    """
    fields = _record_of(table, service, value)
    meant = None
    if fields is None:
        meant = parse_value(msgspec.structs.replace(table, value_format="text"), service, key, value)
        text = value.decode(errors="replace").strip()
        texts = [text.removeprefix(f"{key.decode()}:")] if service.hashed else text.split(":", 2)
        fields = {
            name: int(part) if name in ("uid", "gid") else part
            for name, part in zip(service.fields, texts, strict=False)
        }
    merged = msgspec.json.encode(record | fields)
    if meant is not None and parse_value(table, service, key, merged) != meant:
        raise EntryError("the record of a user cannot hold this value (edit the record in Consul)")
    return merged


def _without_value(service: Service, record: _Record) -> bytes | None:
    """The record without the fields of this service; None if it has no others."""
    left = {name: value for name, value in record.items() if name not in service.fields}
    return msgspec.json.encode(left) if left else None


def _parsed(table: Table, service: Service, key: bytes, value: bytes) -> bytes | None:
    with contextlib.suppress(EntryError):
        return parse_value(table, service, key, value)
    return None


def _answer(entries: Entries, key: bytes) -> bytes | None:
    """The value that smtpd gets for the key of an entry; None if it gets none."""
    key = fold_key(key)
    value = entries.values.get(key)
    service = entries.service
    return key if value is not None and (service.lists_only or (not value and service.answers == "entry")) else value


def _invalid(service: Service, name: bytes, change: Change) -> str:
    """Why Consul or smtpd would reject the key or the size of a change; empty if neither would."""
    if change.value is not None and len(change.value) > VALUE_MAX_BYTES:
        return f"the value has {len(change.value)} bytes, but a transaction of Consul holds at most {VALUE_MAX_BYTES}"
    if change.old is not None:
        return _NOT_UTF8 if REPLACEMENT in change.key else ""
    if not is_url_safe(change.key):
        hint = '; or store it as the value of another key, and set fetch = "values"'
        text = "no URL can name this key (use UTF-8 without control characters, //, and the segments . and ..)"
        return text + hint if service.name == "relayhost" and b"://" in name else text
    if len(name) > MAX_KEY_BYTES and not service.patterns:
        return f"the key has {len(name)} bytes, but smtpd looks up at most {MAX_KEY_BYTES}"
    return ""
