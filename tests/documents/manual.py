"""Parser for the manual pages: sections, lists, and arguments of mdoc(7) macros."""

from __future__ import annotations

import re

from tests.documents.document import ROOT

MAN = ROOT / "man"
NAMES = sorted(path.name for path in MAN.glob("*.[0-9]"))


def source(name: str) -> str:
    return (MAN / name).read_text(encoding="ascii")


def parts(text: str, macro: str) -> dict[str, str]:
    """The text below each heading (`Sh` or `Ss`), by heading."""
    _, *found = re.split(rf"^\.{macro} (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def items(text: str) -> dict[str, str]:
    """The list items of a text: the line after `.It`, and the text of the item."""
    _, *found = re.split(r"^\.It (.*)\n", text, flags=re.MULTILINE)
    return {head: body.partition("\n.El")[0] for head, body in zip(found[::2], found[1::2], strict=True)}


def marked(text: str, macro: str) -> list[str]:
    """Every word that a macro marks, in order."""
    found = []
    for line in text.splitlines():
        now = ""
        for word in line.lstrip(".").split():
            if word in {"Ar", "Cm", "Fl", "It", "Ns", "Oc", "Oo", "Op"}:
                now = word
            elif now == macro and word not in {"|", ",", "..."}:
                found.append(word)
    return found


def flags(text: str) -> set[str]:
    """Every option that a text names: `-h`, `--check`."""
    return {f"-{word}" for word in marked(text, "Fl")}


def stated_default(text: str) -> str | None:
    """The default that an item states: a word, "" for no value, None if it states no default."""
    if "The default is empty" in text:
        return ""
    if found := re.search(r"The default is\n\.Cm (\S+)", text):
        return found[1]
    if found := re.search(r"The default is all but\n\.Cm (\S+)", text):
        return f"all but {found[1]}"
    return None
