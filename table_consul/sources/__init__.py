"""Where entries come from: the one interface of a mirror of Consul, of direct reads, and of a file."""

from __future__ import annotations

from typing import Protocol

from table_consul.services import Service, Table
from table_consul.services.entries import Entries

# Reading this key tells whether a folder may be read (404) or not (403), which a list does not. Any name would do.
PROBE = b"-"


class Source(Protocol):
    """Where buckets come from."""

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The bucket, or as much of it as answers for this key (None: all of it, for fetch).

        ``deadline`` is a moment on the caller's clock, by which this returns or raises.

        Raises:
            SourceError: nobody can tell now.
        """
        ...

    def update(self) -> None:
        """Read configuration, token and data anew.

        Raises:
            TableConsulError: that is not possible; what was known before goes on answering.
        """
        ...
