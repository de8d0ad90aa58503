"""Read tables of other formats: inline tables of smtpd.conf(5), and Postfix's virtual(5) and transport(5) maps.

Pure, like files.py. A line without an equivalent in smtpd is a problem, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from table_consul.ctl.files import (
    FileEntry,
    FormatError,
    LineProblem,
    ParsedFile,
    kind_problem,
    parse_lines,
    significant_lines,
)
from table_consul.errors import printable
from table_consul.services import Service, fold_key

# As smtpd's parse.y, yylex: within quotes only the same quote is escaped, and a newline there or after \ is skipped.
_TOKEN = re.compile(
    rb"""(?P<skip>[ \t\r]+|\\\n|\#[^\n]*)|"(?P<double>(?:\\"|[^"])*)"|'(?P<single>(?:\\'|[^'])*)'"""
    rb"""|\$(?P<macro>\w+)|(?P<mark>=>?|[\n{},])|(?P<word>[^ \t\r\n"'{}<>()!=#,][^ \t\r\n{}<>()!=#,]*)|.""",
    re.VERBOSE,
)
_ESCAPED = re.compile(rb"\\([\"' \t])|\\?\n")


class _Token(NamedTuple):
    text: bytes
    line: int
    is_string: bool = False


def _tokens(data: bytes, first: int, macros: dict[bytes, bytes]) -> Iterator[_Token]:
    line, position = first, 0
    for match in _TOKEN.finditer(data):
        line, position = line + data.count(b"\n", position, match.start()), match.start()
        if match["macro"] is not None:
            if match["macro"] not in macros:
                raise FormatError(f"line {line}: macro {printable(match['macro'])} is not defined")
            yield from _tokens(macros[match["macro"]], line, {})
        elif match.lastgroup in ("double", "single"):
            yield _Token(_ESCAPED.sub(lambda found: found[1] or b"", match[match.lastgroup]), line, is_string=True)
        elif match.lastgroup != "skip":
            yield _Token(match[0], line, match.lastgroup == "word")


def read_conf(data: bytes, service: Service, name: str, below: str | None) -> ParsedFile:
    """The entries of the inline table ``below`` of an smtpd.conf; if None, of ``name``, or else of the only one.

    Raises:
        FormatError: there is no such table, or a brace is not closed.
    """
    macros: dict[bytes, bytes] = {}
    tables: dict[str, list[_Token]] = {}
    elsewhere: dict[str, str] = {}
    statement: list[_Token] = []
    inside: list[_Token] | None = None
    for token in _tokens(data, 1, macros):
        if inside is not None and token[::2] != (b"}", False):
            inside.append(token)
            continue
        if inside is None and token[::2] not in ((b"\n", False), (b"{", False)):
            statement.append(token)
            continue
        texts = [each.text for each in statement]
        if token.text == b"{" and len(texts) == 2 and texts[0] == b"table":
            inside = tables[texts[1].decode(errors="replace")] = []
            continue
        if len(texts) == 3 and texts[0] == b"table":
            elsewhere[texts[1].decode(errors="replace")] = printable(texts[2])
        elif len(texts) == 3 and texts[1] == b"=":
            macros[texts[0]] = texts[2]
        inside, statement = None, []
    if inside is not None:
        raise FormatError("the last table has no closing brace")
    wanted = name if below is None else below
    if wanted not in tables and wanted in elsewhere:
        raise FormatError(f"table {printable(wanted)} is {elsewhere[wanted]} (import the file that it is made from)")
    if wanted not in tables and (below is not None or len(tables) != 1):
        found = ", ".join(map(printable, tables)) or "there are none"
        raise FormatError(f"cannot choose an inline table of this smtpd.conf: {found} (use --from TABLE)")
    return _inline_table(tables[wanted] if wanted in tables else next(iter(tables.values())), service)


