"""A Consul for tests that lies on request: the KV part of its HTTP interface, in threads, over http, https or unix.

By itself it answers as Consul does. A test that wants it to misbehave sets `handle`:

    with FakeConsul() as fake:
        fake.put(b"consul/alias/root", b"gilles")
        fake.handle = html                      # one of the lies below
        fake.handle = lambda request: Answer(403, body=b"Permission denied")
        fake.handle = fake.consul               # the truth again
"""

from __future__ import annotations

import base64
import contextlib
import json
import posixpath
import re
import socket
import socketserver
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

CONSUL_1_21_5 = re.compile(rb"[a-zA-Z0-9,_./\-?&=]+")  # All that this one version lets a key consist of.


@dataclass
class Answer:
    """What goes back to the client; `length` is the Content-Length to claim, if not the true one."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    chunked: bool = False

    def wire(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Whatever"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.chunked:
            chunks = [self.body[at : at + 4096] for at in range(0, len(self.body), 4096)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
            lines.append("Transfer-Encoding: chunked")
        else:
            body = self.body
            lines.append(f"Content-Length: {len(body) if self.length is None else self.length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class Request:
    """One request as it came; `target` is what stood in the request line, `key` what Consul makes of its path."""

    target: str
    headers: dict[str, str]
    connection: int  # Counts the connections of this fake, from 1.
    send: Callable[[bytes], None]
    stopping: threading.Event

    @property
    def path(self) -> bytes:
        return urllib.parse.unquote_to_bytes(self.target.partition("?")[0])

    @property
    def key(self) -> bytes:
        return self.path.removeprefix(b"/v1/kv/")

    @property
    def params(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))


class FakeConsul:
    """A running fake; a context manager that stops it. All that is public may be changed while it runs."""

    def __init__(self, *, unix: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.index = 10
        self.requests: list[Request] = []
        self.handle: Callable[[Request], Answer | None] = self.consul
        self.token: str | None = None  # If set, any other is answered with 403.
        self.denied: tuple[bytes, ...] = ()  # Prefixes that an ACL hides.
        self.charset: re.Pattern[bytes] | None = None  # CONSUL_1_21_5, to imitate it.
        self.leader = True
        self._entries: dict[bytes, tuple[bytes | None, int]] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._accepted = 0
        self._unix = unix
        self._tls = tls
        self._port = 0
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """As `ConsulConfig.addresses` has it."""
        if self._unix is not None:
            return f"unix://{self._unix}"
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def put(self, key: bytes, value: bytes | None) -> None:
        with self._changed:
            self.index += 1
            self._entries[key] = (value, self.index)
            self._changed.notify_all()

    def delete(self, key: bytes) -> None:
        with self._changed:
            self.index += 1
            del self._entries[key]
            self._changed.notify_all()

    def reset_index(self, index: int) -> None:
        """The index jumps, as after a snapshot was restored."""
        with self._changed:
            self.index = index
            self._changed.notify_all()

    def close_connections(self) -> None:
        """Close what clients keep alive, as Consul does with idle connections when it restarts."""
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Listen, on the same port as before if it was stopped."""
        self._stopping.clear()
        if self._unix is not None:
            self._unix.unlink(missing_ok=True)
            self._server: socketserver.BaseServer = _UnixServer(str(self._unix), _Handler)
        else:
            self._server = _TCPServer(("127.0.0.1", self._port), _Handler)
            self._port = self._server.server_address[1]
        self._server.fake = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and end those there are."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self.close_connections()
        self._server.server_close()

    # What Consul does.

    def consul(self, request: Request) -> Answer:
        headers = {
            "Content-Type": "application/json",
            "X-Consul-Index": str(self.index),
            "X-Consul-Knownleader": "true" if self.leader else "false",
            "X-Consul-Lastcontact": "0",
        }
        path = request.path.decode(errors="replace")
        clean = posixpath.normpath(path).replace("//", "/") + ("/" if path.endswith("/") else "")
        if clean != path:
            return Answer(301, {"Location": urllib.parse.quote(clean)}, b"<a>Moved Permanently</a>")
        if not path.startswith("/v1/kv/"):
            return Answer(200, headers, b'{"Config": "of the agent"}')
        if self.token is not None and request.headers.get("x-consul-token") != self.token:
            return Answer(403, {}, b"ACL not found")
        stale = "stale" in request.params
        if not self.leader and not stale:
            return Answer(500, {}, b"No cluster leader")
        if self.charset is not None and not self.charset.fullmatch(request.key):
            return Answer(500, {}, b"invalid key name, keys should respect the format")
        if "recurse" in request.params or "keys" in request.params:
            return self._listed(request, headers)
        return self._single(request, headers)

    def _single(self, request: Request, headers: dict[str, str]) -> Answer:
        if request.key.startswith(self.denied or (b"\0",)):
            return Answer(403, {}, b"Permission denied")
        with self._changed:
            entry = self._entries.get(request.key)
            if entry is None:
                return Answer(404, headers)
            return Answer(200, headers, _json([self._shown(request.key)]))

    def _listed(self, request: Request, headers: dict[str, str]) -> Answer:
        params = request.params
        with self._changed:
            asked = int(params.get("index", "0"))
            end = time.monotonic() + _seconds(params.get("wait", "300s"))
            while asked >= self.index and not self._stopping.is_set() and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
                if self.index < asked:
                    break
            below = sorted(key for key in self._entries if key.startswith(request.key))
            shown = [key for key in below if not key.startswith(self.denied or (b"\0",))]
            headers["X-Consul-Index"] = str(self.index)
            if shown != below:
                headers["X-Consul-Results-Filtered-By-ACLs"] = "true"
            if not shown:
                return Answer(404, headers)
            found = [key.decode() for key in shown] if "keys" in params else [self._shown(key) for key in shown]
            return Answer(200, headers, _json(found), chunked=True)

    def _shown(self, key: bytes) -> dict[str, object]:
        value, index = self._entries[key]
        return {
            "LockIndex": 0,
            "Key": key.decode(),
            "Flags": 0,
            "Value": base64.b64encode(value).decode() if value else None,
            "CreateIndex": index,
            "ModifyIndex": index,
        }


