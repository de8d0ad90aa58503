"""Parse a stored value for a service, and build the entries of a service."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.services.values import parse_value

TABLE = Table("aliases")
COMMANDS = replace(TABLE, allow_commands=True)
RECORD = b'{"password": "$6$salt$hash", "uid": 1000, "gid": "1000", "home": "/home/vera", "quota": [1, {"a": null}]}'


def read(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    return parse_value(replace(table, value_format=value_format), SERVICES[service], key, raw)


def refusal(raw, service="alias", table=TABLE, key=b"root", value_format="auto"):
    with pytest.raises(EntryError) as caught:
        read(raw, service, table, key, value_format)
    return str(caught.value)


def entries(service, *pairs, table=TABLE):
    return Entries(table, SERVICES[service], pairs)
