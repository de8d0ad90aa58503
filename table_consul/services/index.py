"""Which entry of a table matches a key, where entries are patterns: domains, networks, addresses, expressions.

smtpd matches patterns itself only in its own ``file:`` and ``db:`` tables: it walks over all entries in the order of
strcmp(3) and stops at the first match (smtpd: table_static.c, table_static_lookup; dict.c). An index gives the answer
of that walk, the lowest entry that matches, without walking.

Strategy: derive from the key the few normal forms that a matching entry can have, and look those up in a dict of the
entries. What a key can cost is bounded when entries are added; expressions, whose cost is an estimate, watch the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES, compiled, match
from table_consul.services.judge import NO_NETWORK
from table_consul.services.regex import REGEX_SET_BYTES, REGEX_SET_SIZE, RegexSet, escape_warnings, regcomp

# Seconds: for one step of a host name along patterns; for one instruction of an expression and a byte of the text, at
# worst and by a hostile text. On a core of 2020, rounded up.
STEP_SECONDS = 2e-6
INSTRUCTION_SECONDS = 20e-9
WIDTH_SECONDS = 2e-9
# What may take less needs no clock.
TIMED_SECONDS = 0.001
# A bound on the memory of RE2 that does not grow with the deadline.
MAX_WIDTH = 150_000
TOO_LONG = f"longer than {MAX_KEY_BYTES} bytes, the longest key that smtpd asks for; shorten it"


SecondsLeft = Callable[[], float]
"""What returns how much is left of the deadline of a request."""


def forever() -> float:
    return inf


def _check_time(needed: float, seconds_left: SecondsLeft) -> None:
    if seconds_left() < needed:
        raise EntryError("too little left of the deadline to match the patterns")


class Index(ABC):
    """The entries of one service, prepared for matching. Never changed once built; any thread may read it."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2) -> None:
        """``seconds`` bounds what one key may take; entries that no longer fit are refused."""
        self.problems: list[tuple[bytes, str]] = []
        """Entries that cannot be used, each with the cause and what to do. They affect no other entry."""
        self.timed = False
        """Whether a key may take so long that `find` needs the clock of its request."""
        self._seconds = seconds
        self._first_refused: bytes | None = None
        for entry in sorted(entries):
            if len(entry) > MAX_KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            else:
                self._add(entry)

    @abstractmethod
    def _add(self, entry: bytes) -> None:
        """Add one entry; they come in ascending order, so the first that has a normal form keeps it."""

    def _refuse(self, entry: bytes, what: str) -> None:
        """Leave out an entry for which there is no time."""
        self._first_refused = self._first_refused or entry
        text = f"{what} of this service would take more than a tenth of the deadline to match; simplify or delete some"
        self.problems.append((entry, text))

    def find(self, key: bytes, seconds_left: SecondsLeft = forever) -> bytes | None:
        """The lowest entry, in byte order, of those that match the key; None if there is none.

        Raises:
            EntryError: an entry that was refused may be the lowest; too little time is left.
        """
        found = self._find(key, seconds_left)
        refused = self._first_refused
        if refused is not None and (found is None or refused < found):
            raise EntryError("too many patterns to match all within a tenth of the deadline; simplify or delete some")
        return found

    @abstractmethod
    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        """As `find`, among the entries that are not refused."""


