"""Find aliases that smtpd cannot expand: loops and chains that are too deep (smtpd: lka_session.c, expand.c).

Pure. smtpd expands breadth first. It rejects the recipient if any alias is nested too deeply, or if no recipient is
left. It skips a user that it has already expanded below the same address: a loop of users that also deliver elsewhere
is harmless. It expands an address each time it occurs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from table_consul.errors import printable
from table_consul.services import compiled
from table_consul.services.match import DELIMITER, split_list

EXPAND_DEPTH = 10
# The elements to follow, and how many more for each alias of the table.
STEPS, STEPS_PER_ALIAS = 300_000, 20
TOO_NESTED = "too many nested aliases to follow, so smtpd may reject mail to this alias (nest fewer aliases)"
_LOCAL_PART = rb"[A-Za-z0-9!#$%*?^{}`~&'+=_.-][A-Za-z0-9!#$%*/?|^{}`~&'+=_.-]*"


def failures(aliases: Mapping[bytes, bytes], delimiter: bytes = DELIMITER) -> Iterator[tuple[bytes, str]]:
    """Yield the keys that smtpd rejects, with the cause, in time linear in the size of the aliases.

    ``aliases`` maps folded keys to values; an empty value is a lookup that returns an error. Addresses are followed
    only within the domains of the keys: smtpd.conf routes other domains. ``delimiter`` starts the tag of a user.
    """
    graph = _Graph(aliases, delimiter)
    inner = {key: {name for name, _ in found} - {None} for key, found in graph.elements.items()}
    # The aliases that start a chain of this length; a loop is an endless chain.
    deep = set(inner)
    for _ in range(graph.depth, EXPAND_DEPTH - 2):
        deep = {key for key in deep if not inner[key].isdisjoint(deep)}
    steps = STEPS + STEPS_PER_ALIAS * len(aliases)
    for key in aliases:
        if key in deep:
            path, steps = graph.failure(key, steps) if steps >= 0 else ([], steps)
            if path or steps < 0:
                yield key, TOO_NESTED if steps < 0 else _text(path)


def _text(path: Sequence[bytes]) -> str:
    end = next((number for number, key in enumerate(path) if key in path[:number]), 0)
    chain = path[path.index(path[end]) : end + 1] if end else path
    what = "an alias loop" if end else "a chain of too many aliases"
    advice = "break the loop" if end else "shorten the chain"
    return f"{what} ({' -> '.join(printable(key) for key in chain)}), so smtpd rejects mail to this alias; {advice}"


class _Graph:
    """The aliases that contain others, as smtpd expands them."""

    def __init__(self, aliases: Mapping[bytes, bytes], delimiter: bytes) -> None:
        self._aliases, self._delimiter = aliases, delimiter
        self._domains = {key.partition(b"@")[2] for key in aliases} - {b""}
        self.depth = 0 if any(b"@" in key for key in aliases) else 1
        """The depth of a first alias: ``virtual`` finds it for the address, ``alias`` for the user of the address."""
        self.elements: dict[bytes, list[tuple[bytes | None, bool]]] = {}
        """For each element: the alias that smtpd finds, None if smtpd delivers; and whether it is an address."""
        for key, value in aliases.items():
            quoted = compiled(rb"[\\\"']").search(value)
            elements = split_list(value) if quoted else value.split(b",")
            found = [self._resolve(key, element.strip().lower()) for element in elements]
            if any(name is not None for name, _ in found):
                self.elements[key] = found

    def _resolve(self, key: bytes, element: bytes) -> tuple[bytes | None, bool]:
        local, at, domain = element.partition(b"@")
        names = [local, local.partition(self._delimiter)[0]]
        if at:
            here = [*(name + at + domain for name in names), *names, at + domain, at]
            names = here if domain in self._domains else []
        name = next((name for name in names if name in self._aliases), b"")
        # An alias of a user for itself is that user (smtpd: expand.c, sameuser).
        itself = name == key and not at
        delivered = itself or not self._aliases.get(name) or not compiled(_LOCAL_PART).fullmatch(local)
        return (None if delivered else name), bool(at)

    def failure(self, start: bytes, steps: int) -> tuple[list[bytes], int]:
        """The chain of aliases at which smtpd gives up, empty if it does not; and the steps that are left."""
        queue: deque[tuple[list[bytes], int]] = deque([([start], 0)])
        seen = {(start, False, 0)} if self.depth else set()
        delivers = False
        while queue:
            path, context = queue.popleft()
            for name, is_address in self.elements.get(path[-1], [(None, False)]):
                steps -= 1
                if name is not None and (name, is_address, context) in seen:
                    continue
                longer = path if name is None else [*path, name]
                if self.depth + len(path) == EXPAND_DEPTH or steps < 0:
                    return longer, steps
                delivers = delivers or name is None
                if name is not None:
                    seen.add((name, is_address, context))
                    queue.append((longer, len(seen) if is_address else context))
        path = [start]
        while not delivers and path[-1] not in path[:-1]:
            path.append(next(name for name, _ in self.elements[path[-1]] if name is not None))
        return [] if delivers else path, steps
