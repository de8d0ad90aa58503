"""HTTP for kv.py: failover between addresses, deadlines, kept-alive connections, validation of status and headers.

requests' timeouts are per receive: a server that sends a byte a second is never late for them. Here every socket knows
when its exchange must be over, name resolution included, and the target of a URL is sent exactly as it was written.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import os
import socket
import ssl
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import urllib3
import urllib3.connection
import urllib3.exceptions

from table_consul import __version__
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the versions of what it could use
    import requests
    import requests.adapters

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

EXCERPT_CHARACTERS = 120  # Of a body, in a message: enough to recognise a proxy's error page by its title.
_BEGINNING_BYTES = 16 << 10  # Read of a body that is refused; most are shorter, and their connection is kept.

# A connection whose other end vanished shows only when something is sent: in a blocking query nothing is.
_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)  # OpenBSD has none of the three.
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]
BROKEN = (OSError, urllib3.exceptions.HTTPError)  # What an exchange may raise; requests' errors are OSErrors.


class BadRequest(BadResponse):
    """Consul refuses this one request: another address would say the same, and other requests may succeed."""


class Deadline:
    """By when the current exchange must be over, as moments on ``clock``; shared by a transport and its sockets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.connect_by = self.answer_by = 0.0
        self.connected = False
        """Whether this exchange opened a connection instead of using one that was kept."""

    def remaining(self, by: float) -> float:
        """Seconds until ``by``.

        Raises:
            TimeoutError: there are none.
        """
        left = by - self.clock()
        if left <= 0:
            raise TimeoutError
        return left


