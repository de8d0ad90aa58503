"""Read tables of other formats: inline tables of smtpd.conf(5), and Postfix's virtual(5) and transport(5) maps.

Pure, like formats.py. A line without an equivalent in smtpd is a problem, never a guess.
"""

from __future__ import annotations

import re

from table_consul.ctl.formats import (
    FileEntry,
    FormatError,
    LineProblem,
    ParsedFile,
    kind_problem,
    parse_lines,
    significant_lines,
)
from table_consul.ctl.lexer import Token, statements
from table_consul.errors import printable
from table_consul.services import Service, fold_key


def read_conf(data: bytes, service: Service, name: str, below: str | None) -> ParsedFile:
    """The entries of the inline table ``below`` of an smtpd.conf; if None, of ``name``, or else of the only one.

    Raises:
        FormatError: the file has no table of this name, or smtpd rejects the table.
    """
    tables: dict[str, list[Token]] = {}
    elsewhere: dict[str, str] = {}
    for statement in statements(data.decode(errors="surrogateescape"), {}):
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
    return _inline_table(tables[wanted] if wanted in tables else next(iter(tables.values())), service)


def _inline_table(tokens: list[Token], service: Service) -> ParsedFile:
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
