"""smtpd's matchers, by their names there; the first argument comes from the session, the second from the table.

Knows nothing of buckets or indexes: one key, one entry, one answer. The answers are those of smtpd's own ``file:``
tables, down to what a walk over them would call surprising.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from table_consul.services import MAX_KEY_BYTES

# smtpd: smtpd-defines.h, SMTPD_MAXLOCALPARTSIZE and SMTPD_MAXDOMAINPARTSIZE, without the NUL.
MAILADDR_PART_BYTES = 255
# smtpd.conf(5), subaddressing-delimiter: its default, as smtpd does not tell a table which one it uses.
DELIMITER = b"+"

TOO_LONG = f"smtpd takes no key of more than {MAX_KEY_BYTES} bytes; shorten it"


def hostname_match(hostname: bytes, pattern: bytes) -> bool:
    """Whether the host name is the pattern's (smtpd: util.c).

    A ``*`` skips to the first place where the character after it occurs and does not try another: ``*.example.org``
    matches ``a.example.org`` but not ``a.b.example.org``. At the end it takes all that is left, if that is anything.
    """
    return pieces_match(hostname.lower(), pattern.lower().split(b"*"))


def pieces_match(hostname: bytes, pieces: Sequence[bytes]) -> bool:
    """The loop of hostname_match, over a folded host name and what stands between the stars of a folded pattern."""
    head, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return hostname == head
    if not (hostname.startswith(head) and hostname.endswith(last)):
        return False
    at = len(head)
    for piece in pieces[1:]:
        if piece:
            at = hostname.find(piece[:1], at)
            if at < 0 or not hostname.startswith(piece, at):
                return False
            at += len(piece)
    return at == len(hostname) if last else at < len(hostname)


def table_domain_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a domain table answers for the host name (smtpd: table.c)."""
    return hostname_match(key, entry)


def text_to_mailaddr(text: bytes) -> tuple[bytes, bytes] | None:
    """User and domain, each possibly empty; None when smtpd would refuse the text (smtpd: to.c)."""
    user, at, domain = text.rpartition(b"@")
    if not at:
        user, domain = domain, b""
    return (user, domain) if len(user) <= MAILADDR_PART_BYTES and len(domain) <= MAILADDR_PART_BYTES else None


def mailaddr_match(address: tuple[bytes, bytes], pattern: tuple[bytes, bytes]) -> bool:
    """Whether the address is the pattern's; a part that is empty in the pattern matches all (smtpd: util.c)."""
    (user, domain), (wanted, hosts) = address, pattern
    if hosts and not hostname_match(domain, hosts):
        return False
    if wanted and DELIMITER not in wanted:
        user = user.partition(DELIMITER)[0]
    return not wanted or user.lower() == wanted.lower()


