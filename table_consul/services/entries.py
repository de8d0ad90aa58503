"""The entries of one service in one table: how they are built from keys and values, and how a key is found among them.

Keys and values come in as Consul stores them; every value that comes out is a valid reply to smtpd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

from table_consul.errors import EntryError, printable
from table_consul.services import DEFAULT_KEY, MAX_KEY_BYTES, Service, Table, fold_key
from table_consul.services.addresses import NOT_A_NETWORK, is_plain_list
from table_consul.services.judge import key_problem, usual_key, value_problem
from table_consul.services.parts import NO_PARTS, REPLACEMENT, Draft, Drafts, Note, Part, Parts
from table_consul.services.passwords import Kind, calculated_hash
from table_consul.services.values import MissingFields, expand_home, is_valid_reply_value, parse_value

if TYPE_CHECKING:
    from table_consul.services.index import Index, SecondsLeft


NOT_UTF8 = (
    "the key is not UTF-8 (Consul lists its bytes as U+FFFD), so no lookup finds it; delete it over HTTP, by its bytes"
    " (table-consulctl lint --live prints the request)"
)
WRONG_CASE = "smtpd asks in lower case, so mode direct never finds this key; rename it"


class Problem(NamedTuple):
    """An entry that smtpd cannot use as it is stored, with the cause and a hint."""

    key: bytes
    """The full key, as it is stored."""
    text: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {self.text}"


class EntriesBuilder:
    """Builds `Entries` from pairs, in as many steps as it takes. A bad entry affects no other."""

    def __init__(self, table: Table, service: Service, former: Entries | None = None, below: bytes = b"") -> None:
        """``former`` are the entries of an earlier load; values that have not changed since are not parsed again.

        What is taken replaces those of them whose stored key, relative to the folder, begins with ``below``.
        """
        self.table = table
        self.service = service
        self.path = table.path(service)
        self._former = former if former is not None and former.path == self.path else None
        self._reusable: Entries | None = None
        # Other settings, such as allow_commands, may change whether a value is valid. Hashes and patterns depend on the
        # deadline, and keys on the services that read the folder.
        if self._former is not None and self._former.table.same_entries(table):
            before = self._former.table
            same_deadline = before.deadline == table.deadline or not (service.hashed or service.patterns)
            same_readers = before.services == table.services and before.paths == table.paths
            self._reusable = self._former if same_deadline and same_readers else None
        self._rest_is_known = not below or self._reusable is not None
        # A value returned by parse_value is valid unchanged, unless it would be decoded again. Warned values are
        # judged again, and so are expressions, which depend on their original case.
        self._reuses_values = table.value_format != "json" and service.name != "regex"
        self._decoded = (b'"', b"[", b"{") if table.value_format == "auto" else ()
        self._hashed = service.hashed and "auth" in table.services
        parts = NO_PARTS if self._reusable is None else self._reusable.parts
        self._drafts = Drafts(parts, below, self._kind if self._hashed else None)
        self._usual_key = usual_key(service)
        self._judges_empty = service.needs_value or service.name in ("source", "relayhost")
        self._takes_lists = service.joined and table.value_format != "json"

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Add pairs, whose keys are relative to the folder and begin with ``below``."""
        rest, drafts = iter(pairs), self._drafts
        while True:
            pair = drafts.current.follow(rest, self._decoded) if self._reuses_values else next(rest, None)
            if pair is None:
                return
            key, raw = pair
            if key and key[-1] != 0x2F:  # not the folder itself, nor folders made in the UI
                folded = fold_key(key)
                drafts.take(folded, *self._judge(drafts.at(folded), folded, key, raw))

    def _judge(self, draft: Draft, folded: bytes, key: bytes, raw: bytes | None) -> tuple[bytes | None, Note | None]:
        """The value of an entry, None if it is an error, and its note."""
        former = draft.former
        if raw and self._reuses_values and former.values.get(folded) == raw and raw[:1] not in self._decoded:
            note = former.notes.get(folded)
            if note is None or note.warning is None:
                return former.values[folded], None if folded == key else Note(key)
        if REPLACEMENT in key:
            return None, Note(key, NOT_UTF8)
        problem, value = None, raw or b""
        if raw and not (self._takes_lists and is_plain_list(raw)):  # as nearly all lists are
            try:
                value = parse_value(self.table, self.service, folded, raw)
            except EntryError as error:
                return None, Note(key, str(error), incomplete=isinstance(error, MissingFields))
            problem = value_problem(self.table, self.service, folded, value)
        elif not raw and self._judges_empty:
            problem = value_problem(self.table, self.service, folded, value)
        if self._hashed and (kind := self._kind(value)) is not None:
            draft.kinds.setdefault(kind, (folded, value))
        if len(folded) > MAX_KEY_BYTES or not self._usual_key(folded):
            problem = key_problem(self.table, self.service, folded, key) or problem
        return value, None if folded == key and problem is None else Note(key, warning=problem)

    def _kind(self, value: bytes) -> Kind | None:
        parsed = calculated_hash(value, self.table.deadline)
        return None if parsed is None else parsed.kind

    def has(self, folded: bytes) -> bool:
        """Whether an entry of this folded key was taken, or is one that is not replaced."""
        return self._drafts.has(folded)

    def missing_keys(self) -> dict[bytes, bytes]:
        """The keys of the former entries that were not taken, from folded to stored, relative to the folder."""
        self._drafts.settle()
        return {} if self._former is None else dict(self._drafts.missing(self._former.parts))

    def keep(self, keys: Iterable[bytes]) -> None:
        """Keep these of the `missing_keys`, which are folded, with their former values."""
        former = NO_PARTS if self._former is None else self._former.parts
        for folded in keys:
            part = former.of(folded)
            self._drafts.keep(folded, part.values[folded], part.notes.get(folded))

    @property
    def conclusive(self) -> bool:
        """Whether the entry for each key is certain; if not, the whole folder must be read.

        It is not if a deleted key took precedence over one that differs only in case and is not below: the value of
        that one is not in memory.
        """
        return self._drafts.settle() and self._rest_is_known

    def parts(self) -> Parts:
        """The parts of the entries."""
        return self._drafts.finish()

    def finish(self) -> Entries:
        """The entries; the former ones themselves if nothing has changed."""
        parts, former = self.parts(), self._reusable
        if former is not None and former.parts.parts == parts.parts:
            return former
        return Entries(self.table, self.service, parts=parts, former=former)


