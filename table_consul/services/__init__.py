"""The services that smtpd asks tables for, and the layout of one table. The other modules here interpret entries.

Pure: bytes in, bytes out; independent of Consul's HTTP, smtpd's protocols, and time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

# smtpd never asks for a longer key, and its own tables contain none (smtpd: table.c, table_lookup: char lkey[1024]).
MAX_KEY_BYTES = 1023
# The default entry, which applies to every key without one, in services that have a default.
DEFAULT_KEY = b"*"


class Service(NamedTuple):
    """One thing that smtpd asks tables for (smtpd: smtpd-api.h, enum table_service)."""

    name: str
    answers: str
    """``value``; ``entry``: an entry without value returns its key; ``check``: there are no lookups."""
    joined: bool = False
    """The value is a list, whose elements may be on lines of their own."""
    bounded: bool = False
    """smtpd rejects values of LINE_MAX bytes or more."""
    patterns: bool = False
    """An entry may match keys that are not equal to it, so a lookup needs all entries."""
    hashed: bool = False
    """The value is a credential, and may be a hash."""
    fields: tuple[str, ...] = ()
    """The fields that make up the value if it is stored as a JSON object (the record of one user)."""
    default: bool = False
    """An entry ``*`` applies to keys without an entry of their own."""

    @property
    def needs_value(self) -> bool:
        """Whether an entry without value is useless. ``string`` is not: smtpd may only ask whether the key exists."""
        return self.answers != "entry" and self.name != "string"

    @property
    def lists_only(self) -> bool:
        """Whether smtpd rejects a mapping, because it never asks for a value (smtpd: parse.y, table_check_use)."""
        return self.name in {"domain", "netaddr", "regex"}


# In the order of smtpd's enum: the place of a service is that of its bit in the binary dialect.
SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        service.name: service
        for service in (
            Service("alias", "value", joined=True, bounded=True),
            Service("domain", "entry", patterns=True),
            Service("credentials", "value", bounded=True, hashed=True, fields=("password",)),
            Service("netaddr", "entry", patterns=True),
            Service("userinfo", "value", fields=("uid", "gid", "home"), default=True),
            Service("source", "entry"),
            Service("mailaddr", "entry", patterns=True),
            Service("addrname", "value", patterns=True),
            Service("mailaddrmap", "value", joined=True),
            Service("relayhost", "entry"),
            Service("string", "value"),
            Service("regex", "entry", patterns=True),
            Service("auth", "check", hashed=True, fields=("password",)),
        )
    }
)

# Registering auth takes password checks away from credentials (smtpd: lka.c, lka_authenticate), so it is optional.
DEFAULT_SERVICES = tuple(name for name in SERVICES if name != "auth")


class Table(msgspec.Struct, frozen=True):
    """The settings of one table: its layout in Consul, how it is read, and how it is served. Durations in seconds.

    The fields are the keys of ``[defaults]`` and ``[tables.NAME]``. config.py checks values against their types; a
    description completes "must be ...".
    """

    name: str = msgspec.field(name="table")
    prefix: str = ""
    mode: Literal["mirror", "direct"] = "mirror"
    services: Annotated[tuple[str, ...], Meta(min_length=1, description="a list of one or more services")] = (
        DEFAULT_SERVICES
    )
    deadline: Annotated[float, Meta(ge=0.05, le=60, description="a number of seconds between 0.05 and 60")] = 2.0
    max_age: Annotated[
        float, Meta(gt=0, le=1e10, description="a number of seconds above 0 and at most 10000000000")
    ] = 86400.0
    hold_deletions: Annotated[
        float, Meta(ge=0, le=1e10, description="a number of seconds between 0 and 10000000000")
    ] = 900.0
    max_keys: Annotated[int, Meta(ge=1, le=10**9, description="a whole number between 1 and 1000000000")] = 2_000_000
    snapshot: str | None = None
    value_format: Literal["auto", "text", "json"] = "auto"
    fetch: Literal["keys", "values"] = "keys"
    allow_commands: bool = False
    allow_root: bool = False
    subaddress_delimiter: str = "+"
    procexec_reply: Literal["auto", "table-response", "table-result"] = "auto"
    paths: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))

    @property
    def root(self) -> bytes:
        """The folder of this table in Consul, ending in a slash; services named in ``paths`` may be elsewhere."""
        return (f"{self.prefix}/{self.name}/" if self.prefix else f"{self.name}/").encode()

    def path(self, service: Service) -> bytes:
        """The folder in Consul that holds the entries of this service, ending in a slash."""
        named = self.paths.get(service.name)
        return self.root + service.name.encode() + b"/" if named is None else named.encode() + b"/"

    @property
    def readable_services(self) -> tuple[str, ...]:
        """The services whose entries are read: a user without a hash in ``auth`` may have one in ``credentials``."""
        more = ("credentials",) if "auth" in self.services and "credentials" not in self.services else ()
        return (*self.services, *more)

    def sharing(self, service: Service) -> list[Service]:
        """The services that read the folder of this service: itself first."""
        others = (SERVICES[name] for name in self.readable_services if name != service.name)
        return [service, *(other for other in others if self.path(other) == self.path(service))]

    def same_entries(self, other: Table) -> bool:
        """Whether an entry of the same folder means the same in both, whatever their other settings are."""
        unrelated = (
            "deadline",
            "hold_deletions",
            "max_age",
            "max_keys",
            "paths",
            "procexec_reply",
            "services",
            "snapshot",
        )
        return msgspec.structs.replace(self, **{key: getattr(other, key) for key in unrelated}) == other

    def folders(self) -> dict[bytes, list[str]]:
        """The folders in Consul to watch, and the services whose entries each of them contains."""
        folders: dict[bytes, list[str]] = {}
        for name in self.readable_services:
            path = self.path(SERVICES[name])
            folders.setdefault(self.root if path.startswith(self.root) else path, []).append(name)
        return folders


def fold_key(key: bytes) -> bytes:
    """The key as smtpd asks for it (smtpd: util.c, lowercase: ASCII letters only)."""
    return key.lower()


@functools.cache
def compiled(expression: bytes) -> re.Pattern[bytes]:
    """The regular expression, compiled at its first use: compiling all of them would delay the handshake."""
    return re.compile(expression)
