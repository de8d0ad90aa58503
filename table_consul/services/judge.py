"""The problems of entries that smtpd cannot use, each with cause and hint, for the daemon, lint and import.

Follows the parsers of smtpd that are named (OpenSMTPD 6.8 to 7.9). An entry with such a problem is served unchanged,
because smtpd's rules may change. No text contains any part of a value.
"""

from __future__ import annotations

import functools
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping

from table_consul.errors import EntryError
from table_consul.services import MAX_KEY_BYTES, SERVICES, Service, Table, compiled, passwords
from table_consul.services.addresses import (
    COMMAND_BYTES,
    MAILADDR_PART_BYTES,
    dotted_quad,
    inet6_pton,
    is_address,
    is_plain_list,
    list_format,
    parse_element,
    split_list,
    text_to_mailaddr,
)
from table_consul.services.values import LINE_MAX

# limits.h of Linux, HOST_NAME_MAX. Without the NUL.
HOST_BYTES = 64

# The keys that a session can ask for, apart from their length (smtpd: util.c, valid_localpart and valid_domainpart;
# the client's name in filters is <unknown> if it has none). A * is a pattern only in host names, and only in domain and
# mailaddr.
_ATOM = rb"[A-Za-z0-9!#$%&'*/?^`{|}~+=_-]+"
_LOCAL = rb"(?!\*(?:@|\Z))%b(?:\.%b)*" % (_ATOM, _ATOM)
_HOST = rb"(?:(?!-)[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*|\[[A-Za-z0-9:.]+\])"
_HOSTS = rb"(?:(?!-)[A-Za-z0-9_*-]+(?:\.[A-Za-z0-9_*-]+)*|\[[A-Za-z0-9:.*]+\])"
_MAILADDR = rb"%b(?:@%b?)?|@%b?" % (_LOCAL, _HOSTS, _HOSTS)
_ASKED = {
    "alias": rb"%b(?:@%b)?|@%b?" % (_LOCAL, _HOST, _HOST),
    "domain": _HOSTS + rb"|<unknown>",
    "mailaddr": _MAILADDR,
}

# Characters that look like others, by expression.
_FOREIGN = (
    (rb"\xef\xbb\xbf", "contains a byte order mark (remove it)"),
    (rb"\xc2\xa0|\xe2\x80[\x80-\x8a\xaf]", "contains a non-breaking space (write an ordinary one, or none)"),
    (rb"\xe2\x80[\x8b-\x8f]|\xe2\x81\xa0|\xc2\xad", "contains a zero-width space (remove it)"),
    (rb"\xef\xbc\x8c|\xe3\x80\x81", "contains a full-width comma (write an ordinary one)"),
    (rb"\xe2\x80[\x98-\x9f]", "contains curly quotes (remove them)"),
    (rb"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[A-Za-z]+);", "contains an HTML entity (write the character itself)"),
)
# Characters that no address contains.
_ODD = (
    (rb"[<>]", "contains angle brackets (write the address alone)"),
    (rb"[\"']", "contains quotes (remove them)"),
    (rb"[ \t-\r]", "contains white space"),
    (rb"[,;]", "contains a comma or semicolon"),
    (rb"[^\0-\x7f]", "contains letters outside ASCII (write internationalised domains as xn--...)"),
)
_ODD_IN_LIST = (*_ODD[:2], (_ODD[2][0], "contains white space (is a comma missing?)"), *_ODD[3:])
_STAR_AS_USER = (rb"\A\*(?:@|\Z)", "has * as its user, where * is not a pattern (write @example.org, or @ for all)")
_COPIED = (
    *_FOREIGN,
    (rb"\A(?i:mailto:)", "begins with mailto: (write the address alone)"),
    (rb":\Z", "ends in a colon, as in an aliases file (remove it)"),
    (rb"\A#.*\s", "is a comment (delete it)"),
)


def _dots(hint: str) -> tuple[tuple[bytes, str], ...]:
    return (
        (rb"(?:\A|@)\.", f"has a name that begins with a dot ({hint})"),
        (rb"\.@|\.\Z", "has a name that ends in a dot (remove it)"),
        (rb"\.\.", "has two dots in a row (remove one)"),
        (rb"@.*@", "has two @ (write one)"),
    )


_HOSTS_BELOW = "write *.example.org for the hosts below a domain"


