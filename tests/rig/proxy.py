"""TCP proxies in front of an agent with faults: they trickle, cut waits, send 1xx responses, refuse requests."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.rig.consul import ConsulAgent

TIMEOUT_SECONDS = 0.1


class Proxy:
    """A proxy to an agent, as a context manager; subclasses define the fault while ``bad`` is set."""

    def __init__(self, agent: ConsulAgent) -> None:
        self._agent = (agent.bind, agent.ports["http"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bad = threading.Event()
        self.harm: list[float] = []
        """The times of faults, by time.monotonic()."""
        self.requests: list[tuple[float, str]] = []
        """Time and target of each request."""
        self._end = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(ours,), daemon=True).start()

    def _carry(self, ours: socket.socket) -> None:
        with contextlib.suppress(OSError), ours, socket.create_connection(self._agent) as theirs:
            latest, waiting, target = time.monotonic(), False, ""
            while not self._end.is_set():
                ready = select.select([ours, theirs], [], [], TIMEOUT_SECONDS)[0]
                if not ready and waiting and self.bad.is_set() and self.ends(time.monotonic() - latest, target):
                    return
                for side in ready:
                    bad = self.bad.is_set()
                    data = side.recv(self.size if bad and side is theirs else 65536)
                    if not data:
                        return
                    latest = time.monotonic()
                    if side is theirs:
                        ours.sendall(self.answer(data, first=waiting) if bad else data)
                        waiting = False
                        continue
                    if data.startswith(b"GET "):
                        target = data.split(b" ", 2)[1].decode()
                        self.requests.append((latest, target))
                    if bad and (refusal := self.refusal(target)) is not None:
                        if not refusal:
                            return
                        ours.sendall(refusal)
                        continue
                    waiting = True
                    theirs.sendall(data)
                    if bad:
                        ours.sendall(self.interim())

    # The fault while ``bad`` is set, none by default.

    size = 65536
    """The number of bytes of a response to forward at a time."""

    def ends(self, seconds: float, target: str) -> bool:
        """Whether to close a connection that has waited this long for the response to a request."""
        return False

    def refusal(self, target: str) -> bytes | None:
        """The response to a request that is not forwarded, empty to close the connection; None to forward it."""
        return None

    def interim(self) -> bytes:
        """The bytes to send as soon as a request is forwarded."""
        return b""

    def answer(self, data: bytes, *, first: bool) -> bytes:
        """The bytes to send for a part of a response."""
        return data


class Trickling(Proxy):
    """A bad network: one byte of a response, headers included, every ``PAUSE_SECONDS``."""

    PAUSE_SECONDS = 0.05
    size = 1

    def answer(self, data: bytes, *, first: bool) -> bytes:
        self.harm.append(time.monotonic())
        self._end.wait(self.PAUSE_SECONDS)
        return data


class Cutting(Proxy):
    """Closes a connection without a byte of a response for ``seconds``, as proxies and Consul 1.22.4 do."""

    def __init__(self, agent: ConsulAgent, seconds: float) -> None:
        super().__init__(agent)
        self.seconds = seconds
        self.cut: dict[str, float] = {}
        """The time of the first cut wait, by path."""

    def ends(self, seconds: float, target: str) -> bool:
        if seconds < self.seconds:
            return False
        self.harm.append(time.monotonic())
        self.cut.setdefault(target.partition("?")[0], self.harm[-1])
        return True


class Informing(Proxy):
    """Sends 1xx responses before each response: after the request, and again when the response arrives."""

    INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
    HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"

    def interim(self) -> bytes:
        self.harm.append(time.monotonic())
        return self.HINTS

    def answer(self, data: bytes, *, first: bool) -> bytes:
        return (self.INTERIM + self.HINTS + data) if first else data


class Refusing(Proxy):
    """Refuses requests below a path with one of ``REFUSALS``, or ("stalled") never answers."""

    REFUSALS = MappingProxyType(
        {
            "429": b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain\r\nContent-Length: 81\r\n\r\n"
            b"Your IP is issuing too many concurrent connections, please rate limit your calls\n",
            "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 27\r\n\r\nrpc error making call: EOF\n",
            "403": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 18\r\n\r\nPermission denied\n",
            "closed": b"",
        }
    )

    def __init__(self, agent: ConsulAgent, kind: str) -> None:
        super().__init__(agent)
        self.path = "/"
        self._kind = kind

    def refusal(self, target: str) -> bytes | None:
        if not target.startswith(self.path):
            return None
        self.harm.append(time.monotonic())
        if self._kind == "stalled":
            self._end.wait()
        return self.REFUSALS.get(self._kind, b"")