class _Hosts(Index):
    """Entries that end in a host name or a pattern of one. The part before it, the prefix, must be equal."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2) -> None:
        self._entries: dict[bytes, bytes] = {}
        """By prefix and pattern, in lower case, with every run of ``*`` as one."""
        self._steps: dict[bytes, dict[tuple[int, bytes], int]] = {b"": {}}
        """What patterns begin with, up to the byte after a ``*``: how many bytes precede the next ``*``, and the byte
        that follows it, if any. A ``*`` does not backtrack, so a name follows each of these steps to one place; of all
        patterns that begin with ``*.`` and have no other ``*``, it can match only one. With it, the most steps that a
        name takes from there."""
        self._heads: dict[tuple[bytes, bytes, bytes], bytes] = {}
        """Where a step leads: by where it begins, the bytes before the ``*``, and the byte after it."""
        self._ends: set[bytes] = set()
        """The heads after the last ``*`` of some pattern."""
        self._costs: dict[bytes, int] = {b"": 0}
        """By head, the most steps that a name takes from there."""
        super().__init__(entries, seconds)
        self.timed = self._costs[b""] * STEP_SECONDS > TIMED_SECONDS

    def _add_pattern(self, entry: bytes, prefix: bytes, pattern: bytes) -> None:
        form = compiled(rb"\*+").sub(b"*", pattern)
        if not self._add_steps(form.split(b"*")):
            self._refuse(entry, "the patterns with *")
            return
        form = prefix + form
        self._entries.setdefault(entry if form == entry else form, entry)  # one object where they are equal

    def _add_steps(self, pieces: list[bytes]) -> bool:
        """Add the steps to the last of these pieces between stars; whether there is time for them."""
        known, head = self._heads, b""
        path: list[tuple[bytes, bytes, bytes]] = []
        for number, following in enumerate(pieces[1:]):
            path.append((head, pieces[number][number > 0 :], following[:1]))
            head = known.get(path[-1]) or b"*".join((head + path[-1][1], path[-1][2]))
        if not path:
            return True
        if path[-1] not in known and (self._costs[b""] + len(path)) * STEP_SECONDS > self._seconds:
            return False
        self._ends.add(head)
        for key in reversed(path):
            start, piece, following = key
            known.setdefault(key, head)
            cost = 1 + self._costs.get(head, 0)
            steps = self._steps.setdefault(start, {})
            step = (len(piece), following)
            more = cost - steps.get(step, 0)
            if more > 0:
                steps[step] = cost
                self._costs[start] = self._costs.get(start, 0) + more
            head = start
        return True

    def _matching(self, hostname: bytes, prefixes: Sequence[bytes], seconds_left: SecondsLeft) -> list[bytes]:
        """Entries that match the folded host name after one of the prefixes, the lowest of each form among them."""
        if self.timed:
            _check_time(self._costs[b""] * STEP_SECONDS, seconds_left)
        names, size = [hostname], len(hostname)
        steps, heads, ends = self._steps, self._heads, self._ends
        places = [(b"", 0)]
        for start, at in places:  # grows as it goes
            for length, following in steps[start]:
                star = at + length
                if star < size and (head := heads.get((start, hostname[at:star], following))) is not None:
                    end = hostname.find(following, star) + 1 if following else size
                    if end:
                        if head in ends:
                            names.append(head + hostname[end:])
                        if head in steps:
                            places.append((head, end))
        get = self._entries.get
        return [entry for prefix in prefixes for name in names if (entry := get(prefix + name)) is not None]


class Domains(_Hosts):
    """Host names and patterns of them, as smtpd's table_domain_match compares them."""

    def _add(self, entry: bytes) -> None:
        self._add_pattern(entry, b"", entry.lower())

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        return min(self._matching(key.lower(), (b"",), seconds_left), default=None)


