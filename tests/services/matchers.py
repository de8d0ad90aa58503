"""smtpd's matchers under their names in smtpd, for one key and one entry. An index must find what they find.

The first argument comes from the session, the second from the table.
"""

from __future__ import annotations

from table_consul.errors import EntryError
from table_consul.services.addresses import DELIMITER, parse_sockaddr, text_to_mailaddr, text_to_netaddr
from table_consul.services.regex import package, regcomp


def pieces_match(hostname, pieces):
    """Whether a folded host name matches a folded pattern that is split at its stars (smtpd: util.c, hostname_match).

    A ``*`` skips to the first place where the character after it occurs and tries no other: ``*.example.org``
    matches ``a.example.org`` but not ``a.b.example.org``. At the end it matches the rest, which must not be empty.
    """
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


def table_domain_match(key, entry):
    return pieces_match(key.lower(), entry.lower().split(b"*"))


def table_mailaddr_match(key, entry, delimiter=DELIMITER):
    address, pattern = text_to_mailaddr(key), text_to_mailaddr(entry)
    if address is None or pattern is None:
        return False
    (user, domain), (wanted, hosts) = address, pattern
    if hosts and not table_domain_match(domain, hosts):
        return False
    if wanted and delimiter not in wanted:
        user = user.partition(delimiter)[0]
    return not wanted or user.lower() == wanted.lower()


def table_netaddr_match(key, entry):
    if key.lower() == entry.lower():
        return True
    address, network = text_to_netaddr(key), text_to_netaddr(entry)
    if address is None or network is None or address[0] != network[0]:
        return False
    family, number, bits = network
    return (address[1] ^ number) >> (family - bits) == 0


def table_regex_match(key, entry):
    try:
        pattern = regcomp(entry).pattern
    except EntryError:
        return False
    re2 = package()
    options = re2.Options()
    options.encoding = options.Encoding.LATIN1
    return re2.compile(pattern, options).search(key) is not None


def addrname_match(key, entry):
    """Whether both are the same address, brackets or not. smtpd compares bytes, and writes ``[2001:db8::1]``."""
    if key == entry:
        return True
    address = parse_sockaddr(key)
    return address is not None and address == parse_sockaddr(entry)


MATCHERS = {
    "domain": table_domain_match,
    "netaddr": table_netaddr_match,
    "mailaddr": table_mailaddr_match,
    "regex": table_regex_match,
    "addrname": addrname_match,
}
