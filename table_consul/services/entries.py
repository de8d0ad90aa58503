"""The entries of one service in one table: how they are built from pairs, and how a key is found among them.

They are one folder of Consul's key-value store, ``<prefix>/<table>/<service>/``. Pairs come in as bytes; every value
that comes out is a valid reply to smtpd.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from table_consul.errors import EntryError, printable
from table_consul.services import Service, Table, fold_key
from table_consul.services.values import (
    DEFAULT_KEY,
    MissingFields,
    expand_default_home,
    is_valid_reply_value,
    parse_value,
)

if TYPE_CHECKING:
    from table_consul.services.index import Index


class Problem(NamedTuple):
    """An entry that smtpd cannot use as it is stored, with the cause and what to do."""

    key: bytes
    """The whole key, as it is spelled in the store."""
    text: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {self.text}"


class EntriesBuilder:
    """Builds `Entries` from pairs, in as many steps as it takes. A bad entry affects no other."""

    def __init__(self, table: Table, service: Service, former: Entries | None = None) -> None:
        """``former`` are the entries of an earlier load; what has not changed since is taken from them unread."""
        self.table = table
        self.service = service
        self.path = table.path(service)
        if former is not None and not former.table.same_entries(table):
            former = None  # it was validated by other settings, such as allow_commands
        self.former = former
        self.values: dict[bytes, bytes] = {}
        """By folded key; ``b""`` where the entry has no value."""
        self.errors: dict[bytes, Problem] = {}
        """By folded key: entries whose lookup is an error."""
        self.incomplete: set[bytes] = set()
        """Those of them that are records without any field of this service, which another service may use."""
        self.warnings: dict[bytes, Problem] = {}
        """By folded key: entries that are served, although smtpd would reject or misread them."""
        self.spelling: list[Problem] = []
        """Keys with capitals that do not answer."""
        self.original_case: dict[bytes, bytes] = {}
        """Folded key to the stored one, where they differ."""
        # A value that was stored before, and that is not decoded, is valid as it is.
        self._valid: Mapping[bytes, bytes] = {} if former is None or table.value_format == "json" else former.values
        self._decoded = (b'"', b"[", b"{") if table.value_format == "auto" else ()
        self._former_keys = iter(self._valid)
        self._former_key = next(self._former_keys, None)

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Add pairs, whose keys are relative to the folder."""
        values, errors, valid, decoded = self.values, self.errors, self._valid, self._decoded
        for key, raw in pairs:
            if not key or key[-1] == 0x2F:
                continue  # the folder itself, and folders made in the UI
            folded = fold_key(key)
            if (folded != key or folded in values or folded in errors) and not self._resolve_case(key, folded):
                continue
            if raw and valid.get(folded) == raw and raw[:1] not in decoded:
                values[self._interned(folded)] = valid[folded]
            else:
                self._parse(folded, key, raw)

    def _interned(self, key: bytes) -> bytes:
        """The former entries' own object for this key, so that a reload does not hold every key twice.

        Both come in Consul's order; where they do not, the key itself is as good.
        """
        former = self._former_key
        while former is not None and former < key:
            former = next(self._former_keys, None)
        self._former_key = former
        return former if former is not None and former == key else key

    def _resolve_case(self, key: bytes, folded: bytes) -> bool:
        """Whether this key answers: of those that differ only in case, the lower-case one does, or else the first."""
        exact = not self.service.patterns and self.service.name != "source"
        if folded != key and self.table.mode == "direct" and exact:
            text = "smtpd asks in lower case, and a table that is read directly does not find this key; rename it"
            self.spelling.append(Problem(self.path + key, text))
        if folded in self.values or folded in self.errors:
            rival = self.original_case.get(folded, folded)
            if key != folded:
                self._note_loser(key, rival)
                return False
            self._note_loser(rival, key)
            self._drop(folded)
        if folded != key:
            self.original_case[folded] = key
        return True

    def _note_loser(self, loser: bytes, winner: bytes) -> None:
        text = (
            f"smtpd asks in lower case, where this is the same key as {printable(self.path + winner)}, which answers; "
            "delete one of them"
        )
        self.spelling.append(Problem(self.path + loser, text))

    def _drop(self, folded: bytes) -> None:
        for place in (self.values, self.errors, self.warnings, self.original_case):
            place.pop(folded, None)
        self.incomplete.discard(folded)

    def _parse(self, folded: bytes, key: bytes, raw: bytes | None) -> None:
        from table_consul.services.doubts import doubt

        try:
            value = parse_value(self.table, self.service, folded, raw)
        except EntryError as error:
            self.errors[folded] = Problem(self.path + key, str(error))
            if isinstance(error, MissingFields):
                self.incomplete.add(folded)
            return
        self.values[folded] = value
        if (text := doubt(self.table, self.service, folded, value)) is not None:
            self.warnings[folded] = Problem(self.path + key, text)

    def missing_keys(self) -> Iterator[bytes]:
        """The keys, as they were stored, that the former entries had and these have not."""
        if self.former is None:
            return
        for place in (self.former.values, self.former.errors):
            for key in place:
                if key not in self.values and key not in self.errors:
                    yield self.former.original_case.get(key, key)

    def finish(self) -> Entries:
        """The entries; the former ones themselves if nothing has changed."""
        former = self.former
        if former is None:
            return Entries(self.table, self.service, builder=self)
        for folded, warning in former.warnings.items():
            if folded in self.values and self.values[folded] is former.values[folded]:  # it was not parsed again
                self.warnings[folded] = warning._replace(key=self.path + self.original_case.get(folded, folded))
        unchanged = (
            former.values == self.values
            and former.errors == self.errors
            and former.warnings == self.warnings
            and former.spelling == self.spelling
        )
        return former if unchanged else Entries(self.table, self.service, builder=self)


