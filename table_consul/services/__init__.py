"""What smtpd may ask, and how one table answers it. The modules beside this one say what an entry means.

Pure: bytes in, bytes out; nothing here knows Consul's HTTP, smtpd's wire, or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

# smtpd asks for no longer key, and its own tables hold none (smtpd: table.c, table_lookup: char lkey[1024]).
MAX_KEY_BYTES = 1023


class Service(NamedTuple):
    """One thing that smtpd asks tables for (smtpd: smtpd-api.h, enum table_service)."""

    name: str
    bit: int
    answers: str
    """``value``; ``entry``, where an entry without value answers with itself; ``check``, where there is no value."""
    joined: bool = False
    """Several lines are one list."""
    bounded: bool = False
    """smtpd refuses LINE_MAX bytes and more."""
    patterns: bool = False
    """An entry may answer for keys that are not equal to it, so the whole bucket is needed."""
    hashed: bool = False
    """The value is a credential, and may be a hash."""
    fields: tuple[str, ...] = ()
    """What makes up the value where it is a JSON object, such as a record of one user."""
    default: bool = False
    """An entry ``*`` answers for keys that have none."""

    @property
    def needs_value(self) -> bool:
        """Whether an entry without value is of no use; a list of strings may be asked with ``check`` alone."""
        return self.answers != "entry" and self.name != "string"


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        service.name: service
        for service in (
            Service("alias", 0x001, "value", joined=True, bounded=True),
            Service("domain", 0x002, "entry", patterns=True),
            Service("credentials", 0x004, "value", bounded=True, hashed=True, fields=("password",)),
            Service("netaddr", 0x008, "entry", patterns=True),
            Service("userinfo", 0x010, "value", fields=("uid", "gid", "home"), default=True),
            Service("source", 0x020, "entry"),
            Service("mailaddr", 0x040, "entry", patterns=True),
            Service("addrname", 0x080, "value", patterns=True),
            Service("mailaddrmap", 0x100, "value", joined=True),
            Service("relayhost", 0x200, "entry"),
            Service("string", 0x400, "value"),
            Service("regex", 0x800, "entry", patterns=True),
            Service("auth", 0x1000, "check", hashed=True, fields=("password",)),
        )
    }
)

# Registering auth takes password checks away from credentials (smtpd: lka.c, lka_authenticate): only when asked for.
DEFAULT_SERVICES = tuple(name for name in SERVICES if name != "auth")


class Table(msgspec.Struct, frozen=True):
    """How one table is laid out in Consul, read, and answered for; durations in seconds.

    The fields are the keys of ``[defaults]`` and ``[tables.NAME]``. config.py checks values against their types; a
    description completes "must be ...".
    """

    name: str = msgspec.field(name="table")
    prefix: str = ""
    mode: Literal["mirror", "direct"] = "mirror"
    services: Annotated[tuple[str, ...], Meta(min_length=1, description="a list of one or more services")] = (
        DEFAULT_SERVICES
    )
    deadline: Annotated[float, Meta(ge=0.05, le=60, description="between 0.05 and 60 seconds")] = 2.0
    max_age: Annotated[float, Meta(gt=0, le=1e10, description="above 0 and at most 10000000000 seconds")] = 86400.0
    max_keys: Annotated[int, Meta(ge=1, le=10**9, description="a whole number between 1 and 1000000000")] = 500_000
    snapshot: str | None = None
    value_format: Literal["auto", "text", "json"] = "auto"
    fetch: Literal["keys", "values"] = "keys"
    allow_commands: bool = False
    allow_root: bool = False
    procexec_reply: Literal["auto", "table-response", "table-result"] = "auto"
    paths: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))

    @property
    def root(self) -> bytes:
        """The folder of this table in Consul, ending in a slash; buckets named in ``paths`` may lie elsewhere."""
        return (f"{self.prefix}/{self.name}/" if self.prefix else f"{self.name}/").encode()

    def path(self, service: Service) -> bytes:
        """The folder in Consul that holds the entries of this service, ending in a slash."""
        named = self.paths.get(service.name)
        return self.root + service.name.encode() + b"/" if named is None else named.encode() + b"/"

    @property
    def readable_services(self) -> tuple[str, ...]:
        """The services whose entries are read: who has no hash in ``auth`` may have one in ``credentials``."""
        more = ("credentials",) if "auth" in self.services and "credentials" not in self.services else ()
        return (*self.services, *more)

    def same_entries(self, other: Table) -> bool:
        """Whether an entry means the same in both: they differ at most in settings that never reach an entry."""
        unrelated = {key: getattr(other, key) for key in ("deadline", "max_age", "snapshot", "procexec_reply")}
        return msgspec.structs.replace(self, **unrelated) == other

    def folders(self) -> dict[bytes, list[str]]:
        """The folders in Consul to be watched, and the services whose entries each of them holds."""
        folders: dict[bytes, list[str]] = {}
        for name in self.readable_services:
            path = self.path(SERVICES[name])
            folders.setdefault(self.root if path.startswith(self.root) else path, []).append(name)
        return folders


def fold_key(key: bytes) -> bytes:
    """The key as smtpd would ask for it (smtpd: util.c, lowercase: byte by byte, ASCII alone)."""
    return key.lower()