class Addresses(_Hosts):
    """Mail addresses and patterns of them, as smtpd's table_mailaddr_match compares them."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2, *, delimiter: bytes = match.DELIMITER) -> None:
        """``delimiter`` is where the tag of a user begins."""
        self._delimiter = delimiter
        super().__init__(entries, seconds)

    def _add(self, entry: bytes) -> None:
        if match.text_to_mailaddr(entry) is None:
            text = f"more than {match.MAILADDR_PART_BYTES} bytes before or after the @; shorten it"
            self.problems.append((entry, text))
            return
        user, at, hosts = entry.lower().rpartition(b"@")
        self._add_pattern(entry, user + at if at else hosts, hosts if at else b"")

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        address = match.text_to_mailaddr(key.lower())
        if address is None:
            return None
        user, domain = address
        users = {user, user.partition(self._delimiter)[0]} - {b""}
        prefixes = [b"@", *(name + b"@" for name in users)]
        get = self._entries.get
        forms = (b"", *prefixes, *(name for name in users if b"@" not in name))
        found = [entry for form in forms if (entry := get(form)) is not None]
        if domain:
            found += self._matching(domain, prefixes, seconds_left)
        return min(found, default=None)


class Networks(Index):
    """IPv4 and IPv6 networks, and words such as ``local``, as smtpd's table_netaddr_match compares them."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2) -> None:
        self._words: dict[bytes, bytes] = {}
        self._networks: dict[int, dict[int, dict[int, bytes]]] = {match.IPV4_BITS: {}, match.IPV6_BITS: {}}
        """By family, by the number of bits after the prefix, by the prefix."""
        super().__init__(entries, seconds)

    def _add(self, entry: bytes) -> None:
        network = match.text_to_netaddr(entry)
        if network is not None:
            family, number, bits = network
            shift = family - bits
            self._networks[family].setdefault(shift, {}).setdefault(number >> shift, entry)
            return
        word = entry.lower()
        self._words.setdefault(word, entry)
        if word != b"local":
            self.problems.append((entry, NO_NETWORK))

    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        address = match.text_to_netaddr(key)
        if address is None:
            return self._words.get(key.lower())
        family, number, _ = address
        networks = self._networks[family].items()
        found = [entry for shift, entries in networks if (entry := entries.get(number >> shift)) is not None]
        return min(found, default=None)


class HostAddresses(Index):
    """Addresses, compared as such: smtpd asks for ``[2001:db8::1]``. One that is written like the key goes first."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2) -> None:
        self._entries: set[bytes] = set()
        self._addresses: dict[int | tuple[int, bytes], bytes] = {}
        super().__init__(entries, seconds)

    def _add(self, entry: bytes) -> None:
        self._entries.add(entry)
        address = match.parse_sockaddr(entry)
        if address is not None:
            self._addresses.setdefault(address, entry)
        elif not match.is_address(entry):
            self.problems.append((entry, "not an address (expected 192.0.2.1, 2001:db8::1 or [2001:db8::1])"))

    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        """The entry that is written like the key, otherwise the lowest that is the same address, or None."""
        if key in self._entries:
            return key
        address = match.parse_sockaddr(key)
        return None if address is None else self._addresses.get(address)


class Regexes(Index):
    """POSIX extended expressions, as smtpd's table_regex_match compares them; a search takes time linear in the key."""

    def __init__(self, entries: Iterable[bytes], seconds: float = 0.2, set_bytes: int = REGEX_SET_BYTES) -> None:
        self._sets: list[RegexSet] = []
        self._next: dict[bytes, bytes] = {}
        self._size = 0
        self._room = min(int(seconds / MAX_KEY_BYTES / WIDTH_SECONDS), MAX_WIDTH)
        self._set_bytes = set_bytes
        super().__init__(entries, seconds)
        self._close_set()
        self.timed = bool(self._sets)

    def _add(self, entry: bytes) -> None:
        try:
            _, pattern, size, width, _ = regcomp(entry)
        except EntryError as error:
            self.problems.append((entry, str(error)))
            return
        worst = size * MAX_KEY_BYTES * INSTRUCTION_SECONDS
        if worst > self._seconds:
            text = f"may take {worst:.2f} s to match, more than a tenth of the deadline; repeat less, or split it"
            self.problems.append((entry, f"the regular expression {text}"))
            return
        if width > self._room:
            self._refuse(entry, "the regular expressions")
            return
        self._room -= width
        if self._size + size > REGEX_SET_SIZE:
            self._close_set()
        self._next[entry] = pattern
        self._size += size
        self.problems += [(entry, text) for text in escape_warnings(entry)]

    def _close_set(self) -> None:
        if self._next:
            self._sets.append(RegexSet(self._next, self._size, self._set_bytes))
        self._next, self._size = {}, 0

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        for each in self._sets:
            _check_time(each.size * len(key) * INSTRUCTION_SECONDS, seconds_left)
            if (entry := each.find(key)) is not None:
                return entry
        return None


INDEXES: Mapping[str, type[Index]] = {
    "domain": Domains,
    "netaddr": Networks,
    "mailaddr": Addresses,
    "regex": Regexes,
    "addrname": HostAddresses,
}
