"""A mail server that accepts everything from a relay and records its sessions."""

from __future__ import annotations

import socketserver
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.rig.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

TIMEOUT_SECONDS = 15.0


@dataclass
class Received:
    """A mail and its session."""

    peer: str
    helo: str = ""
    sender: str = ""
    recipients: list[str] = field(default_factory=list)
    text: str = ""


class _Session(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        mail = Received(self.client_address[0])
        self._reply("220 sink.example.org ESMTP")
        while line := self.rfile.readline().decode(errors="replace").strip():
            verb = line[:4].upper()
            if verb in ("EHLO", "HELO"):
                mail.helo = line[5:]
            elif verb == "MAIL":
                mail = Received(mail.peer, mail.helo, line[10:].strip("<> "))
            elif verb == "RCPT":
                mail.recipients.append(line[8:].strip("<> "))
            elif verb == "DATA":
                self._reply("354 go on")
                lines = iter(lambda: self.rfile.readline().decode(errors="replace"), ".\r\n")
                mail.text = "".join(lines)
                self.server.received.append(mail)
            self._reply("221 bye" if verb == "QUIT" else "250 ok")
            if verb == "QUIT":
                return

    def _reply(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), _Session)
        self.received: list[Received] = []


class Sink:
    """A server on ``address``, as a context manager."""

    def __init__(self, address: str = "127.0.0.9") -> None:
        self._server = _Server(address)
        self.address = address
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def received(self) -> list[Received]:
        """The received mails, in order."""
        return list(self._server.received)

    def wait_for(self, count: int, failure: Callable[[], str]) -> None:
        """Return once ``count`` mails have arrived.

        Raises:
            AssertionError: they do not arrive in time; with the text of ``failure``.
        """
        wait_for(lambda: len(self.received) >= count, TIMEOUT_SECONDS, failure)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
