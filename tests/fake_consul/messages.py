"""Requests and responses of the fake."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Answer:
    """A response; `length` replaces the true Content-Length."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    chunked: bool = False

    def wire(self, *, head: bool = False) -> bytes:
        """The response as bytes; with `head`, without its body."""
        lines = [f"HTTP/1.1 {self.status} Whatever"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.chunked:
            chunks = [self.body[at : at + 4096] for at in range(0, len(self.body), 4096)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
            lines.append("Transfer-Encoding: chunked")
        else:
            body = self.body
            lines.append(f"Content-Length: {len(body) if self.length is None else self.length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head else body)


@dataclass
class Request:
    """A received request; `target` is from the request line, `key` is the key as Consul 1.8.7 reads the path."""

    target: str
    headers: dict[str, str]
    connection: int  # Counts the connections of this fake, from 1.
    send: Callable[[bytes], None]
    stopping: threading.Event
    method: str = "GET"
    body: bytes = b""
    deadline: float | None = None  # The deadline for writing the response, by time.monotonic().

    @property
    def path(self) -> bytes:
        return urllib.parse.unquote_to_bytes(self.target.partition("?")[0])

    @property
    def key(self) -> bytes:
        return self.path.removeprefix(b"/v1/kv/")

    @property
    def params(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def token(self) -> str | None:
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
        return self.params.get("token") or self.headers.get("x-consul-token") or bearer or None


def to_json(value: object) -> bytes:
    """JSON as Go writes it; each byte of a key (see `text`) that is not UTF-8 becomes an escaped U+FFFD."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    written = re.sub(r"[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", written)
    return re.sub(r"[\udc80-\udcff]", r"\\ufffd", written).encode()


def text(key: bytes) -> str:
    return key.decode(errors="surrogateescape")
