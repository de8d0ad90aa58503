"""Split a JSON list into smaller lists, so that each step is short and no body is in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# The last boundary between two objects of a list. A JSON string cannot contain it: the quote would end the string, and
# no letter follows the end of a string. The search runs from the end, in linear time.
OBJECTS = re.compile(rb'(?s:.*)\},(?=\s{0,32}\{\s{0,32}"[A-Za-z])')
# The same for strings, none of which starts with a comma: otherwise `","` could be a string.
STRINGS = re.compile(rb'(?s:.*)(?<!\\)",(?=\s{0,32}"[^,])')
_BOUNDARY_BYTES = 69

OBJECT_BYTES = 8 << 20
"""More than the JSON of any entry; a value has at most 512 KiB by default (limits.kv_max_value_size)."""


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