class Entries:
    """The entries of one service in one table at one moment. Never changed once built; any thread may read them."""

    __slots__ = (
        "_default",
        "_exact",
        "_index",
        "_order",
        "errors",
        "incomplete",
        "original_case",
        "path",
        "problems",
        "service",
        "spelling",
        "table",
        "values",
        "warnings",
    )

    def __init__(
        self,
        table: Table,
        service: Service,
        pairs: Iterable[tuple[bytes, bytes | None]] = (),
        builder: EntriesBuilder | None = None,
    ) -> None:
        """Build from pairs, whose keys are relative to the folder; a builder may have taken others before."""
        builder = builder or EntriesBuilder(table, service)
        builder.take(pairs)
        self.table = table
        self.service = service
        self.path = builder.path
        self.values = builder.values
        self.errors = builder.errors
        self.incomplete = builder.incomplete
        self.warnings = builder.warnings
        self.spelling = builder.spelling
        self.original_case = builder.original_case
        refused = (problem for key, problem in self.errors.items() if key not in self.incomplete)
        self.problems: list[Problem] = [*refused, *self.spelling, *self.warnings.values()]
        """Every entry that smtpd cannot use as it is stored."""
        self._default = service.default and (DEFAULT_KEY in self.values or DEFAULT_KEY in self.errors)
        self._order: list[bytes] | None = None
        self._index: Index | None = None
        if service.patterns and (self.values or self.errors):
            from table_consul.services.index import INDEXES

            self._index = INDEXES[service.name]([*self.values, *self.errors])
            self.problems += [Problem(self._stored(key), text) for key, text in self._index.problems]
        self._exact = self._index is None and not self._default

    def __len__(self) -> int:
        return len(self.values) + len(self.errors)

    def _stored(self, key: bytes) -> bytes:
        return self.path + self.original_case.get(key, key)

    def find(self, key: bytes) -> bytes | None:
        """The entry that answers for this key, which smtpd has folded; None when there is none."""
        if self._index is not None:
            return self._index.find(key)
        return key if key in self.values or key in self.errors else None

    def has_own_entry(self, key: bytes) -> bool:
        """Whether an entry other than the default is there for the key, also one whose value is an error."""
        return self.find(key) is not None

    def contains(self, key: bytes) -> bool:
        """Whether the key is in the table: by an entry for it, or by the default of the service."""
        return self._default or self.find(key) is not None

    def uses_default(self, key: bytes) -> bool:
        """Whether the default of the service, if there is one, answers for this key."""
        return self.service.default and key not in self.values and (key not in self.errors or key in self.incomplete)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of the key, never empty, or None when the key is not in the table.

        Raises:
            MissingFields: the entry is a record without any field of this service.
            EntryError: the entry has no value that smtpd can use.
        """
        if self._exact:
            value = self.values.get(key)
            if value:
                return value
            if value is None and key not in self.errors:
                return None
        if self._default and (key == DEFAULT_KEY or self.uses_default(key)):
            return self._default_value(key)
        entry = self.find(key)
        return None if entry is None else self._value(entry)

    def _default_value(self, key: bytes) -> bytes:
        value = self._value(DEFAULT_KEY)
        try:
            return expand_default_home(value, key)
        except EntryError as error:
            raise EntryError(str(Problem(self._stored(DEFAULT_KEY), str(error)))) from None

    def _value(self, entry: bytes) -> bytes:
        problem = self.errors.get(entry)
        if problem is not None:
            raise (MissingFields if entry in self.incomplete else EntryError)(str(problem))
        value = self.values[entry]
        if value:
            return value
        if self.service.answers != "entry":
            text = f"there is no value, and {self.service.name} needs one"
            raise EntryError(str(Problem(self._stored(entry), text)))
        return self._key(entry)

    def _key(self, entry: bytes) -> bytes:
        if not is_valid_reply_value(entry):
            raise EntryError(str(Problem(self._stored(entry), "the key holds a control character")))
        return entry

    def next_after(self, last: bytes | None) -> tuple[bytes, bytes] | None:
        """The entry that follows ``last`` in the order of keys, wrapping, and its reply to a fetch.

        None when there is no entry at all. ``last`` may have been removed: additions and removals between two fetches
        neither repeat nor skip other entries. Entries that are errors are skipped.

        Raises:
            EntryError: all entries are errors.
        """
        if self._order is None:
            self._order = sorted([*self.values, *self.errors])
        order = self._order
        start = 0 if last is None else bisect_right(order, last)
        failure: EntryError | None = None
        for step in range(len(order)):
            entry = order[(start + step) % len(order)]
            try:
                return entry, self._value(entry) if self.table.fetch == "values" else self._key(entry)
            except EntryError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None