class Entries:
    """The entries of one service in one table at one moment. Never changed once built; any thread may read them."""

    def __init__(
        self,
        table: Table,
        service: Service,
        pairs: Iterable[tuple[bytes, bytes | None]] = (),
        *,
        parts: Parts | None = None,
        former: Entries | None = None,
    ) -> None:
        """Build from pairs, whose keys are relative to the folder, or from the parts that a builder made.

        ``former`` are the entries from whose parts the builder started.
        """
        if parts is None:
            builder = EntriesBuilder(table, service)
            builder.take(pairs)
            parts = builder.parts()
        self.table, self.service, self.path = table, service, table.path(service)
        self.parts = parts
        every = parts.parts
        self.kinds = {kind: entry for part in every for kind, entry in part.kinds.items()}
        """An entry and its value for each kind of hash, where passwords are verified here."""
        self.index: Index | None = None
        """None unless entries are patterns."""
        if service.patterns and every[0].values:
            self.index = self._updated_index(former)
        self._default = service.default and self.find(DEFAULT_KEY) is not None
        self._undecodable = next((part.undecodable for part in every if part.undecodable is not None), None)
        self._exact = self.index is None and not self._default and self._undecodable is None
        self.plain = self._exact and all(part.plain for part in every)
        """Every entry is an exact key with a value: ``values.get`` is a `lookup`."""
        self.values: Mapping[bytes, bytes] = parts
        """By folded key; ``b""`` where the entry has no value."""
        if len(every) == 1 and not every[0].errors:
            self.values = cast("dict[bytes, bytes]", every[0].values)
        self.timed = self.index is not None and self.index.timed
        """Whether matching a key may take so long that it needs the clock of its request."""

    def _updated_index(self, former: Entries | None) -> Index:
        from table_consul.services.index import INDEXES

        parts = self.parts
        if former is not None and former.index is not None:
            added, removed = parts.patterns_not_in(former.parts), former.parts.patterns_not_in(parts)
            index = copy(former.index)
            index.change(added, removed, parts.patterns(), parts.is_pattern)
            return index
        kind, delimiter = INDEXES[self.service.name], self.table.subaddress_delimiter.encode()
        return kind(parts.patterns(), self.table.deadline / 10, parts.is_pattern, delimiter=delimiter)

    def __len__(self) -> int:
        return sum(len(part.values) for part in self.parts.parts)

    @cached_property
    def errors(self) -> Mapping[bytes, Problem]:
        """By folded key: entries whose lookup is an error. No key is both here and in ``values``."""
        return {key: self._problem(note, note.error) for key, note in self.parts.notes() if note.error is not None}

    @cached_property
    def incomplete(self) -> frozenset[bytes]:
        """The keys of `errors` that are records without any field of this service, which another service may use."""
        return frozenset(key for key, note in self.parts.notes() if note.incomplete)

    @cached_property
    def warnings(self) -> Mapping[bytes, Problem]:
        """By folded key: entries that are served, although smtpd would reject or misread them."""
        return {key: self._problem(note, note.warning) for key, note in self.parts.notes() if note.warning is not None}

    @cached_property
    def original_case(self) -> Mapping[bytes, bytes]:
        """Folded key to the stored one, where they differ."""
        return {key: note.stored for key, note in self.parts.notes() if note.stored != key}

    @property
    def only_lower_case(self) -> bool:
        """Whether no lookup finds a key in another case, because each reads the folded key from Consul."""
        return self.table.mode == "direct" and not self.service.patterns and self.service.name != "source"

    @cached_property
    def spelling(self) -> list[Problem]:
        """Keys that are never looked up, because one that differs only in case takes precedence."""
        return [problem for _, note in self.parts.notes() for problem in self._variants(note)]

    @cached_property
    def problems(self) -> list[Problem]:
        """Every entry that smtpd cannot use as it is stored."""
        return [*self.problems_of(self.parts.parts), *self.index_problems()]

    def problems_since(self, former: Entries | None) -> list[Problem]:
        """The problems that the former entries did not have."""
        if former is None:
            return self.problems
        before = {*former.problems_of(former.parts.not_in(self.parts)), *former.index_problems()}
        problems = (*self.problems_of(self.parts.not_in(former.parts)), *self.index_problems())
        return [problem for problem in problems if problem not in before]

    @cached_property
    def refused(self) -> int:
        """How many entries smtpd cannot use; a host name among networks may be meant for `match from rdns`."""
        return len({problem.key for problem in self.problems if problem.text != NOT_A_NETWORK})

    def problems_of(self, parts: Iterable[Part]) -> Iterator[Problem]:
        """The problems of these parts, without those of the index."""
        for part in parts:
            for key, note in part.notes.items() if self.only_lower_case or part.flawed else ():
                if note.error is not None and not note.incomplete:
                    yield self._problem(note, note.error)
                yield from self._variants(note)
                if note.warning is not None:
                    yield self._problem(note, note.warning)
                if self.only_lower_case and note.stored != key:
                    yield self._problem(note, WRONG_CASE)

    def index_problems(self) -> Iterator[Problem]:
        """Patterns that cannot be used."""
        for key, text in self.index.problems if self.index is not None else ():
            yield Problem(self._stored(key), text)

    def _variants(self, note: Note) -> Iterator[Problem]:
        for key in note.variants:
            path = printable(self.path + note.stored)
            text = f"differs only in case from {path}, which takes precedence; delete one of the two"
            yield Problem(self.path + key, text)

    def _problem(self, note: Note, text: str) -> Problem:
        return Problem(self.path + note.stored, text)

    def _stored(self, key: bytes) -> bytes:
        return self.path + self.parts.of(key).stored(key)

    def _error(self, entry: bytes, text: str) -> EntryError:
        return EntryError(str(Problem(self._stored(entry), text)))

    def find(self, key: bytes, seconds_left: SecondsLeft = None) -> bytes | None:
        """The entry, good or bad, of this folded key; None if there is none. The default entry is ignored.

        Raises:
            EntryError: the time that is left, by default unlimited, is too short to match the key.
        """
        if self.index is not None:
            try:
                return self.index.find(key, seconds_left)
            except EntryError as error:
                raise EntryError(str(Problem(self.path, str(error)))) from None
        return key if self.parts.has(key) else None

    def has_answer(self, key: bytes | None) -> bool:
        """Whether an entry matches the key (None: any, for a fetch); then those that an ACL hides do not matter."""
        return len(self) > 0 if key is None else self.find(key) is not None

    def contains(self, key: bytes, seconds_left: SecondsLeft = None) -> bool:
        """Whether the key is in the table: by an entry for it, or by the default entry of the service.

        Raises:
            EntryError: as `find`, or the key is not UTF-8 and may be one that Consul lists with other bytes.
        """
        self._raise_if_undecodable(key)
        if self.find(key, seconds_left) is not None and not self.uses_default(key):
            return True
        try:
            return self._default and (key == DEFAULT_KEY or self._expanded(key) is not None)
        except EntryError:
            return True

    def _raise_if_undecodable(self, key: bytes) -> None:
        if self._undecodable is not None:
            try:
                key.decode()
            except UnicodeDecodeError:
                raise self._error(self._undecodable, NOT_UTF8) from None

    def uses_default(self, key: bytes) -> bool:
        """Whether the default entry of the service, if there is one, applies to this key."""
        if not self.service.default:
            return False
        part = self.parts.of(key)
        return key not in part.values or (key in part.notes and part.notes[key].incomplete)

    def lookup(self, key: bytes, seconds_left: SecondsLeft = None) -> bytes | None:
        """The value of the key, never empty, or None when the key is not in the table.

        Raises:
            MissingFields: the entry is a record without any field of this service.
            EntryError: the entry has no value that smtpd can use, or as `contains`.
        """
        if self._exact:
            value = self.values.get(key)
            if value:
                return value
            if value is None and not self.parts.has(key):
                return None
        self._raise_if_undecodable(key)
        if self._default and (key == DEFAULT_KEY or self.uses_default(key)):
            return self._expanded(key)
        entry = self.find(key, seconds_left)
        return None if entry is None else self._value(entry)

    def _expanded(self, key: bytes) -> bytes | None:
        value = self._value(DEFAULT_KEY)
        try:
            return expand_home(value, key)
        except EntryError as error:
            raise self._error(DEFAULT_KEY, str(error)) from None

    def _value(self, entry: bytes) -> bytes:
        part = self.parts.of(entry)
        value = part.values[entry]
        if value:
            return value
        if value is None:
            note = part.notes[entry]
            raise (MissingFields if note.incomplete else EntryError)(str(self._problem(note, note.error or "")))
        if self.service.answers != "entry":
            raise self._error(entry, f"missing value: {self.service.name} requires one")
        return self._key(entry)

    def _key(self, entry: bytes) -> bytes:
        if not is_valid_reply_value(entry):
            raise self._error(entry, "the key contains a control character")
        if REPLACEMENT in entry:
            raise self._error(entry, NOT_UTF8)
        return entry

    def next_after(self, last: bytes | None) -> tuple[bytes, bytes] | None:
        """The entry that follows ``last`` in the order of keys, wrapping, and its reply to a fetch.

        None when there is no entry at all. ``last`` may have been removed: additions and removals between two fetches
        neither repeat nor skip other entries. Entries that are errors are skipped.

        Raises:
            EntryError: all entries are errors.
        """
        failure: EntryError | None = None
        for entry in self.parts.after(last):
            try:
                return entry, self._value(entry) if self.table.fetch == "values" else self._key(entry)
            except EntryError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None
