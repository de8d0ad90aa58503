"""The elements of a list of recipients: how smtpd splits and reads them, and why it cannot use one.

Pure: bytes in, text out, following the functions of smtpd that are named. No text contains any part of a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from table_consul.errors import UNDECODABLE, EntryError
from table_consul.services import compiled

# smtpd: smtpd-defines.h, SMTPD_MAXLOCALPARTSIZE; smtpd.h, EXPAND_BUFFER. Without the NUL.
USER_BYTES = 255
COMMAND_BYTES = 1023

# Lists of users and addresses that need no further check, as nearly all.
_PLAIN = rb"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*(?:@[A-Za-z0-9][A-Za-z0-9-]*(?:\.[A-Za-z0-9-]+)*)?"
_PLAIN_LIST = rb"%b(?:, ?%b)*" % (_PLAIN, _PLAIN)
_USER = rb"[A-Za-z0-9_.+-]{1,%d}" % USER_BYTES
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
# A placeholder that sendmail or Postfix fills in.
_TEMPLATE = rb"(?:%[0-9a-z]|[$\\][0-9]|\$\{[0-9]\})@"

# Characters that look like others, by expression.
FOREIGN = (
    (rb"\xef\xbb\xbf", "contains a byte order mark (remove it)"),
    (rb"\xc2\xa0|\xe2\x80[\x80-\x8a\xaf]", "contains a non-breaking space (write an ordinary one, or none)"),
    (rb"\xe2\x80[\x8b-\x8f]|\xe2\x81\xa0|\xc2\xad", "contains a zero-width space (remove it)"),
    (rb"\xef\xbc\x8c|\xe3\x80\x81", "contains a full-width comma (write an ordinary one)"),
    (rb"\xe2\x80[\x98-\x9f]", "contains curly quotes (remove them)"),
    (rb"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[A-Za-z]+);", "contains an HTML entity (write the character itself)"),
)
# Characters that no address contains.
ODD = (
    (rb"[<>]", "contains angle brackets (write the address alone)"),
    (rb"[\"']", "contains quotes (remove them)"),
    (rb"[ \t-\r]", "contains white space"),
    (rb"[,;]", "contains a comma or semicolon"),
    (rb"[^\0-\x7f]", "contains letters outside ASCII (write internationalised domains as xn--...)"),
)
ODD_IN_LIST = (*ODD[:2], (ODD[2][0], "contains white space (is a comma missing?)"), *ODD[3:])
_CAUSES = (
    *FOREIGN,
    (rb"\A(?i::?(?:error|fail|defer|reject):)", "is not an error reply in smtpd's form (write error:550 text)"),
    (rb"\A(?i::blackhole:)", "is Exim's way to discard mail (write /dev/null)"),
    (rb"\A(?i::?include:)", "includes a file by a relative path (write :include:/PATH)"),
    (rb'\A"/', "is a file name in quotes (remove them)"),
    (rb'\A"?[|/]', f"is a command without its closing quote, or has more than {COMMAND_BYTES} bytes"),
    (rb"\A(?i:mailto:)", "begins with mailto: (write the address alone)"),
    (rb"\A[A-Za-z0-9_.+-]+:", "looks like a line of an aliases file (store the value of each name under its own key)"),
    *ODD_IN_LIST,
    (rb"\A@", "is a whole domain, which smtpd cannot deliver to (write an address)"),
    (rb"@\Z", "has nothing after the @"),
    (rb"@.*@", "contains two @ (is a comma missing?)"),
    (rb"\A[^@]*\Z", f"is neither a user (letters, digits and _.+-, at most {USER_BYTES}) nor an address"),
    (rb"@", "is neither a user nor an address (a domain is letters, digits, - and .)"),
)


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
            return Element("address", local[:USER_BYTES], domain[:USER_BYTES])
        element = local  # alias_is_address has truncated it there
    return Element("user", element) if compiled(_USER).fullmatch(element) else None


def cause(text: bytes, causes: Iterable[tuple[bytes, str]]) -> str | None:
    """The text of the first expression that matches, None if none does."""
    return next((what for expression, what in causes if compiled(expression).search(text)), None)


def is_plain_list(text: bytes) -> bool:
    """Whether smtpd reads this as users and addresses in every service: no quotes, no commands, nothing too long."""
    return len(text) <= USER_BYTES and compiled(_PLAIN_LIST).fullmatch(text) is not None


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


def element_problem(element: bytes) -> str | None:
    """Why smtpd rejects or misreads an element of an alias, with a hint; None if it does not."""
    parsed = parse_element(element)
    truncated = parsed is not None and parsed.kind == "user" and b"@" in element
    if parsed is not None and not truncated:
        if compiled(_TEMPLATE).match(element):
            return "begins with a placeholder, which smtpd does not fill in (write an alias for each user)"
        return None
    effect = "delivers to the local user before the @ instead" if truncated else "rejects the whole alias because of it"
    return f"{cause(element, _CAUSES)}; smtpd {effect}"