class _DeadlineMixin:
    """A socket none of whose calls outlives the deadline, however slowly bytes trickle in."""

    deadline: Deadline | None = None  # None until connected: until then `Endpoint` sets the timeout.

    def recv_into(self, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the signature of the socket
        self._set_timeout()
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]  # mixed into a socket

    def sendall(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the signature of the socket
        self._set_timeout()
        super().sendall(*args, **kwargs)  # type: ignore[misc]  # mixed into a socket

    def _set_timeout(self) -> None:
        if self.deadline is not None:
            self.settimeout(self.deadline.remaining(self.deadline.answer_by))  # type: ignore[attr-defined]  # likewise


class _Socket(_DeadlineMixin, socket.socket):
    pass


class _TLSSocket(_DeadlineMixin, ssl.SSLSocket):
    pass


class _Connection(urllib3.connection.HTTPConnection):
    """A connection of the pool; also for TLS and unix sockets, because `Endpoint` opens it."""

    def __init__(self, *args: Any, endpoint: Endpoint, **kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint

    def connect(self) -> None:
        self._endpoint.deadline.connected = True
        self.sock = self._endpoint.open()

    def getresponse(self) -> urllib3.response.HTTPResponse:  # type: ignore[override]  # urllib3 does so itself
        if self.sock is None:  # urllib3 ignores a broken pipe, in the hope of an answer that was sent before
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().getresponse()


class Endpoint(requests.adapters.HTTPAdapter):
    """One address of Consul and the connection to it. Sends the target of a URL exactly as it was written.

    Used without a requests.Session, which adds proxies and netrc from the environment, cookies and redirects.
    """

    def __init__(self, address: str, settings: ConsulConfig, deadline: Deadline) -> None:
        super().__init__()
        self.address = address
        self.deadline = deadline
        self._settings = settings
        self._url = urllib.parse.urlsplit(address)
        self._host = self._url.hostname or "localhost"
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._resolution: Future[list[Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Let the next request open a new connection, with the TLS files as they are then."""
        self._context: ssl.SSLContext | None = None
        self._pool = urllib3.HTTPConnectionPool(self._host, self._port, maxsize=1)
        self._pool.ConnectionCls = functools.partial(_Connection, endpoint=self)  # type: ignore[assignment]  # only called

    def close(self) -> None:
        self._pool.close()

    def get_connection_with_tls_context(self, *_args: Any, **_kwargs: Any) -> urllib3.HTTPConnectionPool:  # noqa: ANN401 - the parent's
        return self._pool

    def cert_verify(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the parent's
        """Nothing: `open` brings a TLS context of its own."""

    def request_url(self, request: requests.PreparedRequest, _proxies: object) -> str:
        return (request.url or "").removeprefix(self.address)

    def open(self) -> socket.socket:
        """A connected socket, TLS included.

        Raises:
            OSError: there is no connection in time.
            SourceError: a TLS file cannot be used.
        """
        sock: _Socket | _TLSSocket = self._connect()
        try:
            if self._url.scheme == "https":
                self._context = self._context or tls_context(self._settings)
                sock.settimeout(self._left())  # ssl takes it for the handshake as a whole
                sock = self._context.wrap_socket(sock, server_hostname=self._settings.tls_server_name or self._host)  # type: ignore[assignment]  # a _TLSSocket
        except BaseException:
            sock.close()
            raise
        sock.deadline = self.deadline
        return sock

    def _left(self) -> float:
        return self.deadline.remaining(self.deadline.connect_by)

    def _connect(self) -> _Socket:
        if self._url.scheme == "unix":
            return _dial(socket.AF_UNIX, self.address.removeprefix("unix://"), self._left())
        failure: OSError = OSError("name has no address")
        found = self._resolve()
        for number, (family, _, _, _, target) in enumerate(found):
            try:
                return _dial(family, target, self._left() / (len(found) - number))
            except OSError as error:
                failure = error
        raise failure

    def _resolve(self) -> list[Any]:
        with contextlib.suppress(OSError, UnicodeError):
            return socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        # getaddrinfo has no timeout: it runs in a thread, and one that hangs must not cost another with each call.
        resolution = self._resolution
        if resolution is None:
            resolution = self._resolution = Future()
            arguments = (resolution, self._host, self._port)
            threading.Thread(target=_getaddrinfo, args=arguments, name=f"resolve {self._host}", daemon=True).start()
        try:
            return resolution.result(self._left())
        finally:
            self._resolution = None if resolution.done() else resolution


def _getaddrinfo(resolution: Future[list[Any]], host: str, port: int) -> None:
    try:
        resolution.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        resolution.set_exception(error if isinstance(error, OSError) else OSError(f"{host!r} is not a host name"))


def _dial(family: int, target: Any, timeout: float) -> _Socket:  # noqa: ANN401 - as socket.connect
    sock = _Socket(family, socket.SOCK_STREAM)
    try:
        for option in _SOCKET_OPTIONS if family != socket.AF_UNIX else ():
            sock.setsockopt(*option)
        sock.settimeout(timeout)
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


class Request(NamedTuple):
    path: str
    params: Sequence[tuple[str, Any]]
    headers: Mapping[str, str]
    method: str = "GET"
    body: bytes | None = None


class Answer(msgspec.Struct, frozen=True):
    """An answer whose status and headers were validated, and whose body is still to be read."""

    raw: requests.Response
    absent: bool = False
    """A 404 that can be trusted: Consul has no such key."""
    index: int = 0
    filtered: bool = False
    """An ACL hides some of the keys that were asked for."""


class Transport:
    """One conversation with Consul at a time, over kept-alive connections; not for use by two threads at once."""

    def __init__(self, settings: ConsulConfig, clock: Callable[[], float]) -> None:
        self.deadline = Deadline(clock)
        self._stale = settings.consistency == "stale"
        self._scope = [(k, v) for k, v in (("ns", settings.namespace), ("partition", settings.partition)) if v]
        self._endpoints = [Endpoint(address, settings, self.deadline) for address in settings.addresses]
        self._current = 0
        self._prepared = requests.PreparedRequest()
        self._headers: Mapping[str, str] | None = None

    def reset(self) -> None:
        """Let the next request open a new connection, with the TLS files as they are then."""
        self.close()
        for endpoint in self._endpoints:
            endpoint.reset()

    def close(self) -> None:
        """Close all connections; later requests are Unreachable."""
        for endpoint in self._endpoints:
            endpoint.close()

    @property
    def address(self) -> str:
        """The address in use."""
        return self._endpoints[self._current].address

    def next_address(self) -> None:
        """Use the next address from now on."""
        self._current = (self._current + 1) % len(self._endpoints)

    def send(self, request: Request, *, by: float, held: float = 0.0) -> Answer:
        """Consul's answer, from the first address that gives one.

        ``by`` is the moment at which its beginning must be there (a body as well, unless it is read in steps); for
        ``held`` seconds of that a healthy Consul may sit on the request.

        Raises:
            SourceError: no answer in time that can be believed: Unreachable, Forbidden or BadResponse; or SourceError
                itself, if a TLS file cannot be used.
        """
        query = urllib.parse.urlencode([*request.params, *self._scope])
        target = urllib.parse.quote(request.path, safe="/") + ("?" + query if query else "")
        self._prepared.method, self._prepared.body = request.method, request.body
        if request.headers != self._headers:
            self._headers = dict(request.headers)
            # Compression costs more than it saves on a host's own network, and one bound is easier held than two.
            fixed = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json"}
            merged = {**fixed, "Accept-Encoding": "identity", **request.headers}
            self._prepared.headers = requests.structures.CaseInsensitiveDict(merged)
        failures: list[SourceError] = []
        for candidates in range(len(self._endpoints), 0, -1):
            # An address that hangs must leave some time for the next one. While Consul sits on a blocking query it
            # looks just like one that hangs: there only connecting is shared.
            now = self.deadline.clock()
            self.deadline.connect_by = now + (by - now - (held if by - now > held else 0.0)) / candidates
            self.deadline.answer_by = by if held else self.deadline.connect_by
            self._prepared.url = self.address + target
            try:
                return self._attempt(write=request.method != "GET")
            except BadRequest:
                raise
            except (Unreachable, BadResponse) as error:
                failures.append(error)
                self.next_address()
            if self.deadline.clock() >= by:
                break
        text = "; ".join(str(failure) for failure in failures)
        # Of several failures the one that says most about the key counts: an address that answers is no outage.
        raise next((type(f) for f in failures if isinstance(f, BadResponse)), Unreachable)(text)

    def _attempt(self, *, write: bool) -> Answer:
        for again in (False, True):
            self.deadline.connected = False
            try:
                raw = self._endpoints[self._current].send(self._prepared, stream=True)
                try:
                    return self._judge(raw, write=write)
                except BaseException:
                    raw.close()
                    raise
            except BROKEN as error:
                # A connection that was kept may have been closed meanwhile: that says nothing about Consul.
                if again or self.deadline.connected or isinstance(_cause_of(error), TimeoutError):
                    raise self.failure(error) from error
        raise AssertionError

    def _judge(self, raw: requests.Response, *, write: bool) -> Answer:
        """The answer, if Consul gave it and it proves what it says; else raises the SourceError it amounts to."""
        status, headers = raw.status_code, raw.headers
        beginning = functools.partial(raw.raw.read, _BEGINNING_BYTES)
        # 409: nothing was written, and the body says what stood in the way.
        if status not in ((200, 409) if write else (200, 404)):
            raise self._refusal(status, beginning())
        if write:
            return Answer(raw)
        leader = headers.get("X-Consul-Knownleader")
        # Stale reads prefer old data to none; but a server without a leader cannot know that something is not there.
        if leader == "false" and (status == 404 or not self._stale):
            raise Unreachable(f"Consul at {self.address} has no cluster leader")
        # Where the connection broke within the headers nothing else would show it.
        if leader != "true" and status == 404:
            raise self.bad("404 that is not from Consul's key-value store", beginning())
        number = headers.get("X-Consul-Index", "")
        index = int(number) if number.isascii() and number.isdigit() and len(number) <= 20 else 0
        if index <= 0:
            raise self.bad(f"{status} without an index, so not from Consul's key-value store", beginning())
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self.bad("compressed answer, which was not asked for")
        filtered = headers.get("X-Consul-Results-Filtered-By-ACLs", "").lower() == "true"
        return Answer(raw, status == 404, index, filtered)

    def _refusal(self, status: int, body: bytes) -> SourceError:
        said = f"{status} {self._excerpt(body)}".rstrip()
        if status in (401, 403):
            return Forbidden(f"Consul at {self.address} refuses the token: {said}")
        # Consul 1.21.5 answers 400 or 500 for a key with any of `@ + : *` in it (hashicorp/consul#22835); were that
        # an outage, one recipient could stop the answers to all.
        if b"invalid key name" in body.lower():
            return BadRequest(
                f"Consul at {self.address} refuses the name of this key (a limit of Consul 1.21.5: upgrade it, or set"
                f' disable_http_unprintable_char_filter, or use mode = "mirror"): {status}'
            )
        kind = Unreachable if status == 429 or status >= 500 else BadRequest if status >= 400 else BadResponse
        return kind(f"Consul at {self.address}: {said}")

    def bad(self, what: str, body: bytes = b"") -> BadResponse:
        """The error for an answer that Consul would not give."""
        # A web page tells who answered; anything else may hold the values of the table, password hashes among them.
        page = ": " + self._excerpt(body) if body.lstrip().startswith(b"<") else ""
        return BadResponse(f"Consul at {self.address}: {what}{page}")

    def _excerpt(self, body: bytes) -> str:
        """The beginning of a body, as one printable line; without the token, should a proxy echo it."""
        text = body[: 8 * EXCERPT_CHARACTERS].decode(errors="backslashreplace")
        if token := (self._headers or {}).get("X-Consul-Token"):
            text = text.replace(token, "(token)")
        return printable(" ".join(text.split()), EXCERPT_CHARACTERS)

    def failure(self, error: Exception) -> SourceError:
        """The error for an exchange that broke off."""
        cause = _cause_of(error)
        cut = isinstance(cause, http.client.RemoteDisconnected | http.client.IncompleteRead)
        garbled = isinstance(cause, http.client.HTTPException) and not cut
        return (BadResponse if garbled else Unreachable)(f"Consul at {self.address}: {_reason_of(cause)}")


def tls_context(settings: ConsulConfig) -> ssl.SSLContext:
    """The context of HTTPS connections.

    Raises:
        SourceError: a file cannot be used; the text names the files.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ca_file, capath=settings.ca_path)
        if settings.cert_file:
            # Without the password function OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except OSError as error:
        files = [f for f in (settings.ca_file, settings.ca_path, settings.cert_file, settings.key_file) if f]
        raise SourceError(f"TLS files {', '.join(files)}: {_reason_of(error)}") from error
    # Since 3.13 Python is stricter about private authorities than RFC 5280 asks, and than the consul command is.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TLSSocket
    return context


def _cause_of(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client below the wrappings of urllib3 and requests."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__
    return error


def _reason_of(error: BaseException) -> str:
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
            return f"certificate verification failed: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "the server did not speak TLS (should the address be http://?)"
        case OSError(strerror=str(text)):
            return text.lower()
    return printable(f"{type(error).__name__}: {error}")
