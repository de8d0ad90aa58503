"""What a value in the configuration must be: each rule gives it in its one normal form, or raises ValueError.

Pure: knows neither the file a value stands in nor its key, and opens nothing. An error says what is wrong and what is
allowed; it never quotes what may be a secret that was put beside the wrong key.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from table_consul.errors import printable
from table_consul.services import SERVICES

# linux: unix(7), sun_path holds 108 bytes, the last of which is NUL; OpenBSD's holds 104.
SOCKET_PATH_MAX = 103

_HOST = r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?"
_HOST_PORT = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{_HOST})(?::([0-9]{{1,5}}))?/?")
# What a URL means without a port; so does Consul's own client (consul: api/api.go, NewClient adds none).
PORTS = {"http": 80, "https": 443}
# As in Go's strconv.ParseBool, which the consul command reads its environment with.
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def choice(word: str, options: Collection[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word[:100], options, 1)
    return f"(allowed: {', '.join(options)}{f'; did you mean {close[0]}?' if close else ''})"


def quoted(text: str) -> str:
    return f"'{printable(text, 60)}'"


def absolute(value: str) -> str:
    # The value is not quoted: people put the token itself where its file belongs.
    if not value.startswith("/") or value.endswith("/") or not _printable(value):
        raise ValueError("no absolute path; smtpd runs its tables in / (allowed: /path/to/it)")
    return value


def folder_path(value: str) -> str:
    return absolute(value.removesuffix("/"))


def _printable(value: str) -> bool:
    return value.isprintable() and "\0" not in value


def host(value: str) -> str:
    # consul: api/api.go, SetupTLSConfig drops a port
    match = _HOST_PORT.fullmatch(value)
    if match is None or value.endswith("/"):
        raise ValueError(f"{quoted(value)} is no host name")
    return match[1].strip("[]")


def word(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError(f"{quoted(value)} is no name (allowed: visible ASCII characters)")
    return value


def token(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("what it holds is no token (allowed: visible ASCII characters, no spaces or line breaks)")
    return value


def table_name(value: str) -> str:
    if value in {"", ".", ".."} or "/" in value or not _printable(value):
        raise ValueError(f"{quoted(value)} is no name of a table (allowed: one path segment of printable characters)")
    return value


def consul_path(value: str) -> str:
    """The path without a slash at either end."""
    path = value.removeprefix("/").removesuffix("/")
    if not _printable(path) or any(segment in {"", ".", ".."} for segment in path.split("/")):
        raise ValueError(
            f"{quoted(value)} is no path in Consul (allowed: printable segments between slashes, none empty, . or ..)"
        )
    return path


def prefix(value: str) -> str:
    return "" if value in {"", "/"} else consul_path(value)


def services(value: list[str]) -> tuple[str, ...]:
    for name in value:
        if name not in SERVICES:
            raise ValueError(f"unknown service {quoted(name)} {choice(name, SERVICES)}")
    return tuple(name for name in SERVICES if name in value)


def _socket(value: str, scheme: str) -> str:
    path = absolute(value.removeprefix(f"{scheme}://"))
    if scheme == "unix" and len(path.encode("utf-8", "surrogateescape")) > SOCKET_PATH_MAX:
        raise ValueError(f"longer than a socket's path can be (allowed: {SOCKET_PATH_MAX} bytes)")
    return f"{scheme}://{path}"


def address(value: str) -> str:
    """The address in its normal form, with a port. What may hold a password or a token is not quoted in the error."""
    scheme, separator, rest = value.partition("://")
    if separator and scheme in {"unix", "file"}:
        return _socket(value, scheme)
    allowed = "(allowed: http://HOST:PORT, https://HOST:PORT, unix:///PATH, file:///PATH)"
    said = "this" if set(value) & set("@?#") else quoted(value)
    if scheme not in PORTS or not separator:
        hint = "" if separator or not _HOST_PORT.fullmatch(value) else f"; did you mean http://{value}?"
        raise ValueError(f"{said} is no address {allowed[:-1]}{hint})")
    match = _HOST_PORT.fullmatch(rest)
    if match is None:
        raise ValueError(f"{said} is no address: HOST:PORT alone may follow {scheme}:// {allowed}")
    host, port = match[1].lower(), int(match[2] or PORTS[scheme])
    if host.startswith("["):
        host = f"[{_ip(host[1:-1])}]"
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is no port (allowed: 1 to 65535)")
    return f"{scheme}://{host}:{port}"


def _ip(value: str) -> str:
    from ipaddress import IPv6Address

    try:
        return str(IPv6Address(value))
    except ValueError:
        raise ValueError(f"{quoted(value)} is no IPv6 address") from None


def listen(value: str) -> str:
    from ipaddress import ip_address

    if value.startswith("unix://"):
        return _socket(value, "unix")
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", value)
    try:
        if match and ip_address(match[1] or match[2]).is_loopback and 1 <= int(match[3]) <= 65535:
            return value
    except ValueError:
        pass
    raise ValueError(f"{quoted(value)} is no place to listen (allowed: 127.0.0.1:PORT, [::1]:PORT, unix:///PATH)")


def boolean(value: str) -> bool:
    if value not in _BOOLEANS:
        raise ValueError(f"{quoted(value)} is no boolean (allowed: {', '.join(_BOOLEANS)})")
    return _BOOLEANS[value]
