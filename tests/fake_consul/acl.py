"""ACLs: tokens with rules in the syntax of Consul's policies, and the texts of refusals."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

ANONYMOUS = "anonymous"
ANONYMOUS_ACCESSOR = "00000000-0000-0000-0000-000000000002"
MANAGEMENT = 'key_prefix "" { policy = "write" }'
LEVELS = ("deny", "read", "list", "write")  # Each allows what the ones before it allow.


class Rules:
    """The rules for keys of a policy in HCL; other resources are ignored."""

    def __init__(self, policy: str) -> None:
        self._exact: dict[bytes, str] = {}
        self._prefixes: dict[bytes, str] = {}
        for kind, name, level in re.findall(r'\b(key|key_prefix) "([^"]*)" \{ policy = "(\w+)" \}', policy):
            (self._exact if kind == "key" else self._prefixes)[name.encode()] = level

    def level(self, key: bytes) -> str:
        """The rule of the key, otherwise that of its longest prefix, otherwise deny."""
        if key in self._exact:
            return self._exact[key]
        return self._prefixes.get(
            max((each for each in self._prefixes if key.startswith(each)), key=len, default=b""), "deny"
        )


@dataclass(frozen=True)
class Identity:
    """A token as resolved at the start of a request; later changes of its rules do not affect that request."""

    secret: str | None
    rules: Rules | None  # None allows everything except `denied`.
    denied: tuple[bytes, ...] = ()

    @property
    def named(self) -> bool:
        return self.secret not in {None, ANONYMOUS}

    def allows(self, key: bytes, level: str = "read") -> bool:
        if self.denied and key.startswith(self.denied):
            return False
        return self.rules is None or LEVELS.index(self.rules.level(key)) >= LEVELS.index(level)

    def refusal(self, version: tuple[int, ...], key: bytes, level: str = "read") -> str:
        """The text of a 403 that `version` sends."""
        if version < (1, 12):
            return "Permission denied"
        lacks = f"lacks permission 'key:{level}' on \"{key.decode(errors='replace')}\""
        if self.named:
            return f"Permission denied: token with AccessorID '{accessor(self.secret)}' {lacks}"
        if version < (1, 15):
            return f"Permission denied: token with AccessorID '{ANONYMOUS_ACCESSOR}' {lacks}"
        used = "The anonymous token is used implicitly when a request does not specify a token."
        return f"Permission denied: anonymous token {lacks}. {used}"


def accessor(secret: str | None) -> str:
    """The public identifier of a token, the same for the same secret."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, secret)) if secret not in {None, ANONYMOUS} else ANONYMOUS_ACCESSOR


def token_info(secret: str, tokens: dict[str, str], policies: dict[str, str]) -> dict[str, object]:
    """The response to a token that reads itself: its policies by name and identifier, without rules."""
    rules = tokens.get(secret)
    special = {None: "Anonymous Token", MANAGEMENT: "Bootstrap Token (Global Management)"}
    names = [] if rules is None else [policies.get(secret, "global-management" if rules == MANAGEMENT else "policy")]
    listed = [{"ID": str(uuid.uuid5(uuid.NAMESPACE_OID, name)), "Name": name} for name in names]
    return {
        "AccessorID": accessor(secret),
        "SecretID": secret,
        "Description": special.get(rules, ""),
        **({"Policies": listed} if listed else {}),
        "Local": False,
        "CreateTime": "2026-11-27T19:55:57.251458832Z",
        "Hash": "TUlXSqEhVnsSsMGFHSrOBR5Eayf7oODViahAUsdqjD4=",
        "CreateIndex": 10,
        "ModifyIndex": 10,
    }
