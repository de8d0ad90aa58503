"""A running fake: its settings, start and stop, and the threads that serve connections."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Self

from tests.fake_consul import agent
from tests.fake_consul.messages import Answer, Request
from tests.fake_consul.store import Store

VERSIONS = ("1.8.7", "1.21.5", "1.22", "1.22.4")


class FakeConsul:
    """A running fake, stopped by its context manager. Public attributes may change while it runs."""

    def __init__(self, *, version: str = "1.22", unix: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.version = version
        self.requests: list[Request] = []
        self.handle: Callable[[Request], Answer | None] = self.consul
        self.store = Store()
        # ACLs. A change moves no index. `tokens` takes effect with the next request, as a wait keeps the rules of its
        # start; `denied` takes effect immediately.
        self.token: str | None = None  # If set, ACLs are on and this token may do everything.
        self.tokens: dict[str, str] = {}  # Rules by token, in HCL, also for "anonymous". If any, ACLs are on.
        self.policies: dict[str, str] = {}  # The name of the policy of a token.
        self.denied: tuple[bytes, ...] = ()  # Prefixes hidden from every token.
        self.key_list_policy = False  # acl.enable_key_list_policy: a list needs the rule list or write.
        # State of the cluster.
        self.leader = True
        self.last_contact = 0  # Milliseconds since this server heard from its leader.
        self.datacenters: tuple[str, ...] = ("dc1",)
        # Settings of the agent.
        self.block_endpoints: tuple[bytes, ...] = ()
        self.write_allowed = True  # allow_write_http_from contains the client
        self.max_connections: int | None = None  # limits.http_max_conns_per_client
        self.rate_limited = False  # Every request exceeds the limit.
        self.disable_kv_key_validation = False  # From 1.21.6 on.
        self.disable_http_unprintable_char_filter = False  # In 1.21.5 this also turns off the validation of keys.
        self.max_query_time = 600.0
        self.jitter = 0.0  # The share of the longest jitter, a sixteenth of the wait, that each wait gets.
        self.wait_error: str | None = None  # A wait without news ends with 500 and this text.
        self.write_timeout: float | None = 30.0 if version == "1.22.4" else None  # Later responses are not sent:
        self.closes_late = False  # the connection closes then, or only when the response is ready, as with Go.
        self.idle_timeout: float | None = None
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
    def since(self) -> tuple[int, ...]:
        """The version as a tuple, for comparison."""
        return tuple(int(part) for part in self.version.split("."))

    @property
    def acl(self) -> bool:
        return self.token is not None or bool(self.tokens)

    @property
    def index(self) -> int:
        """The index of the store: that of its newest change."""
        return self.store.index

    @index.setter
    def index(self, index: int) -> None:
        self.store.restore(index)

    @property
    def address(self) -> str:
        """The address in the form of `ConsulConfig.addresses`."""
        if self._unix is not None:
            return f"unix://{self._unix}"
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def put(self, key: bytes, value: bytes | None, flags: int = 0) -> None:
        self.store.put(key, value, flags)

    def delete(self, key: bytes) -> None:
        self.store.delete(key)

    def reset_index(self, index: int) -> None:
        """Change the index as a restored snapshot does."""
        self.store.restore(index)

    def close_connections(self) -> None:
        """Close kept-alive connections, as a restart of Consul does."""
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Listen, after a stop on the same port as before."""
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
        """Stop listening and close all connections."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self.close_connections()
        self._server.server_close()

    def consul(self, request: Request) -> Answer:
        """The response of Consul."""
        return agent.answer(self, request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = False

    def setup(self) -> None:
        fake = self.server.fake
        if fake.max_connections is not None and len(fake._connections) >= fake.max_connections:
            self.refuse(fake)
        if fake._tls is not None:
            self.request.settimeout(5)
            self.request = fake._tls.wrap_socket(self.request, server_side=True)
            self.request.settimeout(None)
        if fake.idle_timeout is not None:
            self.request.settimeout(fake.idle_timeout)
        super().setup()
        fake._accepted += 1
        self.number = fake._accepted
        fake._connections[self.number] = self.request

    def refuse(self, fake: FakeConsul) -> None:
        """Close a connection beyond the limit as it is accepted; 1.8 sends nothing."""
        if fake.since >= (1, 9) and fake._tls is None:
            words = b"Your IP is issuing too many concurrent connections, please rate limit your calls\n"
            self.request.sendall(Answer(429, {"Content-Type": "text/plain", "Connection": "close"}, words).wire())
        self.request.close()
        raise ConnectionAbortedError

    def finish(self) -> None:
        self.server.fake._connections.pop(self.number, None)
        try:
            super().finish()
            if self.server.fake._tls is not None:
                self.request.close()
        except OSError:
            pass

    def _do(self) -> None:
        fake = self.server.fake
        deadline = None if fake.write_timeout is None else time.monotonic() + fake.write_timeout
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(
                self.requestline.split()[1],
                headers,
                self.number,
                self._send,
                fake._stopping,
                self.command,
                body,
                deadline,
            )
            fake.requests.append(request)
            answer = fake.handle(request)
            if answer is None or (deadline is not None and time.monotonic() >= deadline):
                self.close_connection = True
            else:
                self._send(answer.wire(head=self.command == "HEAD"))
        except OSError:
            self.close_connection = True

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = do_OPTIONS = _do  # noqa: N815 - as its parent calls them

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
        """Ignore clients that disconnect, which most of these tests cause."""


class _TCPServer(_Quiet, socketserver.ThreadingTCPServer):
    pass


class _UnixServer(_Quiet, socketserver.ThreadingUnixStreamServer):
    pass
