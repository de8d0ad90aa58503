"""One address of Consul: name resolution, sockets with a deadline, TLS, and the kept-alive connection."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
from concurrent.futures import Future
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import urllib3
import urllib3.connection
import urllib3.exceptions

from table_consul.errors import SourceError, printable
from table_consul.files import open_regular_file, version_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about versions of optional dependencies
    import requests
    import requests.adapters

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

# A vanished peer is noticed only when something is sent, and a blocking query sends nothing.
_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)  # OpenBSD has none of the three.
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]


def _seconds_until(moment: float) -> float:
    """The seconds until a time of time.monotonic().

    Raises:
        TimeoutError: the time has passed.
    """
    left = moment - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


MAX_INTERIM = 16
"""Interim responses (1xx) before the one that counts."""
# OpenSSL's names of TLS alerts (RFC 8446, 6.2) about the client certificate.
CLIENT_CERTIFICATE = re.compile("_ALERT_(.*CERTIFICATE.*|UNKNOWN_CA)")
# The size of the kernel's receive buffer; the headers of a response have about 400 bytes.
NARROW_BYTES = 4 << 10


class Exchange:
    """The state that a request, its response and their connection share."""

    connect_by = answer_by = 0.0
    """The deadlines of the current request, as times of time.monotonic()."""
    connected = False
    """Whether the current request opened a new connection."""
    connected_at = 0.0
    """When the latest connection was opened, as a time of time.monotonic()."""
    latest_socket: socket.socket | None = None
    narrow = wide = False
    """``narrow``: a new connection gets a small receive buffer. ``wide``: the buffer has been enlarged."""
    waiting = interrupted = False
    """Whether a blocking query is waiting, and whether it, or the next one, must end."""


class _DeadlineMixin:
    """A socket whose calls all end by the deadline of the exchange, however slowly bytes arrive."""

    exchange: Exchange

    def recv_into(self, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the signature of the socket
        self.settimeout(_seconds_until(self.exchange.answer_by))  # type: ignore[attr-defined]  # mixed into a socket
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]  # mixed into a socket

    def sendall(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the signature of the socket
        self.settimeout(_seconds_until(self.exchange.answer_by))  # type: ignore[attr-defined]  # mixed into a socket
        super().sendall(*args, **kwargs)  # type: ignore[misc]  # mixed into a socket


class _Socket(_DeadlineMixin, socket.socket):
    pass


class _TLSSocket(_DeadlineMixin, ssl.SSLSocket):
    def sendall(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the signature of the socket
        try:
            super().sendall(*args, **kwargs)
        except ssl.SSLEOFError:
            # With TLS 1.3 a server rejects the client certificate after the handshake. Reading raises its reason.
            self.recv_into(bytearray(1))
            raise


class _Reader(io.BufferedReader):
    last = b""
    """The last line read, empty at the end of the connection."""

    def readline(self, size: int | None = -1) -> bytes:
        self.last = super().readline(size)
        return self.last


class _HTTPResponse(http.client.HTTPResponse):
    """http.client's response, which also skips all interim responses, and rejects truncated headers and bad chunks.

    http.client skips only 100: after a 103, the real response would stay on the connection and pass for that of the
    next request. If the connection ends within the headers, http.client treats them as complete. A chunk of negative
    size makes it raise an error that is not an HTTPException.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self.fp: _Reader = _Reader(self.fp.detach())
        self._interim = 0

    def begin(self) -> None:
        """Read the headers.

        Raises:
            OSError: the connection broke.
            http.client.HTTPException: invalid or truncated HTTP, or too many interim responses.
        """
        super().begin()
        if not self.fp.last:
            raise http.client.IncompleteRead(b"")

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]  # typeshed leaves it out
        if 100 <= status < 200 and status != HTTPStatus.SWITCHING_PROTOCOLS:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise http.client.BadStatusLine(f"{status} {reason}")
            status = HTTPStatus.CONTINUE  # which the parent skips, with its headers
        return version, status, reason

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]  # typeshed leaves it out
        if size < 0:
            raise ValueError  # as for a size that is not a number
        return size


