"""POSIX extended regular expressions, as glibc's regcomp(3) reads them, translated for RE2, which takes linear time.

smtpd compiles with REG_EXTENDED, and REG_ICASE after ``(?i)``, in the C locale. Only syntax that both libraries read
alike is translated; what POSIX leaves open follows glibc. RE2's option ``posix_syntax`` reads brackets and repetitions
differently.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from itertools import groupby
from types import ModuleType
from typing import NamedTuple

from table_consul.errors import ConfigError, EntryError
from table_consul.services import compiled

CLASSES = {
    b"alnum": frozenset((string.ascii_letters + string.digits).encode()),
    b"alpha": frozenset(string.ascii_letters.encode()),
    b"blank": frozenset(b" \t"),
    b"cntrl": frozenset((*range(32), 127)),
    b"digit": frozenset(string.digits.encode()),
    b"graph": frozenset(range(33, 127)),
    b"lower": frozenset(string.ascii_lowercase.encode()),
    b"print": frozenset(range(32, 127)),
    b"punct": frozenset(string.punctuation.encode()),
    b"space": frozenset(string.whitespace.encode()),
    b"upper": frozenset(string.ascii_uppercase.encode()),
    b"xdigit": frozenset(string.hexdigits.encode()),
}
EVERY = frozenset(range(256))
WORD, SPACE = CLASSES[b"alnum"] | {0x5F}, CLASSES[b"space"]
# Tokens that match several bytes, and tokens that match none and cannot be repeated.
CLASS_TOKENS = {b".": EVERY, rb"\w": WORD, rb"\W": EVERY - WORD, rb"\s": SPACE, rb"\S": EVERY - SPACE}
EMPTY_TOKENS = {b"|": b"|", b"^": rb"\A", b"$": rb"\z", rb"\`": rb"\A", rb"\'": rb"\z", rb"\b": rb"\b", rb"\B": rb"\B"}
INTERVAL = rb"\{([0-9]*)(,?)([0-9]*)\}"
# Within [ ]: [:alpha:], [.-.] or [=a=]; three hyphens in a row, which glibc reads as a literal hyphen; any byte.
BRACKET_ELEMENT = rb"(?s)\[([.:=])(.*?)\1\]|---|(?!\[[.:=])."
REPEATS = 1000  # RE2: kMaxRepeat. POSIX promises 255 (RE_DUP_MAX).
IGNORE_CASE = b"(?i)"
# Bounds on the memory of one expression, and of one set of them; RE2's own default is 8 MiB for each.
REGEX_BYTES = 1 << 20
REGEX_SET_BYTES = 2 << 20
REGEX_SET_SIZE = 10_000  # instructions; a set of that many never runs out of its memory
# In RE2's syntax: everything that is not literal, or one literal byte.
_LITERAL = rb"\[[^]]*\]|\{[^}]*\}|\\[AzbB]|(\\x..|\w)"


def _error(text: str) -> EntryError:
    return EntryError(f"the regular expression {text}")


@functools.lru_cache(maxsize=1024)
def _bytes_class(members: frozenset[int]) -> bytes:
    """RE2's expression for one of these bytes."""
    codes = sorted(members)
    if not codes:
        return rb"[^\x00-\xff]"
    if len(codes) == 1:
        return b"%c" % codes[0] if codes[0] in WORD else rb"\x%02x" % codes[0]
    runs = ([code for _, code in run] for _, run in groupby(enumerate(codes), lambda each: each[1] - each[0]))
    return b"[" + b"".join(rb"\x%02x-\x%02x" % (run[0], run[-1]) for run in runs) + b"]"


