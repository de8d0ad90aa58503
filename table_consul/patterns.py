"""Which entry of a table answers for a key, where entries are patterns: domains, networks, addresses, expressions.

smtpd matches patterns itself only in its own ``file:`` and ``db:`` tables, by a walk over all entries in the order of
strcmp(3) that ends at the first match (smtpd: table_static.c, table_static_lookup; dict.c). The indexes here give the
answer of that walk, the lowest entry that matches, without walking. Knows nothing of values, of Consul or of time.

Strategy: from the key, make the few spellings an entry that matches must have, and look those up in sets of the
entries' own bytes, so that an entry costs a slot and no object. What has no such spelling is walked. The matchers are
smtpd's, by their names there.

Longer than a module should be, in three parts that read each for itself: smtpd's matchers, POSIX expressions rewritten
for RE2, and the indexes.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Protocol

from table_consul.errors import EntryError

# smtpd: table_static.c, table_static_priv_add. A longer key cannot get into a table there, nor be asked for.
KEY_BYTES = 1023
# smtpd: smtpd-defines.h, SMTPD_MAXLOCALPARTSIZE and SMTPD_MAXDOMAINPARTSIZE, without the NUL.
MAILADDR_PART_BYTES = 255
# smtpd.conf(5), subaddressing-delimiter: its default, as smtpd does not tell a table which one it uses.
DELIMITER = b"+"

TOO_LONG = f"smtpd takes no key of more than {KEY_BYTES} bytes; shorten it"


class Index(Protocol):
    """The entries of one bucket, ready to tell which of them answers for a key. Never changed once built."""

    @property
    def problems(self) -> Sequence[tuple[bytes, str]]:
        """Entries that smtpd could not use, each with the remedy in one line. They harm no other entry."""

    def find(self, key: bytes) -> bytes | None:
        """The entry that answers for this key: the lowest in byte order of those that match. None: none does."""


# Part one: the matchers of smtpd. In all of them the first argument comes from the session, the second from the table.


def hostname_match(hostname: bytes, pattern: bytes) -> bool:
    """Whether the host name is the pattern's (smtpd: util.c).

    A ``*`` skips to the first place where the character after it occurs and does not try another: ``*.example.org``
    matches ``a.example.org`` but not ``a.b.example.org``. At the end it takes all that is left, if that is anything.
    """
    return _matches(hostname.lower(), pattern.lower().split(b"*"))


def _matches(hostname: bytes, pieces: Sequence[bytes]) -> bool:
    """The loop of hostname_match, over a folded host name and what stands between the stars of a folded pattern."""
    head, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return hostname == head
    if not (hostname.startswith(head) and hostname.endswith(last)):
        return False
    at = len(head)
    for piece in pieces[1:]:
        if piece:
            at = hostname.find(piece[:1], at)
            if at < 0 or not hostname.startswith(piece, at):
                return False
            at += len(piece)
    return at == len(hostname) if last else at < len(hostname)


def table_domain_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a domain table answers for the host name (smtpd: table.c)."""
    return hostname_match(key, entry)


def text_to_mailaddr(text: bytes) -> tuple[bytes, bytes] | None:
    """User and domain, each possibly empty; None when smtpd would refuse the text (smtpd: to.c)."""
    user, at, domain = text.rpartition(b"@")
    if not at:
        user, domain = domain, b""
    return (user, domain) if len(user) <= MAILADDR_PART_BYTES and len(domain) <= MAILADDR_PART_BYTES else None


def mailaddr_match(address: tuple[bytes, bytes], pattern: tuple[bytes, bytes]) -> bool:
    """Whether the address is the pattern's; a part that is empty in the pattern matches all (smtpd: util.c)."""
    (user, domain), (wanted, hosts) = address, pattern
    if hosts and not hostname_match(domain, hosts):
        return False
    if wanted and DELIMITER not in wanted:
        user = user.partition(DELIMITER)[0]
    return not wanted or user.lower() == wanted.lower()


