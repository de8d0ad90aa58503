"""Which entry of a table matches a key, where entries are patterns: domains, networks, addresses, expressions.

smtpd matches patterns itself only in its own ``file:`` and ``db:`` tables: it walks over all entries in the order of
strcmp(3) and stops at the first match (smtpd: table_static.c, table_static_lookup; dict.c). An index finds the same
entry, the lowest that matches, without a walk.

Strategy: derive from the key the few normal forms that a matching entry can have, and look those up among the entries,
and in a dict of entries that are not in normal form. The cost of a key is bounded when entries are added; expressions,
whose cost is an estimate, also check the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from table_consul.errors import ConfigError, EntryError
from table_consul.services import MAX_KEY_BYTES, addresses, compiled
from table_consul.services.forms import Forms, Steps
from table_consul.services.regex import REGEX_SET_SIZE, RegexSet, escape_warnings, package, regcomp

# Seconds for one instruction of an expression and one byte of the text, at worst with a hostile text; on a core of
# 2020, rounded up.
INSTRUCTION_SECONDS = 20e-9
WIDTH_SECONDS = 2e-9
# A wait for Python's lock takes some milliseconds for any name.
LEAST_LIMIT_SECONDS = 0.02
# A match that takes less needs no clock.
TIMED_SECONDS = 0.001
# A bound on the memory of RE2 that does not grow with the deadline.
MAX_WIDTH = 150_000
_TOO_SLOW = "of this service would take more than a tenth of the deadline to match; simplify or delete some"
SLOW_STARS, SLOW_EXPRESSIONS = f"the patterns with * {_TOO_SLOW}", f"the regular expressions {_TOO_SLOW}"
SLOW_NAME = "the regular expressions take more than a tenth of the deadline to match this name; simplify them"
TOO_MANY = "too many patterns to match all within a tenth of the deadline; simplify or delete some"
TOO_LONG = f"longer than {MAX_KEY_BYTES} bytes, the longest key that smtpd asks for; shorten it"


SecondsLeft = Callable[[], float] | None
"""Returns how much is left of the deadline of a request; None without a deadline."""


def _check_time(needed: float, seconds_left: SecondsLeft) -> None:
    if seconds_left is not None and seconds_left() < needed:
        raise EntryError("too little time left before the deadline to match the patterns")


class Index(ABC):
    """The entries of one service, prepared for matching. Never changed once built; any thread may read it."""

    def __init__(
        self,
        entries: Iterable[bytes] = (),
        seconds: float = 0.2,
        holds: Callable[[bytes], bool] | None = None,
        *,
        delimiter: bytes = addresses.DELIMITER,
    ) -> None:
        """``seconds`` bounds the time for one key; entries that exceed it are refused.

        ``holds`` returns whether a normal form is itself an entry; such forms are not stored here. ``delimiter`` is
        where the tag of a user begins.
        """
        self._seconds, self._delimiter = seconds, delimiter
        self._unusable: dict[bytes, list[str]] = {}
        """Entries with a problem, and why; most of them never match."""
        self._refused: dict[bytes, str] = {}
        """Entries that cannot be matched, although they may be valid, and why."""
        self._reason = TOO_MANY
        self._first_refused: bytes | None = None
        self.timed = False
        """Whether a key may take so long that `find` needs the clock of its request."""
        entries = [*entries]
        self._holds = holds or {*entries}.__contains__
        self._clear()
        self._change(entries, (), entries)

    @abstractmethod
    def _clear(self) -> None:
        """Set up an index without entries."""

    def change(
        self, added: Sequence[bytes], removed: Sequence[bytes], entries: Iterable[bytes], holds: Callable[[bytes], bool]
    ) -> None:
        """Update this copy of an index to ``entries``, which differ from its own by those added and removed."""
        self._holds = holds
        if added or removed:
            self._unusable = {**self._unusable}
            self._change(added, removed, entries)

    def _change(self, added: Iterable[bytes], removed: Iterable[bytes], _entries: Iterable[bytes], /) -> None:
        """Add and remove entries; the last argument is all that result. Data shared with another index is copied."""
        for entry in removed:
            if self._unusable.pop(entry, None) != [TOO_LONG]:
                self._remove(entry)
        for entry in added:
            if len(entry) > MAX_KEY_BYTES:
                self._unusable[entry] = [TOO_LONG]
            else:
                self._add(entry)

    @abstractmethod
    def _add(self, entry: bytes) -> None:
        """Add one entry."""

    @abstractmethod
    def _remove(self, entry: bytes) -> None:
        """Remove one that was added; its problems are forgotten."""

    def _refuse(self, entries: Iterable[bytes], text: str, reason: str = TOO_MANY) -> None:
        """Leave out entries that cannot be matched, with the problem of each; ``reason`` is the error of a key."""
        self._refused, self._reason = dict.fromkeys(entries, text), reason
        self._first_refused = min(self._refused, default=None)

    @property
    def problems(self) -> list[tuple[bytes, str]]:
        """Entries that cannot be used, each with the cause and a hint. They affect no other entry."""
        return [*((entry, text) for entry, texts in self._unusable.items() for text in texts), *self._refused.items()]

    def find(self, key: bytes, seconds_left: SecondsLeft = None) -> bytes | None:
        """The lowest entry, in byte order, of those that match the key; None if there is none.

        Raises:
            EntryError: a refused entry may be the lowest, or too little time is left.
        """
        found = self._find(key, seconds_left)
        refused = self._first_refused
        if refused is not None and (found is None or refused < found):
            raise EntryError(self._reason)
        return found

    @abstractmethod
    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        """As `find`, among the entries that are not refused."""


class _Hosts(Index):
    """Entries that end in a host name or a pattern of one. The part before it, the prefix, must be equal."""

    def _clear(self) -> None:
        self._forms = Forms()
        """Entries that are not written in lower case, with every run of ``*`` as one."""
        self._stems: dict[bytes, int] = {}
        """The stems of patterns, and how many patterns have each."""
        self._steps = Steps()

    def _change(self, added: Iterable[bytes], removed: Iterable[bytes], entries: Iterable[bytes], /) -> None:
        stems = self._stems
        self._forms, self._stems = Forms(self._forms), {**stems}
        super()._change(added, removed, entries)
        if self._refused or self._stems.keys() != stems.keys():
            self._steps = Steps()
            refused = {each for each in sorted(self._stems) if not self._steps.add(each.split(b"*"), self._seconds)}
            self._refuse((entry for entry in entries if self._stem(entry) in refused) if refused else (), SLOW_STARS)
            self.timed = self._steps.seconds > TIMED_SECONDS

    def _add(self, entry: bytes) -> None:
        form = self._form(entry)
        if form is None:
            self._unusable[entry] = [
                f"more than {addresses.MAILADDR_PART_BYTES} bytes before or after the @; shorten it"
            ]
            return
        if form != entry:
            self._forms.add(form, entry)
        if stem := self._stem(entry):
            self._stems[stem] = self._stems.get(stem, 0) + 1

    def _remove(self, entry: bytes) -> None:
        form = self._form(entry)
        if form is None:
            return
        if form != entry:
            self._forms.remove(form, entry)
        if stem := self._stem(entry):
            self._stems[stem] -= 1
            if not self._stems[stem]:
                del self._stems[stem]

    @abstractmethod
    def _split(self, entry: bytes) -> tuple[bytes, bytes] | None:
        """The prefix and the pattern of an entry, in lower case; None if it cannot be used."""

    def _form(self, entry: bytes) -> bytes | None:
        """Prefix and pattern with every run of ``*`` as one."""
        split = self._split(entry)
        return None if split is None else split[0] + compiled(rb"\*+").sub(b"*", split[1])

    def _stem(self, entry: bytes) -> bytes:
        """The stem of a pattern, up to the byte after its last ``*``, which decides its steps; empty if it has none."""
        split = self._split(entry) if b"*" in entry and len(entry) <= MAX_KEY_BYTES else None
        if split is None or b"*" not in split[1]:
            return b""
        form = compiled(rb"\*+").sub(b"*", split[1])
        return form[: form.rindex(b"*") + 2]

    def _matching(self, forms: Iterable[bytes]) -> bytes | None:
        """The lowest of the entries that have one of these forms."""
        holds, get = self._holds, self._forms.get
        unusable, refused = self._unusable, self._refused
        found = [form for form in forms if holds(form) and form not in unusable and form not in refused]
        if self._forms.size:
            found += [each for form in forms if (each := get(form)) is not None and each not in refused]
        return min(found, default=None)

    def _names(self, hostname: bytes, seconds_left: SecondsLeft) -> list[bytes]:
        if self.timed:
            _check_time(self._steps.seconds, seconds_left)
        return self._steps.names(hostname)


class Domains(_Hosts):
    """Host names and patterns of them, as smtpd's table_domain_match compares them."""

    def _split(self, entry: bytes) -> tuple[bytes, bytes]:
        return b"", entry.lower()

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        return self._matching(self._names(key.lower(), seconds_left))


