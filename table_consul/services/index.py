"""Which entry of a table matches a key, where entries are patterns: domains, networks, addresses, expressions.

smtpd matches patterns itself only in its own ``file:`` and ``db:`` tables: it walks over all entries in the order of
strcmp(3) and stops at the first match (smtpd: table_static.c, table_static_lookup; dict.c). An index gives the answer
of that walk, the lowest entry that matches, without walking.

Strategy: derive from the key the few normal forms that a matching entry can have, and look those up in a dict of the
entries. Entries that have no such form are walked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES, match
from table_consul.services.judge import NO_NETWORK
from table_consul.services.regex import REGEX_SET_BYTES, RegexSet, escape_warnings, regcomp

REGEX_SET_SIZE = 250
TOO_LONG = f"longer than {MAX_KEY_BYTES} bytes, the longest key that smtpd asks for; shorten it"


class Index(ABC):
    """The entries of one service, prepared for matching. Never changed once built; any thread may read it."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        """Entries that smtpd cannot use, each with the cause and what to do. They affect no other entry."""
        for entry in sorted(entries):
            if len(entry) > MAX_KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            else:
                self._add(entry)

    @abstractmethod
    def _add(self, entry: bytes) -> None:
        """Add one entry; they come in ascending order, so the first that has a normal form keeps it."""

    @abstractmethod
    def find(self, key: bytes) -> bytes | None:
        """The lowest entry, in byte order, of those that match the key; None if there is none."""


class _Hosts(Index):
    """Entries that end in a host name or a pattern of one. The part before it, the prefix, must be equal."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        self._entries: dict[bytes, bytes] = {}
        """By prefix and pattern, in lower case, with a single ``*``."""
        self._shapes: set[tuple[int, bytes]] = set()
        """Of the patterns with one ``*``: how many bytes precede it, and the byte that follows it, if any.

        As a ``*`` does not backtrack, these determine what is left of a host name: of all patterns that begin with
        ``*.``, a name can match only one.
        """
        self._others: list[tuple[bytes, bytes, list[bytes]]] = []
        """Patterns with several ``*``: entry, prefix, and the pieces between the stars."""
        super().__init__(entries)

    def _add_pattern(self, entry: bytes, prefix: bytes, pattern: bytes) -> None:
        head, star, tail = pattern.partition(b"*")
        tail = tail.lstrip(b"*")
        if b"*" in tail:
            self._others.append((entry, prefix, pattern.split(b"*")))
            return
        if star:
            self._shapes.add((len(head), tail[:1]))
        form = prefix + head + star + tail
        self._entries.setdefault(entry if form == entry else form, entry)  # one object where they are equal

    def _matching(self, hostname: bytes, prefixes: Sequence[bytes]) -> list[bytes]:
        """Entries that match the folded host name after one of the prefixes, the lowest of each kind among them."""
        names = [hostname]
        for length, following in self._shapes:
            if length < len(hostname):
                at = hostname.find(following, length) if following else len(hostname)
                if at >= 0:
                    names.append(hostname[:length] + b"*" + hostname[at:])
        get = self._entries.get
        found = [entry for prefix in prefixes for name in names if (entry := get(prefix + name)) is not None]
        for entry, prefix, pieces in self._others:
            if prefix in prefixes and match.pieces_match(hostname, pieces):
                return [*found, entry]
        return found


class Domains(_Hosts):
    """Host names and patterns of them, as smtpd's table_domain_match compares them."""

    def _add(self, entry: bytes) -> None:
        self._add_pattern(entry, b"", entry.lower())

    def find(self, key: bytes) -> bytes | None:
        return min(self._matching(key.lower(), (b"",)), default=None)


class Addresses(_Hosts):
    """Mail addresses and patterns of them, as smtpd's table_mailaddr_match compares them."""

    def __init__(self, entries: Iterable[bytes], delimiter: bytes = match.DELIMITER) -> None:
        self._delimiter = delimiter
        super().__init__(entries)

    def _add(self, entry: bytes) -> None:
        if match.text_to_mailaddr(entry) is None:
            text = f"more than {match.MAILADDR_PART_BYTES} bytes before or after the @; shorten it"
            self.problems.append((entry, text))
            return
        user, at, hosts = entry.lower().rpartition(b"@")
        self._add_pattern(entry, user + at if at else hosts, hosts if at else b"")

    def find(self, key: bytes) -> bytes | None:
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
            found += self._matching(domain, prefixes)
        return min(found, default=None)


class Networks(Index):
    """IPv4 and IPv6 networks, and words such as ``local``, as smtpd's table_netaddr_match compares them."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        self._words: dict[bytes, bytes] = {}
        self._networks: dict[int, dict[int, dict[int, bytes]]] = {match.IPV4_BITS: {}, match.IPV6_BITS: {}}
        """By family, by the number of bits after the prefix, by the prefix."""
        super().__init__(entries)

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

    def find(self, key: bytes) -> bytes | None:
        address = match.text_to_netaddr(key)
        if address is None:
            return self._words.get(key.lower())
        family, number, _ = address
        networks = self._networks[family].items()
        found = [entry for shift, entries in networks if (entry := entries.get(number >> shift)) is not None]
        return min(found, default=None)


class HostAddresses(Index):
    """Addresses, compared as such: smtpd asks for ``[2001:db8::1]``. One that is written like the key goes first."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        self._entries: set[bytes] = set()
        self._addresses: dict[int | tuple[int, bytes], bytes] = {}
        super().__init__(entries)

    def _add(self, entry: bytes) -> None:
        self._entries.add(entry)
        address = match.parse_sockaddr(entry)
        if address is not None:
            self._addresses.setdefault(address, entry)
        elif not match.is_address(entry):
            self.problems.append((entry, "not an address (expected 192.0.2.1, 2001:db8::1 or [2001:db8::1])"))

    def find(self, key: bytes) -> bytes | None:
        """The entry that is written like the key, otherwise the lowest that is the same address, or None."""
        if key in self._entries:
            return key
        address = match.parse_sockaddr(key)
        return None if address is None else self._addresses.get(address)


class Regexes(Index):
    """POSIX extended expressions, as smtpd's table_regex_match compares them; a search takes time linear in the key."""

    def __init__(self, entries: Iterable[bytes], set_bytes: int = REGEX_SET_BYTES) -> None:
        self._usable: list[bytes] = []
        super().__init__(entries)
        chunks = (self._usable[n : n + REGEX_SET_SIZE] for n in range(0, len(self._usable), REGEX_SET_SIZE))
        self._sets = [RegexSet(chunk, set_bytes) for chunk in chunks]

    def _add(self, entry: bytes) -> None:
        try:
            regcomp(entry)
        except EntryError as error:
            self.problems.append((entry, str(error)))
            return
        self._usable.append(entry)
        self.problems += [(entry, text) for text in escape_warnings(entry)]

    def find(self, key: bytes) -> bytes | None:
        return next((entry for each in self._sets if (entry := each.find(key)) is not None), None)


INDEXES: Mapping[str, type[Index]] = {
    "domain": Domains,
    "netaddr": Networks,
    "mailaddr": Addresses,
    "regex": Regexes,
    "addrname": HostAddresses,
}
