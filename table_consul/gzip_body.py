"""Bodies of responses in pieces of a bounded size, those with ``Content-Encoding: gzip`` decompressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

Read = Callable[[int], bytes]
"""The next part of a body, of at most so many bytes; empty at its end."""


def body_of(response: requests.Response) -> Read:
    """How to read the body; reading a compressed one may raise zlib.error."""
    read: Read = response.raw.read
    return _Gzip(read).read if response.headers.get("Content-Encoding") == "gzip" else read


class _Gzip:
    """One gzip member, and nothing after it. Each step lets go of Python's lock and is as small as the reader asks.

    urllib3 decompresses whatever it has read at once: 16 KB can become 16 MB.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._inflate = zlib.decompressobj(wbits=31)

    def read(self, size: int) -> bytes:
        inflate = self._inflate
        while not inflate.eof:
            data = inflate.unconsumed_tail or self._read(size)
            if piece := inflate.decompress(data, size):
                return piece
            if not data and not inflate.eof:
                raise zlib.error("cut off")
        if inflate.unused_data or self._read(size):
            raise zlib.error("more follows")
        return b""