def table_mailaddr_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a table of mail addresses answers for the address (smtpd: table.c)."""
    address, pattern = text_to_mailaddr(key), text_to_mailaddr(entry)
    return address is not None and pattern is not None and mailaddr_match(address, pattern)


IPV4 = re.compile(rb"([0-9]+(?:\.[0-9]+){0,3})(?:/([0-9]+))?")
IPV4_HEX = re.compile(rb"0[xX]([0-9a-fA-F]{1,8})(?:/([0-9]+))?")
DOTTED = re.compile(rb"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")
HEXTETS = re.compile(rb"[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4})*")
# strtonum(3), by which smtpd reads the length of an IPv6 prefix, skips white space and takes a sign.
PREFIX_LENGTH = re.compile(rb"[ \t-\r]*[+-]?[0-9]+")
# smtpd: openbsd-compat/inet_net_pton.c, INET6_ADDRSTRLEN + sizeof("/128"), without the NUL.
IPV6_BYTES = 50
IPV4_BITS, IPV6_BITS = 32, 128


def inet_net_pton(text: bytes) -> tuple[int, int] | None:
    """An IPv4 network as number and prefix length (inet_net_pton(3), as OpenBSD has it and smtpd carries it).

    Octets left out at the end are zero. Without a prefix length it is that of the class of old, A to E, or what the
    octets given make: ``10`` is 10.0.0.0/8 and ``192.0.2`` is 192.0.2.0/24.
    """
    found = IPV4.fullmatch(text)
    if found is not None:
        octets = [int(octet) for octet in found[1].split(b".")]
        if max(octets) > 255:
            return None
        octets += (0,) * (4 - (given := len(octets)))
    else:
        found = IPV4_HEX.fullmatch(text)
        if found is None:
            return None
        octets = list(bytes.fromhex(found[1].ljust(8, b"0").decode()))
        given = (len(found[1]) + 1) // 2
    if found[2] is not None:
        bits = int(found[2])
    else:
        first = octets[0]
        bits = 32 if first >= 240 else 4 if first >= 224 else 24 if first >= 192 else 16 if first >= 128 else 8
        bits = max(bits, given * 8)
    return None if bits > IPV4_BITS else (octets[0] << 24 | octets[1] << 16 | octets[2] << 8 | octets[3], bits)


def inet6_pton(text: bytes) -> int | None:
    """An IPv6 address in any spelling as a number; None when it is none (inet_pton(3))."""
    if b"." in text:
        start, colon, dotted = text.rpartition(b":")
        octets = [int(octet) for octet in dotted.split(b".")] if DOTTED.fullmatch(dotted) else [256]
        if not colon or max(octets) > 255:
            return None
        text = start + b":%x:%x" % (octets[0] << 8 | octets[1], octets[2] << 8 | octets[3])
    head, gap, tail = text.partition(b"::")
    if (head and not HEXTETS.fullmatch(head)) or (tail and not HEXTETS.fullmatch(tail)):
        return None
    high = head.split(b":") if head else []
    low = tail.split(b":") if tail else []
    missing = 8 - len(high) - len(low)
    if missing < 1 if gap else missing != 0:
        return None
    digits = b"".join([group.zfill(4) for group in (*high, *(b"0",) * missing, *low)])
    return int(digits, 16)


def text_to_netaddr(text: bytes) -> tuple[int, int, int] | None:
    """Family as the bits of its addresses (32 or 128), number and prefix length (smtpd: to.c).

    None when smtpd would refuse it. The length stands within the brackets: ``[2001:db8::/32]``.
    """
    if len(text) > KEY_BYTES:
        return None
    if text[:5].lower() == b"ipv6:":
        text = text[5:]
    network = inet_net_pton(text)
    if network is not None:
        return IPV4_BITS, *network
    if text.startswith(b"["):
        text = text[6:] if text[1:6].lower() == b"ipv6:" else text[1:]
        if not text.endswith(b"]"):
            return None
        text = text[:-1]
    address, slash, length = text.partition(b"/")
    if len(text) > IPV6_BYTES or (slash and not PREFIX_LENGTH.fullmatch(length)):
        return None
    bits = int(length) if slash else IPV6_BITS
    number = inet6_pton(address) if 0 <= bits <= IPV6_BITS else None
    return None if number is None else (IPV6_BITS, number, bits)


def table_netaddr_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a table of networks answers for the address, or the word ``local`` (smtpd: table.c)."""
    if key.lower() == entry.lower():
        return True
    address, network = text_to_netaddr(key), text_to_netaddr(entry)
    if address is None or network is None or address[0] != network[0]:
        return False
    family, number, bits = network
    return (address[1] ^ number) >> (family - bits) == 0


def parse_sockaddr(text: bytes) -> int | tuple[int, bytes] | None:
    """The number of an IPv6 address, bracketed or not, and its scope if it has one (smtpd: table.c)."""
    text = text.removeprefix(b"[")
    if text[:5].lower() == b"ipv6:":
        text = text[5:]
    address, _, scope = text.partition(b"]")[0].partition(b"%")
    number = inet6_pton(address)
    return (number, scope) if scope and number is not None else number


