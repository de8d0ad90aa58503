"""Kept-alive connections to Consul on which no exchange outlives its deadline.

Knows HTTP's transport (TCP, unix sockets, TLS), and nothing of what is said over it. requests' own time-out is per
receive: a server that sends a byte a second is never late for it. So every socket here knows when its exchange must be
over, name resolution included, and of a URL the target is sent exactly as it was written.
"""

from __future__ import annotations

import errno
import functools
import http.client
import os
import socket
import ssl
import sys
import threading
import urllib.parse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import urllib3
import urllib3.connection
import urllib3.exceptions

from table_consul.errors import SourceError, printable

# requests guesses the encoding of texts, which nobody here reads, and misses that with a warning; each table has a
# process, and each process would hold 3 MB for it. What transport.py needs of requests it has from here.
_GUESSES = ("charset_normalizer", "chardet")
_unneeded = [name for name in _GUESSES if name not in sys.modules]
sys.modules.update(dict.fromkeys(_unneeded))  # type: ignore[arg-type]  # None: as if it were not installed
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import requests
    import requests.adapters
for _name in _unneeded:
    del sys.modules[_name]
Headers = requests.structures.CaseInsensitiveDict
PreparedRequest = requests.PreparedRequest
Response = requests.Response

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

# A connection whose other end vanished shows only when something is sent: in a blocking query nothing is.
_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)  # OpenBSD has none of the three.
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]


class Deadline:
    """When the present exchange must be over, shared by the client and each of its sockets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.connect_by = 0.0
        self.answer_by = 0.0
        self.connected = False  # Whether this exchange opened a connection, and did not find one kept.

    def left(self, by: float) -> float:
        """Seconds until `by`; raises TimeoutError when there are none."""
        left = by - self.clock()
        if left <= 0:
            raise TimeoutError
        return left


class _Timed:
    """What the sockets below have in common: no call outlives the deadline, however slowly bytes trickle in."""

    deadline: Deadline | None = None  # None until connected: till then `Endpoint` sets the time.

    def recv_into(self, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the signature of the parent
        self._set_time()
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]  # beside it stands a socket

    def sendall(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the signature of the parent
        self._set_time()
        super().sendall(*args, **kwargs)  # type: ignore[misc]  # beside it stands a socket

    def _set_time(self) -> None:
        if self.deadline is not None:
            self.settimeout(self.deadline.left(self.deadline.answer_by))  # type: ignore[attr-defined]  # likewise


class _TimedSocket(_Timed, socket.socket):
    """A TCP or unix socket with a deadline."""


class _TimedTLSSocket(_Timed, ssl.SSLSocket):
    """A TLS socket with a deadline."""


class _Resolution(threading.Thread):
    """One getaddrinfo, which knows no time-out, in a thread that may be left behind."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(name=f"resolve {host}", daemon=True)
        self._question = (host, port)
        self.found: list[tuple[Any, ...]] = []
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.found = list(socket.getaddrinfo(*self._question, type=socket.SOCK_STREAM))
        except OSError as error:
            self.error = error
        except UnicodeError:
            self.error = OSError(f"{self._question[0]!r} is no host name")


