"""The tables of smtpd.conf, and the services that smtpd looks up in each.

Words are split as by smtpd (smtpd: parse.y, yylex), with includes, macros, quotes and continuation lines. The grammar
is not checked: ``smtpd -n`` does that.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from table_consul.config import DEFAULT_PATH
from table_consul.errors import TableConsulError, printable
from table_consul.files import open_regular_file, read_bounded

# In addition to the path that smtpd contains: OpenBSD, Debian, FreeBSD, Alpine, Fedora.
PATHS = (
    "/etc/mail/smtpd.conf",
    "/etc/smtpd.conf",
    "/usr/local/etc/mail/smtpd.conf",
    "/etc/smtpd/smtpd.conf",
    "/etc/opensmtpd/smtpd.conf",
)
BACKEND = "consul"
SIZE_MAX = 16 << 20
# Only a file that includes itself gets deeper.
DEPTH_MAX = 16
_WORDS = re.compile(
    r"""(?P<gap>(?:[ \t\r]|\\\n)+|\#(?:\\.|[^\n\\])*) | \$(?P<macro>\w*)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<word>[\w:](?:\\.|[^\s\\(){}<>!=\#,])*) | (?P<sign>=>|.)""",
    re.VERBOSE | re.DOTALL,
)
# The services that smtpd looks up in a table, by the word before it, if they do not depend on the statement.
_SERVICES: dict[str, tuple[str, ...]] = {
    "alias": ("alias",),
    "virtual": ("alias",),
    "userbase": ("userinfo",),
    "helo-src": ("addrname",),
    "host": ("relayhost",),
    "auth-optional": ("credentials", "auth"),
    "hostnames": ("addrname",),
    "senders": ("mailaddrmap",),
    "tag": ("string",),
    "helo": ("domain",),
    "rdns": ("domain",),
    "src": ("netaddr",),
    "domain": ("domain",),
    "mail-from": ("mailaddr",),
    "rcpt-to": ("mailaddr",),
}
_IN_STATEMENT: dict[tuple[str, str], tuple[str, ...]] = {
    ("action", "src"): ("source",),
    ("action", "domain"): ("relayhost",),
    ("action", "auth"): ("credentials",),
    ("listen", "auth"): ("credentials", "auth"),
    ("match", "auth"): ("string", "mailaddr"),
    ("filter", "auth"): ("string", "credentials"),
}


class Use(NamedTuple):
    """The services that smtpd looks up in a table, and the place in smtpd.conf."""

    services: tuple[str, ...]
    """smtpd looks up one of them, depending on its version and on the key."""
    where: str


class Declared(NamedTuple):
    """A table of smtpd.conf that table-consul serves."""

    name: str
    where: str
    """``FILE:LINE``."""
    config: str | None
    """The path of its configuration, None for the default."""
    uses: list[Use]


class SmtpdConf(NamedTuple):
    """The parts of smtpd.conf that concern table-consul."""

    path: str
    tables: dict[str, Declared]
    problems: list[tuple[str, str]]


class _Word(NamedTuple):
    kind: str
    """``word``, ``string`` or ``sign``."""
    text: str
    where: str


def program() -> str | None:
    """The path of smtpd, None if it is not installed."""
    return shutil.which("smtpd") or shutil.which("smtpd", path="/usr/sbin:/usr/local/sbin")


def built_in(expression: bytes) -> list[str]:
    """The paths in the binary of smtpd that match the expression; none if smtpd is not installed."""
    path = program()
    if path is None:
        return []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return [os.fsdecode(match[1]) for match in re.finditer(expression, data)]


def locate() -> str:
    """The path of smtpd.conf.

    Raises:
        TableConsulError: it is in none of the usual places.
    """
    for path in (*built_in(rb"\0(/[\w/.-]+/smtpd\.conf)\0"), *PATHS):
        if os.path.exists(path):
            return path
    raise TableConsulError("smtpd.conf not found (use --smtpd-conf)")


def read(path: str) -> SmtpdConf:
    """The tables of this smtpd.conf, and their uses.

    Raises:
        OSError: the file cannot be read; for an included file, this is a problem instead.
    """
    reader = _Reader()
    statement: list[_Word] = []
    depth = 0
    for word in itertools.chain(reader.words(path), [_Word("sign", "\n", "")]):
        depth += {"{": 1, "}": -1}.get(word.text, 0) if word.kind == "sign" else 0
        if word.kind != "sign" or word.text != "\n":
            statement.append(word)
        elif depth <= 0:
            reader.take(statement)
            statement, depth = [], 0
    return SmtpdConf(path, {name: table for name, table in reader.tables.items() if table is not None}, reader.problems)


