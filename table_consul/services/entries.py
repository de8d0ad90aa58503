"""The entries of one service in one table, how they are built, and how a key is found among them.

Entries are one folder of Consul's key-value store, ``<prefix>/<table>/<service>/``. Pairs come in as bytes; what comes
out is a valid reply to smtpd.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

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


class EntriesBuilder:
    """Reads the pairs of one bucket, in as many goes as it takes. An entry that is no good harms no other."""

    def __init__(self, table: Table, service: Service, former: Entries | None = None) -> None:
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
        self.doubts: dict[bytes, str] = {}
        self._spelled: dict[bytes, bytes] = {}
        # A value that stood there before, and that nothing decodes, has been judged before.
        self._known = {} if former is None or table.value_format == "json" else former.values
        self._decoded = (b'"', b"[", b"{") if table.value_format == "auto" else ()
        self._former_keys = iter(self._known)
        self._former_key = next(self._former_keys, None)
        from table_consul.services.doubts import doubt

        self._doubt = doubt

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Read the pairs, whose keys are relative to the bucket."""
        values, refused, known, decoded = self.values, self.refused, self._known, self._decoded
        for key, raw in pairs:
            if not key or key[-1] == 0x2F:
                continue  # the bucket itself, and folders made in the UI
            folded = fold_key(key)
            if (folded != key or folded in values or folded in refused) and not self._spell(key, folded):
                continue
            if raw and known.get(folded) == raw and raw[:1] not in decoded:
                values[self._same_key(folded)] = known[folded]
            else:
                self._read(folded, raw)

    def _same_key(self, key: bytes) -> bytes:
        """The former bucket's own object for this key, so that a reload leaves no second copy of all keys behind.

        Both come in Consul's order; where they do not, the key itself is as good.
        """
        former = self._former_key
        while former is not None and former < key:
            former = next(self._former_keys, None)
        self._former_key = former
        return former if former is not None and former == key else key

    def _spell(self, key: bytes, folded: bytes) -> bool:
        """Whether the key, of which there may be another spelling, is the one that answers."""
        wins = True
        if (
            folded != key
            and self.table.mode == "direct"
            and not self.service.patterns
            and self.service.name != "source"
        ):
            self.problems.append(
                f"{printable(self.path + key)}: smtpd asks in lower case, and a table that is read directly does "
                "not find this key; rename it"
            )
        if folded in self.values or folded in self.refused:
            rival = self._spelled.get(folded, folded)
            wins = key == folded
            winner, loser = (key, rival) if wins else (rival, key)
            self.problems.append(
                f"{printable(self.path + loser)}: smtpd asks in lower case, where this is the same key as "
                f"{printable(self.path + winner)}, which answers; delete one of them"
            )
        if wins:
            self._spelled[folded] = key
        return wins

    def _read(self, key: bytes, raw: bytes | None) -> None:
        self.values.pop(key, None)
        self.refused.pop(key, None)
        self.doubts.pop(key, None)
        try:
            value = self.values[key] = parse_value(self.table, self.service, key, raw)
        except EntryError as error:
            named = error.__class__(f"{printable(self.path + key)}: {error}")
            self.refused[key] = named
            if not isinstance(
                error, MissingFields
            ):  # a bucket that serves several services has records for some of them
                self.problems.append(str(named))
            return
        if (doubt := self._doubt(self.table, self.service, key, value)) is not None:
            self.doubts[key] = f"{printable(self.path + key)}: {doubt}"

    def lost(self) -> Iterator[bytes]:
        """The keys that the former bucket had and this one has not."""
        if self.former is None:
            return
        for had in (self.former.values, self.former.refused):
            for key in had:
                if key not in self.values and key not in self.refused:
                    yield key

    def finish(self) -> Entries:
        """The bucket; the former one itself if nothing has changed."""
        former = self.former
        if former is not None:
            for key, doubt in former.doubts.items():
                if key in self.values and self.values[key] is former.values[key]:
                    self.doubts[key] = doubt  # taken over with its value, which has not been read again
        if (
            former is not None
            and former.values == self.values
            and former.refused.keys() == self.refused.keys()
            and former.read_problems == self.problems
            and former.doubts == self.doubts
        ):
            return former
        return Entries(self.table, self.service, builder=self)


