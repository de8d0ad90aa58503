"""The exception tree, and how messages quote untrusted text.

The text of each error is one line that a mail operator can act on. It never contains a token, a password or a hash.
"""

from __future__ import annotations

import msgspec


class TableConsulError(Exception):
    """Root of all errors that this package raises on purpose. Their text ends in the hint, in parentheses."""

    def __init__(self, text: str = "", hint: str = "") -> None:
        super().__init__(f"{text} ({hint})" if hint else text)
        self.hint = hint
        """What to do, as an imperative; empty if that depends on where the error occurs."""


class ConfigError(TableConsulError):
    """The configuration cannot be used; the text is ``FILE: KEY: PROBLEM (HINT)``, other mistakes are notes."""


class PeerError(TableConsulError):
    """A request from smtpd is invalid."""


class ReplyError(TableConsulError):
    """A reply would break smtpd, so it cannot be sent."""


class FunctionError(TableConsulError):
    """A function given to `callbacks.serve` raised an exception, the cause of this one."""


class EntryError(TableConsulError):
    """An entry in Consul is invalid for its service; the text does not contain the value."""


class SourceError(TableConsulError):
    """The source cannot determine whether the key exists: never a reason to return ``not-found``."""

    kind = "other"
    """For labels of metrics: one of five words, never part of the text."""


class Unreachable(SourceError):
    """No connection, no leader, too many requests, or no response in time."""

    kind = "unreachable"


class Forbidden(SourceError):
    """The token may not read the key (401, 403)."""

    kind = "forbidden"


class BadResponse(SourceError):
    """A redirect, a body that is not Consul's, or a response to another request."""

    kind = "bad-response"


class BadRequest(BadResponse):
    """Consul rejects this request. Another address would reject it too; other requests may succeed."""


class TooManyConnections(Unreachable):
    """Consul accepts no further connections from this host; open ones still work."""


class BadName(BadRequest):
    """Consul rejects the name of this key, whether the key exists or not."""


class TooLarge(SourceError):
    """More data than may be held in memory; the table falls back to direct mode."""

    kind = "too-large"


# The errors of decoding untrusted bytes; msgspec's errors are ValueErrors only from 0.21 on.
UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def printable(data: bytes | str, limit: int = 120) -> str:
    """The data as one printable line of at most about ``limit`` characters, for messages and logs.

    Control characters and bytes that are not UTF-8 become escapes: a stranger's recipient appears in the log of the
    mail server, and must not control a terminal or forge a second line.
    """
    text = data.decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def problem_of(error: Exception) -> str:
    """The text of an error; of an OSError the cause alone, because messages name the path themselves."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def counted(number: int, singular: str, plural: str) -> str:
    """The number with its noun: ``1 entry``, ``2 entries``."""
    return f"{number} {singular if number == 1 else plural}"
