"""How smtpd reads mail addresses, lists of recipients, and networks. Docstrings name the functions of smtpd.

The results are those of smtpd's own ``file:`` tables, surprising ones included. No text contains any part of a value.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from table_consul.errors import UNDECODABLE, EntryError
from table_consul.services import MAX_KEY_BYTES, compiled

# smtpd: smtpd-defines.h, SMTPD_MAXLOCALPARTSIZE and SMTPD_MAXDOMAINPARTSIZE; smtpd.h, EXPAND_BUFFER. Without the NUL.
MAILADDR_PART_BYTES = 255
COMMAND_BYTES = 1023
# smtpd.conf(5), smtp sub-addr-delim: its default, because smtpd does not pass its own to a table.
DELIMITER = b"+"
IPV4_BITS, IPV6_BITS = 32, 128
# smtpd: openbsd-compat/inet_net_pton.c, INET6_ADDRSTRLEN + sizeof("/128"), without the NUL.
IPV6_BYTES = 50
# The one problem that may be intended; it does not count as a refused entry.
NOT_A_NETWORK = (
    "not a network: matches only this exact name, as for `match from rdns` (expected 192.0.2.1, 192.0.2.0/24, "
    "2001:db8::/32, [2001:db8::/32] or local)"
)

# Lists of users and addresses that need no further check, as nearly all.
_PLAIN = rb"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*(?:@[A-Za-z0-9][A-Za-z0-9-]*(?:\.[A-Za-z0-9-]+)*)?"
_PLAIN_LIST = rb"%b(?:, ?%b)*" % (_PLAIN, _PLAIN)
_USER = rb"[A-Za-z0-9_.+-]{1,%d}" % MAILADDR_PART_BYTES
_LOCAL_PART = rb"[A-Za-z0-9!#$%*/?|^{}`~&'+=_.-]+"
_DOMAIN = rb"[A-Za-z0-9.-]+"
Kind = Literal["user", "file", "command", "include", "address", "error"]
# All but users and addresses.
_SPECIAL: tuple[tuple[Kind, bytes], ...] = (
    ("error", rb"(?s):?(?i:error):(?=[45][0-9]{2} [A-Za-z0-9])(.{0,%d})" % COMMAND_BYTES),
    ("include", rb"(?s):?(?i:include):(?=/)(.{0,%d})" % COMMAND_BYTES),
    ("command", rb'(?s)\|(.{0,%d})|"\|(.{0,%d})"' % (COMMAND_BYTES, COMMAND_BYTES - 1)),
    ("file", rb"(?s)(?=/)(.{0,%d})" % COMMAND_BYTES),
)

_IPV4 = rb"([0-9]+(?:\.[0-9]+){0,3})(?:/([0-9]+))?"
_IPV4_HEX = rb"0[xX]([0-9a-fA-F]{1,8})(?:/([0-9]+))?"
_DOTTED_QUAD = rb"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})"
_HEXTETS = rb"[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4})*"
# strtonum(3), by which smtpd reads the length of an IPv6 prefix, skips white space and accepts a sign.
_PREFIX_LENGTH = rb"[ \t-\r]*[+-]?[0-9]+"


def text_to_mailaddr(text: bytes) -> tuple[bytes, bytes] | None:
    """User and domain, each possibly empty; None when smtpd rejects the text (smtpd: to.c)."""
    user, at, domain = text.rpartition(b"@")
    if not at:
        user, domain = domain, b""
    return (user, domain) if len(user) <= MAILADDR_PART_BYTES and len(domain) <= MAILADDR_PART_BYTES else None


class Element(NamedTuple):
    """An element of an alias, as smtpd reads it."""

    kind: Kind
    text: bytes
    domain: bytes = b""
    """Only for an address, whose local part is ``text``."""

    def __bytes__(self) -> bytes:
        return self.text + b"@" + self.domain if self.kind == "address" and self.domain else self.text


def parse_element(element: bytes) -> Element | None:
    """The element as smtpd parses it; None if smtpd rejects it (smtpd: to.c, text_to_expandnode)."""
    for kind, expression in _SPECIAL:
        if match := compiled(expression).fullmatch(element):
            return Element(kind, match[match.lastindex or 0])
    local, at, domain = element.partition(b"@")
    if at and local and domain:
        if compiled(_LOCAL_PART).fullmatch(local) and compiled(_DOMAIN).fullmatch(domain):
            return Element("address", local[:MAILADDR_PART_BYTES], domain[:MAILADDR_PART_BYTES])
        element = local  # alias_is_address has truncated it there
    return Element("user", element) if compiled(_USER).fullmatch(element) else None


def is_plain_list(text: bytes) -> bool:
    """Whether smtpd reads this as users and addresses in every service: no quotes, no commands, nothing too long."""
    return len(text) <= MAILADDR_PART_BYTES and compiled(_PLAIN_LIST).fullmatch(text) is not None


def split_list(text: bytes) -> list[bytes]:
    """The elements of a list as smtpd splits and unescapes them (smtpd: expand_line_split, mailaddr_line_split).

    Raises:
        EntryError: smtpd rejects the whole list, because a quote or an escape is left open.
    """
    elements: list[bytes] = []
    element = bytearray()
    escaped = double = single = False
    for c in text:
        if escaped:
            element.append(c)
            escaped = False
        elif c == 0x5C:
            escaped = True
        elif c == 0x2C and not double and not single:
            elements.append(bytes(element).strip())
            element.clear()
        else:
            element.append(c)
            double ^= c == 0x22 and not single
            single ^= c == 0x27 and not double
    if escaped or double or single:
        why = list_format(text) or "ends inside a quote or an escape"
        raise EntryError(f"the value {why}; smtpd rejects the whole value because of it")
    elements.append(bytes(element).strip())
    return [element for element in elements if element]


def list_format(text: bytes) -> str | None:
    """The format of a list that is not in smtpd's, with a hint; None if it is."""
    if compiled(rb"[\[(]\s*u?'").match(text):
        return "is a list in Python syntax (write a JSON array; with Ansible, use to_json)"
    if text.startswith(b"- "):
        return "is a YAML list (separate the elements with commas)"
    if not text.startswith((b"[", b"{")):
        return None
    try:
        msgspec.json.decode(text)
    except UNDECODABLE:
        return 'starts like JSON but is not valid JSON (write ["a", "b"])'
    return 'is JSON, but is not read as an array of strings (write ["a", "b"], and check value_format)'