def addrname_match(key: bytes, entry: bytes) -> bool:
    """Whether both spell the same address, brackets or not. smtpd compares bytes, and writes ``[2001:db8::1]``."""
    if key == entry:
        return True
    address = parse_sockaddr(key)
    return address is not None and address == parse_sockaddr(entry)


# Part two: POSIX extended regular expressions, as glibc's regcomp(3) reads them, rewritten for RE2. smtpd compiles with
# REG_EXTENDED | REG_NOSUB, and REG_ICASE after (?i), in the C locale. Only what both mean alike is written, and what
# one of them refuses is refused. Where POSIX leaves the meaning open, glibc decides.

CODES = {
    name: frozenset(members)
    for name, members in {
        b"alnum": (string.ascii_letters + string.digits).encode(),
        b"alpha": string.ascii_letters.encode(),
        b"blank": b" \t",
        b"cntrl": (*range(32), 127),
        b"digit": string.digits.encode(),
        b"graph": range(33, 127),
        b"lower": string.ascii_lowercase.encode(),
        b"print": range(32, 127),
        b"punct": string.punctuation.encode(),
        b"space": string.whitespace.encode(),
        b"upper": string.ascii_uppercase.encode(),
        b"xdigit": string.hexdigits.encode(),
    }.items()
}
EVERY = frozenset(range(256))
WORD = CODES[b"alnum"] | {0x5F}
ESCAPED_CLASSES = {
    b"w": WORD,
    b"W": EVERY - WORD,
    b"s": CODES[b"space"],
    b"S": EVERY - CODES[b"space"],
}
ESCAPED_ANCHORS = {b"b": rb"\b", b"B": rb"\B", b"`": rb"\A", b"'": rb"\z"}
ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
UNDEFINED = "\\{0} is just the character {0} in POSIX expressions; write a class, such as [0-9] or [[:alpha:]]"
INTERVAL = re.compile(rb"\{([0-9]*)(,?)([0-9]*)\}")
REPEATS = 1000  # RE2: kMaxRepeat. POSIX promises 255 (RE_DUP_MAX).
IGNORE_CASE = b"(?i)"


def posix_to_re2(pattern: bytes) -> bytes:
    """The expression in RE2's syntax, for bytes (its encoding Latin-1), with ``.`` matching a newline.

    Raises:
        EntryError: regcomp(3) would refuse it, or RE2 has no such thing; the text says what, in one line.
    """
    fold = pattern.startswith(IGNORE_CASE)
    return _Reader(pattern.removeprefix(IGNORE_CASE), fold=fold).expression()


