"""The tables of smtpd.conf(5): those of table-consul, with the services that smtpd looks up in each, and inline tables.

The grammar is not checked: ``smtpd -n`` does that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from table_consul.config import DEFAULT_PATH
from table_consul.ctl.formats import FileEntry, FormatError, LineProblem, ParsedFile, kind_problem
from table_consul.errors import TableConsulError, printable, problem_of
from table_consul.files import open_regular_file, read_bounded
from table_consul.services import Service, fold_key

_TOKEN = re.compile(
    r"""(?P<gap>(?:[ \t\r]|\\\n)+|\#(?:\\.|[^\n\\])*) | \$(?P<macro>\w*)
    | (?P<string>"(?:\\"|[^"])*"|'(?:\\'|[^'])*')
    | (?P<word>[\w:](?:\\.|[^\s\\(){}<>!=\#,])*) | (?P<sign>=>|.)""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A word of a statement, without quotes and escapes."""

    kind: str
    """``word``, ``string``, ``sign``, or ``macro`` for one that is not defined."""
    text: str
    line: int


def _statements(text: str, macros: dict[str, str]) -> Iterator[list[Token]]:
    """Yield each statement that is not empty, split into words as by smtpd (smtpd: parse.y, yylex), without line ends.

    The last one may have unclosed braces. Definitions of macros are added to ``macros`` instead.
    """
    statement: list[Token] = []
    depth = 0
    for token in _tokens(text + "\n", macros):
        if token[:2] != ("sign", "\n"):
            statement.append(token)
            depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "sign" else 0
        elif depth <= 0:
            match statement:
                case [Token("word", name), Token("sign", "="), Token("word" | "string", value)]:
                    macros[name] = value
                case [_, *_]:
                    yield statement
            statement, depth = [], 0
    if statement:
        yield statement


def _tokens(text: str, macros: dict[str, str], line: int = 1, *, expanding: bool = False) -> Iterator[Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        found = match[kind]
        if kind == "macro" and expanding:  # smtpd expands only once
            yield Token("sign", match[0], line)
        elif kind == "macro" and found in macros:
            yield from (each._replace(line=line) for each in _tokens(macros[found], macros, expanding=True))
        elif kind == "string":
            yield Token(kind, re.sub(rf"\\([{found[0]} \t])|\\?\n", r"\1", found[1:-1]), line)
        elif kind == "word":
            yield Token(kind, re.sub(r"\\\n|\\(.)", r"\1", found), line)
        elif kind != "gap":
            yield Token(kind, found, line)
        line += match[0].count("\n")


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

    tables: dict[str, Declared]
    problems: list[tuple[str, str]]


def program() -> str | None:
    """The path of smtpd, None if it is not installed."""
    return shutil.which("smtpd") or shutil.which("smtpd", path="/usr/sbin:/usr/local/sbin")


def built_in(expression: bytes) -> list[str]:
    """The paths in the binary of smtpd that match the expression; none if smtpd is not installed.

    Raises:
        OSError: the binary cannot be read.
    """
    path = program()
    if path is None:
        return []
    with open(path, "rb") as file:
        return [os.fsdecode(found) for found in re.findall(expression, file.read())]


def locate() -> str:
    """The path of smtpd.conf.

    Raises:
        OSError: the binary of smtpd cannot be read.
        TableConsulError: it is in none of the usual places.
    """
    for path in (*built_in(rb"\0(/[\w/.-]+/smtpd\.conf)\0"), *PATHS):
        if os.path.exists(path):
            return path
    raise TableConsulError("smtpd.conf not found", "use --smtpd-conf")


def read(path: str) -> SmtpdConf:
    """The tables of this smtpd.conf, and their uses.

    Raises:
        OSError: the file cannot be read; for an included file, this is a problem instead.
    """
    reader = _Reader()
    reader.read(path)
    return SmtpdConf({name: table for name, table in reader.tables.items() if table is not None}, reader.problems)


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

    def read(self, path: str, depth: int = 0) -> None:
        """Record the tables of a file and of those that it includes, and their uses."""
        with open(path, "rb", opener=open_regular_file) as file:
            text = read_bounded(file, SIZE_MAX).decode("utf-8", "backslashreplace")
        for statement in _statements(text, self._macros):
            for token in statement:
                if token.kind == "macro":
                    where = f"{printable(path)}:{token.line}"
                    self.problems.append((where, f"macro {printable(token.text)} is not defined (define it above)"))
            match statement:
                case [Token("word", "include"), Token("string" | "word", name, line)]:
                    self._include(os.path.join("/", name), f"{printable(path)}:{line}", depth)
                case [Token("word", "table"), Token("word" | "string", name, line), Token("word" | "string", source)]:
                    config, where = _config(source), f"{printable(path)}:{line}"
                    self.tables[name] = None if config is None else Declared(name, where, config or None, [])
                case [Token("word", "table"), Token("word" | "string", name), *_]:
                    self.tables[name] = None
                case [Token("word", verb), *_]:
                    self._take_uses(verb, statement, printable(path))

    def _include(self, path: str, where: str, depth: int) -> None:
        if depth == DEPTH_MAX:
            self.problems.append((where, f"includes are nested more than {DEPTH_MAX} deep (does one include itself?)"))
            return
        try:
            self.read(path, depth + 1)
        except (OSError, TableConsulError) as error:
            self.problems.append((where, f"cannot include {printable(path)}: {problem_of(error)} (correct the path)"))

    def _take_uses(self, verb: str, statement: list[Token], path: str) -> None:
        for number, token in enumerate(statement[:-2]):
            if (token.kind, token.text, statement[number + 2].text) != ("sign", "<", ">"):
                continue
            where = f"{path}:{token.line}"
            name, before = statement[number + 1].text, statement[number - 1].text
            if name not in self.tables:
                self.problems.append((where, f"table {printable(name)} is used but not defined (define it above)"))
            elif (table := self.tables[name]) is not None:
                services = _IN_STATEMENT.get((verb, before)) or _SERVICES.get(before, ())
                if before == "regex":
                    services = ("regex",)
                table.uses.append(Use(services, where))


def _config(source: str) -> str | None:
    """The configuration that a table line names, "" if none; None if it does not start table-consul."""
    backend, _, path = source.partition(":")
    if backend == BACKEND:
        return path
    words = path.split()
    if backend in {"procexec", "proc-exec"} and words and os.path.basename(words[0]) == f"table-{BACKEND}":
        return words[1] if len(words) > 1 else ""
    return None


def inline_table(data: bytes, service: Service, name: str, below: str | None) -> ParsedFile:
    """The entries of the inline table ``below`` of an smtpd.conf; if None, of ``name``, or else of the only one.

    Raises:
        FormatError: the file has no table of this name, or smtpd rejects the table.
    """
    tables: dict[str, list[Token]] = {}
    elsewhere: dict[str, str] = {}
    for statement in _statements(data.decode(errors="surrogateescape"), {}):
        for token in statement:
            if token.kind == "macro":
                raise FormatError(f"line {token.line}: macro {printable(token.text)} is not defined")
        match statement:
            case [Token("word", "table"), Token(_, table), Token("sign", "{"), *inside, Token("sign", "}")]:
                tables[table] = inside
            case [Token("word", "table"), Token(_, table), Token("sign", "{"), *_]:
                raise FormatError(f"table {printable(table)} has no closing brace at its end")
            case [Token("word", "table"), Token(_, table), Token(_, source)]:
                elsewhere[table] = printable(source)
    wanted = name if below is None else below
    if wanted not in tables and wanted in elsewhere:
        raise FormatError(f"table {printable(wanted)} is {elsewhere[wanted]} (import the file that it is made from)")
    if wanted not in tables and (below is not None or len(tables) != 1):
        found = ", ".join(map(printable, tables)) or "there are none"
        raise FormatError(f"cannot choose an inline table of this smtpd.conf: {found} (use --from TABLE)")
    return _entries(tables[wanted] if wanted in tables else next(iter(tables.values())), service)


def _entries(tokens: list[Token], service: Service) -> ParsedFile:
    """The entries of a table: KEY = VALUE or KEY, separated by commas or newlines (smtpd: parse.y, tableval_list).

    Raises:
        FormatError: there is something else in the table, so smtpd rejects it.
    """
    entries: list[FileEntry] = []
    problems: list[LineProblem] = []
    values = 0
    rest = iter(tokens)
    for kind, text, line in rest:
        if kind != "sign":
            entries.append(FileEntry(fold_key(text.encode(errors="surrogateescape")), b"", line))
        elif text in ("=", "=>") and entries and not entries[-1].value:
            value = next(rest, None)
            values += 1
            if value is None or value.kind == "sign" or not value.text:
                problems.append(LineProblem(line, "has no value", entries.pop().key))
            else:
                entries[-1] = entries[-1]._replace(value=value.text.encode(errors="surrogateescape"))
        elif text != ",":  # the words beside it are parts of one that needs quotes
            raise FormatError(
                f"line {line}: expected a key, not {printable(text)} (put a text that contains it in quotes)"
            )
    if entries and values and service.lists_only:
        problems, entries = [LineProblem(entries[0].line, kind_problem(service, listed=False))], []
    elif entries and not values and service.needs_value:
        problems, entries = [LineProblem(entries[0].line, kind_problem(service, listed=True))], []
    elif values:
        problems += [LineProblem(each.line, "has no value", each.key) for each in entries if not each.value]
        entries = [each for each in entries if each.value]
    return ParsedFile("conf", entries, sorted(problems))
