"""http.client's response, but one that skips interim responses and rejects headers that are cut off.

http.client skips 100 alone: behind a 103 the answer itself would stay on the connection and pass for that of the next
request. And where the connection ends within the headers, it takes those that came for all of them.
"""

from __future__ import annotations

import http.client
import io
from http import HTTPStatus
from typing import Any

MAX_INTERIM = 16
"""Interim responses (1xx) before the one that counts."""


class _Reader(io.BufferedReader):
    last = b""
    """The line that was read last, empty at the end of the connection."""

    def readline(self, size: int | None = -1) -> bytes:
        self.last = super().readline(size)
        return self.last


class HTTPResponse(http.client.HTTPResponse):
    """As its parent, for a response of a server that may be anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self.fp: _Reader = _Reader(self.fp.detach())
        self._interim = 0

    def begin(self) -> None:
        """Read the headers.

        Raises:
            OSError: the connection broke.
            http.client.HTTPException: not HTTP, cut off, or too many interim responses.
        """
        super().begin()
        if not self.fp.last:
            raise http.client.IncompleteRead(b"")

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]  # typeshed leaves it out
        if 100 <= status < 200 and status != HTTPStatus.SWITCHING_PROTOCOLS:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise http.client.BadStatusLine(f"{status} {reason}")
            status = HTTPStatus.CONTINUE  # which the parent skips, with its headers
        return version, status, reason
