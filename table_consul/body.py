"""The body of a response in pieces of bounded size: decompressed, and a JSON list split into smaller lists.

Each step is short, so that the answering thread gets Python's lock between two, and no body is in memory as a whole.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

# The last boundary between two objects of a list. A JSON string cannot contain it: the quote would end the string, and
# no letter follows the end of a string. The search runs from the end, in linear time.
OBJECTS = re.compile(rb'(?s:.*)\},(?=\s{0,32}\{\s{0,32}"[A-Za-z])')
# The same for strings, none of which starts with a comma: otherwise `","` could be a string.
STRINGS = re.compile(rb'(?s:.*)(?<!\\)",(?=\s{0,32}"[^,])')
_BOUNDARY_BYTES = 69

OBJECT_BYTES = 8 << 20
"""More than the JSON of any entry; a value has at most 512 KiB by default (limits.kv_max_value_size)."""

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


class LargeObjectError(ValueError):
    """An object of the list is larger than it may be."""


def split_list(chunks: Iterable[bytes], boundaries: re.Pattern[bytes] = OBJECTS) -> Iterator[bytearray]:
    """Yield one list, which arrives in chunks, as lists of whole objects (or `STRINGS`), in linear time.

    Raises:
        LargeObjectError: an object has more than `OBJECT_BYTES` bytes.
        ValueError: so many bytes contain no object.
    """
    rest, searched = bytearray(), 0
    for chunk in chunks:
        rest += chunk
        if boundary := boundaries.match(rest, searched):
            end = boundary.end() - 1
            del boundary  # it locks the buffer
            yield rest[:end] + b"]"
            rest[: end + 1] = b"["
        elif len(rest) > OBJECT_BYTES:
            if re.match(rb'\[\s*[{"]', rest):
                raise LargeObjectError(f"an entry of more than {OBJECT_BYTES >> 20} MiB")
            raise ValueError(f"{OBJECT_BYTES >> 20} MiB without an entry")
        searched = max(0, len(rest) - _BOUNDARY_BYTES)
    yield rest
