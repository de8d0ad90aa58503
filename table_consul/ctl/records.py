"""The JSON records of users; each service reads some of the fields. Pure: bytes in, bytes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec

from table_consul.errors import UNDECODABLE, EntryError
from table_consul.services import Service, Table
from table_consul.services.values import parse_value

Record = dict[str, object]


def record_of(table: Table, service: Service, value: bytes) -> Record | None:
    """The value as a record; None if it is anything else, or the service has no records."""
    if service.fields and table.value_format != "text" and value.lstrip().startswith(b"{"):
        with contextlib.suppress(*UNDECODABLE):
            return msgspec.json.decode(value, type=Record)
    return None


def are_records(table: Table, service: Service, values: Iterable[bytes]) -> bool:
    """Whether most of the values are records."""
    found = [record_of(table, service, value) is not None for value in values] if service.fields else []
    return 2 * sum(found) > len(found)


def with_value(table: Table, service: Service, key: bytes, record: Record, value: bytes) -> bytes:
    """The record with the fields of this service set from ``value``, which is a record or text.

    Raises:
        EntryError: the text is not a value of this service, or its fields cannot hold it.
    """
    fields = record_of(table, service, value)
    meant = None
    if fields is None:
        meant = parse_value(msgspec.structs.replace(table, value_format="text"), service, key, value)
        text = value.decode(errors="replace").strip()
        texts = [text.removeprefix(f"{key.decode()}:")] if service.hashed else text.split(":", 2)
        fields = {
            name: int(part) if name in ("uid", "gid") else part
            for name, part in zip(service.fields, texts, strict=False)
        }
    merged = msgspec.json.encode(record | fields)
    if meant is not None and parse_value(table, service, key, merged) != meant:
        raise EntryError("the record of a user cannot hold this value (edit the record in Consul)")
    return merged


def without_value(service: Service, record: Record) -> bytes | None:
    """The record without the fields of this service; None if it has no others."""
    left = {name: value for name, value in record.items() if name not in service.fields}
    return msgspec.json.encode(left) if left else None