class _Reader:
    """One pass over an expression. ``_out`` is the open group; its last element is what a repetition repeats."""

    def __init__(self, pattern: bytes, *, fold: bool) -> None:
        # regcomp(3) with REG_ICASE compares upper-case letters with upper-case letters, ranges included.
        self._raw = pattern
        self._pattern = pattern.upper() if fold else pattern
        self._fold = fold
        self._at = 0
        self._out: list[bytes] = []
        self._outer: list[list[bytes]] = []
        self._repeatable = False

    def expression(self) -> bytes:
        while self._at < len(self._pattern):
            self._element(self._pattern[self._at : self._at + 1])
        if self._outer:
            raise EntryError("the regular expression leaves a ( open; close it, or write \\( for the character")
        return b"".join(self._out)

    def _element(self, c: bytes) -> None:
        if c in b"*+?{":
            self._repeat(c)
            return
        self._at += 1
        if c == b"(":
            self._outer.append(self._out)
            self._out = []
            self._repeatable = False
        elif c == b")" and self._outer:
            group = b"(?:" + b"".join(self._out) + b")"
            self._out = self._outer.pop()
            self._append(group)
        elif c == b"|":
            self._append(b"|", repeatable=False)
        elif c in b"^$":
            self._append(rb"\A" if c == b"^" else rb"\z", repeatable=False)
        elif c == b".":
            self._append(b".")
        elif c == b"[":
            self._append(self._members(self._bracket()))
        elif c == b"\\":
            self._escape()
        else:
            self._append(self._members({c[0]}))

    def _append(self, piece: bytes, *, repeatable: bool = True) -> None:
        self._out.append(piece)
        self._repeatable = repeatable

    def _repeat(self, c: bytes) -> None:
        if not self._repeatable:
            raise EntryError(f"the regular expression has a {c.decode()} with nothing to repeat; put a \\ before it")
        if c == b"{":
            c = self._interval()
        else:
            self._at += 1
        self._out[-1] = b"(?:" + self._out[-1] + c + b")" if c else b"(?:)"

    def _interval(self) -> bytes:
        found = INTERVAL.match(self._pattern, self._at)
        if found is None or not (found[1] or found[2]):
            raise EntryError("the regular expression has a { that is no {n}, {n,} or {n,m}; put a \\ before it")
        self._at = found.end()
        least = int(found[1] or b"0")
        most = int(found[3]) if found[3] else None if found[2] else least
        if most is not None and most < least:
            raise EntryError("the regular expression has a {n,m} whose n is greater than its m; exchange them")
        if max(least, most or 0) > REPEATS:
            raise EntryError(f"the regular expression repeats more than {REPEATS} times; repeat less")
        if most == 0:
            return b""
        return b"{%d,}" % least if most is None else b"{%d,%d}" % (least, most)

    def _escape(self) -> None:
        c = self._raw[self._at : self._at + 1]
        self._at += 1
        if not c:
            raise EntryError("the regular expression ends in a \\; write \\\\ for the character")
        if c in b"123456789":
            raise EntryError("the regular expression has a back-reference, which can take for ever; do without")
        if c in b"<>":
            raise EntryError(f"the regular expression has a \\{c.decode()}, which is not POSIX; write \\b")
        if c in ESCAPED_CLASSES:
            self._append(self._members(ESCAPED_CLASSES[c]))
        elif c in ESCAPED_ANCHORS:
            self._append(ESCAPED_ANCHORS[c], repeatable=False)
        else:
            self._append(self._members(c))

    def _members(self, members: Iterable[int]) -> bytes:
        """A class of these bytes; when case is ignored, of all bytes whose upper case is among these."""
        if self._fold:
            among = frozenset(members)
            members = [code for code in EVERY if (code - 32 if 0x61 <= code <= 0x7A else code) in among]
        codes = sorted(members)
        if len(codes) == 1:
            return b"%c" % codes[0] if codes[0] in WORD else rb"\x%02x" % codes[0]
        runs: list[list[int]] = []
        for code in codes:
            if runs and code == runs[-1][1] + 1:
                runs[-1][1] = code
            else:
                runs.append([code, code])
        if not runs:
            return rb"[^\x00-\xff]"
        return b"[" + b"".join(rb"\x%02x-\x%02x" % (first, last) for first, last in runs) + b"]"

    def _bracket(self) -> frozenset[int]:
        """The bytes that match a bracket expression, whose ``[`` is read (glibc: regcomp.c, parse_bracket_exp)."""
        negated = self._pattern.startswith(b"^", self._at)
        self._at += negated
        members: set[int] = set()
        first = True
        while first or not self._pattern.startswith(b"]", self._at):
            members |= self._range(first=first)
            first = False
        self._at += 1
        return EVERY - members if negated else frozenset(members)

    def _range(self, *, first: bool) -> frozenset[int] | set[int]:
        if self._hyphen() and not first and not self._pattern.startswith(b"]", self._at + 1):
            raise EntryError("the regular expression has a - that is no range within [ ]; put it last, before the ]")
        start, ranged = self._bracket_element()
        if not ranged or not self._hyphen() or self._pattern.startswith(b"]", self._at + 1):
            return start
        self._at += 1
        end, ranged = self._bracket_element()
        low, high = min(start), max(end)
        if not ranged or low > high:
            raise EntryError("the regular expression has a range within [ ] that is empty; write it in order")
        return set(range(low, high + 1))

    def _hyphen(self) -> bool:
        # glibc takes three in a row for one that is no range.
        rest = self._pattern[self._at : self._at + 3]
        return rest.startswith(b"-") and rest != b"---"

    def _bracket_element(self) -> tuple[frozenset[int], bool]:
        """The bytes of one element within [ ], and whether it may be an end of a range."""
        c = self._pattern[self._at : self._at + 1]
        if not c:
            raise EntryError("the regular expression leaves a [ open; close it, or write \\[ for the character")
        kind = self._pattern[self._at + 1 : self._at + 2]
        if c == b"[" and kind and kind in b".:=":
            end = self._pattern.find(kind + b"]", self._at + 2)
            source = self._raw if kind == b":" else self._pattern
            name = source[self._at + 2 : end]
            if end < 0:
                raise EntryError("the regular expression leaves a [ open; close it, or write \\[ for the character")
            self._at = end + 2
            if kind == b":":
                if self._fold and name in (b"lower", b"upper"):
                    name = b"alpha"
                if name not in CODES:
                    raise EntryError("the regular expression names a class that is none, such as [:alpha:] would be")
                return CODES[name], False
            if len(name) != 1:
                raise EntryError("the regular expression names a collating element of several characters; write it out")
            return frozenset(name), kind == b"."
        self._at += 3 if self._pattern.startswith(b"---", self._at) else 1
        return frozenset(c), True


