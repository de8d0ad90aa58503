"""The interface of all sources of entries: a mirror of Consul, direct reads, and a file."""

from __future__ import annotations

from typing import Protocol

from table_consul.services import Service, Table
from table_consul.services.entries import Entries

# Reading this key shows whether the token may read a folder (404) or not (403); a list does not. Any name would do.
PROBE = b"-"


class Source(Protocol):
    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """The entries of the service, or only those that matter for this key (None: all, for fetch).

        Raises:
            SourceError: no answer by the deadline, a time on the caller's clock.
        """
        ...

    def update(self) -> None:
        """Reread token, TLS files and data; the former data are served until newer ones arrive.

        Raises:
            TableConsulError: one of them cannot be read.
        """
        ...