class Endpoint:
    """One address of Consul, and how to open a connection to it."""

    def __init__(self, address: str, context: Callable[[], ssl.SSLContext], server_name: str | None) -> None:
        self.address = address
        parts = urllib.parse.urlsplit(address)
        self.tls = parts.scheme == "https"
        self.path = address.removeprefix("unix://") if parts.scheme == "unix" else None
        self.host = parts.hostname or "localhost"
        self.port = parts.port or (443 if self.tls else 80)
        self._server_name = server_name or self.host
        self._context = context
        self._resolution: _Resolution | None = None

    def open(self, deadline: Deadline) -> socket.socket:
        """A connected socket, TLS included; raises OSError, or SourceError where a TLS file is at fault."""
        sock = self._connect(deadline)
        try:
            if not self.tls:
                sock.deadline = deadline
                return sock
            sock.settimeout(deadline.left(deadline.connect_by))  # ssl takes it for the handshake as a whole.
            secured = self._context().wrap_socket(sock, server_hostname=self._server_name)
        except BaseException:
            sock.close()
            raise
        assert isinstance(secured, _TimedTLSSocket)
        secured.deadline = deadline
        return secured

    def _connect(self, deadline: Deadline) -> _TimedSocket:
        if self.path is not None:
            return self._dial(socket.AF_UNIX, self.path, deadline.left(deadline.connect_by))
        failure: OSError = OSError("name has no address")
        found = self._resolve(deadline)
        for number, (family, _, _, _, target) in enumerate(found):
            share = deadline.left(deadline.connect_by) / (len(found) - number)
            try:
                return self._dial(family, target, share)
            except OSError as error:
                failure = error
        raise failure

    @staticmethod
    def _dial(family: int, target: Any, timeout: float) -> _TimedSocket:  # noqa: ANN401 - as socket.connect
        sock = _TimedSocket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                for option in _SOCKET_OPTIONS:
                    sock.setsockopt(*option)
            sock.settimeout(timeout)
            sock.connect(target)
        except BaseException:
            sock.close()
            raise
        return sock

    def _resolve(self, deadline: Deadline) -> list[tuple[Any, ...]]:
        try:
            return list(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        except (OSError, UnicodeError):
            pass
        # A resolver that hangs must not cost one more thread with each call.
        resolution = self._resolution = self._resolution or _Resolution(self.host, self.port)
        resolution.join(deadline.left(deadline.connect_by))
        if resolution.is_alive():
            raise TimeoutError
        self._resolution = None
        if resolution.error is not None:
            raise resolution.error
        return resolution.found


class _Connection(urllib3.connection.HTTPConnection):
    """A connection of the pool; TLS and unix sockets too, for it is `Endpoint` that opens it."""

    def __init__(self, *args: Any, endpoint: Endpoint, deadline: Deadline, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint
        self._deadline = deadline

    def connect(self) -> None:
        self._deadline.connected = True
        self.sock = self._endpoint.open(self._deadline)

    def getresponse(self) -> urllib3.response.HTTPResponse:  # type: ignore[override]  # urllib3 does so itself
        if self.sock is None:  # urllib3 passes over a broken pipe, in the hope of an answer that was sent before
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().getresponse()


class _Adapter(requests.adapters.HTTPAdapter):
    """Leads to one endpoint; of a URL it sends the target exactly as it was written."""

    def __init__(self, endpoint: Endpoint, deadline: Deadline) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1)
        self._pool = urllib3.HTTPConnectionPool(endpoint.host, endpoint.port, maxsize=1)
        self._pool.ConnectionCls = functools.partial(  # type: ignore[assignment]  # called, never inspected
            _Connection, endpoint=endpoint, deadline=deadline
        )
        self._target_at = len(endpoint.address)

    def get_connection_with_tls_context(self, *_args: Any, **_kwargs: Any) -> urllib3.HTTPConnectionPool:  # noqa: ANN401
        return self._pool

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
        """Nothing: the connection brings a TLS context of its own."""

    def request_url(self, request: requests.PreparedRequest, _proxies: object) -> str:
        assert request.url is not None
        return request.url[self._target_at :]

    def close(self) -> None:
        super().close()
        self._pool.close()


class Session(requests.Session):
    """Without the environment (proxies, netrc), cookies of its own, or a way to follow anything."""

    def __init__(self, endpoints: list[Endpoint], deadline: Deadline) -> None:
        super().__init__()
        self.trust_env = False
        self.adapters.clear()
        for endpoint in endpoints:
            self.mount(endpoint.address + "/", _Adapter(endpoint, deadline))

    def get_redirect_target(self, _response: requests.Response) -> None:
        # Even with allow_redirects=False requests reads the body of a redirect, and parses where it leads.
        return None


def tls_context(settings: ConsulConfig) -> ssl.SSLContext:
    """The context of all HTTPS connections; raises SourceError naming the file that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file, capath=settings.ca_path)
        if settings.cert_file:
            # Without the password function OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except OSError as error:
        files = [f for f in (settings.ca_file, settings.ca_path, settings.cert_file, settings.key_file) if f]
        raise SourceError(f"TLS files {', '.join(files)}: {reason_of(error)}") from error
    # Since 3.13 Python is stricter about private authorities than RFC 5280 asks, and than the consul command is.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TimedTLSSocket
    return context


def cause_of(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client below the wrappings of urllib3 and requests."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__.
    return error


def reason_of(error: BaseException) -> str:
    """What happened, for one line of an operator's log."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case http.client.RemoteDisconnected():
            return "connection closed without an answer"
        case http.client.IncompleteRead():
            return "answer cut off"
        case http.client.HTTPException() | urllib3.exceptions.HTTPError():
            return f"no HTTP, or broken ({type(error).__name__})"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not to be trusted: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "no TLS there (is it an http:// address?)"
        case OSError(strerror=str(text)):
            return text.lower()
    return printable(f"{type(error).__name__}: {error}")