def _address_causes(odd: tuple[tuple[bytes, str], ...]) -> tuple[tuple[bytes, str], ...]:
    return (
        *_COPIED,
        _STAR_AS_USER,
        *odd,
        (rb"@.*[{}]", "contains braces (remove them)"),
        *_dots(_HOSTS_BELOW),
    )


_KEY_CAUSES: Mapping[str, tuple[tuple[bytes, str], ...]] = {
    "alias": (
        *_COPIED,
        _STAR_AS_USER,
        (rb"@.*\*", "has * in its domain, but alias keys are not patterns (write a key for each domain)"),
        *_ODD,
        *_dots("an alias is for one domain; write a key for each"),
    ),
    "domain": (
        *_COPIED,
        (rb"\A#", "is a comment (delete it)"),
        (rb"[\\^$()|+?]", "is a regular expression (store it for the service regex)"),
        *_ODD,
        (rb"[{}]", "contains braces (write a key for each domain)"),
        (rb"@", "is a mail address (write the part after the @)"),
        *_dots(_HOSTS_BELOW),
    ),
    "mailaddr": _address_causes(_ODD),
}
_SENDER_CAUSES = _address_causes(_ODD_IN_LIST)
_RECIPIENT_CAUSES = (
    *_FOREIGN,
    (rb"\A(?i::?(?:error|fail|defer|reject):)", "is not an error reply in smtpd's form (write error:550 text)"),
    (rb"\A(?i::blackhole:)", "is Exim's way to discard mail (write /dev/null)"),
    (rb"\A(?i::?include:)", "includes a file by a relative path (write :include:/PATH)"),
    (rb'\A"/', "is a file name in quotes (remove them)"),
    (rb'\A"?[|/]', f"is a command without its closing quote, or has more than {COMMAND_BYTES} bytes"),
    (rb"\A(?i:mailto:)", "begins with mailto: (write the address alone)"),
    (rb"\A[A-Za-z0-9_.+-]+:", "looks like a line of an aliases file (store the value of each name under its own key)"),
    *_ODD_IN_LIST,
    (rb"\A@", "is a whole domain, which smtpd cannot deliver to (write an address)"),
    (rb"@\Z", "has nothing after the @"),
    (rb"@.*@", "contains two @ (is a comma missing?)"),
    (rb"\A[^@]*\Z", f"is neither a user (letters, digits and _.+-, at most {MAILADDR_PART_BYTES}) nor an address"),
    (rb"@", "is neither a user nor an address (a domain is letters, digits, - and .)"),
)
# A placeholder that sendmail or Postfix fills in.
_TEMPLATE = rb"(?:%[0-9a-z]|[$\\][0-9]|\$\{[0-9]\})@"


def _cause(text: bytes, causes: Iterable[tuple[bytes, str]]) -> str | None:
    """The text of the first expression that matches, None if none does."""
    return next((what for expression, what in causes if compiled(expression).search(text)), None)


@functools.cache
def usual_key(service: Service) -> Callable[[bytes], object]:
    """A test for usual keys: smtpd can ask this service for the folded key, or match a name with it."""
    # Expressions are judged as they are stored; other keys are any text without surrounding white space.
    form = rb"(?!)" if service.name == "regex" else _ASKED.get(service.name, rb"(?s)\S(?:.*\S)?")
    return compiled(form).fullmatch


def key_problem(table: Table, service: Service, key: bytes, stored: bytes) -> str | None:
    """Why no service that reads this folder finds the folded key, or why it matches unintended names."""
    if service.name == "regex":
        if {rb"\S", rb"\W", rb"\B"}.intersection(compiled(rb"(?s)\\.").findall(stored)):
            return (
                "the key contains \\S, \\W or \\B; smtpd reads expressions in lower case, which reverses the meaning "
                "(write [^[:space:]] or [^[:alnum:]_])"
            )
        return None
    if len(key) > MAX_KEY_BYTES and not service.patterns:  # an index reports patterns
        return f"the key has {len(key)} bytes; smtpd never asks for more than {MAX_KEY_BYTES}"
    path = table.path(service)
    sharing = (SERVICES[name] for name in table.readable_services if table.path(SERVICES[name]) == path)
    if any(usual_key(each)(key) for each in (service, *sharing)):
        return None
    if key != key.strip() or service.name not in _KEY_CAUSES:
        return "the key begins or ends with white space; smtpd never asks for such a key (rename it)"
    why = _cause(key, _KEY_CAUSES[service.name]) or "contains characters that no address may contain (correct it)"
    return f"the key {why}; smtpd never asks for it"