def table_mailaddr_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a table of mail addresses answers for the address (smtpd: table.c)."""
    address, pattern = text_to_mailaddr(key), text_to_mailaddr(entry)
    return address is not None and pattern is not None and mailaddr_match(address, pattern)


IPV4 = re.compile(rb"([0-9]+(?:\.[0-9]+){0,3})(?:/([0-9]+))?")
IPV4_HEX = re.compile(rb"0[xX]([0-9a-fA-F]{1,8})(?:/([0-9]+))?")
DOTTED = re.compile(rb"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})")
HEXTETS = re.compile(rb"[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4})*")
# strtonum(3), by which smtpd reads the length of an IPv6 prefix, skips white space and takes a sign.
PREFIX_LENGTH = re.compile(rb"[ \t-\r]*[+-]?[0-9]+")
# smtpd: openbsd-compat/inet_net_pton.c, INET6_ADDRSTRLEN + sizeof("/128"), without the NUL.
IPV6_BYTES = 50
IPV4_BITS, IPV6_BITS = 32, 128


def inet_net_pton(text: bytes) -> tuple[int, int] | None:
    """An IPv4 network as number and prefix length (inet_net_pton(3), as OpenBSD has it and smtpd carries it).

    Octets left out at the end are zero. Without a prefix length it is that of the class of old, A to E, or what the
    octets given make: ``10`` is 10.0.0.0/8 and ``192.0.2`` is 192.0.2.0/24.
    """
    found = IPV4.fullmatch(text)
    if found is not None:
        octets = [int(octet) for octet in found[1].split(b".")]
        if max(octets) > 255:
            return None
        octets += (0,) * (4 - (given := len(octets)))
    else:
        found = IPV4_HEX.fullmatch(text)
        if found is None:
            return None
        octets = list(bytes.fromhex(found[1].ljust(8, b"0").decode()))
        given = (len(found[1]) + 1) // 2
    if found[2] is not None:
        bits = int(found[2])
    else:
        first = octets[0]
        bits = 32 if first >= 240 else 4 if first >= 224 else 24 if first >= 192 else 16 if first >= 128 else 8
        bits = max(bits, given * 8)
    return None if bits > IPV4_BITS else (octets[0] << 24 | octets[1] << 16 | octets[2] << 8 | octets[3], bits)


def inet6_pton(text: bytes) -> int | None:
    """An IPv6 address in any spelling as a number; None when it is none (inet_pton(3))."""
    if b"." in text:
        start, colon, dotted = text.rpartition(b":")
        octets = [int(octet) for octet in dotted.split(b".")] if DOTTED.fullmatch(dotted) else [256]
        if not colon or max(octets) > 255:
            return None
        text = start + b":%x:%x" % (octets[0] << 8 | octets[1], octets[2] << 8 | octets[3])
    head, gap, tail = text.partition(b"::")
    if (head and not HEXTETS.fullmatch(head)) or (tail and not HEXTETS.fullmatch(tail)):
        return None
    high = head.split(b":") if head else []
    low = tail.split(b":") if tail else []
    missing = 8 - len(high) - len(low)
    if missing < 1 if gap else missing != 0:
        return None
    digits = b"".join([group.zfill(4) for group in (*high, *(b"0",) * missing, *low)])
    return int(digits, 16)


def text_to_netaddr(text: bytes) -> tuple[int, int, int] | None:
    """Family as the bits of its addresses (32 or 128), number and prefix length (smtpd: to.c).

    None when smtpd would refuse it. The length stands within the brackets: ``[2001:db8::/32]``.
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
    if len(text) > IPV6_BYTES or (slash and not PREFIX_LENGTH.fullmatch(length)):
        return None
    bits = int(length) if slash else IPV6_BITS
    number = inet6_pton(address) if 0 <= bits <= IPV6_BITS else None
    return None if number is None else (IPV6_BITS, number, bits)


def table_netaddr_match(key: bytes, entry: bytes) -> bool:
    """Whether the entry of a table of networks answers for the address, or the word ``local`` (smtpd: table.c)."""
    if key.lower() == entry.lower():
        return True
    address, network = text_to_netaddr(key), text_to_netaddr(entry)
    if address is None or network is None or address[0] != network[0]:
        return False
    family, number, bits = network
    return (address[1] ^ number) >> (family - bits) == 0


def parse_sockaddr(text: bytes) -> int | tuple[int, bytes] | None:
    """The number of an IPv6 address, bracketed or not, and its scope if it has one (smtpd: table.c)."""
    text = text.removeprefix(b"[")
    if text[:5].lower() == b"ipv6:":
        text = text[5:]
    address, _, scope = text.partition(b"]")[0].partition(b"%")
    number = inet6_pton(address)
    return (number, scope) if scope and number is not None else number


def is_address(text: bytes) -> bool:
    """Whether smtpd takes this for an address of its own to send from (smtpd: table.c, parse_sockaddr)."""
    dotted = DOTTED.fullmatch(text) is not None and all(int(octet) <= 255 for octet in text.split(b"."))
    return dotted or parse_sockaddr(text) is not None


def addrname_match(key: bytes, entry: bytes) -> bool:
    """Whether both spell the same address, brackets or not. smtpd compares bytes, and writes ``[2001:db8::1]``."""
    if key == entry:
        return True
    address = parse_sockaddr(key)
    return address is not None and address == parse_sockaddr(entry)
