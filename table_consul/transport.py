"""HTTP for kv.py: failover between addresses, deadlines, kept-alive connections, validation of status and headers.

requests' timeouts are per receive: a server that sends a byte a second is never late for them. Here every socket knows
when its exchange must be over, and so does name resolution.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import urllib3
import urllib3.connection
import urllib3.exceptions

from table_consul import __version__
from table_consul.errors import BadResponse, SourceError, Unreachable, printable
from table_consul.failures import BROKEN, BadRequest, broken_exchange, cause_of, excerpt, reason_of, refusal
from table_consul.files import open_regular_file, version_of
from table_consul.http_response import HTTPResponse

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the versions of what it could use
    import requests
    import requests.adapters

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

log = logging.getLogger("table_consul")

# A connection whose other end vanished shows only when something is sent: in a blocking query nothing is.
_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)  # OpenBSD has none of the three.
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]
# A connection that ends sooner was idle for too long, or its server restarted; later, a timeout has cut the wait:
# Consul 1.22.4's of 30 seconds (http_config.write_timeout), or a proxy's.
LEAST_CUT_SECONDS = 2.0
_GATEWAY_TIMEOUTS = (502, 504)  # How a proxy reports that its own timeout, or Consul's behind it, has cut a wait.
# A server that has not heard from its leader for longer may lack entries: consistency = "stale" reads from it even so.
MAX_STALE_SECONDS = 10.0
# Compression costs more than it saves on a host's own network, and one bound is easier held than two.
_HEADERS = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"}
_MAX_INDEX = 2**63 - 1


class WaitCut(Unreachable):
    """Something cut a wait: it closed the connection, or answered in Consul's place. No news, and no fault."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds
        """How long the connection had waited; infinite after `Transport.interrupt`."""


def _seconds_until(moment: float) -> float:
    """Raises TimeoutError where it has passed."""
    left = moment - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _DeadlineMixin:
    """A socket none of whose calls outlives the exchange's deadline, however slowly bytes trickle in."""

    transport: Transport

    def recv_into(self, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the signature of the socket
        self.settimeout(_seconds_until(self.transport.answer_by))  # type: ignore[attr-defined]  # mixed into a socket
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]  # mixed into a socket

    def sendall(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the signature of the socket
        self.settimeout(_seconds_until(self.transport.answer_by))  # type: ignore[attr-defined]  # mixed into a socket
        super().sendall(*args, **kwargs)  # type: ignore[misc]  # mixed into a socket


class _Socket(_DeadlineMixin, socket.socket):
    pass


class _TLSSocket(_DeadlineMixin, ssl.SSLSocket):
    pass


class _Connection(urllib3.connection.HTTPConnection):
    """A connection of the pool; also for TLS and unix sockets, because `Endpoint` opens it."""

    response_class = HTTPResponse

    def __init__(self, *args: Any, endpoint: Endpoint, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint

    def connect(self) -> None:
        transport = self._endpoint.transport
        transport.connected = True
        self.sock = transport.latest_socket = self._endpoint.open()
        transport.connected_at = time.monotonic()
        if transport.waiting and transport.interrupted:  # before there was a socket to shut down
            raise ConnectionAbortedError

    def getresponse(self) -> urllib3.response.HTTPResponse:  # type: ignore[override]  # urllib3 does so itself
        if self.sock is None:  # urllib3 ignores a broken pipe, in the hope of an answer that was sent before
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().getresponse()


class Endpoint(requests.adapters.HTTPAdapter):
    """One address of Consul and the connection to it; sends the target of a URL exactly as it was written.

    A requests.Session would add proxies and netrc from the environment, cookies and redirects.
    """

    def __init__(self, address: str, settings: ConsulConfig, transport: Transport) -> None:
        super().__init__()
        self.address = address
        self.transport = transport
        self._settings = settings
        self._url = urllib.parse.urlsplit(address)
        self._host = self._url.hostname or "localhost"
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._resolution: Future[list[Any]] | None = None
        self._context: ssl.SSLContext | None = None
        self._broken: tuple[object, SourceError] | None = None
        self._pool = self._new_pool()

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        pool = urllib3.HTTPConnectionPool(self._host, self._port, maxsize=1)
        pool.ConnectionCls = functools.partial(_Connection, endpoint=self)  # type: ignore[assignment]  # only called
        return pool

    def disconnect(self) -> None:
        """Close the connection; the next request opens another."""
        self._pool.close()
        self._pool = self._new_pool()

    def close(self) -> None:
        """Close the connection; the next one uses the TLS files as they are then."""
        self.disconnect()
        self._context = None

    def get_connection_with_tls_context(self, *_args: Any, **_kwargs: Any) -> urllib3.HTTPConnectionPool:  # noqa: ANN401 - the parent's
        return self._pool

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        """Nothing: `open` brings a TLS context of its own."""

    def request_url(self, request: requests.PreparedRequest, _proxies: object) -> str:
        return (request.url or "").removeprefix(self.address)

    def open(self) -> socket.socket:
        """A connected socket, TLS included."""
        if self._url.scheme == "https" and self._context is None:
            self._context = self._tls_context()
        failure = OSError("name has no address")
        addresses, by = self._resolve(), self.transport.connect_by
        for others, (family, _, _, _, target) in zip(range(len(addresses))[::-1], addresses, strict=True):
            sock: _Socket | _TLSSocket = _Socket(family, socket.SOCK_STREAM)
            try:
                for option in _SOCKET_OPTIONS if family != socket.AF_UNIX else ():
                    sock.setsockopt(*option)
                sock.settimeout(_seconds_until(by) / (1 + others))
                sock.connect(target)
                if self._context is not None:
                    sock.settimeout(_seconds_until(by) / (1 + others))  # ssl takes it for the handshake as a whole
                    name = self._settings.tls_server_name or self._host
                    sock = self._context.wrap_socket(sock, server_hostname=name)  # type: ignore[assignment]  # a _TLSSocket
            except OSError as error:
                sock.close()
                failure = error
            else:
                sock.transport = self.transport
                return sock
        raise failure

    def _tls_context(self) -> ssl.SSLContext:
        """A context with the TLS files; those that cannot be used are not parsed again until one of them changes."""
        versions = [version_of(os.stat(path)) for path in _tls_files(self._settings) if os.path.exists(path)]
        if self._broken is not None and self._broken[0] == versions:
            raise self._broken[1].with_traceback(None)
        try:
            return _tls_context(self._settings)
        except SourceError as error:
            self._broken = versions, error
            raise

    def _resolve(self) -> list[Any]:
        if self._url.scheme == "unix":
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self.address.removeprefix("unix://"))]
        with contextlib.suppress(OSError, UnicodeError):
            return socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        # getaddrinfo has no timeout: it runs in a thread, and one that hangs must not cost another with each call.
        resolution = self._resolution
        if resolution is None:
            resolution = Future()
            arguments = (resolution, self._host, self._port)
            threading.Thread(target=_getaddrinfo, args=arguments, name=f"resolve {self._host}", daemon=True).start()
            self._resolution = resolution
        try:
            return resolution.result(_seconds_until(self.transport.connect_by))
        finally:
            self._resolution = None if resolution.done() else resolution


