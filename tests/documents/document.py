"""The project's documents as tests read them: their fenced blocks, their links, and the commands that they show."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Fenced(NamedTuple):
    """One block between fences: its language, its text, and the number of its first line in the document."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command as a ``console`` block shows it, and the lines that it answers."""

    prompt: str
    text: str
    output: str
    line: int


class Document:
    """One page of Markdown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")

    def fenced(self, *languages: str) -> Iterator[Fenced]:
        """The fenced blocks in these languages (of all, if none is named), in order."""
        start, lines = None, self.text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.lstrip(" ").startswith("```"):
                continue
            if start is None:
                start = number
                continue
            language = lines[start - 1].strip().removeprefix("```")
            if not languages or language in languages:
                # A block within a list is indented as its item is.
                yield Fenced(language, textwrap.dedent("\n".join([*lines[start : number - 1], ""])), start + 1)
            start = None
        assert start is None, f"{self.path.name}: the block of line {start} does not end"

    def commands(self) -> Iterator[Command]:
        """Every command of the ``console`` blocks with what stands below it.

        A block begins with its prompt, ``$`` or root's ``#``; ``>`` continues a command.
        """
        for block in self.fenced("console"):
            own = block.text[:2]
            assert own in ("$ ", "# "), f"{self.path.name}:{block.line}: no prompt"
            prompt, text, output, at = "", "", [], 0
            for number, line in enumerate(block.text.splitlines(), block.line):
                if line.startswith(own):
                    if text:
                        yield Command(prompt, text, "".join(output), at)
                    prompt, text, output, at = line[0], line[2:], [], number
                elif not output and line.startswith("> "):
                    text += "\n" + line[2:]
                else:
                    assert text, f"{self.path.name}:{number}: what stands here belongs to no command"
                    output.append(line + "\n")
            if text:
                yield Command(prompt, text, "".join(output), at)

    @property
    def prose(self) -> str:
        """All but its fenced blocks."""
        return re.sub(r"^ *```.*?^ *```", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def links(self) -> list[str]:
        """Where the links go that stay within the project."""
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", self.prose) if not re.match(r"[a-z]+:", link)]

    def anchors(self) -> set[str]:
        """The anchors of its headings, as GitHub makes them."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
