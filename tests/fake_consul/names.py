"""The path of a request before the lookup: normalized, redirected or refused."""

from __future__ import annotations

import posixpath
import re
import urllib.parse

TRAVERSAL = "invalid key name, path traversal is not allowed"
BLANKS = "invalid key name, leading/trailing spaces are not allowed"
CHARSET = r'invalid key name, keys should respect the "^[a-zA-Z0-9,_./\\-?&=]+$" format'


def printable(path: bytes) -> bool:
    """Whether Consul's HTTP server accepts the decoded path; it reads bytes that are not UTF-8 as U+FFFD."""
    return path.decode(errors="replace").isprintable()


def redirect(version: tuple[int, ...], target: str) -> str | None:
    """The redirect of Go's HTTP server for a path that is not clean; Consul 1.20 and later check the escaped path."""
    path, mark, query = target.partition("?")
    if version < (1, 20):
        path = urllib.parse.unquote_to_bytes(path).decode("latin-1")
    clean = _clean(path)
    return (
        None if clean == path else urllib.parse.quote(clean, encoding="latin-1", safe="/:@!$&'()*+,;=~") + mark + query
    )


def key(version: tuple[int, ...], path: bytes) -> bytes:
    """The key that a request for `path` reads or writes."""
    name = path.removeprefix(b"/v1/kv/")
    if version < (1, 21, 5) or not name:
        return name
    return _clean(name.decode("latin-1")).encode("latin-1")


def fault(version: tuple[int, ...], name: bytes) -> str | None:
    """The message with which Consul refuses this key or prefix."""
    if version < (1, 21, 5) or not name:
        return None
    if version == (1, 21, 5):
        return None if re.fullmatch(rb"[a-zA-Z0-9,_./\-?&=]+", name) and b".." not in name else CHARSET
    if name.startswith(b" ") or name.endswith(b" "):
        return BLANKS
    if b".." in name.split(b"/"):
        return TRAVERSAL
    if re.search(rb"%(?![0-9A-Fa-f]{2})", name):
        return None  # Not decodable.
    decoded = urllib.parse.unquote_to_bytes(name)
    if decoded == name:
        return None
    return TRAVERSAL if b".." in decoded else BLANKS if b" " in decoded else None


def _clean(path: str) -> str:
    """Go's path.Clean with a final slash kept."""
    clean = re.sub("^//", "/", posixpath.normpath(path))
    return clean + "/" if path.endswith("/") and not clean.endswith("/") else clean
