"""The keys of an index: normal forms of entries, and the forms that can match a host name."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

# For one step of a host name along patterns, at worst with a hostile name; on a core of 2020, rounded up.
STEP_SECONDS = 2e-6
# How many forms one change of a `Forms` copies.
SHARD_SIZE = 2048


class Forms:
    """A dict from normal forms to the lowest entry of each; a copy shares unchanged parts."""

    def __init__(self, former: Forms | None = None) -> None:
        """A copy of ``former``, which must not change any more."""
        self.shards: list[dict[Hashable, bytes | tuple[bytes, ...]]] = [{}] if former is None else [*former.shards]
        self.size: int = 0 if former is None else former.size
        self._own = {0} if former is None else set()

    def get(self, form: Hashable) -> bytes | None:
        """The lowest entry of this form."""
        found = self.shards[hash((form,)) % len(self.shards)].get(form)
        return found[0] if isinstance(found, tuple) else found

    def add(self, form: Hashable, entry: bytes) -> None:
        """Add an entry of this form."""
        shard = self._shard(form)
        found = shard.get(form)
        if found is None:
            shard[form] = entry
            self.size += 1
            if self.size > SHARD_SIZE * len(self.shards):
                self._grow()
        else:
            shard[form] = tuple(sorted((*_several(found), entry)))

    def remove(self, form: Hashable, entry: bytes) -> None:
        """Remove an entry that was added."""
        shard = self._shard(form)
        left = tuple(each for each in _several(shard.pop(form)) if each != entry)
        if left:
            shard[form] = left if len(left) > 1 else left[0]
        else:
            self.size -= 1

    def __iter__(self) -> Iterator[bytes]:
        return (entry for shard in self.shards for found in shard.values() for entry in _several(found))

    def _shard(self, form: Hashable) -> dict[Hashable, bytes | tuple[bytes, ...]]:
        number = hash((form,)) % len(self.shards)
        if number not in self._own:
            self._own.add(number)
            self.shards[number] = self.shards[number].copy()
        return self.shards[number]

    def _grow(self) -> None:
        former, count = self.shards, 4 * len(self.shards)
        self.shards, self._own = [{} for _ in range(count)], {*range(count)}
        for shard in former:
            for form, found in shard.items():
                self.shards[hash((form,)) % count][form] = found


def _several(found: bytes | tuple[bytes, ...]) -> tuple[bytes, ...]:
    return found if isinstance(found, tuple) else (found,)


class Steps:
    """Which patterns with ``*`` a host name can match.

    A ``*`` does not backtrack, so a name follows each step to one place; of all patterns that begin with ``*.`` and
    have no other ``*``, it can match only one. What follows the byte after the last ``*`` makes no step.
    """

    def __init__(self) -> None:
        self._steps: dict[bytes, dict[tuple[int, bytes], int]] = {b"": {}}
        """By head, the start of patterns up to the byte after a ``*``: its steps, each the number of bytes before the
        next ``*`` and the byte after it, if any, with the most steps that a name takes from there."""
        self._heads: dict[tuple[bytes, bytes, bytes], bytes] = {}
        """The head that a step leads to: by its start, the bytes before the ``*``, and the byte after it."""
        self._ends: set[bytes] = set()
        """The heads after the last ``*`` of some pattern."""
        self._costs: dict[bytes, int] = {b"": 0}
        """By head, the most steps that a name takes from there."""

    @property
    def seconds(self) -> float:
        """The longest time that a name takes."""
        return self._costs[b""] * STEP_SECONDS

    def add(self, pieces: list[bytes], seconds: float) -> bool:
        """Add the steps for these pieces between stars; returns whether there is time for them."""
        heads, head = self._heads, b""
        path: list[tuple[bytes, bytes, bytes]] = []
        for number, following in enumerate(pieces[1:]):
            path.append((head, pieces[number][number > 0 :], following[:1]))
            head = heads.get(path[-1]) or b"*".join((head + path[-1][1], path[-1][2]))
        if path[-1] not in heads and (self._costs[b""] + len(path)) * STEP_SECONDS > seconds:
            return False
        self._ends.add(head)
        for key in reversed(path):
            start, piece, following = key
            heads.setdefault(key, head)
            cost = 1 + self._costs.get(head, 0)
            steps = self._steps.setdefault(start, {})
            step = (len(piece), following)
            more = cost - steps.get(step, 0)
            if more > 0:
                steps[step] = cost
                self._costs[start] = self._costs.get(start, 0) + more
            head = start
        return True

    def names(self, hostname: bytes) -> list[bytes]:
        """The name, and every pattern that could match it."""
        names, size = [hostname], len(hostname)
        steps, heads, ends = self._steps, self._heads, self._ends
        places = [(b"", 0)]
        for start, at in places:  # grows during the loop
            for length, following in steps[start]:
                star = at + length
                if star < size and (head := heads.get((start, hostname[at:star], following))) is not None:
                    end = hostname.find(following, star) + 1 if following else size
                    if end:
                        if head in ends:
                            names.append(head + hostname[end:])
                        if head in steps:
                            places.append((head, end))
        return names