# Lies, for `handle`.


def html(_request: Request) -> Answer:
    """The page of a proxy that knows no Consul behind it."""
    return Answer(200, {"Content-Type": "text/html"}, b"<html><title>Welcome to nginx!</title></html>")


def stall(request: Request) -> None:
    """Read the request and never answer."""
    request.stopping.wait(60)


def trickle(answer: Answer, *, pause: float = 0.05) -> Callable[[Request], None]:
    """The answer, headers too, a byte at a time with a pause after each."""

    def handle(request: Request) -> None:
        for byte in answer.wire():
            request.send(bytes([byte]))
            if request.stopping.wait(pause):
                return

    return handle


def cut(answer: Answer, length: int) -> Callable[[Request], None]:
    """The first bytes of the answer, then the end of the connection."""
    return lambda request: request.send(answer.wire()[:length])


def entry(key: bytes, value: object, *, status: int = 200, index: str = "5") -> Answer:
    """An answer to one key whose Value is just what is given, be it base64 or not."""
    body = json.dumps([{"Key": key.decode(), "Value": value, "ModifyIndex": 5}]).encode()
    return Answer(status, {"X-Consul-Index": index, "X-Consul-Knownleader": "true"}, body)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(ms|s|m)", duration).groups()
    return float(number) * {"ms": 0.001, "s": 1, "m": 60}[unit]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = False

    def setup(self) -> None:
        fake = self.server.fake
        if fake._tls is not None:
            self.request.settimeout(5)
            self.request = fake._tls.wrap_socket(self.request, server_side=True)
            self.request.settimeout(None)
        super().setup()
        fake._accepted += 1
        self.number = fake._accepted
        fake._connections[self.number] = self.request

    def finish(self) -> None:
        self.server.fake._connections.pop(self.number, None)
        try:
            super().finish()
            if self.server.fake._tls is not None:
                self.request.close()
        except OSError:
            pass

    def do_GET(self) -> None:
        fake = self.server.fake
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, self.number, self._send, fake._stopping)
        fake.requests.append(request)
        try:
            answer = fake.handle(request)
            if answer is None:
                self.close_connection = True
            else:
                self._send(answer.wire())
        except OSError:
            self.close_connection = True

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *_args: object) -> None:
        pass


class _Quiet:
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, *_args: object) -> None:
        """A client that goes away in the middle is what most of these tests are about."""


class _TCPServer(_Quiet, socketserver.ThreadingTCPServer):
    pass


class _UnixServer(_Quiet, socketserver.ThreadingUnixStreamServer):
    pass
