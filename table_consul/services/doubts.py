"""Entries that are answered as they stand, but that smtpd could not use, or not as they were meant.

Each function has the remedy in one line for a value that looks so, and None for all others. No line holds any part of
the value. That smtpd decides otherwise is possible (its rules change), so nothing is refused for what is told here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from table_consul.errors import EntryError
from table_consul.services import passwords
from table_consul.services.match import MAILADDR_PART_BYTES, is_address, text_to_mailaddr
from table_consul.services.values import COMMAND_BYTES, USER_BYTES, is_plain_list, split_list

if TYPE_CHECKING:
    from table_consul.services import Service, Table

_REPLY = re.compile(rb"[45][0-9]{2} [A-Za-z0-9]")
_USER = re.compile(rb"[A-Za-z0-9_.+-]{0,%d}" % USER_BYTES)
_ADDRESS_USER = re.compile(rb"[A-Za-z0-9!#$%*/?|^{}`~&'+=_.-]+")
_ADDRESS_DOMAIN = re.compile(rb"[A-Za-z0-9.-]+")
# Formats of Dovecot's that no crypt(3) reads (doc.dovecot.org, Password Schemes).
_FOREIGN = re.compile(
    rb"\{(?:PLAIN|CLEAR|CLEARTEXT|L?S?(?:MD5|SHA)|S?SHA(?:256|512)|(?:PLAIN|LDAP|CRAM|DIGEST|HMAC)-[A-Z0-9]+|PBKDF2"
    rb"|SCRAM-[A-Z0-9-]+|ARGON2ID?|LANMAN|NTLM|OTP|SKEY|RPA)(?:\.[A-Z0-9]+)?\}.*",
    re.IGNORECASE | re.DOTALL,
)


def _alias(_table: Table, text: bytes) -> str | None:
    if is_plain_list(text):
        return None
    for number, node in enumerate(split_list(text), 1):
        if _is_special(node) or _is_address(node):
            continue
        if not _USER.fullmatch(node.partition(b"@")[0] if _is_cut(node) else node):
            return (
                f"element {number} of the value is neither user nor address to smtpd, which refuses the whole alias "
                "for it"
            )
        if b"@" in node:
            return (
                f"element {number} of the value has a domain with characters that smtpd does not take there; it "
                "delivers to the local user before the @ instead (write internationalised domains as xn--...)"
            )
    return None


def _is_special(node: bytes) -> bool:
    """Whether this is an error reply, an :include:, a |command or a /file (smtpd: to.c, text_to_expandnode)."""
    lower = node.lower()
    for word in (b":error:", b"error:", b":include:", b"include:"):
        if lower.startswith(word):
            rest = node[len(word) :]
            return len(rest) <= COMMAND_BYTES and bool(_REPLY.match(rest) if b"error" in word else rest[:1] == b"/")
    quoted = node.startswith(b'"')
    if node[quoted : quoted + 1] == b"|":
        command = node[quoted + 1 :]
        return len(command) <= COMMAND_BYTES and (not quoted or command.endswith(b'"'))
    return node.startswith(b"/") and len(node) <= COMMAND_BYTES


def _is_cut(node: bytes) -> bool:
    """Whether smtpd, looking for an address, has ended the text at the ``@`` (smtpd: to.c, alias_is_address)."""
    return len(node) >= 3 and 0 < node.find(b"@") < len(node) - 1


def _is_address(node: bytes) -> bool:
    user, _, domain = node.partition(b"@")
    return _is_cut(node) and bool(_ADDRESS_USER.fullmatch(user) and _ADDRESS_DOMAIN.fullmatch(domain))


def _mailaddrmap(_table: Table, text: bytes) -> str | None:
    if is_plain_list(text):
        return None
    for number, node in enumerate(split_list(text), 1):
        if text_to_mailaddr(node) is None:
            return (
                f"element {number} of the value is longer than smtpd takes, which refuses the whole list for it "
                f"(allowed: {MAILADDR_PART_BYTES} bytes on each side of the @)"
            )
    return None


def _credentials(table: Table, text: bytes) -> str | None:
    """Whether nobody can log in with this; what has a user before it may as well be clear text to relay with."""
    secret = passwords.hash_part(text)
    verified_here = "auth" in table.services
    foreign = _FOREIGN.fullmatch(secret) or secret.startswith(b"$argon2")
    if (b":" in text and not foreign) or secret.startswith(passwords.LOCK_MARKERS):
        return None
    if verified_here:
        return _auth(table, text)
    if foreign or not passwords.looks_like_a_hash(secret):
        return (
            "the value is no hash that smtpd's crypt(3) reads, so nobody can log in with it (allowed: the output of "
            "`smtpctl encrypt`; argon2 with the service auth; USER:PASSWORD to relay with)"
        )
    return None


def _auth(table: Table, text: bytes) -> str | None:
    try:
        passwords.verifiable_hash(text, table.deadline)
    except EntryError as error:
        return str(error)
    return None


def doubt(table: Table, service: Service, key: bytes, value: bytes) -> str | None:
    """The remedy for an entry that looks as if smtpd could not use it; None for all others."""
    if key != key.strip() and service.name != "regex":
        return "the key has a blank at one of its ends, and smtpd does not ask for such; rename it"
    if service.name == "source":
        return _source(key if table.fetch == "keys" or not value else value)
    if not value:
        return f"there is no value, and {service.name} needs one" if service.needs_value else None
    judge = _VALUES.get(service.name)
    return None if judge is None else judge(table, value)


def _source(address: bytes) -> str | None:
    if is_address(address):
        return None
    return "no address to send mail from (allowed: 192.0.2.25, 2001:db8::25, [2001:db8::25])"


_VALUES: Mapping[str, Callable[[Table, bytes], str | None]] = MappingProxyType(
    {
        "alias": _alias,
        "mailaddrmap": _mailaddrmap,
        "credentials": _credentials,
        "auth": _auth,
    }
)