def _getaddrinfo(resolution: Future[list[Any]], host: str, port: int) -> None:
    try:
        resolution.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except UnicodeError:
        resolution.set_exception(OSError(f"{host!r} is not a host name"))
    except BaseException as error:  # noqa: BLE001 - without a result the waiting thread would never return
        resolution.set_exception(error)


class Request(NamedTuple):
    path: str
    params: Sequence[tuple[str, Any]]
    headers: Mapping[str, str]
    method: str = "GET"
    body: bytes | None = None


class Transport:
    """One conversation with Consul at a time, over kept-alive connections; not for use by two threads at once."""

    connect_by = answer_by = 0.0
    """By when the current exchange must be over, as moments of time.monotonic()."""
    connected = False
    """Whether this exchange opened a connection instead of using one that was kept."""
    connected_at = 0.0
    """When the latest connection was opened, a moment of time.monotonic()."""
    latest_socket: socket.socket | None = None

    def __init__(self, settings: ConsulConfig) -> None:
        self._settings = settings
        self._stale = settings.consistency == "stale"
        self._scope = [(k, v) for k, v in (("ns", settings.namespace), ("partition", settings.partition)) if v]
        self._endpoints = [Endpoint(address, settings, self) for address in settings.addresses]
        self._current = 0
        self._prepared = requests.PreparedRequest()
        self._lock = threading.Lock()
        self._warned = self.waiting = self.interrupted = False

    def close(self) -> None:
        """Close all connections; later requests open others, with the TLS files as they are then."""
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
        """Close the connection in use: whatever else comes on it would answer nothing that is asked."""
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
        """Consul's answer, from the first address that gives one; status and headers are validated, the body unread.

        ``by`` is the moment at which its beginning must be there (the body as well, unless `read` gives it longer); for
        ``held`` seconds of that a healthy Consul may sit on the request. A 404 proves that there is no such key.

        Raises:
            SourceError: Unreachable, Forbidden, BadResponse; or itself, if a TLS file cannot be used.
        """
        if not held:
            return self._send(request, by, held)
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
        target = urllib.parse.quote(request.path, safe="/") + ("?" + query if query else "")
        self._prepared.method, self._prepared.body = request.method, request.body
        self._prepared.headers = requests.structures.CaseInsensitiveDict({**_HEADERS, **request.headers})
        failures: list[SourceError] = []
        for candidates in range(len(self._endpoints), 0, -1):
            # An address that hangs must leave some time for the next one. While Consul sits on a blocking query it
            # looks just like one that hangs: there only connecting is shared.
            now = time.monotonic()
            self.connect_by = now + (by - now - (held if by - now > held else 0.0)) / candidates
            self.answer_by = by if held else self.connect_by
            self._prepared.url = self.address + target
            try:
                return self._attempt(held)
            except (BadRequest, WaitCut):
                raise
            except (Unreachable, BadResponse) as error:
                failures.append(error)
                self.next_address()
            if time.monotonic() >= by:
                break
        # Of several failures the one that says most about the key counts: an address that answers is no outage.
        kind = BadResponse if any(isinstance(failure, BadResponse) for failure in failures) else Unreachable
        raise kind("; ".join(map(str, failures)))

    def _attempt(self, held: float, *, again: bool = False) -> requests.Response:
        self.connected, began = False, time.monotonic()
        try:
            response = self._endpoints[self._current].send(self._prepared, stream=True)
            try:
                return self._validated(response, min(held, time.monotonic() - max(began, self.connected_at)))
            except BaseException:
                response.close()
                raise
        except BROKEN as error:
            cause, waited = cause_of(error), time.monotonic() - max(began, self.connected_at)
            failure, cut = broken_exchange(f"Consul at {self.address}", error), min(held, waited)
            if cut >= LEAST_CUT_SECONDS and isinstance(cause, ConnectionResetError):  # RemoteDisconnected is one
                raise WaitCut(str(failure), cut) from error
            # The server may have closed an idle connection, which is no sign of a fault of Consul.
            if again or self.connected or (held and self.interrupted) or isinstance(cause, TimeoutError):
                raise failure from error
        if held:  # the time that this wait took is not missing from the next
            self.connect_by += waited
            self.answer_by += waited
        return self._attempt(held, again=True)

    def _validated(self, response: requests.Response, waited: float) -> requests.Response:
        """The answer, if it is a valid one of Consul's. Raises the matching SourceError otherwise, and disconnects."""
        try:
            self._validate(response, waited)
        except SourceError:
            self.disconnect()
            raise
        return response

    def _validate(self, response: requests.Response, waited: float) -> None:
        write = self._prepared.method != "GET"
        status, headers = response.status_code, response.headers
        beginning = functools.partial(response.raw.read, 16 << 10)
        # 409: nothing was written, and the body names the conflict.
        if status not in ((200, 409) if write else (200, 404)):
            error = refusal(f"Consul at {self.address}", status, beginning(), token=self._has_token)
            raise WaitCut(str(error), waited) if status in _GATEWAY_TIMEOUTS and waited >= LEAST_CUT_SECONDS else error
        if write:
            return
        leader, index = headers.get("X-Consul-Knownleader"), headers.get("X-Consul-Index", "")
        is_index = re.fullmatch("[0-9]{1,30}", index) is not None and 0 < int(index) <= _MAX_INDEX
        # Stale reads prefer old data to none; but such a server cannot know that something is not there.
        if leader == "false" and (status == 404 or not self._stale):
            raise Unreachable(f"Consul at {self.address} has no cluster leader")
        if leader not in ("true", "false") or not is_index:
            raise self.bad(f"{status} that is not from Consul's key-value store", beginning())
        if status == 404 and self.is_behind(response):
            raise Unreachable(f"Consul at {self.address} has not heard from its leader for {MAX_STALE_SECONDS:.0f} s")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self.bad("compressed answer, which was not asked for")
        # Consul 1.11 is the first to have partitions, and to send this header; older ones ignore the parameter.
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

    def read(self, response: requests.Response, size: int, seconds: float | None) -> bytes:
        """The next part of the body, empty at its end; in ``seconds`` if given, instead of the deadline.

        Raises:
            SourceError: it broke off, or did not come in time; the next request goes to the next address.
        """
        if seconds is not None:
            self.answer_by = time.monotonic() + seconds
        try:
            return response.raw.read(size)
        except BROKEN as error:
            failure = broken_exchange(f"Consul at {self.address}", error)
            self.next_address()
            raise failure from error

    @property
    def _has_token(self) -> bool:
        return "X-Consul-Token" in self._prepared.headers

    def bad(self, what: str, body: bytes | bytearray = b"") -> BadResponse:
        """The error for an answer that Consul would not give."""
        # A web page tells who answered; anything else may hold the values of the table, password hashes among them.
        page = ": " + excerpt(bytes(body), token=self._has_token) if body.lstrip().startswith(b"<") else ""
        return BadResponse(f"Consul at {self.address}: {what}{page}")


def _tls_files(settings: ConsulConfig) -> list[str]:
    return [path for path in (settings.ca_file, settings.ca_path, settings.cert_file, settings.key_file) if path]


def _tls_context(settings: ConsulConfig) -> ssl.SSLContext:
    try:
        for path in _tls_files(settings):
            os.close(open_regular_file(path, os.O_RDONLY))  # OpenSSL would wait for the writer of a named pipe
        context = ssl.create_default_context(cafile=settings.ca_file, capath=settings.ca_path)
        if settings.cert_file:
            # Without the password function OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except OSError as error:
        raise SourceError(f"TLS files {', '.join(_tls_files(settings))}: {reason_of(error)}") from error
    # Since 3.13 Python is stricter about private authorities than RFC 5280 asks, and than the consul command is.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TLSSocket
    return context