# Bounds on what one expression, and one set of them, may take; RE2's own is 8 MiB for each.
REGEX_BYTES = 1 << 20
REGEX_SET_BYTES = 8 << 20
REGEX_SET_SIZE = 250


@cache
def _re2() -> ModuleType | None:
    """The google-re2 module, imported only where there are expressions; None when it is not installed."""
    try:
        return import_module("re2")
    except ImportError:
        return None


def _options(re2: ModuleType, max_mem: int) -> object:
    options = re2.Options()
    options.max_mem = max_mem
    options.encoding = options.Encoding.LATIN1
    options.log_errors = False
    options.never_nl = False
    options.dot_nl = True
    options.never_capture = True
    return options


class Regex(Protocol):
    """A compiled expression of google-re2."""

    def search(self, text: bytes) -> object | None:
        """The first match, in time linear in the text, or None."""


def regcomp(pattern: bytes) -> Regex:
    """The POSIX extended expression, compiled; ``(?i)`` before it ignores case (smtpd: table.c, table_regex_match).

    Raises:
        EntryError: it is no such expression, or one that has no answer in linear time; the text says the remedy.
    """
    if len(pattern) > KEY_BYTES:
        raise EntryError(TOO_LONG)
    re2 = _re2()
    if re2 is None:
        raise EntryError("regular expressions need the Python package google-re2; install it")
    try:
        compiled: Regex = re2.compile(posix_to_re2(pattern), _options(re2, REGEX_BYTES))
    except re2.error:
        raise EntryError("the regular expression is too large; split it into several entries") from None
    return compiled


def table_regex_match(key: bytes, entry: bytes) -> bool:
    """Whether the expression is found in the key (smtpd: table.c)."""
    try:
        return regcomp(entry).search(key) is not None
    except EntryError:
        return False


# Part three: the indexes.


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
            if len(entry) > KEY_BYTES:
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
        found.append(next((entry for entry, pieces in self._others if _matches(key, pieces)), None))
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
            others = (entry for entry, name, pieces in self._others if name in names and _matches(domain, pieces))
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
            elif len(entry) > KEY_BYTES:
                self.problems.append((entry, TOO_LONG))
            else:
                self._words.add(entry.lower(), entry)
                if entry.lower() != b"local":
                    self.problems.append(
                        (entry, "no network (allowed: 192.0.2.1, 192.0.2.0/24, 2001:db8::/32, [2001:db8::/32], local)")
                    )
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
            if len(entry) > KEY_BYTES:
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
        self._groups = [_Group(usable[n : n + REGEX_SET_SIZE]) for n in range(0, len(usable), REGEX_SET_SIZE)]

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


class _Group:
    """Expressions compiled into one, and after them one that matches everything."""

    __slots__ = ("_entries", "_set")

    def __init__(self, entries: list[bytes]) -> None:
        self._entries = entries
        re2 = _re2()
        assert re2 is not None
        self._set = re2.Set.SearchSet(_options(re2, REGEX_SET_BYTES))
        try:
            for entry in entries:
                self._set.Add(posix_to_re2(entry))
            self._set.Add(b"")
            self._set.Compile()
        except re2.error:
            self._set = None
        re2.purge()

    def find(self, key: bytes) -> bytes | None:
        matched: list[int] = (self._set.Match(key) or []) if self._set is not None else []
        if len(self._entries) in matched:
            first = min(matched)
            return self._entries[first] if first < len(self._entries) else None
        # What matches everything did not match: the set ran out of its memory, and that it found nothing says nothing.
        return next((entry for entry in self._entries if table_regex_match(key, entry)), None)


INDEXES: Mapping[str, Callable[[Iterable[bytes]], Index]] = MappingProxyType(
    {
        "domain": Domains,
        "netaddr": Networks,
        "mailaddr": Addresses,
        "regex": Regexes,
        "addrname": HostAddresses,
    }
)