class Addresses(_Hosts):
    """Mail addresses and patterns of them, as smtpd's table_mailaddr_match compares them."""

    def _split(self, entry: bytes) -> tuple[bytes, bytes] | None:
        if addresses.text_to_mailaddr(entry) is None:
            return None
        user, at, hosts = entry.lower().rpartition(b"@")
        return (user + at, hosts) if at else (hosts, b"")

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        address = addresses.text_to_mailaddr(key.lower())
        if address is None:
            return None
        user, domain = address
        users = {user, user.partition(self._delimiter)[0]} - {b""}
        prefixes = [b"@", *(name + b"@" for name in users)]
        forms = [b"", *prefixes, *(name for name in users if b"@" not in name)]
        if domain:
            names = self._names(domain, seconds_left)
            forms += [prefix + name for prefix in prefixes for name in names]
        return self._matching(forms)


class Networks(Index):
    """IPv4 and IPv6 networks, and words such as ``local``, as smtpd's table_netaddr_match compares them."""

    def _clear(self) -> None:
        self._words = Forms()
        self._networks = {addresses.IPV4_BITS: Forms(), addresses.IPV6_BITS: Forms()}
        """By family, by the prefix of the network behind a 1, from which its length follows."""
        self._bits: dict[int, set[int]] = {addresses.IPV4_BITS: set(), addresses.IPV6_BITS: set()}
        """By family, the lengths of prefixes, and perhaps of some that were removed."""

    def _change(self, added: Iterable[bytes], removed: Iterable[bytes], entries: Iterable[bytes], /) -> None:
        self._words, self._networks = Forms(self._words), {bits: Forms(each) for bits, each in self._networks.items()}
        self._bits = {family: {*bits} for family, bits in self._bits.items()}
        super()._change(added, removed, entries)

    def _place(self, entry: bytes) -> tuple[Forms, Hashable]:
        """The forms that include the entry, and its form."""
        network = addresses.text_to_netaddr(entry)
        if network is None:
            return self._words, entry.lower()
        family, number, bits = network
        self._bits[family].add(bits)
        return self._networks[family], 1 << bits | number >> (family - bits)

    def _add(self, entry: bytes) -> None:
        forms, form = self._place(entry)
        forms.add(form, entry)

    def _remove(self, entry: bytes) -> None:
        forms, form = self._place(entry)
        forms.remove(form, entry)

    @property
    def problems(self) -> list[tuple[bytes, str]]:
        """As in every index, and the words that are neither a network nor ``local``."""
        return [
            *super().problems,
            *((word, addresses.NOT_A_NETWORK) for word in self._words if word.lower() != b"local"),
        ]

    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        address = addresses.text_to_netaddr(key)
        if address is None:
            return self._words.get(key.lower())
        family, number, _ = address
        get = self._networks[family].get
        found = [get(1 << bits | number >> (family - bits)) for bits in self._bits[family]]
        return min((entry for entry in found if entry is not None), default=None)


