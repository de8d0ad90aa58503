"""Where to cut a large table into ranges: key prefixes that are watched separately.

Pure. The cuts depend on the keys: names differ in their first letter, ``user0000123`` only in its last ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# In a smaller table, an edit costs no more than with several watches.
LEAST_KEYS = 10_000
# A range of this many keys is small enough: Consul lists their names in some 5 ms.
RANGE_KEYS = 16_000
# Consul allows a client address 200 connections (limits.http_max_conns_per_client), and a mail host has several tables.
MOST_RANGES = 31
# The cost of asking whether a range has changed, as a number of entries to read.
ASK_KEYS = 300
# Keys per step of a pass over all of them; other threads run only between steps.
_STEP = 8192


class Range(NamedTuple):
    """A full prefix in Consul, and how many keys begin with it."""

    prefix: bytes
    size: int
    parts: tuple[Range, ...] = ()
    """Disjoint ranges that contain all of these keys; empty where reading the whole costs less than asking for each."""

    def leaves(self) -> Iterator[Range]:
        """The ranges within this one that have no parts; itself if it has none."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


class Cut(NamedTuple):
    """Disjoint ranges that contain every key the table had when it was cut."""

    watched: list[Range]
    """Each is worth a blocking query of its own."""
    rest: list[Range]
    """The other ranges, with few keys in all; they are read whenever something changes."""


def covers(prefixes: Sequence[bytes], names: Sequence[bytes]) -> bool:
    """Whether each of the names begins with one of the prefixes, which are in order and disjoint."""

    def prefix_of(name: bytes) -> bytes | None:
        at = bisect_right(prefixes, name) - 1
        return prefixes[at] if at >= 0 and name.startswith(prefixes[at]) else None

    if not names:
        return True
    # Whatever sorts between two strings with a common prefix has that prefix.
    first = prefix_of(min(names))
    if first is not None and max(names).startswith(first):
        return True
    return all(prefix_of(name) is not None for name in names)


def gap(key: bytes, folder: bytes, prefixes: Iterable[bytes]) -> bytes | None:
    """The shortest prefix of this key in this folder that overlaps none of the others; None if there is none."""
    disjoint = [*prefixes]
    for end in range(len(folder) + 1, len(key) + 1):
        prefix = key[:end]
        if not _inside_character(key, end) and not any(each.startswith(prefix) for each in disjoint):
            return prefix
    return None


class _Group(NamedTuple):
    prefix: bytes
    depth: int
    """How many bytes of each key the prefix covers."""
    keys: list[bytes]
    """Relative to their folder, in no particular order."""


def cut(
    folders: Mapping[bytes, Iterable[bytes]], askable: Callable[[bytes], bool], most: int = MOST_RANGES
) -> Cut | None:
    """The ranges for these keys, by folder and relative to it; None if an edit would bring half of them.

    ``askable``: whether Consul can list the keys below this prefix. ``most``: how many ranges to watch.
    """
    groups = [_Group(path, 0, [*keys]) for path, keys in folders.items()]
    total = sum(len(group.keys) for group in groups)
    whole: list[_Group] = []
    while groups:
        largest = max(groups, key=lambda group: len(group.keys))
        groups.remove(largest)
        parts = _split(largest, askable) if len(largest.keys) > RANGE_KEYS else []
        together = [*groups, *whole]
        if parts and _cost([*together, *parts], most) < _cost([*together, largest], most):
            groups += parts
        else:
            whole.append(largest)
    ranges = sorted((_range(group, askable) for group in whole), key=lambda each: -each.size)
    watched = [each for each in ranges[:most] if each.size]
    if sum(leaf.size**2 for each in ranges for leaf in each.leaves()) > total * total // 2:
        return None
    return Cut(watched, ranges[len(watched) :])


def _range(group: _Group, askable: Callable[[bytes], bool]) -> Range:
    parts = _split(group, askable) if len(group.keys) > ASK_KEYS else []
    average = sum(len(part.keys) ** 2 for part in parts) / (len(group.keys) or 1)
    if ASK_KEYS * len(parts) + average > len(group.keys):
        parts = []
    return Range(group.prefix, len(group.keys), tuple(_range(part, askable) for part in parts))


def _cost(groups: Iterable[_Group], most: int) -> int:
    """The average cost of an edit: the number of entries to read, times that of all entries."""
    counts = sorted((len(group.keys) for group in groups), reverse=True)
    return sum(count * count for count in counts[:most]) + sum(counts) * sum(ASK_KEYS + n for n in counts[most:])


def _split(group: _Group, askable: Callable[[bytes], bool]) -> list[_Group]:
    """The group split by the character after the common prefix of its keys; empty if it cannot be split."""
    stem, depth, _ = _narrowed(group)
    found: dict[bytes, list[bytes]] = {}
    for key in group.keys:
        if len(key) == depth:
            return []  # the key that ends here would be in no part
        found.setdefault(key[depth : depth + _width(key[depth])], []).append(key)
    parts: list[_Group] = []
    for character, keys in found.items():
        part = _Group(stem + character, depth + len(character), keys)
        if not askable(part.prefix):
            part = _narrowed(part)
        if askable(part.prefix):
            parts.append(part)
        elif deeper := _split(part, askable):
            parts += deeper
        else:
            return []
    return parts


def _narrowed(group: _Group) -> _Group:
    """The group with the longest prefix that all of its keys have."""
    lowest = highest = group.keys[0]
    for at in range(0, len(group.keys), _STEP):
        step = group.keys[at : at + _STEP]
        lowest, highest = min(lowest, *step), max(highest, *step)
    depth = group.depth
    while depth < len(lowest) and lowest[: depth + 1] == highest[: depth + 1]:
        depth += 1
    while depth > group.depth and _inside_character(lowest, depth):
        depth -= 1
    return _Group(group.prefix + lowest[group.depth : depth], depth, group.keys)


def _inside_character(key: bytes, at: int) -> bool:
    return at < len(key) and key[at] & 0xC0 == 0x80


def _width(lead: int) -> int:
    """How many bytes the UTF-8 character has that begins with this one."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