class _Translator:
    """One pass over an expression."""

    def __init__(self, pattern: bytes) -> None:
        self._fold = pattern.startswith(IGNORE_CASE)
        self._raw = pattern.removeprefix(IGNORE_CASE)
        # regcomp(3) with REG_ICASE compares upper-case letters with upper-case letters, ranges included.
        self._pattern = self._raw.upper() if self._fold else self._raw
        self._at = 0

    def translate(self) -> bytes:
        """The expression in RE2's syntax, for bytes (its encoding Latin-1).

        Raises:
            EntryError: regcomp(3) would reject it, or RE2 has no equivalent; the text has a hint.
        """
        groups: list[list[bytes]] = [[]]  # the pieces of each open group; a repetition repeats the last piece
        repeatable = False
        while self._at < len(self._pattern):
            token = self._token()
            pieces = groups[-1]
            if token in (b"*", b"+", b"?", b"{"):
                if not repeatable:
                    raise _error(f"has a {token.decode()} with nothing to repeat; put a \\ before it")
                suffix = self._interval() if token == b"{" else token
                pieces[-1] = b"(?:" + pieces[-1] + suffix + b")" if suffix else b"(?:)"
                continue
            repeatable = token not in EMPTY_TOKENS and token != b"("
            if token == b"(":
                groups.append([])
            elif token == b")" and len(groups) > 1:
                groups.pop()
                groups[-1].append(b"(?:" + b"".join(pieces) + b")")
            elif token in EMPTY_TOKENS:
                pieces.append(EMPTY_TOKENS[token])
            else:
                pieces.append(self._class(self._bracket() if token == b"[" else CLASS_TOKENS.get(token, token[-1:])))
        if len(groups) > 1:
            raise _error("leaves a ( open; close it, or write \\( for the character")
        return b"".join(groups[0])

    def _token(self) -> bytes:
        """The next byte, or the next two if the first is a backslash; an escaped byte keeps its case."""
        at = self._at
        self._at += 1
        if self._pattern[at : self._at] != b"\\":
            return self._pattern[at : self._at]
        self._at += 1
        c = self._raw[at + 1 : self._at]
        if not c:
            raise _error("ends in a \\; write \\\\ for the character")
        if c in b"123456789":
            raise _error("has a back-reference, which cannot be matched in linear time; remove it")
        if c in b"<>":
            raise _error(f"has a \\{c.decode()}, which is not POSIX; write \\b")
        return b"\\" + c

    def _interval(self) -> bytes:
        """The interval whose ``{`` is read, for RE2; empty if it repeats nothing."""
        found = compiled(INTERVAL).match(self._pattern, self._at - 1)
        if found is None or not (found[1] or found[2]):
            raise _error("has a { that does not begin {n}, {n,} or {n,m}; put a \\ before it")
        self._at = found.end()
        least = int(found[1] or b"0")
        most = int(found[3]) if found[3] else None if found[2] else least
        if most is not None and most < least:
            raise _error("has a {n,m} whose n is greater than its m; exchange them")
        if max(least, most or 0) > REPEATS:
            raise _error(f"repeats more than {REPEATS} times; repeat less")
        if most == 0:
            return b""
        return b"{%d,}" % least if most is None else b"{%d,%d}" % (least, most)

    def _class(self, members: Iterable[int]) -> bytes:
        """A class of these bytes; when case is ignored, of all bytes whose upper case is among these."""
        if self._fold:
            among = frozenset(members)
            members = [code for code in EVERY if (code - 32 if 0x61 <= code <= 0x7A else code) in among]
        return _bytes_class(frozenset(members))

    def _bracket(self) -> frozenset[int]:
        """The bytes that match a bracket expression whose ``[`` is read (glibc: regcomp.c, parse_bracket_exp)."""
        negated = self._pattern.startswith(b"^", self._at)
        self._at += negated
        first = self._at
        members: set[int] = set()
        while self._at == first or not self._pattern.startswith(b"]", self._at):
            if self._at > first and self._at_hyphen():
                raise _error("has a - within [ ] that does not form a range; put it last, before the ]")
            start, ranged = self._bracket_element()
            members |= start
            if ranged and self._at_hyphen():
                self._at += 1
                end, ranged = self._bracket_element()
                if not ranged or min(start) > max(end):
                    raise _error("has an empty range within [ ]; write it in ascending order")
                members.update(range(min(start), max(end) + 1))
        self._at += 1
        return EVERY - members if negated else frozenset(members)

    def _at_hyphen(self) -> bool:
        """Whether the next byte is a hyphen that makes a range: not the last within the bracket, and not ``---``."""
        return compiled(rb"-(?!--|\])").match(self._pattern, self._at) is not None

    def _bracket_element(self) -> tuple[frozenset[int], bool]:
        """The bytes of one element within [ ], and whether it can be an end of a range."""
        found = compiled(BRACKET_ELEMENT).match(self._pattern, self._at)
        if found is None:
            raise _error("leaves a [ open; close it, or write \\[ for the character")
        self._at = found.end()
        kind = found[1]
        if kind is None:
            return frozenset(found[0][:1]), True
        if kind == b":":
            name = self._raw[found.start(2) : found.end(2)]
            if self._fold and name in (b"lower", b"upper"):
                name = b"alpha"
            if name not in CLASSES:
                raise _error("names an unknown class; write one such as [:alpha:]")
            return CLASSES[name], False
        if len(found[2]) != 1:
            raise _error("names a collating element of several characters; write it out")
        return frozenset(found[2]), kind == b"."


