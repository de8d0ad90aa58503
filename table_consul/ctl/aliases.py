"""Files as aliases(5) of smtpd, Postfix and sendmail have them; pure, as all that reads files here."""

from __future__ import annotations

import re

from table_consul.ctl.entries import BLANKS, SPACE, Entry, Parsed, Problem
from table_consul.services import fold_key

_QUOTED_COMMAND = re.compile(rb'(?:(?<=,)|\A)\s*\|"((?:[^"\\]|\\.)*)"\s*(?=,|\Z)')
# What smtpd 7.6 and later would take for an entry of its own, were it not meant to go on with the line before.
_OWN_ENTRY = re.compile(rb'"[^"]*"\s*:|[A-Za-z0-9_.+@*=-]+(?:[ \t]*:|[ \t]+[^ \t,])')
_AMBIGUOUS = (
    "begins with a blank: in aliases(5) it goes on with the line before, in a file: table of smtpd's it is an entry of "
    "its own; say which with --format aliases or --format table"
)


def read_aliases(data: bytes, *, cautious: bool = False) -> Parsed:
    """A file as aliases(5) of smtpd, Postfix and sendmail have it.

    ``key: element, element``, quotes, comments; a line that begins with a blank, or stands after one that ends in a
    backslash, goes on with the line before. ``cautious``: a problem where smtpd would take such a line of a ``file:``
    table for an entry of its own. Keys come in lower case, as smtpd asks for them.
    """
    logical: list[tuple[int, list[bytes]]] = []
    problems: list[Problem] = []
    joined = False
    for number, line in enumerate(data.split(b"\n"), 1):
        text = _uncommented(line).rstrip(SPACE)
        if not text.strip(SPACE):
            continue
        goes_on = joined or text[:1] in (b" ", b"\t")
        whole = joined
        joined = text.endswith(b"\\") and not text.endswith(b"\\\\")
        if joined:
            text = text[:-1]
        text = text.strip(SPACE)
        if not goes_on:
            logical.append((number, [text]))
        elif not logical:
            problems.append(Problem(number, "begins with a blank, and there is no line before to go on with"))
        elif cautious and not whole and not logical[-1][1][-1].endswith(b",") and _OWN_ENTRY.match(text):
            problems.append(Problem(number, _AMBIGUOUS))
        else:
            logical[-1][1].append(text)
    entries = []
    for number, parts in logical:
        alias = _alias(b" ".join(parts), number)
        if isinstance(alias, Problem):
            problems.append(alias)
        else:
            entries.append(alias)
    return Parsed("aliases", entries, sorted(problems))


def _alias(text: bytes, number: int) -> Entry | Problem:
    if text.startswith(b'"'):
        end = text.find(b'"', 1)
        if end < 0 or not text[end + 1 :].lstrip(BLANKS).startswith(b":"):
            return Problem(number, "begins with a quote, and no quoted key with a colon follows")
        key, rest = text[1:end], text[end + 1 :]
    else:
        end = next((at for at, c in enumerate(text) if c in b" \t:"), len(text))
        key, rest = text[:end], text[end:]
    rest = rest.lstrip(BLANKS)
    if rest.startswith(b":") and not rest.lower().startswith((b":include:", b":error:")):
        rest = rest[1:]
    value = _QUOTED_COMMAND.sub(rb' "|\1"', rest).strip(SPACE + b",")
    if not key:
        return Problem(number, "has no key")
    if not value:
        return Problem(number, "has no value")
    return Entry(fold_key(key), value, number)


def _uncommented(line: bytes) -> bytes:
    """The line without what stands behind a ``#`` at its beginning or after a blank, outside of quotes."""
    if b"#" not in line:
        return line
    quoted = escaped = False
    for at, c in enumerate(line):
        if escaped:
            escaped = False
        elif c == 0x5C:
            escaped = True
        elif c == 0x22:
            quoted = not quoted
        elif c == 0x23 and not quoted and (at == 0 or line[at - 1] in BLANKS):
            return line[:at]
    return line
