"""HTTP for kv.py: failover between addresses, deadlines, kept-alive connections, validation of status and headers.

requests applies a timeout to each receive, so a server that sends one byte per second never exceeds it. Here every
socket, and name resolution, has the deadline of the whole exchange.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import socket
import threading
import time
import urllib.parse
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from table_consul import __version__
from table_consul.body import Read, body_of
from table_consul.endpoint import Endpoint, Exchange
from table_consul.errors import BadResponse, SourceError, Unreachable, printable
from table_consul.failures import (
    BROKEN,
    NO_LEADER,
    BadRequest,
    TooManyConnections,
    broken_exchange,
    cause_of,
    excerpt,
    refusal,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about versions of optional dependencies
    import requests

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

log = logging.getLogger("table_consul")

# A connection that closes sooner was idle for too long, or its server restarted. Later, a timeout has cut the wait: 30
# seconds in Consul 1.22.4 (http_config.write_timeout), or that of a proxy.
LEAST_CUT_SECONDS = 2.0
# With these a proxy reports a wait that its own timeout, or Consul's, has cut; 503: Varnish and Envoy, 524: Cloudflare.
_GATEWAY_TIMEOUTS = (408, 502, 503, 504, 524)
# A server that has not heard from its leader for longer may lack entries; consistency = "stale" still reads from it.
MAX_STALE_SECONDS = 10.0
_HEADERS = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json"}
_MAX_INDEX = 2**63 - 1


# The size of the kernel's receive buffer while a response is read.
WIDE_BYTES = 1 << 20


class WaitCut(Unreachable):
    """A wait ended early: the connection was closed, or a proxy answered. Neither new data nor a failure."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds
        """How long the connection had waited; infinite after `Transport.interrupt`."""


class Request(NamedTuple):
    path: str
    """Not quoted; a byte that is not UTF-8 is a surrogate (PEP 383)."""
    params: Sequence[tuple[str, Any]]
    headers: Mapping[str, str]
    method: str = "GET"
    body: bytes | None = None
    compress: bool = False
    """Whether gzip is worth its CPU time if the response crosses a network."""
    indexed: bool = True
    """Whether the response comes from the servers' data, and must have their index."""


