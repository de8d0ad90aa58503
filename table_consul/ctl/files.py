"""Files that tables are made from: what their lines say, and which of them cannot be understood.

Pure: bytes in, entries and problems out, each with its line. Knows nothing of Consul or of what a service takes.
"""

from __future__ import annotations

import contextlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable

import msgspec

from table_consul.ctl.aliases import read_aliases
from table_consul.ctl.entries import BLANKS, SPACE, Entry, FormatError, Parsed, Problem, content
from table_consul.ctl.passwd import read_passwd
from table_consul.errors import UNDECODABLE, printable
from table_consul.services import MAX_KEY_BYTES, Service, fold_key

FORMATS = ("auto", "aliases", "table", "passwd", "export")
# Services whose entries may stand without a value: smtpd then takes the file for a list.
LISTED = ("domain", "netaddr", "source", "mailaddr", "relayhost", "regex", "string")

_JSON_LIST = re.compile(rb"\s*\[\s*(?:\{|\]\s*\Z)")
_PASSWD = re.compile(rb"[^:\s]+(?::[^:]*){6,}")
# Editors of Windows put it before UTF-8.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BERKELEY = {number.to_bytes(4, order) for number in (0x00061561, 0x00053162) for order in ("big", "little")}
_MAGIC = (
    (b"\x1f\x8b", "compressed by gzip; pipe it in: gzip -dc FILE | table-consulctl import ... -"),
    (b"BZh91AY&SY", "compressed by bzip2; pipe it in: bzip2 -dc FILE | table-consulctl import ... -"),
    (b"\xfd7zXZ\0", "compressed by xz; pipe it in: xz -dc FILE | table-consulctl import ... -"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; pipe it in: zstd -dc FILE | table-consulctl import ... -"),
    (b"PK\x03\x04", "a zip archive; give the file within it"),
    (b"SQLite format 3\0", "an SQLite database; give what a query of yours writes"),
    (b"\xff\xfe", "UTF-16; pipe it in: iconv -f UTF-16 -t UTF-8 FILE | table-consulctl import ... -"),
    (b"\xfe\xff", "UTF-16; pipe it in: iconv -f UTF-16 -t UTF-8 FILE | table-consulctl import ... -"),
)


def refuse_binary(data: bytes) -> None:
    """Raises FormatError when this is no text, with what it is and what to do instead."""
    place = data.find(b"\0")
    if place < 0:
        with contextlib.suppress(UnicodeDecodeError):
            data.decode()
            return
    for magic, what in _MAGIC:
        if data.startswith(magic):
            raise FormatError(f"this is {what}")
    if data[257:262] == b"ustar":
        raise FormatError("this is a tar archive; give the file within it")
    if data[:4] in _BERKELEY or data[12:16] in _BERKELEY:
        raise FormatError("this is a Berkeley DB; give the text that it was made from, or what makemap -U FILE writes")
    if place >= 0:
        line = data.count(b"\n", 0, place) + 1
        raise FormatError(f"this is no text: NUL in line {line}")


def guess(data: bytes, service: Service) -> str:
    """The format of the file, by rules that prefer a question to a mistake; see the help of the command.

    Raises:
        FormatError: some lines look like one format, some like another; or it is a file of other JSON.
    """
    if _JSON_LIST.match(data):
        return "export"
    if data.lstrip(SPACE)[:1] in (b"{", b"[") and _is_json(data):
        raise FormatError("this is JSON, but no output of `consul kv export`")
    if service.name == "alias":
        return "aliases"
    if service.fields:
        lines = [line for _, line in content(data)]
        users = sum(bool(_PASSWD.fullmatch(line)) for line in lines)
        if users and users < len(lines):
            raise FormatError(
                f"{users} of {len(lines)} lines look like users of a passwd file, the others do not: say which with"
                " --format passwd or --format table"
            )
        return "passwd" if users else "table"
    return "table"


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except UNDECODABLE:
        return False
    return True


def read(
    data: bytes, service: Service, wanted: str, *, path: bytes, below: bytes | None = None, record: bool = False
) -> Parsed:
    """What the file says, in the format ``wanted``; ``path`` is the bucket that an export is for, see read_export.

    Raises:
        FormatError: this is no such file.
    """
    refuse_binary(data)
    data = data.removeprefix(_BYTE_ORDER_MARK)
    name = guess(data, service) if wanted == "auto" else wanted
    if name == "export":
        parsed = read_export(data, service, path, below)
        if below is not None and not parsed.entries and parsed.left_out:
            raise FormatError(f"no key in it is below {printable(below)}")
        return parsed
    if name == "passwd":
        return read_passwd(data, service, record=record)
    if name == "aliases":
        return read_aliases(data, cautious=wanted == "auto")
    return read_table(data, service)


def read_table(data: bytes, service: Service) -> Parsed:
    """A file as smtpd reads ``file:`` tables (smtpd: util.c, parse_table_line): a list, or a mapping.

    Which of them the first entry says, by having a value, or ``# @list`` before it. No line continues another. Keys
    come in lower case, as smtpd asks for them.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    listed: bool | None = None
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip(SPACE)
        if not text:
            continue
        if text.startswith(b"#"):
            if listed is None and text[1:].lstrip(SPACE) == b"@list":
                listed = True
            continue
        parts = split_entry(text)
        if listed is None:
            listed = parts is not None and parts[1] is None
        if listed and service.name not in LISTED:
            problems.append(Problem(number, f"makes the file a list to smtpd, and {service.name} needs values"))
            break
        what = _wrong(parts, listed=listed)
        if what or parts is None:
            problems.append(Problem(number, what))
        else:
            entries.append(
                Entry(fold_key(text), b"", number) if listed else Entry(fold_key(parts[0]), parts[1] or b"", number)
            )
    return Parsed("table", entries, problems)


def _wrong(parts: tuple[bytes, bytes | None] | None, *, listed: bool) -> str:
    """What smtpd would not take, or would not take as it was meant; empty if nothing."""
    if parts is None:
        return "begins with [ and has no ]"
    if listed:
        return ""
    key, value = parts
    if not key:
        return "has no key"
    if not value:
        return "has no value, as the first entry of the file has"
    if value.startswith((b": ", b":\t")):
        return "has a blank before its colon, which smtpd takes for part of the value"
    return ""


def split_entry(text: bytes) -> tuple[bytes, bytes | None] | None:
    """Key and value of a line of a mapping; no value where smtpd sees no separator; None for a ``[`` without ``]``."""
    if text.startswith(b"["):
        end = text.find(b"]") + 1
        if not end:
            return None
    else:
        end = next((at for at, c in enumerate(text) if c in b" \t:"), len(text))
    if end == len(text):
        return text, None
    return text[:end], text[end + 1 :].lstrip(BLANKS)


class _Exported(msgspec.Struct):
    key: str
    value: str | None = None
    flags: int = 0


_EXPORT = msgspec.json.Decoder(list[_Exported])


def read_export(data: bytes, service: Service, path: bytes, below: bytes | None = None) -> Parsed:
    """Entries of a ``consul kv export`` with keys relative to their folder, in the spelling they have.

    The folder is ``below`` if given; else ``path``, the bucket to be filled, if the file has keys there; else the only
    folder in the file that is called as the service. Folders themselves (keys that end in ``/``) are no entries.

    Raises:
        FormatError: this is no export, or none of these rules finds a folder.
    """
    try:
        found = [
            (each.key.encode(), b64decode(each.value or "", validate=True), each.flags) for each in _EXPORT.decode(data)
        ]
    except UNDECODABLE as error:
        raise FormatError(f"this is no output of `consul kv export`: {printable(str(error))}") from None
    folder = _folder([key for key, _, _ in found], service, path) if below is None else below
    entries = [
        Entry(key[len(folder) :], value, number, flags)
        for number, (key, value, flags) in enumerate(found, 1)
        if key.startswith(folder) and not key.endswith(b"/")
    ]
    return Parsed("export", entries, [], sum(not key.startswith(folder) for key, _, _ in found))


def _folder(keys: list[bytes], service: Service, path: bytes) -> bytes:
    if not keys or any(key.startswith(path) for key in keys):
        return path
    name = re.compile(rb"(?:\A|/)%b/" % re.escape(service.name.encode()))
    folders = sorted({key[: match.end()] for key in keys if (match := name.search(key))})
    if len(folders) == 1:
        return folders[0]
    seen = ", ".join(printable(folder) for folder in folders[:3]) or f"none is called {service.name}/"
    raise FormatError(f"it is not clear which folder of the export is meant ({seen}): say so with --from FOLDER")


def table_text(service: Service, entries: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, list[bytes]]:
    """The entries as a ``file:`` table that smtpd reads, and the keys of those that cannot be said in one.

    A list if no entry has a value. What import would read otherwise than smtpd counts as what cannot be said.
    """
    found = [(fold_key(key), value) for key, value in entries]
    listed = not any(value for _, value in found) and service.name in LISTED
    separator = b":\t" if service.name == "alias" else b"\t"
    lines: list[bytes] = [b"# @list\n"] if listed else []
    unsaid: list[bytes] = []
    for key, value in found:
        if not value and not listed and service.answers == "entry":
            value = key  # noqa: PLW2901 - what smtpd is told for such an entry
        line = (key if listed else key + separator + value) + b"\n"
        if _reads_back(line, key, value, service, listed=listed):
            lines.append(line)
        else:
            unsaid.append(key)
    return b"".join(lines), unsaid


def _reads_back(line: bytes, key: bytes, value: bytes, service: Service, *, listed: bool) -> bool:
    # smtpd: table_static.c, table_static_priv_add: `char lkey[1024]`.
    if line.startswith(_BYTE_ORDER_MARK) or b"\0" in line or len(key) > MAX_KEY_BYTES or line.count(b"\n") != 1:
        return False
    before = b"# @list\n" if listed else b"-\t-\n"  # what the rest of the file makes of it
    found = [(each.key, each.value) for each in read_table(before + line, service).entries]
    if found[0 if listed else 1 :] != [(key, value)]:
        return False
    return service.name != "alias" or [(each.key, each.value) for each in read_aliases(line).entries] == [(key, value)]


def export_text(entries: Iterable[tuple[bytes, bytes, int]]) -> bytes:
    """Whole keys, values and flags as ``consul kv export`` writes them."""
    return (
        json.dumps(
            [
                {"key": key.decode(), "flags": flags, "value": b64encode(value).decode()}
                for key, value, flags in entries
            ],
            indent="\t",
            ensure_ascii=False,
        )
        + "\n"
    ).encode()