def value_problem(table: Table, service: Service, key: bytes, value: bytes) -> str | None:
    """Why smtpd rejects or misreads a valid value of `parse_value`, with a hint; None if nothing looks wrong."""
    if not value and service.needs_value:
        return f"missing value: {service.name} requires one"
    if value.startswith(BOM_UTF8):
        return "the value begins with a byte order mark (remove it)"
    judge = _VALUES.get(service.name)
    return None if judge is None else judge(table, key, value)


def _list_problem(value: bytes, judge: Callable[[bytes], str | None]) -> str | None:
    """The first problem of an element, or that of the whole list if it is in another format."""
    if is_plain_list(value):
        return None
    elements = split_list(value)
    if not elements:
        return "the value contains only commas, so smtpd finds no element (write an element, or delete the key)"
    problems = ((number, judge(element)) for number, element in enumerate(elements, 1))
    number, text = next(((number, text) for number, text in problems if text is not None), (0, None))
    if text is None:
        return None
    whole = list_format(value)
    return f"element {number} of the value {text}" if whole is None else f"the value {whole}"


def element_problem(element: bytes) -> str | None:
    """Why smtpd rejects or misreads an element of an alias, with a hint; None if it does not."""
    parsed = parse_element(element)
    truncated = parsed is not None and parsed.kind == "user" and b"@" in element
    if parsed is not None and not truncated:
        if compiled(_TEMPLATE).match(element):
            return "begins with a placeholder, which smtpd does not fill in (write an alias for each user)"
        return None
    effect = "delivers to the local user before the @ instead" if truncated else "rejects the whole alias because of it"
    return f"{_cause(element, _RECIPIENT_CAUSES)}; smtpd {effect}"


def _address_problem(element: bytes) -> str | None:
    """An address or a part of one that a sender is compared with (smtpd: lka.c, lka_mailaddrmap)."""
    if text_to_mailaddr(element) is None:
        return (
            f"has more than {MAILADDR_PART_BYTES} bytes before or after the @; smtpd rejects the whole list because of "
            "it"
        )
    if compiled(_MAILADDR).fullmatch(element):
        return None
    return f"{_cause(element, _SENDER_CAUSES) or 'is not an address'}; no sender ever matches it"


def _userinfo(_table: Table, key: bytes, value: bytes) -> str | None:
    if len(key) + 1 + len(value) >= LINE_MAX:
        return f"user name and value together have more than {LINE_MAX - 1} bytes; smtpd rejects them"
    return None


def _source(table: Table, key: bytes, value: bytes) -> str | None:
    if is_address(key if table.fetch == "keys" or not value else value):
        return None
    return "not an address to send mail from (expected 192.0.2.25, 2001:db8::25 or [2001:db8::25])"


def _host_problem(host: bytes) -> str | None:
    """Why smtpd cannot use this as a host, of a server or its own (smtpd: util.c, valid_domainpart)."""
    if len(host) > HOST_BYTES:
        return f"has more than {HOST_BYTES} bytes, which smtpd on Linux rejects"
    if host.startswith(b"["):
        address = host[6:-1] if host[1:6].lower() == b"ipv6:" else host[1:-1]
        valid = inet6_pton(address) is not None or dotted_quad(address) is not None
        return None if valid else "is not an address; only addresses may be in brackets (remove the brackets)"
    if compiled(rb"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*").fullmatch(host):
        return None
    return _cause(host, (*_FOREIGN, *_ODD, *_dots("remove it"))) or "is not a host name"


def _addrname(_table: Table, _key: bytes, value: bytes) -> str | None:
    problem = _host_problem(value)
    return problem and f"the value is the name that smtpd uses for itself, and {problem}"