class _Connection(urllib3.connection.HTTPConnection):
    """A connection of the pool; also for TLS and unix sockets, because `Endpoint` opens it."""

    response_class = _HTTPResponse

    def __init__(self, *args: Any, endpoint: Endpoint, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint

    def connect(self) -> None:
        exchange = self._endpoint.exchange
        exchange.connected = True
        self.sock = exchange.latest_socket = self._endpoint.open()
        exchange.connected_at = time.monotonic()
        if exchange.waiting and exchange.interrupted:  # interrupted before there was a socket to shut down
            raise ConnectionAbortedError

    def getresponse(self) -> urllib3.response.HTTPResponse:  # type: ignore[override]  # urllib3 does so itself
        if self.sock is None:  # urllib3 ignores a broken pipe: a response may have been sent before
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().getresponse()


class Endpoint(requests.adapters.HTTPAdapter):
    """One address of Consul and the connection to it; sends the target of a URL exactly as it was written.

    A requests.Session would add proxies and netrc from the environment, cookies and redirects.
    """

    def __init__(self, address: str, settings: ConsulConfig, exchange: Exchange) -> None:
        super().__init__()
        self.address = address
        self.exchange = exchange
        self._settings = settings
        self._url = urllib.parse.urlsplit(address)
        self._host = self._url.hostname or "localhost"
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._resolution: Future[list[Any]] | None = None
        self._context: ssl.SSLContext | None = None
        self._pool = self._new_pool()

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        pool = urllib3.HTTPConnectionPool(self._host, self._port, maxsize=1)
        pool.ConnectionCls = functools.partial(_Connection, endpoint=self)  # type: ignore[assignment]  # only called
        return pool

    @property
    def is_remote(self) -> bool:
        """Whether answers cross a network: the address is neither a unix socket, nor loopback, nor a localhost name."""
        with contextlib.suppress(ValueError):
            return not ipaddress.ip_address(self._host).is_loopback
        return self._url.scheme != "unix" and not f".{self._host}".endswith(".localhost")

    def disconnect(self) -> None:
        """Close the connection; the next request opens another."""
        self._pool.close()
        self._pool = self._new_pool()

    def close(self) -> None:
        """Close the connection; the next one reads the TLS files again."""
        self.disconnect()
        self._context = None
        _shared_tls_context.cache_clear()

    def get_connection_with_tls_context(self, *_args: Any, **_kwargs: Any) -> urllib3.HTTPConnectionPool:  # noqa: ANN401 - the parent's
        return self._pool

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        """Does nothing: `open` uses its own TLS context."""

    def request_url(self, request: requests.PreparedRequest, _proxies: object) -> str:
        return (request.url or "").removeprefix(self.address)

    def open(self) -> socket.socket:
        """A connected socket, including TLS."""
        if self._url.scheme == "https" and self._context is None:
            self._context = self._tls_context()
        failures: list[OSError] = []
        addresses, by = self._resolve(), self.exchange.connect_by
        for others, (family, _, _, _, target) in zip(range(len(addresses))[::-1], addresses, strict=True):
            sock: _Socket | _TLSSocket | None = None
            try:
                sock = _Socket(family, socket.SOCK_STREAM)  # fails for a family that the kernel lacks
                for option in _SOCKET_OPTIONS if family != socket.AF_UNIX else ():
                    sock.setsockopt(*option)
                if self.exchange.narrow:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NARROW_BYTES)
                self.exchange.wide = False
                sock.settimeout(_seconds_until(by) / (1 + others))
                sock.connect(target)
                if self._context is not None:
                    sock.settimeout(_seconds_until(by) / (1 + others))  # ssl applies it to the whole handshake
                    name = self._settings.tls_server_name or self._host
                    sock = self._context.wrap_socket(sock, server_hostname=name)  # type: ignore[assignment]  # a _TLSSocket
            except OSError as error:
                if sock is not None:
                    sock.close()
                failures.append(error)
            else:
                sock.exchange = self.exchange
                return sock
        # Not the last one: the resolver puts addresses without a route at the end.
        raise failures[0] if failures else OSError("name has no address")

    def _tls_context(self) -> ssl.SSLContext:
        versions = [version_of(os.stat(path)) for path in _tls_files(self._settings) if os.path.exists(path)]
        context = _shared_tls_context(self._settings, *versions)
        if isinstance(context, SourceError):
            raise context.with_traceback(None)
        return context

    def _resolve(self) -> list[Any]:
        if self._url.scheme == "unix":
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self.address.removeprefix("unix://"))]
        with contextlib.suppress(OSError, UnicodeError):
            return socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        # getaddrinfo has no timeout, so it runs in a thread. If it hangs, later calls wait for the same thread.
        resolution = self._resolution
        if resolution is None:
            resolution = Future()
            arguments = (resolution, self._host, self._port)
            thread = threading.Thread(target=_getaddrinfo, args=arguments, name=f"resolve {self._host}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit of processes or memory; an address that needs no thread may work
                raise OSError(errno.EAGAIN, "cannot start another thread") from None
            self._resolution = resolution
        try:
            return resolution.result(_seconds_until(self.exchange.connect_by))
        finally:
            self._resolution = None if resolution.done() else resolution


def _getaddrinfo(resolution: Future[list[Any]], host: str, port: int) -> None:
    try:
        resolution.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except UnicodeError:
        resolution.set_exception(OSError(f"{host!r} is not a host name"))
    except BaseException as error:  # noqa: BLE001 - without a result the waiting thread would never return
        resolution.set_exception(error)


def _tls_files(settings: ConsulConfig) -> list[str]:
    return [path for path in (settings.ca_file, settings.ca_path, settings.cert_file, settings.key_file) if path]


@functools.lru_cache(maxsize=1)
def _shared_tls_context(settings: ConsulConfig, *_versions: object) -> ssl.SSLContext | SourceError:
    """One context for all connections of a process, because each holds all CA certificates.

    If a file cannot be used it is the error, so that the files are not parsed again until one of them changes.
    """
    try:
        return tls_context(settings)
    except SourceError as error:
        return error


def tls_context(settings: ConsulConfig) -> ssl.SSLContext:
    """The context that verifies Consul's certificate and sends the client's.

    Raises:
        SourceError: a TLS file cannot be used.
    """
    try:
        for path in _tls_files(settings):
            os.close(open_regular_file(path, os.O_RDONLY))  # OpenSSL would wait for the writer of a named pipe
        # create_default_context would write session keys to $SSLKEYLOGFILE and, since Python 3.13, check private CAs
        # more strictly than RFC 5280 requires and the consul command does.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if settings.ca_file or settings.ca_path:
            context.load_verify_locations(settings.ca_file, settings.ca_path)
        else:
            context.load_default_certs()
        if settings.cert_file:
            # Without the password function, OpenSSL would prompt on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except OSError as error:
        raise SourceError(f"TLS files {', '.join(_tls_files(settings))}: {reason_of(error)}") from error
    # As the consul command does, trust every certificate in ca_file, even an intermediate CA without its root.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TLSSocket
    return context


def cause_of(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client that urllib3 and requests wrap."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__
    return error


def reason_of(error: BaseException) -> str:
    """The reason, as part of one log line."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case http.client.RemoteDisconnected():
            return "connection closed without a response"
        case http.client.IncompleteRead():
            return "response truncated"
        case http.client.HTTPException() | urllib3.exceptions.HTTPError():
            return f"invalid HTTP response ({type(error).__name__})"
        case ssl.SSLCertVerificationError():
            return f"certificate verification failed: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "the server did not speak TLS"
        case ssl.SSLError(reason=str(reason)) if alert := CLIENT_CERTIFICATE.search(reason):
            return f"client certificate missing or rejected: {alert[1].replace('_', ' ').lower()}"
        case OSError(strerror=str(text)):
            return text.lower()
    return printable(f"{type(error).__name__}: {error}")