class Transport(Exchange):
    """Sends one request at a time over kept-alive connections; not for use by two threads at once."""

    late = False
    """Whether an address accepted the latest request, but did not start to respond in time."""

    def __init__(self, settings: ConsulConfig) -> None:
        self._settings = settings
        self._stale = settings.consistency == "stale"
        self._scope = [(k, v) for k, v in (("ns", settings.namespace), ("partition", settings.partition)) if v]
        self._endpoints = [Endpoint(address, settings, self) for address in settings.addresses]
        self._current = 0
        self._prepared = requests.PreparedRequest()
        self._lock = threading.Lock()
        self._warned = False

    def close(self) -> None:
        """Close all connections; later requests open new ones, and read the TLS files again."""
        for endpoint in self._endpoints:
            endpoint.close()

    def interrupt(self) -> None:
        """End the wait that is under way, or the next one, with WaitCut; any thread may call this."""
        with self._lock:
            self.interrupted = True
            if self.waiting and self.latest_socket is not None:
                # Not SSLSocket's own, which drops the TLS state that another thread reads.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self.latest_socket, socket.SHUT_RDWR)

    def disconnect(self) -> None:
        """Close the connection in use, because the rest of its input belongs to no later request."""
        self._endpoints[self._current].disconnect()

    @property
    def address(self) -> str:
        """The address in use."""
        return self._endpoints[self._current].address

    def next_address(self) -> None:
        """Use the next address from now on."""
        self._current = (self._current + 1) % len(self._endpoints)

    @property
    def address_count(self) -> int:
        """How many addresses there are."""
        return len(self._endpoints)

    def send(self, request: Request, *, by: float, held: float = 0.0) -> requests.Response:
        """The response of the first address that returns one; status and headers are validated, the body is not read.

        ``by`` is the deadline, as a time of time.monotonic(), for its start (and for the body, unless `read` extends
        it). For ``held`` seconds of this time a healthy Consul may hold the request. A 404 proves that the key is
        absent.

        Raises:
            SourceError: Unreachable, Forbidden, BadResponse; or SourceError itself, if a TLS file cannot be used.
        """
        if not held:
            return self._send(request, by, held)
        if self.wide:  # a TCP window cannot shrink again
            self.disconnect()
        response = None
        with self._lock:
            self.waiting = not self.interrupted
        try:
            if self.waiting:
                response = self._send(request, by, held)
        except SourceError:
            if not self.interrupted:
                raise
        finally:
            with self._lock:
                self.waiting, interrupted, self.interrupted = False, self.interrupted, False
        if interrupted or response is None:
            if response is not None:
                response.close()
            self.disconnect()
            raise WaitCut("interrupted", math.inf)
        return response

    def _send(self, request: Request, by: float, held: float) -> requests.Response:
        query = urllib.parse.urlencode([*request.params, *self._scope])
        target = urllib.parse.quote(request.path, safe="/", errors="surrogateescape") + ("?" + query if query else "")
        self._prepared.method, self._prepared.body = request.method, request.body
        self._indexed = request.indexed
        self._prepared.headers = requests.structures.CaseInsensitiveDict({**_HEADERS, **request.headers})
        failures: list[SourceError] = []
        self.late = False
        for candidates in range(len(self._endpoints), 0, -1):
            # An address that hangs must leave time for the next one. A blocking query looks like an address that hangs,
            # so for it the addresses share only the time to connect.
            now = time.monotonic()
            self.connect_by = now + (by - now - (held if by - now > held else 0.0)) / candidates
            self.answer_by = by if held else self.connect_by
            self._prepared.url = self.address + target
            gzip = request.compress and self._endpoints[self._current].is_remote
            self._prepared.headers["Accept-Encoding"] = "gzip" if gzip else "identity"
            try:
                return self._attempt(held)
            except (BadRequest, WaitCut):
                raise
            except (Unreachable, BadResponse) as error:
                failures.append(error)
                self.next_address()
            if time.monotonic() >= by:
                break
        if len(failures) == 1:
            raise failures[0]
        # Of several failures, the most specific one counts: if an address answers, it is not an outage.
        kinds = [each for each in (BadResponse, TooManyConnections) if any(isinstance(f, each) for f in failures)]
        raise (*kinds, Unreachable)[0]("; ".join(map(str, failures)))

    def _attempt(self, held: float, *, again: bool = False) -> requests.Response:
        self.connected, began = False, time.monotonic()
        try:
            response = self._endpoints[self._current].send(self._prepared, stream=True)
            try:
                self._validate(response, min(held, time.monotonic() - max(began, self.connected_at)))
            except BaseException as error:
                if isinstance(error, SourceError):
                    self.disconnect()
                response.close()
                raise
            else:
                return response
        except BROKEN as error:
            cause, waited = cause_of(error), time.monotonic() - max(began, self.connected_at)
            self.late |= isinstance(cause, TimeoutError) and (self.connected_at >= began or not self.connected)
            fresh, cut = self.connected and waited < LEAST_CUT_SECONDS, min(held, waited)
            failure = broken_exchange(f"Consul at {self.address}", error, fresh=fresh)
            if cut >= LEAST_CUT_SECONDS and isinstance(cause, ConnectionResetError):  # RemoteDisconnected is one
                raise WaitCut(str(failure), cut) from error
            # The server may have closed an idle connection, which is not a failure of Consul.
            if again or self.connected or (held and self.interrupted) or isinstance(cause, TimeoutError):
                raise failure from error
        if held:  # the next attempt gets the time that this wait took
            self.connect_by += waited
            self.answer_by += waited
        return self._attempt(held, again=True)

    def _validate(self, response: requests.Response, waited: float) -> None:
        """Check status and headers of a response.

        Raises:
            SourceError: the response is an error, or invalid.
        """
        write = self._prepared.method != "GET"
        status, headers = response.status_code, response.headers
        # 409: nothing was written, and the body names the conflict.
        if status not in ((200, 409) if write else (200, 404)):
            error = refusal(f"Consul at {self.address}", status, _beginning(response), token=self._has_token)
            raise WaitCut(str(error), waited) if status in _GATEWAY_TIMEOUTS and waited >= LEAST_CUT_SECONDS else error
        if write or not self._indexed:
            return
        leader, index = headers.get("X-Consul-Knownleader"), headers.get("X-Consul-Index", "")
        is_index = re.fullmatch("[0-9]{1,30}", index) is not None and 0 < int(index) <= _MAX_INDEX
        # Stale reads prefer old data to none, but such a server cannot prove that a key is absent.
        if leader == "false" and (status == 404 or not self._stale):
            raise Unreachable(f"Consul at {self.address} has no cluster leader", NO_LEADER)
        if leader not in ("true", "false") or not is_index:
            raise self.bad(f"status {status}, but not from Consul's key-value store", _beginning(response))
        if status == 404 and self.is_behind(response):
            raise Unreachable(f"Consul at {self.address} has not heard from its leader for {MAX_STALE_SECONDS:.0f} s")
        if headers.get("Content-Encoding", "identity") not in ("identity", self._prepared.headers["Accept-Encoding"]):
            raise self.bad("unrequested compression")
        # Consul 1.11 introduced partitions and this header; older versions ignore the parameter.
        if self._settings.partition and "X-Consul-Query-Backend" not in headers and not self._warned:
            self._warned = True
            log.warning(
                "Consul at %s has no partitions and ignores partition = %s (upgrade it to 1.11 or remove the setting)",
                self.address,
                printable(self._settings.partition),
            )

    @staticmethod
    def is_behind(response: requests.Response) -> bool:
        """Whether the server that answered (a stale read) lost its leader, or has not heard from it for too long."""
        contact = response.headers.get("X-Consul-Lastcontact", "0")
        late = not contact.isascii() or not contact.isdigit() or int(contact[:19]) > MAX_STALE_SECONDS * 1000
        return late or response.headers.get("X-Consul-Knownleader") == "false"

    def read(self, body: Read, size: int, seconds: float | None) -> bytes:
        """The next part of a body, empty at the end; within ``seconds`` if given, otherwise by the deadline.

        Raises:
            SourceError: the body is truncated, invalid or late; the next request uses the next address.
        """
        if seconds is not None:
            self.answer_by = time.monotonic() + seconds
        if self.narrow and not self.wide and self.latest_socket is not None:
            with contextlib.suppress(OSError):
                self.latest_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WIDE_BYTES)
            self.wide = True
        try:
            return body(size)
        except (*BROKEN, zlib.error) as error:
            invalid = isinstance(error, zlib.error)
            failure = self.bad("invalid gzip") if invalid else broken_exchange(f"Consul at {self.address}", error)
            self.disconnect()
            self.next_address()
            raise failure from error

    @property
    def _has_token(self) -> bool:
        return "X-Consul-Token" in self._prepared.headers

    def bad(self, what: str, body: bytes | bytearray = b"") -> BadResponse:
        """The error for an invalid response."""
        # A web page identifies the sender; any other body may contain values of the table, including password hashes.
        page = ": " + excerpt(bytes(body), token=self._has_token) if body.lstrip().startswith(b"<") else ""
        return BadResponse(f"Consul at {self.address}: {what}{page}")


def _beginning(response: requests.Response) -> bytes:
    """The start of a body that explains an error; empty if its gzip is invalid.

    Raises:
        OSError, urllib3.exceptions.HTTPError: the connection broke.
    """
    with contextlib.suppress(zlib.error):
        return body_of(response)(16 << 10)
    return b""
