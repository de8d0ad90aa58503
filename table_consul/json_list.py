"""A JSON list, in pieces that are lists themselves: no step is long, and no body is held whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# The last place where one object of a list ends and the next begins. Within a JSON string no quote follows like that:
# it would end the string, and after its end comes no letter. It is found from the end, in linear time.
OBJECTS = re.compile(rb'(?s:.*)\},(?=\s{0,32}\{\s{0,32}"[A-Za-z])')
# The same of strings, none of which begins with a comma: then no `","` is a string between two others.
STRINGS = re.compile(rb'(?s:.*)(?<!\\)",(?=\s{0,32}"[^,])')
_BOUNDARY_BYTES = 69

OBJECT_BYTES = 8 << 20
"""More than an entry of Consul has in JSON; its value has at most 512 KiB by default (limits.kv_max_value_size)."""


class LargeObjectError(ValueError):
    """An object of the list is larger than it may be."""


def split_list(
    chunks: Iterable[bytes], most: int = OBJECT_BYTES, boundaries: re.Pattern[bytes] = OBJECTS
) -> Iterator[bytearray]:
    """The chunks of one list, as lists of whole objects, or `STRINGS`; no byte is searched twice, but for a few.

    Raises:
        LargeObjectError: an object has more than ``most`` bytes.
        ValueError: so many bytes have none.
    """
    rest, searched = bytearray(), 0
    for chunk in chunks:
        rest += chunk
        if boundary := boundaries.match(rest, searched):
            end = boundary.end() - 1
            del boundary  # it locks the buffer
            yield rest[:end] + b"]"
            rest[: end + 1] = b"["
        elif len(rest) > most:
            if re.match(rb'\[\s*[{"]', rest):
                raise LargeObjectError(f"an entry of more than {most >> 20} MiB")
            raise ValueError(f"{most >> 20} MiB without an entry")
        searched = max(0, len(rest) - _BOUNDARY_BYTES)
    yield rest
