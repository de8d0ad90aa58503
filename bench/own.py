"""A minimal custom table: `table_consul.callbacks` over a dict of a file. ``own.py KEYS``."""

from __future__ import annotations

import sys

from table_consul import callbacks

with open(sys.argv[1], encoding="utf-8") as file:
    values = dict(line.rstrip("\n").split("\t") for line in file if "\t" in line)

callbacks.serve(lookup=lambda _table, _service, key: values.get(key), services=["alias"])
