"""Which entry of a table answers for a key, where entries are patterns: domains, networks, addresses, expressions.

smtpd matches patterns itself only in its own ``file:`` and ``db:`` tables, by a walk over all entries in the order of
strcmp(3) that ends at the first match (smtpd: table_static.c, table_static_lookup; dict.c). The indexes here give the
answer of that walk, the lowest entry that matches, without walking. Knows nothing of values, of Consul or of time.

Strategy: from the key, make the few spellings an entry that matches must have, and look those up in sets of the
entries' own bytes, so that an entry costs a slot and no object. What has no such spelling is walked. The matchers, in
matchers.py and expressions.py, are smtpd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES
from table_consul.services.match import (
    DELIMITER,
    DOTTED,
    IPV4_BITS,
    IPV6_BITS,
    MAILADDR_PART_BYTES,
    TOO_LONG,
    inet_net_pton,
    parse_sockaddr,
    pieces_match,
    text_to_mailaddr,
    text_to_netaddr,
)
from table_consul.services.regex import (
    ESCAPED,
    ESCAPED_ANCHORS,
    ESCAPED_CLASSES,
    REGEX_SET_SIZE,
    UNDEFINED,
    Group,
    regcomp,
)

NO_NETWORK = (
    "no network: matches nothing but the same name, which `match from rdns` asks for (allowed: 192.0.2.1, "
    "192.0.2.0/24, 2001:db8::/32, [2001:db8::/32], local)"
)


class Index(Protocol):
    """The entries of one bucket, ready to tell which of them answers for a key. Never changed once built."""

    @property
    def problems(self) -> Sequence[tuple[bytes, str]]:
        """Entries that smtpd could not use, each with the remedy in one line. They harm no other entry."""

    def find(self, key: bytes) -> bytes | None:
        """The entry that answers for this key: the lowest in byte order of those that match. None: none does."""


def _lowest(entries: Iterable[bytes | None]) -> bytes | None:
    return min((entry for entry in entries if entry is not None), default=None)


class _Spellings:
    """Entries by the one spelling under which they are looked up; where that is not their own, by which it is."""

    __slots__ = ("_entries", "_spelled")

    def __init__(self) -> None:
        self._entries: set[bytes] = set()
        self._spelled: dict[bytes, bytes] = {}

    def add(self, spelling: bytes, entry: bytes) -> None:
        if spelling in self._entries:
            self._spelled[spelling] = min(entry, self._spelled.get(spelling, spelling))
        elif spelling == entry:
            self._entries.add(entry)
        else:
            self._entries.add(spelling)
            self._spelled[spelling] = entry

    def find(self, spelling: bytes) -> bytes | None:
        return self._spelled.get(spelling, spelling) if spelling in self._entries else None


class _Wildcards:
    """The patterns with one ``*`` which a host name can match, out of the few shapes that a table has.

    Where the ``*`` stands and which character follows it decide, as it does not backtrack, what is left of a name:
    with ``*.`` there is a single pattern for each name.
    """

    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: set[tuple[int, bytes]] = set()

    def spelling(self, pattern: bytes) -> bytes | None:
        """The folded pattern with its run of stars as one, remembered; None when there are several runs."""
        pattern = pattern.lower()
        head, _, tail = pattern.partition(b"*")
        tail = tail.lstrip(b"*")
        if b"*" in tail:
            return None
        self._shapes.add((len(head), tail[:1]))
        return head + b"*" + tail

    def candidates(self, hostname: bytes) -> Iterator[bytes]:
        """Every spelling that matches the folded host name, and no other."""
        for length, following in self._shapes:
            if length >= len(hostname):
                continue
            at = hostname.find(following, length) if following else len(hostname)
            if at >= 0:
                yield hostname[:length] + b"*" + hostname[at:]


class Domains:
    """Host names and patterns of them, by ``table_domain_match``."""

    __slots__ = ("_exact", "_others", "_patterns", "_wildcards", "problems")

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self._exact = _Spellings()
        self._patterns = _Spellings()
        self._wildcards = _Wildcards()
        self._others: list[tuple[bytes, list[bytes]]] = []
        for entry in entries:
            if len(entry) > MAX_KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            elif b"*" not in entry:
                self._exact.add(entry.lower(), entry)
            elif (spelling := self._wildcards.spelling(entry)) is not None:
                self._patterns.add(spelling, entry)
            else:
                self._others.append((entry, entry.lower().split(b"*")))
        self._others.sort()

    def find(self, key: bytes) -> bytes | None:
        """The lowest entry that matches the host name, or None."""
        key = key.lower()
        found = [self._exact.find(key)]
        found += [self._patterns.find(candidate) for candidate in self._wildcards.candidates(key)]
        found.append(next((entry for entry, pieces in self._others if pieces_match(key, pieces)), None))
        return _lowest(found)


class Addresses:
    """Mail addresses and patterns of them, by ``table_mailaddr_match``."""

    __slots__ = ("_exact", "_others", "_patterns", "_wildcards", "problems")

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self._exact = _Spellings()
        self._patterns = _Spellings()
        self._wildcards = _Wildcards()
        self._others: list[tuple[bytes, bytes, list[bytes]]] = []
        for entry in entries:
            if len(entry) > MAILADDR_PART_BYTES and text_to_mailaddr(entry) is None:
                self.problems.append((entry, f"smtpd takes at most {MAILADDR_PART_BYTES} bytes on each side of the @"))
            elif b"*" not in entry or b"*" not in entry.rpartition(b"@")[2] or b"@" not in entry:
                self._exact.add(entry.lower(), entry)
            else:
                user, _, hosts = entry.lower().rpartition(b"@")
                spelling = self._wildcards.spelling(hosts)
                if spelling is None:
                    self._others.append((entry, user, hosts.split(b"*")))
                else:
                    self._patterns.add(user + b"@" + spelling, entry)
        self._others.sort()

    def find(self, key: bytes) -> bytes | None:
        """The lowest entry that matches the mail address, or None."""
        address = text_to_mailaddr(key.lower())
        if address is None:
            return None
        user, domain = address
        exact, patterns = self._exact.find, self._patterns.find
        found = [exact(b""), exact(b"@")]
        names = {user, user.partition(DELIMITER)[0]}
        names.discard(b"")
        for name in names:
            found.append(exact(name + b"@"))
            if b"@" not in name:
                found.append(exact(name))
        if domain:
            names.add(b"")
            hosts = list(self._wildcards.candidates(domain))
            for name in names:
                found.append(exact(name + b"@" + domain))
                found += [patterns(name + b"@" + host) for host in hosts]
            others = (entry for entry, name, pieces in self._others if name in names and pieces_match(domain, pieces))
            found.append(next(others, None))
        return _lowest(found)


class Networks:
    """IPv4 and IPv6 networks, and words such as ``local``, by ``table_netaddr_match``."""

    __slots__ = ("_networks", "_words", "problems")

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self._words = _Spellings()
        lengths: dict[tuple[int, int], dict[int, bytes]] = {}
        for entry in entries:
            network = text_to_netaddr(entry)
            if network is not None:
                family, number, bits = network
                rivals = lengths.setdefault((family, family - bits), {})
                number >>= family - bits
                rival = rivals.setdefault(number, entry)
                if entry < rival:
                    rivals[number] = entry
            elif len(entry) > MAX_KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            else:
                self._words.add(entry.lower(), entry)
                if entry.lower() != b"local":
                    self.problems.append((entry, NO_NETWORK))
        self._networks: dict[int, list[tuple[int, dict[int, bytes]]]] = {IPV4_BITS: [], IPV6_BITS: []}
        for (family, shift), rivals in lengths.items():
            self._networks[family].append((shift, rivals))

    def find(self, key: bytes) -> bytes | None:
        """The lowest entry that is the address, or a network around it, or None."""
        address = text_to_netaddr(key)
        if address is None:
            return self._words.find(key.lower())
        family, number, _ = address
        best: bytes | None = None
        for shift, networks in self._networks[family]:
            entry = networks.get(number >> shift)
            if entry is not None and (best is None or entry < best):
                best = entry
        return best


class HostAddresses:
    """Addresses in any spelling, by ``addrname_match``; an entry that is spelled as the key goes first."""

    __slots__ = ("_addresses", "_exact", "problems")

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        self._exact: set[bytes] = set()
        self._addresses: dict[int | tuple[int, bytes], bytes] = {}
        for entry in entries:
            if len(entry) > MAX_KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            elif (address := parse_sockaddr(entry)) is not None:
                rival = self._addresses.setdefault(address, entry)
                if entry != rival:
                    self._exact |= {entry, rival}
                    self._addresses[address] = min(entry, rival)
            else:
                self._exact.add(entry)
                if not DOTTED.fullmatch(entry) or inet_net_pton(entry) is None:
                    self.problems.append((entry, "no address (allowed: 192.0.2.1, 2001:db8::1, [2001:db8::1])"))

    def find(self, key: bytes) -> bytes | None:
        """The entry that is spelled as the key, else the lowest that is the same address, or None."""
        if key in self._exact:
            return key
        address = parse_sockaddr(key)
        return None if address is None else self._addresses.get(address)


class Regexes:
    """POSIX extended expressions, by ``table_regex_match``, all at once in time linear in the key."""

    __slots__ = ("_groups", "problems")

    def __init__(self, entries: Iterable[bytes]) -> None:
        self.problems: list[tuple[bytes, str]] = []
        usable: list[bytes] = []
        for entry in sorted(entries):
            try:
                regcomp(entry)
            except EntryError as error:
                self.problems.append((entry, str(error)))
            else:
                usable.append(entry)
                self.problems += [(entry, UNDEFINED.format(c.decode())) for c in sorted(_undefined(entry))]
        self._groups = [Group(usable[n : n + REGEX_SET_SIZE]) for n in range(0, len(usable), REGEX_SET_SIZE)]

    def find(self, key: bytes) -> bytes | None:
        """The lowest entry that is found in the key, or None."""
        for group in self._groups:
            entry = group.find(key)
            if entry is not None:
                return entry
        return None


def _undefined(pattern: bytes) -> set[bytes]:
    """The letters and digits that the expression escapes to no effect, as in other dialects it would have."""
    return {c for c in ESCAPED.findall(pattern) if c.isalnum()} - ESCAPED_CLASSES.keys() - ESCAPED_ANCHORS.keys()


INDEXES: Mapping[str, Callable[[Iterable[bytes]], Index]] = MappingProxyType(
    {
        "domain": Domains,
        "netaddr": Networks,
        "mailaddr": Addresses,
        "regex": Regexes,
        "addrname": HostAddresses,
    }
)
