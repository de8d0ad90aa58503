"""Read and write the files that tables are made from: file: tables, aliases(5), maps of Postfix, passwd files, exports.

Pure: bytes in, entries and line problems out. Values are not validated here. A line without an equivalent in smtpd is a
problem, never a guess.
"""

from __future__ import annotations

import contextlib
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from table_consul.errors import UNDECODABLE, TableConsulError, counted, printable
from table_consul.services import MAX_KEY_BYTES, Service, fold_key

FORMATS = ("auto", "aliases", "table", "passwd", "export", "conf", "transport")

_SPACE = b" \t\n\v\f\r"  # isspace(3) in the C locale, as smtpd uses it
_BLANKS = b" \t"
_KEY_END = re.compile(rb"[ \t:]")
# A user in seven or more fields, with a field after a hash or lock, or with ids and at most a home after them.
_PASSWD_LINE = re.compile(
    rb"[^:\s]+(?:(?::[^:]*){6,}|:(?:\$[0-9a-z-]+[$,]|\{[A-Za-z0-9.-]+\}|[!*])[^:]*:.*"
    rb"|:[^:]*:(?:\d+:\d+(?::[^:]*)?|\d*:\d*:[^:]*:(?:/[^:]*)?))"
)
_EITHER_LINE = re.compile(rb"[^:\s]+:[^:]*")  # such as USER:HASH, which both formats read alike
_CONF_TABLE = re.compile(rb"^[ \t]*table[ \t]+(?:[^\s{]+[ \t]*\{|\S+[ \t]+\"?[a-z]+:/)", re.MULTILINE)
_TRANSPORT = re.compile(
    rb"^[^#\s]\S*[ \t]+(?:(?:smtps?|relay|lmtp|local|virtual|error|retry|discard|uucp|maildrop)?:(?!//|[0-9]+\s)"
    rb"|[a-z0-9_-]+:\[)",
    re.MULTILINE,
)
# A port after the host and its colon, as in Postfix's smtp_sasl_password_maps: [HOST]:PORT USER:PASSWORD.
_SASL_PORT = re.compile(rb"(?:[0-9]+|smtps?|submissions?)[ \t]+[^ \t:]+:.", re.DOTALL)
_TABLE_ENTRY = re.compile(rb"(\[[^\]]*\]|(?!\[)[^ \t:]*)(?:.[ \t]*(.*))?", re.DOTALL)


class FormatError(TableConsulError):
    """A file or a line is not in the expected format, or entries cannot be written in a format."""


class FileEntry(NamedTuple):
    """A key and its value (empty if there is none) from a file, and the line where they start."""

    key: bytes
    value: bytes
    line: int
    flags: int = 0


class LineProblem(NamedTuple):
    """A line of the file and its problem; line 0 for an entry that is only in Consul."""

    line: int
    text: str
    key: bytes = b""
    """Empty if the line cannot be read."""


class ParsedFile(NamedTuple):
    """The entries of a file, and the problems of its lines."""

    format: str
    entries: list[FileEntry]
    problems: list[LineProblem]
    left_out: int = 0
    """How many entries of an export belong to other folders."""
    notes: Sequence[LineProblem] = ()
    """Lines that are skipped without loss."""
    restores: bool = False
    """The file is an export of the target folder: a backup, whose entries are restored unchanged."""

    @property
    def unit(self) -> str:
        """The unit of the line numbers: ``entry`` for an export, otherwise ``line``."""
        return "entry" if self.format == "export" else "line"


def detect_format(data: bytes, service: Service) -> str:
    """The format of the file.

    Raises:
        FormatError: the lines look like two formats, or the file is JSON of another kind.
    """
    if re.match(rb"\s*\[\s*(?:\{|\]\s*\Z)", data):
        return "export"
    if data.lstrip(_SPACE)[:1] in (b"{", b"["):
        with contextlib.suppress(*UNDECODABLE):
            msgspec.json.decode(data)
            raise FormatError("JSON, but not the output of `consul kv export`")
    if _CONF_TABLE.search(data):
        return "conf"
    if service.name == "alias":
        return "aliases"
    if service.name == "relayhost" and _TRANSPORT.search(data):
        return "transport"
    significant = [line for _, line in significant_lines(data)] if service.fields else []
    lines = [line for line in significant if not _EITHER_LINE.fullmatch(line)]
    users = sum(bool(_PASSWD_LINE.fullmatch(line)) for line in lines)
    if 0 < users < len(lines):
        raise FormatError(
            f"passwd entries in {users} of {counted(len(significant), 'line', 'lines')} only (use --format passwd or"
            " --format table)"
        )
    return "passwd" if users else "table"


