"""The shape of the configuration file: its closed set of keys, their types and bounds, which msgspec holds it to.

None is a key on which the file is silent; defaults stand where the values are used. `misshapen` runs only to explain a
refusal: it names every key, where msgspec stops at the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import msgspec
from msgspec import Meta

from table_consul.errors import printable
from table_consul.rules import choice, quoted
from table_consul.services import SERVICES

# A type as annotations spell it: a class, a union, Annotated, Literal.
TypeForm: TypeAlias = Any

_STRINGS = "a string, or a list of strings"
_SERVICES = ", ".join(SERVICES)


class ConsulSection(msgspec.Struct, forbid_unknown_fields=True):
    address: Annotated[str | Annotated[list[str], Meta(min_length=1)], Meta(description=_STRINGS)] | None = None
    token_file: str | None = None
    ca_file: str | None = None
    ca_path: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls_server_name: str | None = None
    tls_verify: bool | None = None
    datacenter: str | None = None
    namespace: str | None = None
    partition: str | None = None
    consistency: Literal["default", "stale", "consistent"] = "default"


class TableSection(msgspec.Struct, forbid_unknown_fields=True):
    prefix: str | None = None
    mode: Literal["mirror", "direct"] | None = None
    services: (
        Annotated[list[str], Meta(min_length=1, description=f"a list with at least one of {_SERVICES}")] | None
    ) = None
    deadline: Annotated[float, Meta(ge=0.05, le=60, description="seconds, 0.05 to 60")] | None = None
    max_age: Annotated[float, Meta(gt=0, le=1e10, description="seconds, more than 0")] | None = None
    max_keys: Annotated[int, Meta(ge=1, le=10**9, description="a whole number, 1 to 1000000000")] | None = None
    snapshot: str | None = None
    value_format: Literal["auto", "text", "json"] | None = None
    fetch: Literal["keys", "values"] | None = None
    allow_commands: bool | None = None
    allow_root: bool | None = None
    procexec_reply: Literal["auto", "table-response", "table-result"] | None = None
    paths: dict[str, str] | None = None


class DefaultsSection(TableSection):
    table: str | None = None


class LogSection(msgspec.Struct, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    target: Literal["auto", "syslog", "stderr"] = "auto"


class MetricsSection(msgspec.Struct, forbid_unknown_fields=True):
    textfile: str | None = None
    listen: str | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    consul: ConsulSection = msgspec.field(default_factory=ConsulSection)
    defaults: DefaultsSection = msgspec.field(default_factory=DefaultsSection)
    tables: dict[str, TableSection] = msgspec.field(default_factory=dict)
    log: LogSection = msgspec.field(default_factory=LogSection)
    metrics: MetricsSection = msgspec.field(default_factory=MetricsSection)


def misshapen(form: TypeForm, raw: object, at: str = "") -> Iterator[str]:
    """Every way in which the raw value is not of the form, as ``key: what is wrong (allowed: ...)``."""
    forms = (form, *get_args(form))
    struct = next((each for each in forms if isinstance(each, type) and issubclass(each, msgspec.Struct)), None)
    mapping = next((each for each in forms if get_origin(each) is dict), None)
    dotted = f"{at}." if at else ""
    if (mapping or struct) and not isinstance(raw, dict):
        yield f"{at}: {_kind(raw)} where a table belongs (allowed: keys below a line [{at}])"
    elif mapping and isinstance(raw, dict):
        for key, value in raw.items():
            yield from misshapen(get_args(mapping)[1], value, f"{dotted}{printable(key)}")
    elif struct and isinstance(raw, dict):
        known = {each.name: each.type for each in msgspec.structs.fields(struct)}
        for key, value in raw.items():
            if key in known:
                yield from misshapen(known[key], value, f"{dotted}{key}")
            else:
                yield f"{dotted}{printable(key)}: unknown key {choice(key, known)}"
    else:
        try:
            msgspec.convert(raw, form)
        except msgspec.ValidationError:
            yield f"{at}: {_mismatch(forms, raw)}"


def _mismatch(forms: tuple[TypeForm, ...], raw: object) -> str:
    """Why the raw value has none of the forms; a text is quoted only where it cannot be a secret put by a wrong key."""
    literals = [literal for each in forms if getattr(each, "__origin__", None) is Literal for literal in get_args(each)]
    if literals and isinstance(raw, str):
        return f"no such choice, {quoted(raw)} {choice(raw, literals)}"
    metas = [meta for each in forms for meta in getattr(each, "__metadata__", ()) if isinstance(meta, Meta)]
    allowed = literals or [meta.description for meta in metas if meta.description]
    allowed = allowed or [_KINDS[each] for each in forms if each in (str, bool)]
    # Python refuses to write very long integers as decimals, and TOML's hexadecimals may be that long.
    is_number = type(raw) is float or (type(raw) is int and abs(raw) < 2**64)
    return f"{raw if is_number else _kind(raw)} does not fit (allowed: {', '.join(allowed)})"


_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a table",
}


def _kind(raw: object) -> str:
    return "an empty list" if raw == [] else _KINDS.get(type(raw), "a date or time")
