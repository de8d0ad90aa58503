"""POSIX extended regular expressions, as glibc's regcomp(3) reads them, rewritten for RE2, which takes linear time.

smtpd compiles with REG_EXTENDED | REG_NOSUB, and REG_ICASE after ``(?i)``, in the C locale. Only what both mean alike
is written, and what one of them refuses is refused. Where POSIX leaves the meaning open, glibc decides.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Protocol

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES
from table_consul.services.match import TOO_LONG

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
    if len(pattern) > MAX_KEY_BYTES:
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


class Group:
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
