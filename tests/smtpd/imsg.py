"""Messages in the format of smtpd up to 7.5."""

from __future__ import annotations

import struct

OPEN, CLOSE, UPDATE, CHECK, LOOKUP, FETCH = range(2, 8)
OPS = {CHECK: "check", LOOKUP: "lookup", FETCH: "fetch"}
ALIAS, SOURCE = 1, 0x20


def message(kind, body=b"", *, length=None):
    return struct.pack("=IHHII", kind, 16 + len(body) if length is None else length, 0, 0, 4711) + body


def opening(name=b"t", version=2):
    return message(OPEN, struct.pack("=I", version) + name.ljust(2048, b"\0"))


def question(kind, bit, rest=b"", count=0):
    return message(kind, struct.pack("=i", bit) + struct.pack("@N", count) + rest)