def inet_net_pton(text: bytes) -> tuple[int, int] | None:
    """An IPv4 network as number and prefix length (inet_net_pton(3), as OpenBSD has it and smtpd includes it).

    Octets left out at the end are zero. A prefix length that is left out is that of the address class (A to E), or
    longer where more octets are given: ``10`` is 10.0.0.0/8 and ``192.0.2`` is 192.0.2.0/24.
    """
    found = compiled(_IPV4).fullmatch(text)
    if found is not None:
        octets = [int(octet) for octet in found[1].split(b".")]
        if max(octets) > 255:
            return None
        octets += (0,) * (4 - (count := len(octets)))
    else:
        found = compiled(_IPV4_HEX).fullmatch(text)
        if found is None:
            return None
        octets = list(bytes.fromhex(found[1].ljust(8, b"0").decode()))
        count = (len(found[1]) + 1) // 2
    if found[2] is not None:
        bits = int(found[2])
    else:
        first = octets[0]
        bits = 32 if first >= 240 else 4 if first >= 224 else 24 if first >= 192 else 16 if first >= 128 else 8
        bits = max(bits, count * 8)
    return None if bits > IPV4_BITS else (int.from_bytes(octets), bits)


def dotted_quad(text: bytes) -> bytes | None:
    """The four octets of an IPv4 address without leading zeros; None for any other text (inet_pton(3))."""
    octets = [int(octet) for octet in text.split(b".")] if compiled(_DOTTED_QUAD).fullmatch(text) else [256]
    return None if max(octets) > 255 else bytes(octets)


def inet6_pton(text: bytes) -> int | None:
    """An IPv6 address in any notation as a number; None for any other text (inet_pton(3))."""
    if b"." in text:
        start, colon, dotted = text.rpartition(b":")
        octets = dotted_quad(dotted)
        if not colon or octets is None:
            return None
        text = b"%b:%x:%x" % (start, int.from_bytes(octets[:2]), int.from_bytes(octets[2:]))
    head, gap, tail = text.partition(b"::")
    hextets = compiled(_HEXTETS)
    if (head and not hextets.fullmatch(head)) or (tail and not hextets.fullmatch(tail)):
        return None
    high = head.split(b":") if head else []
    low = tail.split(b":") if tail else []
    missing = 8 - len(high) - len(low)
    if missing < 1 if gap else missing != 0:
        return None
    return int(b"".join([group.zfill(4) for group in (*high, *(b"0",) * missing, *low)]), 16)


def text_to_netaddr(text: bytes) -> tuple[int, int, int] | None:
    """Family as the bits of its addresses (32 or 128), number and prefix length (smtpd: to.c).

    None when smtpd rejects it. The prefix length belongs inside the brackets: ``[2001:db8::/32]``.
    """
    if len(text) > MAX_KEY_BYTES:
        return None
    if text[:5].lower() == b"ipv6:":
        text = text[5:]
    network = inet_net_pton(text)
    if network is not None:
        return IPV4_BITS, *network
    if text.startswith(b"["):
        text = text[6:] if text[1:6].lower() == b"ipv6:" else text[1:]
        if not text.endswith(b"]"):
            return None
        text = text[:-1]
    address, slash, length = text.partition(b"/")
    if len(text) > IPV6_BYTES or (slash and not compiled(_PREFIX_LENGTH).fullmatch(length)):
        return None
    bits = int(length) if slash else IPV6_BITS
    number = inet6_pton(address) if 0 <= bits <= IPV6_BITS else None
    return None if number is None else (IPV6_BITS, number, bits)


def parse_sockaddr(text: bytes) -> int | tuple[int, bytes] | None:
    """The number of an IPv6 address, bracketed or not, with its scope if it has one (smtpd: table.c)."""
    text = text.removeprefix(b"[")
    if text[:5].lower() == b"ipv6:":
        text = text[5:]
    address, _, scope = text.partition(b"]")[0].partition(b"%")
    number = inet6_pton(address)
    return (number, scope) if scope and number is not None else number


def is_address(text: bytes) -> bool:
    """Whether smtpd accepts this as an address to send from (smtpd: table.c, parse_sockaddr)."""
    return dotted_quad(text) is not None or parse_sockaddr(text) is not None
