"""A minimal table backend in Python: a dict of a file. ``python3 -I -S floor.py KEYS``."""

from __future__ import annotations

import os
import sys


def answer(line: bytes, values: dict[bytes, bytes]) -> bytes:
    head = line.split(b"|", 7)
    value = values.get(head[7])
    if value is None:
        return b"%s-result|%s|not-found\n" % (head[4], head[6])
    if head[4] == b"check":
        return b"check-result|%s|found\n" % head[6]
    return b"lookup-result|%s|found|%s\n" % (head[6], value)


def load(path: str) -> dict[bytes, bytes]:
    with open(path, "rb") as file:
        pairs = (line.rstrip(b"\n").partition(b"\t") for line in file if b"\t" in line)
        return {key: value for key, _, value in pairs}


def main() -> None:
    tail = b""
    while not tail.endswith(b"config|ready\n"):
        tail += os.read(0, 65536)
    os.write(1, b"register|alias\nregister|ready\n")
    values = load(sys.argv[1])
    tail = b""
    while data := os.read(0, 65536):
        lines = (tail + data).split(b"\n")
        tail = lines.pop()
        os.write(1, b"".join([answer(line, values) for line in lines]))


main()
