"""Everything that can go wrong here, as types.

The text of each is one line that a mail operator can act on. None ever holds a token, a password or a hash.
"""

from __future__ import annotations

import msgspec


class TableConsulError(Exception):
    """Root of all errors that this package raises on purpose."""


class ConfigError(TableConsulError):
    """The configuration cannot be used; the text is ``FILE: KEY: PROBLEM (HINT)``, other mistakes are notes."""


class PeerError(TableConsulError):
    """Smtpd sent something that cannot be understood."""


class ReplyError(TableConsulError):
    """An answer cannot be said on the wire without breaking smtpd."""


class EntryError(TableConsulError):
    """What stands in Consul cannot be used as a value of its service; the text names no value."""


class SourceError(TableConsulError):
    """The source cannot tell now whether the key is there: never a reason to say ``not-found``."""

    kind = "other"
    """For labels of metrics: one of five words, never a part of the text."""


class Unreachable(SourceError):
    """No connection, no leader, too many requests, or no answer in time."""

    kind = "unreachable"


class Forbidden(SourceError):
    """Consul does not let this token read the key (401, 403)."""

    kind = "forbidden"


class BadResponse(SourceError):
    """A redirect, a body that is not Consul's, or an answer to another question."""

    kind = "bad-response"


class TooLarge(SourceError):
    """More data than may be held in memory: the table is read directly."""

    kind = "too-large"


# What decoding bytes that are not ours may raise: msgspec's errors are ValueErrors only from 0.21 on.
UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def printable(data: bytes | str, limit: int = 120) -> str:
    """The data as one printable line of at most about ``limit`` characters, for messages and logs.

    Control characters and bytes that are no UTF-8 appear as escapes: what strangers put into a recipient reaches the
    log of the mail server, and must not draw on its reader's terminal or forge a second line.
    """
    text = data.decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def counted(number: int, singular: str, plural: str) -> str:
    """The number with its noun: ``1 entry``, ``2 entries``."""
    return f"{number} {singular if number == 1 else plural}"