def escape_warnings(pattern: bytes) -> Iterator[str]:
    """A hint for each escaped letter or digit that has a meaning only in other dialects."""
    for token in sorted({*compiled(rb"(?s)\\.").findall(pattern)} - CLASS_TOKENS.keys() - EMPTY_TOKENS.keys()):
        if token[1:].isalnum():
            c = token[1:].decode()
            yield f"\\{c} is just the character {c} in POSIX expressions; write a class, such as [0-9] or [[:alpha:]]"


def _options(re2: ModuleType, max_mem: int) -> object:
    options = re2.Options()
    options.max_mem = max_mem
    options.encoding = options.Encoding.LATIN1
    options.log_errors = False
    options.never_capture = True
    return options


class Expression(NamedTuple):
    """A POSIX extended expression that RE2 can match."""

    pattern: bytes
    """In RE2's syntax."""
    size: int
    """Instructions of its program: the most that a search follows at each byte."""
    width: int
    """How many a search of a hostile text follows at each byte: few of those for literal text, and all others."""


def package() -> ModuleType:
    """RE2, which is imported for the first expression, because few tables have any.

    Raises:
        ConfigError: it is missing or broken, or another package has its name.
    """
    need = "regular expressions need the Python package google-re2"
    try:
        re2 = import_module("re2")
    except ModuleNotFoundError:
        raise ConfigError(f"{need}; install it") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package may raise anything
        raise ConfigError(f"{need}, which cannot be loaded ({type(error).__name__}); reinstall it") from None
    if not (hasattr(re2, "Options") and hasattr(re2, "Set")):
        raise ConfigError(f"{need}, but another package is installed as re2; replace it")
    return re2


def regcomp(entry: bytes) -> Expression:
    """The expression; ``(?i)`` before it ignores case (smtpd: table.c, table_regex_match).

    Raises:
        EntryError: not such an expression, or one that cannot be matched in linear time; the text has a hint.
        ConfigError: RE2 cannot be used.
    """
    re2 = package()
    pattern = _Translator(entry).translate()
    try:
        size = re2.compile(pattern, _options(re2, REGEX_BYTES)).programsize
    except re2.error:
        raise _error("is too large; split it into several entries") from None
    literals = sum(map(bool, compiled(_LITERAL).findall(pattern)))
    width = size - literals * 7 // 8
    # Long repetitions are long chains, and each byte follows many of their instructions.
    return Expression(pattern, size, width + width * width // 500)


class RegexSet:
    """Expressions, in ascending order of entries, compiled into one set, whose last member matches everything."""

    def __init__(self, patterns: Mapping[bytes, bytes], size: int) -> None:
        """``patterns`` are in RE2's syntax, by entry; ``size`` is the sum of theirs."""
        self._entries = [*patterns]
        self.size = size
        re2 = import_module("re2")
        self._set = re2.Set.SearchSet(_options(re2, REGEX_SET_BYTES))
        try:
            for pattern in patterns.values():
                self._set.Add(pattern)
            self._set.Add(b"")
            self._set.Compile()
        except re2.error:
            self._set = None
        re2.purge()

    def find(self, key: bytes) -> bytes | None:
        """The first of the entries that matches the key, None if none does.

        Raises:
            EntryError: memory ran out, and the expression that matches everything did not match.
        """
        matched: list[int] = (self._set.Match(key) or []) if self._set is not None else []
        if len(self._entries) not in matched:
            raise EntryError("the regular expressions need too much memory for this name; simplify them")
        first = min(matched)
        return self._entries[first] if first < len(self._entries) else None
