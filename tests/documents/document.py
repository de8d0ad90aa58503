"""Parser for the documents: fenced blocks, links, tables, and the commands they show."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"
CONTROL = (sys.executable, "-c", "import sys; from table_consul.ctl.main import main; sys.exit(main())")
"""The command ``table-consulctl`` of this checkout."""


class Fenced(NamedTuple):
    """A fenced block: its language, its text, and the line number of its first line."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command in a ``console`` block, and its output lines."""

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
        """The fenced blocks in these languages, or in all, in order."""
        start, lines = None, self.text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.lstrip(" ").startswith("```"):
                continue
            if start is None:
                start = number
                continue
            language = lines[start - 1].strip().removeprefix("```")
            if not languages or language in languages:
                # A block within a list has the indentation of its item.
                yield Fenced(language, textwrap.dedent("\n".join([*lines[start : number - 1], ""])), start + 1)
            start = None
        assert start is None, f"{self.path.name}: the block of line {start} does not end"

    def commands(self) -> Iterator[Command]:
        """Every command of the ``console`` blocks with its output.

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
                    assert text, f"{self.path.name}:{number}: output without a command"
                    output.append(line + "\n")
            if text:
                yield Command(prompt, text, "".join(output), at)

    def section(self, heading: str) -> str:
        """The text between a heading, such as ``## Logs``, and the next of the same or a higher level."""
        level, _, _ = heading.partition(" ")
        begins = self.text.index(f"\n{heading}\n") + len(heading) + 2
        ends = re.search(rf"^#{{1,{len(level)}}} ", self.text[begins:], re.MULTILINE)
        return self.text[begins : begins + ends.start() if ends else len(self.text)]

    @property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return re.sub(r"^ *```.*?^ *```", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def links(self) -> list[str]:
        """The targets of links within the project."""
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", self.prose) if not re.match(r"[a-z]+:", link)]

    def anchors(self) -> set[str]:
        """The anchors of its headings, as GitHub makes them."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [Document(path) for folder in (".", "docs", "bench") for path in sorted((ROOT / folder).glob("*.md"))]


def page(name: str) -> Document:
    """The page with this path in the project, such as ``docs/keys.md``."""
    return next(each for each in PAGES if each.path == ROOT / name)


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the Markdown tables in a text, without heads and rules; ``\\|`` does not end a cell."""
    lines = text.splitlines()
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line, after in itertools.pairwise([*lines, ""])
        if line.startswith("|") and not line.startswith("|---") and not after.startswith("|---")
    ]


def written(value: object) -> str:
    """A value in the notation of the documents."""
    return json.dumps(value) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


SMTPD_CHECKS = """\
set -e
mount -t tmpfs tmpfs /tmp
cat > /tmp/smtpd.conf
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mail.example.org -keyout /tmp/key -out /tmp/pem 2>/tmp/log
mount -t tmpfs tmpfs /etc/ssl
mkdir /etc/ssl/certs /etc/ssl/private
install -m 0600 /tmp/key /etc/ssl/private/mail.example.org.key
install -m 0644 /tmp/pem /etc/ssl/certs/mail.example.org.pem
mount -t tmpfs -o mode=755 tmpfs /usr/libexec/opensmtpd
for backend in table-consul table-procexec; do install -m 0755 /bin/true /usr/libexec/opensmtpd/$backend; done
smtpd -n -f /tmp/smtpd.conf 2>&1
"""


def smtpd_check(release: str, conf: str) -> str:
    """The output of an OpenSMTPD release's ``smtpd -n`` for a smtpd.conf."""
    if os.geteuid() != 0:
        pytest.skip("a real OpenSMTPD needs root: sudo make test")
    from tests.rig import cache, root

    try:
        place = root.Root(release).path
    except cache.Unavailable as error:
        pytest.skip(str(error))
    mounts = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    command = ("unshare", "--mount", "sh", "-c", mounts, place, "sh", "-c", SMTPD_CHECKS)
    return subprocess.run(command, input=conf, capture_output=True, text=True, check=False).stdout