def _relayhost(_table: Table, key: bytes, value: bytes) -> str | None:
    """By the steps of smtpd's to.c, text_to_relayhost. Without a value the key is the host."""
    text = value or key
    what = "value" if value else "key"
    found = compiled(rb"(?i)(smtp|smtp\+tls|smtp\+notls|smtps|lmtp)://").match(text)
    if found is None and b"://" in text:
        return f"the {what} has an unknown scheme (use smtp, smtp+tls, smtp+notls, smtps or lmtp)"
    if len(text) > MAX_KEY_BYTES:
        return f"the {what} has more than {MAX_KEY_BYTES} bytes, which smtpd rejects"
    scheme = found[1].lower() if found else b""
    label, at, rest = text[found.end() if found else 0 :].partition(b"@")
    host, colon, port, left = _host_and_port(rest if at else label)
    if colon and not (compiled(rb"[ \t-\r]*[+-]?[0-9]{1,20}").fullmatch(port) and 1 <= int(port) <= 65535):
        postfix = "" if scheme else " (write Postfix's TRANSPORT:[HOST]:PORT as smtp://HOST:PORT)"
        return f"the port of the {what} must be between 1 and 65535{postfix}"
    if problem := _host_problem(host) if host or not left else _cause(left, (*_FOREIGN, *_ODD)) or "is missing":
        return f"the host of the {what} {problem}"
    if scheme == b"lmtp" and not colon:
        return f"the {what} has no port, and lmtp has no default (write lmtp://HOST:24)"
    if at and label and scheme not in (b"smtp+tls", b"smtps"):
        return f"the {what} has a label without TLS, which smtpd rejects (use smtp+tls:// or smtps://)"
    if left not in (b"", b"/"):
        return f"smtpd ignores the text after the host of the {what}: {_cause(left, (*_FOREIGN, *_ODD)) or 'remove it'}"
    return None


def _host_and_port(text: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Host, the colon if there is one, the port, and the text that smtpd ignores."""
    found = compiled(rb"(?s)(\[[^\]]*\]|[A-Za-z0-9_.-]*)(?:(:)(.*)|(.*))").fullmatch(text)
    assert found is not None
    host, colon, port, left = found.groups(b"")
    return host, colon, port, left


# Dovecot's formats that no crypt(3) reads (doc.dovecot.org, Password Schemes).
_FOREIGN_SCHEME = (
    rb"(?is)\{(?:PLAIN|CLEAR|CLEARTEXT|L?S?(?:MD5|SHA)|S?SHA(?:256|512)|(?:PLAIN|LDAP|CRAM|DIGEST|HMAC)-[A-Z0-9]+"
    rb"|PBKDF2|SCRAM-[A-Z0-9-]+|ARGON2ID?|LANMAN|NTLM|OTP|SKEY|RPA)(?:\.[A-Z0-9]+)?\}.*"
)


def _credential(service: str, table: Table, _key: bytes, value: bytes) -> str | None:
    """Warn if no login can succeed. USER:... is exempt: it may be a plain-text relay password."""
    secret = passwords.hash_part(value)
    if secret.startswith(b"$apr1$"):
        return "an MD5 hash of Apache's htpasswd, which crypt(3) does not read (use `smtpctl encrypt`)"
    if service == "credentials":
        foreign = compiled(_FOREIGN_SCHEME).fullmatch(secret) or secret.startswith(b"$argon2")
        if (b":" in value and not foreign) or secret.startswith(passwords.LOCK_MARKERS):
            return None
        if "auth" not in table.services:
            if not foreign and passwords.is_crypt_hash(secret):
                return None
            return (
                "not a hash that smtpd's crypt(3) reads, so no login can succeed (use the output of "
                "`smtpctl encrypt`; argon2 needs the service auth; to relay, write USER:PASSWORD)"
            )
    try:
        parsed = passwords.verifiable_hash(value, table.deadline)
    except EntryError as error:
        return str(error)
    if parsed is not None and parsed.scheme == "DES" and not passwords.is_crypt_hash(secret):
        return "13 letters that only look like a DES hash (use the output of `smtpctl encrypt`)"
    return None


_VALUES: Mapping[str, Callable[[Table, bytes, bytes], str | None]] = {
    "alias": lambda _table, _key, value: _list_problem(value, element_problem),
    "mailaddrmap": lambda _table, _key, value: _list_problem(value, _address_problem),
    "userinfo": _userinfo,
    "source": _source,
    "addrname": _addrname,
    "relayhost": _relayhost,
    "credentials": functools.partial(_credential, "credentials"),
    "auth": functools.partial(_credential, "auth"),
}
