"""A network that can be made bad: a TCP proxy which lets bytes through one at a time on demand."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.rig.consul import ConsulAgent

PAUSE_SECONDS = 0.05


class Trickle:
    """Leads to an agent; while ``bad`` is set a byte passes every ``PAUSE_SECONDS``, of headers too."""

    def __init__(self, agent: ConsulAgent) -> None:
        self._agent = (agent.bind, agent.ports["http"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bad = threading.Event()
        self.passed = 0
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
            other = {ours: theirs, theirs: ours}
            while not self._end.is_set():
                for ready in select.select(list(other), [], [], 0.5)[0]:
                    bad = self.bad.is_set() and ready is theirs
                    data = ready.recv(1 if bad else 65536)
                    if not data:
                        return
                    if bad:
                        self.passed += 1
                        self._end.wait(PAUSE_SECONDS)
                    other[ready].sendall(data)
