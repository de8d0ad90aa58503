#!/usr/bin/env python3
"""A table with one address: an example for a table of your own."""

from __future__ import annotations

from table_consul import callbacks

ME = "gilles@poolp.org"

callbacks.serve(
    check=lambda _table, _service, key: key == ME,
    lookup=lambda _table, service, key: ME if (service, key) == ("alias", "root") else None,
    fetch=lambda _table, _service: ME,
)