def significant_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and stripped text of each line that is neither empty nor a comment."""
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip(_SPACE)
        if text and not text.startswith(b"#"):
            yield number, text


def parse_lines(
    name: str, lines: Iterable[tuple[int, bytes]], parse: Callable[[bytes], tuple[bytes, bytes]]
) -> ParsedFile:
    """The entries of a file with one entry per line. Keys become lower case, as smtpd looks them up."""
    parsed = ParsedFile(name, [], [])
    for number, text in lines:
        try:
            key, value = parse(text)
        except FormatError as error:
            parsed.problems.append(LineProblem(number, str(error)))
        else:
            parsed.entries.append(FileEntry(fold_key(key), value, number))
    return parsed


def read_table(data: bytes, service: Service) -> ParsedFile:
    """The entries of a list or mapping, as smtpd reads ``file:`` tables (smtpd: util.c, parse_table_line).

    It is a list if the first entry has no value, or if the comment ``# @list`` precedes it. Lines are never continued.
    """
    lines = list(significant_lines(data))
    if not lines:
        return ParsedFile("table", [], [])
    first, text = lines[0]
    comments = data.split(b"\n")[: first - 1]
    listed = any(line.strip(_SPACE)[1:].lstrip(_SPACE) == b"@list" for line in comments)
    mapped = False
    if not listed:
        with contextlib.suppress(FormatError):
            mapped = _split_entry(text)[1] is not None
            listed = not mapped
    if (listed and service.needs_value) or (mapped and service.lists_only):
        return ParsedFile("table", [], [LineProblem(first, kind_problem(service, listed=listed))])

    def parse(text: bytes) -> tuple[bytes, bytes]:
        key, value = _split_entry(text)
        if listed:
            return text, b""
        if not key:
            raise FormatError("has no key")
        if not value:
            raise FormatError("has no value, but the first entry of the file has one")
        if value.startswith((b": ", b":\t")):
            raise FormatError("has a blank before its colon, so smtpd would read the colon as part of the value")
        if service.hashed and text[len(key) :].startswith(b":") and _SASL_PORT.match(value):
            raise FormatError(
                "has the port of a Postfix sasl_passwd map, which smtpd would read as part of the user"
                " (write LABEL USER:PASSWORD)"
            )
        return key, value

    return parse_lines("table", lines, parse)


def kind_problem(service: Service, *, listed: bool) -> str:
    """The problem of a list, or of a mapping, for a service that accepts only the other."""
    if listed:
        return f"has no value, so smtpd would read the file as a list, but {service.name} requires values"
    hint = "remove the values, or add the comment # @list if each line is one key"
    return f"has a value, so smtpd would read the file as a mapping, but {service.name} requires a list ({hint})"


def _split_entry(text: bytes) -> tuple[bytes, bytes | None]:
    """Key and value of a line of a mapping; the value is None if smtpd finds no separator."""
    match = _TABLE_ENTRY.fullmatch(text)
    if match is None:
        raise FormatError("starts with [ but has no ]")
    return match[1], match[2]


def table_text(service: Service, entries: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, list[bytes]]:
    """The entries as a ``file:`` table for smtpd, and the keys of the entries that such a table cannot hold.

    It is a list if no entry has a value, or if smtpd accepts only lists for the service. An entry that import would
    read differently from smtpd is left out as well.
    """
    pairs = [(fold_key(key), b"" if service.lists_only else value) for key, value in entries]
    listed = not any(value for _, value in pairs) and not service.needs_value
    separator = b":\t" if service.name == "alias" else b"\t"
    # The first line determines how smtpd reads the others.
    first, number = (b"# @list\n", 0) if listed else (b"-\t-\n", 1)
    lines: list[bytes] = [first] if listed else []
    left_out: list[bytes] = []
    for key, stored in pairs:
        value = key if not stored and not listed and service.answers == "entry" else stored
        line = (key if listed else key + separator + value) + b"\n"
        readings = [read_table(first + line, service).entries[number:]]
        if service.name == "alias":
            readings.append(read_aliases(line).entries)
        same = all([each[:2] for each in entries] == [(key, value)] for entries in readings)
        if same and len(key) <= MAX_KEY_BYTES and b"\0" not in line and not line.startswith(BOM_UTF8):
            lines.append(line)
        else:
            left_out.append(key)
    return b"".join(lines), left_out


_QUOTED_COMMAND = re.compile(rb'(?:(?<=,)|\A)\s*\|"((?:[^"\\]|\\.)*)"\s*(?=,|\Z)')
_QUOTED = re.compile(rb'\\.|"((?:[^"\\]|\\.)*)"', re.DOTALL)
# A continuation line that smtpd 7.6 and later would read as a separate entry of a file: table.
_OWN_ENTRY = re.compile(rb'"[^"]*"\s*:|[A-Za-z0-9_.+@*=-]+(?:[ \t]*:|[ \t]+[^ \t,])')
_AMBIGUOUS = (
    "starts with a blank, which continues an entry in aliases(5), but starts one in a file: table of smtpd (use"
    " --format aliases or --format table)"
)
# A line up to its comment: a # at the start or after a blank, neither quoted nor escaped.
_UNCOMMENTED = re.compile(rb'(?:\\.?|"(?:\\.?|[^"\\])*"?|[^"\\#]|(?<=[^ \t])#)*', re.DOTALL)


def read_aliases(data: bytes, *, cautious: bool = False) -> ParsedFile:
    """The entries of an aliases(5) file of smtpd, Postfix or sendmail: ``key: element, element``, quotes, comments.

    A line that starts with a blank, or follows one that ends in a backslash, continues the previous line. With
    ``cautious``, a continuation that smtpd would read as a separate entry of a ``file:`` table is a problem.
    """
    logical: list[tuple[int, list[bytes]]] = []
    problems: list[LineProblem] = []
    escaped = False
    for number, line in enumerate(data.split(b"\n"), 1):
        match = _UNCOMMENTED.match(line)
        text = (match[0] if match else line).rstrip(_SPACE)
        if not text:
            continue
        after_backslash = escaped
        escaped = text.endswith(b"\\") and not text.endswith(b"\\\\")
        part = text[: -1 if escaped else None].strip(_SPACE)
        if not after_backslash and text[:1] not in (b" ", b"\t"):
            logical.append((number, [part]))
        elif not logical:
            problems.append(LineProblem(number, "starts with a blank, but there is no previous line to continue"))
        elif cautious and not after_backslash and not logical[-1][1][-1].endswith(b",") and _OWN_ENTRY.match(part):
            problems.append(LineProblem(number, _AMBIGUOUS))
        else:
            logical[-1][1].append(part)
    parsed = parse_lines("aliases", ((number, b" ".join(parts)) for number, parts in logical), _alias)
    return parsed._replace(problems=sorted(problems + parsed.problems))


def _unquote(match: re.Match[bytes]) -> bytes:
    """An element or a local part as smtpd reads it: without its quotes, unless it is a command (smtpd: to.c).

    Quotes stay around a name with a blank: smtpd has no such users, and lint reports the name.
    """
    text = re.sub(rb"\\(.)", rb"\1", match[1] or b"")
    before, after = match.string[: match.start()].rstrip(), match.string[match.end() :]
    whole = before[-1:] in (b"", b",") and (after[:1] == b"@" or after.lstrip()[:1] in (b"", b","))
    is_text = text.startswith((b"/", b":include:", b"error:"))
    if not whole or not text or text.lstrip().startswith(b"|") or (b" " in text and not is_text):
        return match[0]
    return re.sub(rb"""[\\,'"]""", rb"\\\g<0>", text)


def _alias(text: bytes) -> tuple[bytes, bytes]:
    if text.startswith(b'"'):
        key, _, rest = text[1:].partition(b'"')
        if not rest.lstrip(_BLANKS).startswith(b":"):
            raise FormatError("starts with a quote, but not with a quoted key and a colon")
    else:
        key = _KEY_END.split(text, 1)[0]
        rest = text[len(key) :]
    rest = rest.lstrip(_BLANKS)
    if rest.startswith(b":") and not rest.lower().startswith((b":include:", b":error:")):
        rest = rest[1:]
    value = _QUOTED.sub(_unquote, _QUOTED_COMMAND.sub(rb' "|\1"', rest)).strip(_SPACE + b",")
    if not key or not value:
        raise FormatError("has no value" if key else "has no key")
    return key, value


# Text between slashes is not enough: it may be a key, and the alias `if` may be /dev/null.
_EXPRESSION = re.compile(rb"!?/.*[\\^$(|].*/[a-z]*")


def without_domains(parsed: ParsedFile) -> ParsedFile:
    """The file without what only Postfix's virtual(5) has: lines that declare domains, and expressions."""
    domains = {key.partition(b"@")[2] for key, _, _, _ in parsed.entries if b"@" in key}
    entries, problems, notes = [], [*parsed.problems], []
    for entry in parsed.entries:
        if entry.key in domains and b"." in entry.key:
            text = "declares a domain of Postfix's virtual(5); skipped (import it for the service domain)"
            notes.append(LineProblem(entry.line, text, entry.key))
        elif _EXPRESSION.fullmatch(entry.key) or (entry.key == b"if" and _EXPRESSION.fullmatch(entry.value)):
            text = "is an expression of a Postfix regexp: or pcre: map, which smtpd does not support in aliases"
            problems.append(LineProblem(entry.line, text, entry.key))
        else:
            entries.append(entry)
    return parsed._replace(entries=entries, problems=sorted(problems), notes=notes)


_SCHEMES = {b"": b"smtp", b"smtp": b"smtp", b"relay": b"smtp", b"smtps": b"smtps", b"lmtp": b"lmtp"}
_NEXTHOP = re.compile(rb"(?:\[(?:(?i:ipv6):)?([^\]]+)\]|([^\[\]:,\s]+))(?::([0-9]+|smtp|submissions?|smtps|lmtp))?")
_PORTS = {b"smtp": b"25", b"submission": b"587", b"submissions": b"465", b"smtps": b"465", b"lmtp": b"24"}


def read_transport(data: bytes) -> ParsedFile:
    """The relay hosts of a Postfix transport(5) map, for `action ... relay domain <table>`."""
    return parse_lines("transport", significant_lines(data), _relay)


def _relay(text: bytes) -> tuple[bytes, bytes]:
    key, value = (*text.split(None, 1), b"")[:2]
    if key == b"*":
        raise FormatError("matches all domains, but smtpd looks up one domain (write `relay host URL` in smtpd.conf)")
    if key.startswith(b".") or b"@" in key:
        kind = "an address" if b"@" in key else "the hosts below a domain"
        raise FormatError(f"matches {kind}, but smtpd looks up relay hosts by domain only")
    if b"://" in value:
        return key, value
    transport, colon, nexthop = value.partition(b":")
    name = printable(transport)
    if not colon:
        raise FormatError("has no transport")
    if transport not in _SCHEMES:
        raise FormatError(f"the Postfix transport {name} is not a relay host (write a rule in smtpd.conf)")
    if not nexthop:
        raise FormatError(
            "is delivered by MX, which a table of relay hosts cannot express (write a rule in smtpd.conf)"
        )
    match = _NEXTHOP.fullmatch(nexthop.removeprefix(b"inet:") if transport == b"lmtp" else nexthop)
    if match is None:
        raise FormatError(f"the nexthop of {name or 'Postfix'} must be [HOST] or [HOST]:PORT")
    host, bare, port = match.groups(b"")
    if bare and transport != b"lmtp":
        raise FormatError("is relayed to the MX of the nexthop, but smtpd relays to a host (write [HOST])")
    host = host or bare
    scheme = _SCHEMES[transport]
    port = _PORTS.get(port, port) or (b"24" if scheme == b"lmtp" else b"")
    return key, scheme + b"://" + (b"[%b]" % host if b":" in host else host) + (b":" + port if port else b"")


def read_passwd(data: bytes, service: Service, *, record: bool = False) -> ParsedFile:
    """The users of a passwd(5), shadow(5), master.passwd(5) or Dovecot passwd-file, with values for the service.

    With ``record`` each value is a JSON object for ``credentials``, ``auth`` and ``userinfo``.
    """
    value_of = _user_record if record else _PASSWD_VALUES[service.name]

    def parse(line: bytes) -> tuple[bytes, bytes]:
        fields = [field.strip(_BLANKS) for field in line.split(b":")]
        if not fields[0]:
            raise FormatError("has no user")
        if fields[0].startswith((b"+", b"-")):
            raise FormatError("is an NIS entry, not a user")
        if len(fields) < 2:
            raise FormatError("has no colon, so it is not a user")
        # master.passwd(5) of the BSDs: name, password, uid, gid, class, change, expire, gecos, home, shell. Dovecot may
        # have extra fields there, such as userdb_mail=maildir:/PATH.
        master = len(fields) == 10 and not fields[5].startswith(b"/") and fields[8].startswith(b"/")
        if master and b"=" not in fields[7]:
            del fields[4:7]
        # shadow(5): name, password, five numbers of days, which are neither ids nor a home, a date, and nothing.
        days = len(fields) == 9 and not b"".join(fields[2:]).strip(b"0123456789")
        if days and (fields[4] or not fields[3]):
            del fields[2:]
        user, password, uid, gid, _, home = (*fields, b"", b"", b"", b"")[:6]
        return user, value_of(password, uid, gid, home)

    return parse_lines("passwd", significant_lines(data), parse)


def _password(password: bytes, *_user: bytes) -> bytes:
    if password == b"x":
        raise FormatError("has its password in another file (import /etc/shadow)")
    if not password:
        raise FormatError("has no password")
    return password if password.strip(b"*!") else b"*"  # the same marker for every locked account, including `!*`


def _user(_password: bytes, *user: bytes) -> bytes:
    if not all(user[:2]):  # smtpd delivers without a home
        raise FormatError("has no uid and gid")
    return b":".join(user)


def _user_record(password: bytes, uid: bytes, gid: bytes, home: bytes) -> bytes:
    texts = {"password": b"" if password == b"x" else password, "uid": uid, "gid": gid, "home": home}
    try:
        record: dict[str, object] = {name: text.decode() for name, text in texts.items() if text}
    except UnicodeDecodeError:
        raise FormatError("is not valid UTF-8, which JSON requires") from None
    # int() of very many digits is slow.
    record |= {name: int(texts[name]) for name in ("uid", "gid") if re.fullmatch(rb"\d{1,20}", texts[name])}
    if not record:
        raise FormatError("has neither a password nor uid, gid and home")
    return msgspec.json.encode(record)


_PASSWD_VALUES = {"credentials": _password, "auth": _password, "userinfo": _user}


def entries_of_export(
    exported: Sequence[tuple[bytes, bytes, int]], service: Service, path: bytes, below: bytes | None = None
) -> ParsedFile:
    """The entries of one folder in an export, with keys relative to it in their original case.

    ``exported`` are whole keys, values and flags. The folder is ``below`` if given; otherwise ``path``, the target
    folder, if there are keys below it; otherwise the only folder named after the service. Keys that end in ``/`` are
    folders, not entries.

    Raises:
        FormatError: no folder is found, or ``below`` has no entries but other folders do.
    """
    keys = [key for key, _, _ in exported]
    folder = path if below is None else below
    if below is None and keys and not any(key.startswith(path) for key in keys):
        name = re.compile(rb"(?:\A|/)%b/" % re.escape(service.name.encode()))
        folders = sorted({key[: match.end()] for key in keys if (match := name.search(key))})
        if len(folders) != 1:
            found = ", ".join(printable(each) for each in folders[:3]) or f"none is named {service.name}/"
            raise FormatError(f"cannot choose a folder of the export: {found} (use --from FOLDER)")
        folder = folders[0]
    entries = [
        FileEntry(key[len(folder) :], value, number, flags)
        for number, (key, value, flags) in enumerate(exported, 1)
        if key.startswith(folder) and not key.endswith(b"/")
    ]
    left_out = sum(not key.startswith(folder) for key in keys)
    if below is not None and not entries and left_out:
        raise FormatError(f"contains no keys below {printable(below)}")
    return ParsedFile("export", entries, [], left_out, restores=folder == path)
