"""The entries of a folder, in parts of some thousand keys each: a new version shares unchanged parts.

A lookup finds the part by its first key and the entry in a dict. No step in building a version covers more than one
part, because each holds Python's lock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import msgspec
from msgspec.structs import replace

from table_consul.services.passwords import Kind

REPLACEMENT = "\ufffd".encode()
# The most entries of a part; a full one is cut in two. A dict of 8192 slots holds one more.
PART_SIZE = 5460
_END: tuple[None, None] = (None, None)


class Note(msgspec.Struct, frozen=True, gc=False):
    """The unusual properties of an entry; most entries have no note."""

    stored: bytes
    """The key as it is stored, relative to the folder."""
    error: str | None = None
    """Why its lookup is an error."""
    incomplete: bool = False
    """It is a record without any field of this service, which another service may use."""
    warning: str | None = None
    """Why smtpd would reject or misread the value, which is served."""
    variants: tuple[bytes, ...] = ()
    """Stored keys that are never looked up, because this one, which differs only in case, takes precedence."""


class Part:
    """Entries whose keys follow each other. Never changed once built; any thread may read it."""

    __slots__ = ("_order", "errors", "flawed", "kinds", "notes", "plain", "undecodable", "values", "varied")

    def __init__(
        self, values: dict[bytes, bytes | None], notes: dict[bytes, Note], kinds: Mapping[Kind, tuple[bytes, bytes]]
    ) -> None:
        self.values = values
        """Folded key to value; ``b""`` where the entry has none, None where its lookup is an error."""
        self.notes = notes
        """By folded key."""
        self.kinds = kinds
        """An entry and its value for each kind of hash, where passwords are verified here."""
        self.errors = 0
        self.varied = False
        """Whether there are keys that differ only in case."""
        self.flawed = False
        """Whether there is a problem that is not one of the index."""
        undecodable = []
        for key, note in notes.items():
            if note.error is not None:
                self.errors += 1
                if REPLACEMENT in key:
                    undecodable.append(key)
            if note.variants:
                self.varied = True
            self.flawed = self.flawed or note.error is not None or note.warning is not None or self.varied
        self.undecodable = min(undecodable, default=None)
        self.plain = all(values.values())
        """Every entry has a value."""
        self._order: list[bytes] | None = None

    @property
    def order(self) -> list[bytes]:
        """The keys in ascending order."""
        if self._order is None:
            self._order = sorted(self.values)
        return self._order

    def stored(self, key: bytes) -> bytes:
        """The key of this entry as it is stored."""
        note = self.notes.get(key)
        return key if note is None else note.stored


class Parts(Mapping[bytes, bytes]):
    """All parts of a folder, in order; as a mapping, the values of the entries that are not errors."""

    def __init__(self, starts: list[bytes], parts: list[Part]) -> None:
        """A part holds all keys from its start on, and before the next one's; the first start is empty."""
        self.starts, self.parts = starts, parts
        self._cuts = starts[1:]
        self._values = [part.values for part in parts]

    def of(self, key: bytes) -> Part:
        """The part that contains this folded key, if any does."""
        return self.parts[bisect_right(self._cuts, key)]

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        """The value of this folded key, ``b""`` if the entry has none; the default for errors and unknown keys."""
        value = self._values[bisect_right(self._cuts, key)].get(key)
        return default if value is None else value

    def has(self, key: bytes) -> bool:
        """Whether there is an entry, good or bad, of this folded key."""
        return key in self._values[bisect_right(self._cuts, key)]

    def is_pattern(self, key: bytes) -> bool:
        """Whether there is an entry that may match. A key that Consul lists with other bytes must not."""
        return key in self._values[bisect_right(self._cuts, key)] and REPLACEMENT not in key

    def patterns(self) -> Iterator[bytes]:
        """The entries that may match, as `is_pattern`."""
        return (key for part in self.parts for key in part.values if REPLACEMENT not in key)

    def notes(self) -> Iterator[tuple[bytes, Note]]:
        """The notes, by folded key."""
        return (noted for part in self.parts for noted in part.notes.items())

    def after(self, last: bytes | None) -> Iterator[bytes]:
        """All keys in ascending order, wrapping, from the one after ``last`` on."""
        number = 0 if last is None else bisect_right(self._cuts, last)
        order = self.parts[number].order
        start = 0 if last is None else bisect_right(order, last)
        yield from (order[place] for place in range(start, len(order)))
        for part in (*self.parts[number + 1 :], *self.parts[:number]):
            yield from part.order
        yield from islice(order, start)

    def not_in(self, other: Parts) -> Iterator[Part]:
        """The parts that the other version does not share."""
        shared = {*map(id, other.parts)}
        return (part for part in self.parts if id(part) not in shared)

    def patterns_not_in(self, other: Parts) -> list[bytes]:
        """The `patterns` that the other version does not have."""
        keys: list[bytes] = []
        for part in self.not_in(other):
            for first in islice(part.values, 1):  # comparing with the likely part is quick
                keys += [key for key in part.values.keys() - other.of(first).values.keys() if not other.has(key)]
        return [key for key in keys if REPLACEMENT not in key]

    def __getitem__(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[bytes]:
        return (key for values in self._values for key, value in values.items() if value is not None)

    def __len__(self) -> int:
        return sum(len(part.values) - part.errors for part in self.parts)


NO_PARTS = Parts([b""], [Part({}, {}, {})])


class Draft:
    """Builds one part: it follows the former one, and becomes a copy at the first difference.

    A dict keeps the order in which Consul listed its keys, so unchanged keys come in that order again.
    """

    def __init__(self, former: Part, low: bytes, high: bytes | None) -> None:
        """For keys from ``low`` on, and before ``high``."""
        self.former, self.low, self.high = former, low, high
        self.values: dict[bytes, bytes | None] | None = None
        """None while it follows the former part."""
        self.notes: dict[bytes, Note] = {}
        self.kinds: dict[Kind, tuple[bytes, bytes]] = {}
        self.orphans: dict[bytes, tuple[bytes, ...]] = {}
        """By folded key: variants of a key that took precedence and was deleted. Their values are not in memory."""
        self.part: Part | None = None
        self.taken = 0
        """How many entries have been taken since the last `close`, except those that follow the former part."""
        self._key: bytes | None
        self._value: bytes | None
        self._follow_from(0)

    def _follow_from(self, position: int) -> None:
        self.values, self.position = None, position
        self._items = islice(self.former.values.items(), position, None)
        self._key, self._value = next(self._items, _END)

    def follow(
        self, pairs: Iterator[tuple[bytes, bytes | None]], decoded: tuple[bytes, ...]
    ) -> tuple[bytes, bytes | None] | None:
        """Take pairs while they equal the next entries of the former part, and return the first that does not.

        A pair with a note, or with a value that begins with one of ``decoded``, never counts as equal.
        """
        if self.values is not None:
            return next(pairs, None)
        key, value, items, notes, position = self._key, self._value, self._items, self.former.notes, self.position
        found = None
        for pair in pairs:
            raw = pair[1]
            if pair[0] != key or (raw != value and (raw or value)) or key in notes or (raw and raw[:1] in decoded):
                found = pair
                break
            key, value = next(items, _END)
            position += 1
        self._key, self._value, self.position = key, value, position
        return found

    def take(self, folded: bytes, value: bytes | None, note: Note | None, below: bytes) -> None:
        """Take an entry. Of variants in case the lower-case one takes precedence, else the first in byte order.

        Consul lists a key twice only if two keys that are not UTF-8 look alike; such a key is an error.
        """
        if self.values is None:
            self._skip(below)
            if folded == self._key and value == self._value and self.former.notes.get(folded) == note:
                self._key, self._value = next(self._items, _END)
                self.position += 1
                return
        values = self.open(below)
        self.taken += 1
        if folded in values:
            note = note or Note(folded)
            rival = self.notes.get(folded) or Note(folded)
            if note.stored == rival.stored:
                if values[folded] is None:
                    return
                value, note = None, Note(note.stored, "Consul lists this key twice", variants=rival.variants)
            elif note.stored == folded or (rival.stored != folded and note.stored < rival.stored):
                note = replace(note, variants=_sorted(rival.variants, rival.stored))
            else:
                value, note = values[folded], replace(rival, variants=_sorted(rival.variants, note.stored))
        self._put(folded, value, note)

    def _put(self, folded: bytes, value: bytes | None, note: Note | None) -> None:
        assert self.values is not None
        self.values[folded] = value
        if note is not None and note != Note(folded):
            self.notes[folded] = note
        else:
            self.notes.pop(folded, None)

    def keep(self, folded: bytes, value: bytes | None, note: Note | None, below: bytes) -> None:
        """Put back an entry of the former part that was not taken."""
        if folded not in self.open(below):
            variants = self.orphans.pop(folded, ())
            self._put(folded, value, note and replace(note, variants=variants))

    def _skip(self, below: bytes) -> None:
        """Skip former entries that are not below."""
        if self._key is None or self.former.stored(self._key).startswith(below):
            return
        notes = self.former.notes
        for key, value in self._items:
            self.position += 1
            if (notes[key].stored if key in notes else key).startswith(below):
                self._key, self._value = key, value
                return
        self.position += 1
        self._key, self._value = _END

    def open(self, below: bytes) -> dict[bytes, bytes | None]:
        """The entries so far, as a copy to change: those taken, and those of the former part that are not below."""
        self.part = None
        if self.values is not None:
            return self.values
        items, former, position = self.former.values.items(), self.former.notes, self.position
        self.values = dict(islice(items, position))
        self.notes = {key: note for key, note in former.items() if key in self.values}
        for key, value in islice(items, position, None) if below else ():
            note = former.get(key)
            if note is None:
                if not key.startswith(below):
                    self.values[key] = value
                continue
            variants = tuple(each for each in note.variants if not each.startswith(below))
            if not note.stored.startswith(below):
                self._put(key, value, replace(note, variants=variants))
            elif variants:
                self.orphans[key] = variants
        return self.values

    def settle(self, below: bytes) -> None:
        """Drop former entries below that were not taken; decide between keys that differ only in case."""
        if self.values is None:
            self._skip(below)
            if self._key is not None:
                self.open(below)
        for folded, variants in [*self.orphans.items()]:
            if self.values is not None and folded in self.values:
                note = self.notes.get(folded) or Note(folded)
                if note.stored == folded or note.stored < min(variants):
                    self._put(folded, self.values[folded], replace(note, variants=_sorted(note.variants, *variants)))
                    del self.orphans[folded]

    def close(self, kind_of: Callable[[bytes], Kind | None] | None) -> Part:
        """The part: the former one if nothing has changed."""
        self.taken = 0
        if self.values is None:
            return self.former
        if self.part is None:
            if self.values == self.former.values and self.notes == self.former.notes:
                self._follow_from(len(self.values))
                return self.former
            kinds = {} if kind_of is None else self._kinds(self.values, kind_of)
            self.part = Part(self.values, self.notes, kinds)
        return self.part

    def _kinds(
        self, values: dict[bytes, bytes | None], kind_of: Callable[[bytes], Kind | None]
    ) -> dict[Kind, tuple[bytes, bytes]]:
        """An entry of each kind of hash; all entries are searched only if one of the former ones is missing."""
        examples = {**self.former.kinds, **self.kinds}
        if all(values.get(key) == value for key, value in examples.values()):
            return examples
        return {kind: (key, value) for key, value in values.items() if value and (kind := kind_of(value)) is not None}

    def split(self, last: bytes) -> Draft:
        """Cut a full draft in two and return the upper one: only ``last``, the latest key, if it is the highest."""
        assert self.values is not None
        order = sorted(self.values)
        is_highest = order[-1] == last
        cut = last if is_highest else order[len(order) // 2]
        upper = Draft(self.former, cut, self.high)
        self.high = cut
        if is_highest:
            upper.values = {last: self.values.pop(last)}
        else:
            values = self.values
            self.values = {key: value for key, value in values.items() if key < cut}
            upper.values = {key: value for key, value in values.items() if key >= cut}
        upper.notes = {key: self.notes.pop(key) for key in [*self.notes] if key >= cut}
        upper.orphans = {key: self.orphans.pop(key) for key in [*self.orphans] if key >= cut}
        upper.kinds, upper.taken = {**self.kinds}, self.taken
        return upper


def _sorted(variants: Iterable[bytes], *more: bytes) -> tuple[bytes, ...]:
    return tuple(sorted({*variants, *more}))


class Drafts:
    """Builds the parts of a folder: the former ones, except the keys that begin with ``below``."""

    def __init__(self, former: Parts, below: bytes, kind_of: Callable[[bytes], Kind | None] | None) -> None:
        self._below = below
        self._folded = below.lower()
        self._kind_of = kind_of
        self._starts: list[bytes] = [*former.starts]
        self._slots: list[Part | Draft] = [*former.parts]
        self.current = self._draft(bisect_right(self._starts, self._folded) - 1)

    def _draft(self, number: int) -> Draft:
        slot = self._slots[number]
        if isinstance(slot, Part):
            high = self._starts[number + 1] if number + 1 < len(self._starts) else None
            part, slot = slot, Draft(slot, self._starts[number], high)
            if part.varied:
                slot.open(self._below)
            self._slots[number] = slot
        return slot

    def at(self, folded: bytes) -> Draft:
        """The draft of the part for this key, which becomes the current one."""
        draft = self.current
        if folded < draft.low or (draft.high is not None and folded >= draft.high):
            if draft.values is not None and draft.taken * 2 > len(draft.values) and not draft.orphans:
                draft.close(self._kind_of)
            self.current = draft = self._draft(bisect_right(self._starts, folded) - 1)
        return draft

    def take(self, folded: bytes, value: bytes | None, note: Note | None) -> None:
        """Take an entry into the current draft, which must be that of its key."""
        draft = self.current
        draft.take(folded, value, note, self._below)
        if draft.values is not None and len(draft.values) > PART_SIZE:
            upper, number = draft.split(folded), bisect_right(self._starts, draft.low)
            self._starts.insert(number, upper.low)
            self._slots.insert(number, upper)
            self.at(folded)

    def has(self, folded: bytes) -> bool:
        """Whether the key was taken, or is a former one that is not below."""
        return folded in self.at(folded).open(self._below)

    def keep(self, folded: bytes, value: bytes | None, note: Note | None) -> None:
        """Put back an entry that was not taken."""
        self.at(folded).keep(folded, value, note, self._below)

    def settle(self) -> bool:
        """Drop former entries below that were not taken; returns whether the entry for every key is certain."""
        certain = True
        for number in range(bisect_right(self._starts, self._folded) - 1, len(self._starts)):
            if self._starts[number] > self._folded and not self._starts[number].startswith(self._folded):
                break
            draft = self._draft(number)
            draft.settle(self._below)
            certain = certain and not draft.orphans
        return certain

    def missing(self, former: Parts) -> Iterator[tuple[bytes, bytes]]:
        """The keys of the former parts that are missing, folded and stored."""
        for part in former.parts:
            for first in islice(part.values, 1):
                slot = self._slots[bisect_right(self._starts, first) - 1]
                if slot is part or (isinstance(slot, Draft) and slot.values is None and slot.former is part):
                    continue
                values = slot.values or {}
                for key in part.values if part.values.keys() - values.keys() else ():
                    if key not in values and not self.has(key):
                        yield key, part.stored(key)

    def finish(self) -> Parts:
        """The parts; small neighbours are merged."""
        self.settle()
        starts: list[bytes] = []
        parts: list[Part] = []
        for start, slot in zip(self._starts, self._slots, strict=True):
            part = slot if isinstance(slot, Part) else slot.close(self._kind_of)
            left = parts[-1] if parts else NO_PARTS.parts[0]
            if not left.values:
                starts, parts = [b""], [part]
            elif part.values and len(left.values) + len(part.values) <= PART_SIZE // 2:
                whole = ({**left.values, **part.values}, {**left.notes, **part.notes}, {**left.kinds, **part.kinds})
                parts[-1] = Part(*whole)
            elif part.values:
                starts.append(start)
                parts.append(part)
        return Parts(starts, parts)