class HostAddresses(Index):
    """Addresses, compared by value: smtpd asks for ``[2001:db8::1]``. One written like the key takes precedence."""

    def _clear(self) -> None:
        self._addresses = Forms()

    def _change(self, added: Iterable[bytes], removed: Iterable[bytes], entries: Iterable[bytes], /) -> None:
        self._addresses = Forms(self._addresses)
        super()._change(added, removed, entries)

    def _add(self, entry: bytes) -> None:
        address = addresses.parse_sockaddr(entry)
        if address is not None:
            self._addresses.add(address, entry)
        elif not addresses.is_address(entry):
            self._unusable[entry] = ["not an address (expected 192.0.2.1, 2001:db8::1 or [2001:db8::1])"]

    def _remove(self, entry: bytes) -> None:
        address = addresses.parse_sockaddr(entry)
        if address is not None:
            self._addresses.remove(address, entry)

    def _find(self, key: bytes, _seconds_left: SecondsLeft, /) -> bytes | None:
        """The entry that is written like the key, otherwise the lowest that is the same address, or None."""
        if self._holds(key) and len(key) <= MAX_KEY_BYTES:
            return key
        address = addresses.parse_sockaddr(key)
        return None if address is None else self._addresses.get(address)


class Regexes(Index):
    """POSIX extended expressions, as smtpd's table_regex_match compares them; a search takes time linear in the key.

    Which expressions have room is estimated; a search for a hostile name, which may take longer, ends at the limit.
    """

    def _clear(self) -> None:
        self._sets: list[RegexSet] = []
        self._next: dict[bytes, bytes] = {}
        self._size = 0
        self._room = min(int(self._seconds / MAX_KEY_BYTES / WIDTH_SECONDS), MAX_WIDTH)
        # A set may begin when half of the time has passed.
        self._set_size = min(int(self._seconds / 2 / MAX_KEY_BYTES / INSTRUCTION_SECONDS), REGEX_SET_SIZE)
        self._unusable = {}
        self._beyond: list[bytes] = []

    def _change(self, _added: Iterable[bytes], _removed: Iterable[bytes], entries: Iterable[bytes], /) -> None:
        """Compile all, in ascending order: the time limit bounds them to some thousand."""
        self._clear()
        try:
            package()
        except ConfigError as error:
            self._refuse(entries, str(error), str(error))
        else:
            super()._change(sorted(entries), (), entries)
            self._refuse(self._beyond, SLOW_EXPRESSIONS)
        self._close_set()
        self.timed = bool(self._sets)

    def _remove(self, entry: bytes) -> None:
        """Do nothing: each change compiles all again."""

    def _add(self, entry: bytes) -> None:
        try:
            pattern, size, width = regcomp(entry)
        except EntryError as error:
            self._unusable[entry] = [str(error)]
            return
        worst = size * MAX_KEY_BYTES * INSTRUCTION_SECONDS
        if worst > self._seconds:
            text = f"may take {worst:.2f} s to match, more than a tenth of the deadline; repeat less, or split it"
            self._unusable[entry] = [f"the regular expression {text}"]
            return
        if width > self._room:
            self._beyond.append(entry)
            return
        self._room -= width
        if self._size + size > self._set_size:
            self._close_set()
        self._next[entry] = pattern
        self._size += size
        if warnings := [*escape_warnings(entry)]:
            self._unusable[entry] = warnings

    def _close_set(self) -> None:
        if self._next:
            self._sets.append(RegexSet(self._next, self._size))
        self._next, self._size = {}, 0

    def _find(self, key: bytes, seconds_left: SecondsLeft, /) -> bytes | None:
        begun = seconds_left() if seconds_left else 0.0
        limit = max(self._seconds, LEAST_LIMIT_SECONDS)
        for each in self._sets:
            needed = each.size * len(key) * INSTRUCTION_SECONDS
            _check_time(needed, seconds_left)
            if seconds_left and begun - seconds_left() + needed > limit:
                raise EntryError(SLOW_NAME)
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