class Entries:
    """The entries of one service in one table as they stood at one moment. Never changed once built."""

    __slots__ = (
        "_default",
        "_index",
        "_order",
        "doubts",
        "path",
        "problems",
        "read_problems",
        "refused",
        "service",
        "table",
        "values",
    )

    def __init__(
        self,
        table: Table,
        service: Service,
        pairs: Iterable[tuple[bytes, bytes | None]] = (),
        builder: EntriesBuilder | None = None,
    ) -> None:
        """Read the pairs, whose keys are relative to the bucket; a builder may have read others already."""
        builder = builder or EntriesBuilder(table, service)
        builder.take(pairs)
        self.table = table
        self.service = service
        self.path = builder.path
        self.values = builder.values
        self.refused = builder.refused
        self.read_problems = builder.problems
        self.doubts = builder.doubts
        self.problems = [*self.read_problems, *self.doubts.values()]
        """Every entry that smtpd could not use as it stands, with its key and the remedy, a line each."""
        self._default = service.default and (DEFAULT_KEY in self.values or DEFAULT_KEY in self.refused)
        self._order: list[bytes] | None = None
        self._index: Index | None = None
        if service.patterns and (self.values or self.refused):
            from table_consul.services.index import INDEXES

            self._index = INDEXES[service.name]([*self.values, *self.refused])
            self.problems += [f"{printable(self.path + key)}: {what}" for key, what in self._index.problems]

    def __len__(self) -> int:
        return len(self.values) + len(self.refused)

    def find(self, key: bytes) -> bytes | None:
        """The entry that answers for this key, which smtpd has folded; None when there is none."""
        if self._index is not None:
            return self._index.find(key)
        return key if key in self.values or key in self.refused else None

    def has_own_entry(self, key: bytes) -> bool:
        """Whether an entry stands for the key itself. One whose value is no good does all the same."""
        return self.find(key) is not None

    def contains(self, key: bytes) -> bool:
        """Whether the key is in the table: by an entry for it, or by the default of the service."""
        return self._default or self.find(key) is not None

    def uses_default(self, key: bytes) -> bool:
        """Whether the default of the service, if there is one, is to answer for this key."""
        return (
            self.service.default and key not in self.values and isinstance(self.refused.get(key), MissingFields | None)
        )

    def lookup(self, key: bytes) -> bytes | None:
        """The value of the key, never empty, or None when the key is not in the table.

        Raises:
            EntryError: the key is there, but what stands under it is no value for this service.
        """
        if self._default and (key == DEFAULT_KEY or self.uses_default(key)):
            return self._by_default(key)
        entry = self.find(key)
        return None if entry is None else self._value(entry)

    def _by_default(self, key: bytes) -> bytes:
        value = self._value(DEFAULT_KEY)
        try:
            return expand_default_home(value, key)
        except EntryError as error:
            raise EntryError(f"{printable(self.path + DEFAULT_KEY)}: {error}") from None

    def _value(self, entry: bytes) -> bytes:
        refused = self.refused.get(entry)
        if refused is not None:
            raise refused.with_traceback(None)  # else it grows with each raise
        value = self.values[entry]
        if not value and self.service.answers == "entry":
            value = entry
            if not is_valid_reply_value(value):
                raise EntryError(f"{printable(self.path + entry)}: the key holds a control character")
        if not value:
            raise EntryError(f"{printable(self.path + entry)}: there is no value, and {self.service.name} needs one")
        return value

    def next_after(self, last: bytes | None) -> tuple[bytes, bytes] | None:
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
        if not is_valid_reply_value(entry):
            raise EntryError(f"{printable(self.path + entry)}: the key holds a control character")
        return entry
