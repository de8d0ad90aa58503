"""What every reader of a file brings: its entries, and what is wrong with which line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from table_consul.errors import TableConsulError

SPACE = b" \t\n\v\f\r"
"""What isspace(3) says yes to in the C locale, as smtpd asks it."""
BLANKS = b" \t"


class FormatError(TableConsulError):
    """The file as a whole is none that can be imported, or its format cannot be told."""


class Entry(NamedTuple):
    """One key and its value, empty where there is none, as the file has them; the line where they begin."""

    key: bytes
    value: bytes
    line: int
    flags: int = 0


class Problem(NamedTuple):
    """What is wrong with a line; 0 where no line of the file says it."""

    line: int
    text: str


class Parsed(NamedTuple):
    """What a file says."""

    format: str
    entries: list[Entry]
    problems: list[Problem]
    left_out: int = 0
    """How many entries of an export belong to other folders."""

    @property
    def unit(self) -> str:
        """What the numbers count: the JSON of an export has entries, all else lines."""
        return "entry" if self.format == "export" else "line"


def content(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that say something, without white space around them, and their numbers."""
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip(SPACE)
        if text and not text.startswith(b"#"):
            yield number, text
