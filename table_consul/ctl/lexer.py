"""The statements of smtpd.conf(5), split into words as by smtpd (smtpd: parse.y, yylex).

Pure. Macros, quotes and continued lines are handled here. The grammar is not checked: ``smtpd -n`` does that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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


def statements(text: str, macros: dict[str, str]) -> Iterator[list[Token]]:
    """Yield each statement that is not empty, without line ends; the last one may have unclosed braces.

    Definitions of macros are added to ``macros`` instead.
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
