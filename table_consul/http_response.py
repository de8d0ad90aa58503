"""http.client's response, which also skips all interim responses and rejects truncated headers.

http.client skips only 100: after a 103, the real response would stay on the connection and pass for that of the next
request. If the connection ends within the headers, http.client treats them as complete.
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
    """The last line read, empty at the end of the connection."""

    def readline(self, size: int | None = -1) -> bytes:
        self.last = super().readline(size)
        return self.last


class HTTPResponse(http.client.HTTPResponse):
    """Like its parent, but for a server that is not trusted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self.fp: _Reader = _Reader(self.fp.detach())
        self._interim = 0

    def begin(self) -> None:
        """Read the headers.

        Raises:
            OSError: the connection broke.
            http.client.HTTPException: invalid or truncated HTTP, or too many interim responses.
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
