"""Response bodies in pieces of bounded size; ``Content-Encoding: gzip`` is decompressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

Read = Callable[[int], bytes]
"""Returns the next part of a body, of at most this many bytes; empty at the end."""


def body_of(response: requests.Response) -> Read:
    """The function that reads the body; for a compressed body, it may raise zlib.error."""
    read: Read = response.raw.read
    return _Gzip(read).read if response.headers.get("Content-Encoding") == "gzip" else read


class _Gzip:
    """One gzip member, with nothing after it. Each step releases Python's lock, and returns no more than requested.

    urllib3 decompresses all that it has read in one step: 16 KB can become 16 MB.
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
                raise zlib.error("truncated")
        if inflate.unused_data or self._read(size):
            raise zlib.error("trailing data")
        return b""