def tables_of(config: str | None) -> set[str]:
    """The tables of this host that use this configuration (None for the default); none if smtpd.conf cannot be read."""
    with contextlib.suppress(OSError, TableConsulError):
        declared = read(locate()).tables.values()
        return {table.name for table in declared if (table.config or DEFAULT_PATH) == (config or DEFAULT_PATH)}
    return set()


class _Reader:
    def __init__(self) -> None:
        self.tables: dict[str, Declared | None] = {}
        """None for a table of another backend."""
        self.problems: list[tuple[str, str]] = []
        self._macros: dict[str, str] = {}

    def words(self, path: str, depth: int = 0) -> Iterator[_Word]:
        """The words of a file and of those that it includes; each line ends with a sign."""
        with open(path, "rb", opener=open_regular_file) as file:
            text = read_bounded(file, SIZE_MAX).decode("utf-8", "backslashreplace")
        line: list[_Word] = []
        for word in self._split(text + "\n", printable(path)):
            line.append(word)
            if word.kind != "sign" or word.text != "\n":
                continue
            match line:
                case [_Word("word", "include"), _Word("string" | "word", name, where), _]:
                    yield from self._included(os.path.join("/", name), where, depth)
                case [_Word("word", name), _Word("sign", "="), _Word("word" | "string", value), _]:
                    self._macros[name] = value
                case _:
                    yield from line
            line = []

    def _included(self, path: str, where: str, depth: int) -> Iterator[_Word]:
        if depth == DEPTH_MAX:
            self.problems.append((where, f"includes are nested more than {DEPTH_MAX} deep"))
            return
        try:
            yield from self.words(path, depth + 1)
        except (OSError, TableConsulError) as error:
            what = getattr(error, "strerror", None) or str(error)
            self.problems.append((where, f"cannot include {printable(path)}: {what.lower()}"))

    def _split(self, text: str, path: str, number: int = 1, *, expanding: bool = False) -> Iterator[_Word]:
        for match in _WORDS.finditer(text):
            where, kind = f"{path}:{number}", match.lastgroup or ""
            found = match[kind]
            if not expanding:
                number += match[0].count("\n")
            if kind == "macro" and expanding:
                yield _Word("sign", match[0], where)
            elif kind == "macro":
                if found not in self._macros:
                    self.problems.append((where, f"macro {printable(found)} is not defined"))
                    continue
                yield from self._split(self._macros[found], path, number, expanding=True)
            elif kind == "string":
                yield _Word(kind, re.sub(rf"\\([{found[0]} \t])|\\?\n", r"\1", found[1:-1]), where)
            elif kind != "gap":
                yield _Word(kind, re.sub(r"\\\n|\\(.)", r"\1", found) if kind == "word" else found, where)

    def take(self, statement: list[_Word]) -> None:
        """Record the tables that a statement defines or uses."""
        match statement:
            case [_Word("word", "table"), _Word("word" | "string", name, where), _Word("word" | "string", source)]:
                config = _config(source)
                self.tables[name] = None if config is None else Declared(name, where, config or None, [])
            case [_Word("word", "table"), _Word("word" | "string", name), *_]:
                self.tables[name] = None
            case [_Word("word", verb), *_]:
                self._take_uses(verb, statement)

    def _take_uses(self, verb: str, statement: list[_Word]) -> None:
        for place, word in enumerate(statement[:-2]):
            if (word.kind, word.text, statement[place + 2].text) != ("sign", "<", ">"):
                continue
            name, before = statement[place + 1].text, statement[place - 1].text
            if name not in self.tables:
                self.problems.append((word.where, f"table {printable(name)} is used but not defined"))
            elif (table := self.tables[name]) is not None:
                services = _IN_STATEMENT.get((verb, before)) or _SERVICES.get(before, ())
                if before == "regex":
                    services = ("regex",)
                table.uses.append(Use(services, word.where))


def _config(source: str) -> str | None:
    """The configuration that a table line names, "" if none; None if it does not start table-consul."""
    backend, _, path = source.partition(":")
    if backend == BACKEND:
        return path
    words = path.split()
    if backend in {"procexec", "proc-exec"} and words and os.path.basename(words[0]) == f"table-{BACKEND}":
        return words[1] if len(words) > 1 else ""
    return None
