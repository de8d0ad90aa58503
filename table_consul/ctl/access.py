"""Find the keys and folders that the mail servers' token may not read, as far as Consul reports them.

An ACL rule for one key, or for a folder inside that of a service, hides keys without an error. From 1.11 on, Consul
reports that it hides keys, but not which ones. A second token finds them: one that may list all keys or read policies.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from table_consul import kv
from table_consul.config import ConsulConfig
from table_consul.ctl.main import as_writer
from table_consul.errors import BadResponse, Forbidden, SourceError
from table_consul.services.parts import REPLACEMENT
from table_consul.sources import PROBE
from table_consul.transport import Request

READ_SECONDS = 30.0
# Consul accepts no more in one request (agent/acl_endpoint.go, ACLAuthorize).
AUTHORIZATIONS_MAX = 64
ANONYMOUS = "the anonymous token"
CLOSED = "{} may not read this folder; lookups return errors ({} the rules that table-consulctl policy prints)"
UNLISTED = (
    "{} may not list this folder; lookups that need the list return errors ({} the rules that table-consulctl policy"
    " --list prints)"
)
DENIED = "{} may not read this key; lookups return errors, or not-found before Consul 1.11 (change its policy)"
HIDING = (
    "Consul hides keys of this folder from {} (change its policy; to list the keys, set CONSUL_HTTP_TOKEN to a token"
    " that may list them)"
)
# What Consul may list as U+FFFD: a byte that is not UTF-8, and U+FFFD itself.
REPLACED = (*(bytes([byte]) for byte in range(0x80, 0x100)), REPLACEMENT)
REPLACEMENTS_MAX = 8
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


T = TypeVar("T")


class _Link(msgspec.Struct, rename={"id": "ID", "name": "Name"}):
    id: str
    name: str


class _Links(msgspec.Struct, rename="pascal"):
    """A token or a role."""

    policies: list[_Link] = []
    roles: list[_Link] = []


class _Policy(msgspec.Struct, rename="pascal"):
    rules: str


class _Build(msgspec.Struct, rename="pascal"):
    version: str


class _Agent(msgspec.Struct, rename="pascal"):
    config: _Build


class _Authorization(msgspec.Struct, rename="pascal"):
    segment: str
    allow: bool


class Access(NamedTuple):
    """What the token may not read, and how much was checked."""

    unreadable: list[tuple[bytes, str]]
    """Each key, or folder, that the token may not read in full, and the consequence."""
    keys: int
    policies: list[str]
    """The names of the policies whose rules could be read."""


def check(settings: ConsulConfig, folders: Sequence[bytes], *, operator: bool = True) -> Access:
    """The keys and folders that the configured token may not read below these folders of services.

    With ``operator``, the token in the environment lists keys and policies.

    Raises:
        SourceError: Consul does not answer.
    """
    others = as_writer(settings, None) if operator else settings
    reader, other = Client(settings), Client(others)
    with contextlib.closing(reader), contextlib.closing(other):
        closed = [folder for folder in folders if not reader.may_read(folder + PROBE)]
        who, grant = ("the token", "grant") if has_token(settings) else (ANONYMOUS, "set token_file to a token with")
        found = [(each, CLOSED.format(who, grant)) for each in closed]
        opened = [folder for folder in folders if folder not in closed]
        keys: dict[str, None] = {}
        with contextlib.suppress(Forbidden):
            for folder in opened if others != settings else ():
                keys.update((key.decode(), None) for key in other.visible_keys(folder, timeout=READ_SECONDS)[0])
        rules = dict(reader.rules(other))
        named = [text for each in rules.values() for text in _strings(each)]
        below = [text for text in named if text.encode().startswith(tuple(opened)) and text.encode() not in opened]
        with contextlib.suppress(SourceError):  # no ACLs, or the endpoint is blocked
            denied = reader.denied([*dict.fromkeys([*keys, *below])])
            found += [(key.encode(), DENIED.format(who)) for key in denied]
        for folder in opened:
            try:
                hides = reader.hides_keys(folder, timeout=READ_SECONDS)
            except Forbidden:  # acl.enable_key_list_policy
                found.append((folder, UNLISTED.format(who, grant)))
                continue
            if hides and not any(where.startswith(folder) for where, _ in found):
                found.append((folder, HIDING.format(who)))
        return Access(sorted(found), len(keys), sorted(rules))


def has_token(settings: ConsulConfig) -> bool:
    """Whether a token is configured; otherwise Consul uses the anonymous token."""
    return bool(settings.token or settings.token_file)


def unwritable(settings: ConsulConfig, keys: Sequence[bytes]) -> list[str]:
    """The keys among these that the token may not write, as far as Consul reports them."""
    with contextlib.closing(Client(settings)) as client, contextlib.suppress(SourceError):
        return client.denied([key.decode(errors="replace") for key in keys], "write")
    return []


def _strings(rules: str) -> Iterator[str]:
    """Yield every string in rules, which are HCL or JSON. Consul decides which strings are denied keys."""
    for quoted in _STRING.findall(rules):
        with contextlib.suppress(ValueError):
            yield json.loads(quoted)


class Client(kv.Client):
    """A client that also reads ACLs, and names that are not UTF-8; not for use by two threads at once."""

    def may_read(self, key: bytes) -> bool:
        try:
            self.get(key, timeout=READ_SECONDS)
        except Forbidden:
            return False
        return True

    def version(self) -> str:
        """The version of the agent.

        Raises:
            Forbidden: the token may not read it.
        """
        agent: _Agent = self._ask_for("agent/self", _Agent, indexed=False)
        return agent.config.version

    def leader(self) -> str | None:
        """The address of the leader of the servers, empty if there is none; None if a proxy blocks the request."""
        try:
            found: str = self._ask_for("status/leader", str, indexed=False)
        except (BadResponse, Forbidden):
            return None
        return found

    def knows_token(self) -> bool:
        """Whether Consul knows this token, False if it has no ACLs or a proxy blocks the request.

        Raises:
            Forbidden: Consul does not know the token.
        """
        try:
            self._ask_for("acl/token/self", _Links)
        except Forbidden as error:
            if not re.search("disabled|blocked", str(error)):
                raise
            return False
        except BadResponse:
            return False
        return True

    def exists(self, folder: bytes) -> bool:
        """Whether the token sees any key in the folder."""
        with self._ask(folder, READ_SECONDS, keys=True, separator="/") as response:
            return not response.absent

    def stored_as(self, listed: bytes) -> list[bytes]:
        """The stored keys that Consul lists under this name, with U+FFFD for each byte that is not UTF-8.

        A prefix is compared with the stored bytes, so every byte is tried in the place of each U+FFFD; empty if there
        are more than `REPLACEMENTS_MAX`.
        """
        first, *others = listed.split(REPLACEMENT)
        found = [first] if len(others) <= REPLACEMENTS_MAX else []
        for part in others:
            tried = [key + byte + part for key in found for byte in REPLACED]
            found = [key for key in tried if listed.decode() in self._listed(key, list[str], keys=True)]
        return [key for key in found if self._listed(key, list[kv.Pair])]

    def denied(self, keys: Sequence[str], access: str = "read") -> list[str]:
        """The keys among these that the token may not read, or write.

        Raises:
            SourceError: Consul has no ACLs, or does not answer.
        """
        denied = []
        for start in range(0, len(keys), AUTHORIZATIONS_MAX):
            asked = {"Resource": "key", "Access": access}
            batch = [{**asked, "Segment": key} for key in keys[start : start + AUTHORIZATIONS_MAX]]
            answers = self._ask_for("internal/acl/authorize", list[_Authorization], json.dumps(batch).encode())
            denied += [each.segment for each in answers if not each.allow]
        return denied

    def rules(self, other: Client) -> Iterator[tuple[str, str]]:
        """Yield name and rules of each policy of this token that ``other`` may read."""
        with contextlib.suppress(SourceError):
            own = self._ask_for("acl/token/self", _Links)
            policies = own.policies
            for role in own.roles:
                with contextlib.suppress(SourceError):
                    policies += other._ask_for(f"acl/role/{role.id}", _Links).policies
            for policy in policies:
                with contextlib.suppress(SourceError):
                    yield policy.name, other._ask_for(f"acl/policy/{policy.id}", _Policy).rules

    def _listed(self, key: bytes, kind: type[list[T]], **options: bool) -> list[T]:
        """The response for a key, or a prefix, that need not be UTF-8."""
        name = key.decode(errors="surrogateescape")
        with kv.Response(self, self._send(lambda: self._library.kv.get(name, **options), READ_SECONDS)) as response:
            return [] if response.absent else response.decoded(msgspec.json.Decoder(kind))

    def _ask_for(self, path: str, kind: Any, body: bytes | None = None, *, indexed: bool = True) -> Any:  # noqa: ANN401 - of this kind
        def build() -> Request:
            headers = {"X-Consul-Token": self._library.token} if self._library.token else {}
            if body is None:
                return Request(f"/v1/{path}", (), headers, indexed=indexed)
            return Request(f"/v1/{path}", (), {**headers, "Content-Length": str(len(body))}, "POST", body)

        with kv.Response(self, self._send(build, READ_SECONDS)) as response:
            return response.decoded(msgspec.json.Decoder(kind))
