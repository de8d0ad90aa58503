"""TCP proxies in front of an agent that can be made bad: they trickle, cut waits, say 1xx, refuse some requests."""

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
    """Leads to an agent, as a context manager; what it does while ``bad`` is set is up to its kind."""

    def __init__(self, agent: ConsulAgent) -> None:
        self._agent = (agent.bind, agent.ports["http"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bad = threading.Event()
        self.harm: list[float] = []
        """When it did what its kind does, as moments of time.monotonic()."""
        self.requests: list[tuple[float, str]] = []
        """Moment and target of what it was asked."""
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

    # What a kind of proxy does while it is bad: nothing.

    size = 65536
    """How much of an answer is passed on at a time."""

    def ends(self, seconds: float, target: str) -> bool:
        """Whether a connection ends on which an answer to this request has been waited for that long."""
        return False

    def refusal(self, target: str) -> bytes | None:
        """What a request is answered with instead of being passed on, if it is not; empty: its connection is closed."""
        return None

    def interim(self) -> bytes:
        """What is answered as soon as a request has been passed on."""
        return b""

    def answer(self, data: bytes, *, first: bool) -> bytes:
        """What is passed on of a part of an answer, which may be its first."""
        return data


class Trickling(Proxy):
    """A bad network: a byte of an answer passes every ``PAUSE_SECONDS``, of headers too."""

    PAUSE_SECONDS = 0.05
    size = 1

    def answer(self, data: bytes, *, first: bool) -> bytes:
        self.harm.append(time.monotonic())
        self._end.wait(self.PAUSE_SECONDS)
        return data


class Cutting(Proxy):
    """Closes a connection on which no byte of an answer came for ``seconds``, as proxies do, and Consul 1.22.4."""

    def __init__(self, agent: ConsulAgent, seconds: float) -> None:
        super().__init__(agent)
        self.seconds = seconds
        self.cut: dict[str, float] = {}
        """By path when a wait was cut first."""

    def ends(self, seconds: float, target: str) -> bool:
        if seconds < self.seconds:
            return False
        self.harm.append(time.monotonic())
        self.cut.setdefault(target.partition("?")[0], self.harm[-1])
        return True


class Informing(Proxy):
    """Says 1xx before each answer: when it was asked, and once more when the answer arrives."""

    INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
    HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"

    def interim(self) -> bytes:
        self.harm.append(time.monotonic())
        return self.HINTS

    def answer(self, data: bytes, *, first: bool) -> bytes:
        return (self.INTERIM + self.HINTS + data) if first else data


class Refusing(Proxy):
    """Refuses what lies below a path, in one of the ways of ``REFUSALS``, or ("stalled") never answers."""

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
