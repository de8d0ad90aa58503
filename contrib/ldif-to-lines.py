#!/usr/bin/env python3
"""Convert LDIF on standard input into lines for `table-consulctl import`.

    ldapsearch -LLL ... uid userPassword | ldif-to-lines.py '{uid} {userPassword}'

Each value of the first attribute gets one line; several values of another attribute become one list. An entry that
lacks an attribute is skipped and reported.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator

NAMED = re.compile(r"{([\w;-]+)}")


def main() -> int:
    if len(sys.argv) != 2 or not (names := NAMED.findall(sys.argv[1])):
        sys.stderr.write(f"{(__doc__ or '').strip()}\n")
        return 2
    for entry in entries(sys.stdin.read()):
        lacking = [name for name in names if name.lower() not in entry]
        if lacking:
            sys.stderr.write(f"{entry['dn'][0]}: no {', no '.join(lacking)}\n")
            continue
        values = {name: ", ".join(entry[name.lower()]) for name in names}
        for first in entry[names[0].lower()]:
            line = values | {names[0]: first}
            sys.stdout.write(NAMED.sub(lambda match, line=line: line[match[1]], sys.argv[1]) + "\n")
    return 0


def entries(text: str) -> Iterator[dict[str, list[str]]]:
    """Yield each entry: its values by attribute name in lower case."""
    for block in re.split(r"(?:\r?\n){2,}", re.sub(r"\r?\n ", "", text)):
        entry: dict[str, list[str]] = {}
        for name, coded, value in re.findall(r"^([\w;-]+):(:?) *(.*?)\r?$", block, re.MULTILINE):
            plain = base64.b64decode(value).decode(errors="replace") if coded else value
            entry.setdefault(name.lower(), []).append(plain)
        if "dn" in entry:
            yield entry


if __name__ == "__main__":
    sys.exit(main())