def _inline_table(tokens: list[_Token], service: Service) -> ParsedFile:
    """The entries of a table: KEY = VALUE or KEY, separated by commas or newlines (smtpd: parse.y, tableval_list)."""
    entries: list[FileEntry] = []
    problems: list[LineProblem] = []
    values = 0
    rest = iter(tokens)
    for token in rest:
        if token.is_string:
            entries.append(FileEntry(fold_key(token.text), b"", token.line))
        elif token.text in (b"=", b"=>") and entries:
            value = next(rest, None)
            values += 1
            if value is None or not value.is_string or not value.text:
                problems.append(LineProblem(token.line, "has no value", entries.pop().key))
            else:
                entries[-1] = entries[-1]._replace(value=value.text)
        elif token.text not in (b",", b"\n"):
            problems.append(LineProblem(token.line, f"expected a key, not {printable(token.text)}"))
    if entries and values and service.lists_only:
        problems, entries = [LineProblem(entries[0].line, kind_problem(service, listed=False))], []
    elif entries and not values and service.needs_value:
        problems, entries = [LineProblem(entries[0].line, kind_problem(service, listed=True))], []
    elif values:
        problems += [LineProblem(each.line, "has no value", each.key) for each in entries if not each.value]
        entries = [each for each in entries if each.value]
    return ParsedFile("conf", entries, sorted(problems))


# Text between slashes is not enough: it may be a key, and the alias `if` may be /dev/null.
_EXPRESSION = re.compile(rb"!?/.*[\\^$(|].*/[a-z]*")


def without_domains(parsed: ParsedFile) -> ParsedFile:
    """The file without what only Postfix's virtual(5) has: lines that declare domains, and expressions."""
    domains = {key.partition(b"@")[2] for key, _, _, _ in parsed.entries if b"@" in key}
    entries, problems, notes = [], [*parsed.problems], []
    for entry in parsed.entries:
        if entry.key in domains and b"." in entry.key:
            text = "declares a domain of Postfix's virtual(5); skipped (import it for the service domain)"
            notes.append(LineProblem(entry.line, text, entry.key))
        elif _EXPRESSION.fullmatch(entry.key) or (entry.key == b"if" and _EXPRESSION.fullmatch(entry.value)):
            text = "is an expression of a Postfix regexp: or pcre: map, which smtpd does not support in aliases"
            problems.append(LineProblem(entry.line, text, entry.key))
        else:
            entries.append(entry)
    return parsed._replace(entries=entries, problems=sorted(problems), notes=notes)


_SCHEMES = {b"": b"smtp", b"smtp": b"smtp", b"relay": b"smtp", b"smtps": b"smtps", b"lmtp": b"lmtp"}
_NEXTHOP = re.compile(rb"(?:\[(?:(?i:ipv6):)?([^\]]+)\]|([^\[\]:,\s]+))(?::([0-9]+|smtp|submissions?|smtps|lmtp))?")
_PORTS = {b"smtp": b"25", b"submission": b"587", b"submissions": b"465", b"smtps": b"465", b"lmtp": b"24"}


def read_transport(data: bytes) -> ParsedFile:
    """The relay hosts of a Postfix transport(5) map, for `action ... relay domain <table>`."""
    return parse_lines("transport", significant_lines(data), _relay)


def _relay(text: bytes) -> tuple[bytes, bytes]:
    key, value = (*text.split(None, 1), b"")[:2]
    if key == b"*":
        raise FormatError("matches all domains, but smtpd looks up one domain (write `relay host URL` in smtpd.conf)")
    if key.startswith(b".") or b"@" in key:
        kind = "an address" if b"@" in key else "the hosts below a domain"
        raise FormatError(f"matches {kind}, but smtpd looks up relay hosts by domain only")
    if b"://" in value:
        return key, value
    transport, colon, nexthop = value.partition(b":")
    name = printable(transport)
    if not colon:
        raise FormatError("has no transport")
    if transport not in _SCHEMES:
        raise FormatError(f"the Postfix transport {name} is not a relay host (write a rule in smtpd.conf)")
    if not nexthop:
        raise FormatError(
            "is delivered by MX, which a table of relay hosts cannot express (write a rule in smtpd.conf)"
        )
    match = _NEXTHOP.fullmatch(nexthop.removeprefix(b"inet:") if transport == b"lmtp" else nexthop)
    if match is None:
        raise FormatError(f"the nexthop of {name or 'Postfix'} must be [HOST] or [HOST]:PORT")
    host, bare, port = match.groups(b"")
    if bare and transport != b"lmtp":
        raise FormatError("is relayed to the MX of the nexthop, but smtpd relays to a host (write [HOST])")
    host = host or bare
    scheme = _SCHEMES[transport]
    port = _PORTS.get(port, port) or (b"24" if scheme == b"lmtp" else b"")
    return key, scheme + b"://" + (b"[%b]" % host if b":" in host else host) + (b":" + port if port else b"")
