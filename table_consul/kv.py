"""Reads of Consul's key-value store, each within one deadline: what is there, provenly nothing, or a SourceError.

It knows Consul's HTTP interface and nothing of tables, services or mail. Three layers, from the bottom:

- sockets that carry a deadline (`_Deadline`, `_TimedSocket`, `_TimedTLSSocket`) and where they lead (`_Endpoint`);
- one exchange over a kept-alive connection of urllib3 inside one `requests.Session` (`_Connection`, `_Adapter`);
- the HTTP client of the Consul library (`_Transport`): addresses in turn, status, headers, strict decoding.

Why the stock client of the library will not do: its time-outs are per receive, it follows redirects out of the asked
key, and it half reads the environment. Only `Consul.kv.get` of it is used, which builds path, parameters and headers.

Longer than other modules: the socket that keeps a deadline is of no use but to this client, which has no other.
"""

from __future__ import annotations

import functools
import http.client
import pathlib
import re
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgspec
import requests
import requests.adapters
import urllib3
import urllib3.connection
import urllib3.exceptions

from table_consul import __version__
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, shown

with warnings.catch_warnings():
    # python-consul2 is of 2020: Python warns about its spelling, and itself of what it deprecates (in _Consul).
    warnings.simplefilter("ignore")
    from consul import base

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from table_consul.config import ConsulConfig

BODY_LIMIT_BYTES = 128 << 20  # Some 400,000 entries of 100 bytes; more than that no mail host should hold in memory.
EXCERPT_CHARACTERS = 120  # Of a body, in a message: enough to recognise a proxy's error page by its title.
READ_BYTES = 1 << 20
JITTER = 1 / 16  # Consul adds up to this part of `wait` (its api-docs/features/blocking, "wait").

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_TOKEN = re.compile("[\x21-\x7e]+")  # What a header can carry as it is.

# A connection whose other end vanished shows only when something is sent: in a blocking query nothing is.
_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)  # OpenBSD has none of the three.
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]

_T = TypeVar("_T")
_Keys = list[bytes]  # A name of its own: inside Client `list` is a method.


class Pair(NamedTuple):
    """One entry of the store; `value` is None where Consul says null, which is how it spells an empty value."""

    key: bytes
    value: bytes | None
    modify_index: int


class Page(NamedTuple):
    """One answer to `Client.list`: the entries, the index to wait on, and whether an ACL hid some of them."""

    pairs: list[Pair]
    index: int  # type: ignore[assignment]  # Consul's word for it; nobody looks for the place of an element here
    filtered: bool


class _Entry(msgspec.Struct, rename="pascal"):
    key: str
    value: bytes | None  # msgspec decodes base64, and refuses what is not exactly that.
    modify_index: int


_ENTRIES = msgspec.json.Decoder(list[_Entry])
_KEYS = msgspec.json.Decoder(list[str])


class _Answer(NamedTuple):
    body: bytes | None  # None: a trusted 404.
    index: int  # type: ignore[assignment]  # as in Page
    filtered: bool


class _Refused(BadResponse):
    """Consul's own no to this one request: another address would say the same."""


def addressable(key: bytes) -> bool:
    """Whether a URL can name exactly this key, and Consul would look it up as it stands.

    Go's request multiplexer, in front of Consul, answers empty, `.` and `..` segments with a redirect to another path,
    and Consul refuses control characters: no key that an operator made with a URL has them.
    """
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(text) and not {"", ".", ".."}.intersection(text.split("/"))


class _Deadline:
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

    deadline: _Deadline | None = None  # None until connected: till then `_Endpoint` sets the time.

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


class _Endpoint:
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

    def open(self, deadline: _Deadline) -> socket.socket:
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

    def _connect(self, deadline: _Deadline) -> _TimedSocket:
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

    def _resolve(self, deadline: _Deadline) -> list[tuple[Any, ...]]:
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
    """A connection of the pool; TLS and unix sockets too, for it is `_Endpoint` that opens it."""

    def __init__(self, *args: Any, endpoint: _Endpoint, deadline: _Deadline, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._endpoint = endpoint
        self._deadline = deadline

    def connect(self) -> None:
        self._deadline.connected = True
        self.sock = self._endpoint.open(self._deadline)


class _Adapter(requests.adapters.HTTPAdapter):
    """Leads to one endpoint; of a URL it sends the target exactly as it was written."""

    def __init__(self, endpoint: _Endpoint, deadline: _Deadline) -> None:
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


class _Session(requests.Session):
    """Without the environment (proxies, netrc), cookies of its own, or a way to follow anything."""

    def __init__(self, endpoints: list[_Endpoint], deadline: _Deadline) -> None:
        super().__init__()
        self.trust_env = False
        self.adapters.clear()
        for endpoint in endpoints:
            self.mount(endpoint.address + "/", _Adapter(endpoint, deadline))

    def get_redirect_target(self, _response: requests.Response) -> None:
        # Even with allow_redirects=False requests reads the body of a redirect, and parses where it leads.
        return None


class _Transport(base.HTTPClient):  # type: ignore[misc]  # the library has no types
    """What the Consul library sends its requests through: one conversation, strict and in time.

    `get` leaves the library's callback uncalled and returns an `_Answer`: the callback takes any 404 for absence, any
    base64 for a value, and differs between python-consul2 and py-consul.
    """

    def __init__(self, settings: ConsulConfig, clock: Callable[[], float]) -> None:
        super().__init__()
        self._settings = settings
        self._context: ssl.SSLContext | None = None
        self.deadline = _Deadline(clock)
        self._endpoints = [_Endpoint(a, self._tls_context, settings.tls_server_name) for a in settings.addresses]
        self._current = 0
        self._session = _Session(self._endpoints, self.deadline)
        self._scope = [(k, v) for k, v in (("ns", settings.namespace), ("partition", settings.partition)) if v]
        self._request = requests.PreparedRequest()
        self._request.method = "GET"
        self._request.prepare_cookies({})
        self._token: str | None = None
        self._set_headers({})
        self.end = 0.0
        self.patience = 0.0  # How long a healthy Consul may sit on the request: the wait of a blocking query.
        self.accept: Callable[[_Answer], Any] = lambda answer: answer

    @property
    def address(self) -> str:
        return self._endpoints[self._current].address

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = _tls_context(self._settings)
        return self._context

    def _set_headers(self, headers: Mapping[str, str]) -> None:
        self._given = dict(headers)
        self._token = headers.get("X-Consul-Token")
        # Compression costs more than it saves on a host's own network, and one bound is easier held than two.
        fixed = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json"}
        self._request.headers = requests.structures.CaseInsensitiveDict(
            {**fixed, "Accept-Encoding": "identity", **headers}
        )

    def get(self, _callback: object, path: str, params: Any = None, headers: Any = None, **_extra: Any) -> Any:  # noqa: ANN401 - the library's
        query = urllib.parse.urlencode([*(params or ()), *self._scope])
        target = urllib.parse.quote(path, safe="/") + ("?" + query if query else "")
        if headers != self._given:
            self._set_headers(headers or {})
        failures: list[SourceError] = []
        for candidates in range(len(self._endpoints), 0, -1):
            self._share_time(candidates)
            try:
                return self.accept(self._attempt(target))
            except _Refused:
                raise
            except (Unreachable, BadResponse) as error:
                failures.append(error)
                self._current = (self._current + 1) % len(self._endpoints)
            if self.deadline.clock() >= self.end:
                break
        text = "; ".join(str(failure) for failure in failures)
        # Of several failures the one that says most about the key counts: an address that answers is no outage.
        raise next((type(f) for f in failures if isinstance(f, BadResponse)), Unreachable)(text)

    def _share_time(self, candidates: int) -> None:
        """Give this attempt its part of the time, so that an address that hangs leaves some for the next one."""
        now = self.deadline.clock()
        left = self.end - now
        spare = left - self.patience if left > self.patience else left
        self.deadline.connect_by = now + spare / candidates
        # While Consul sits on a blocking query it looks just like one that hangs: there only connecting is shared.
        self.deadline.answer_by = self.end if self.patience else self.deadline.connect_by

    def _attempt(self, target: str) -> _Answer:
        self._request.url = self.address + target
        try:
            try:
                return self._exchange()
            except (OSError, urllib3.exceptions.HTTPError) as error:
                # A connection kept alive may have been closed meanwhile: that says nothing about Consul.
                if self.deadline.connected or isinstance(_cause(error), TimeoutError):
                    raise
                return self._exchange()
        except (OSError, urllib3.exceptions.HTTPError) as error:
            cause = _cause(error)
            garbled = isinstance(cause, http.client.HTTPException) and not isinstance(
                cause, http.client.RemoteDisconnected | http.client.IncompleteRead
            )
            kind = BadResponse if garbled else Unreachable
            raise kind(f"Consul at {self.address}: {_reason(cause)}") from error

    def _exchange(self) -> _Answer:
        self.deadline.connected = False
        response = self._session.send(self._request, stream=True, allow_redirects=False, proxies={})
        try:
            chunks = []
            size = 0
            while chunk := response.raw.read(READ_BYTES):
                chunks.append(chunk)
                size += len(chunk)
                if size > BODY_LIMIT_BYTES:
                    raise self._bad(f"answers with more than {BODY_LIMIT_BYTES >> 20} MiB")
        finally:
            response.close()
        return self._judge(response.status_code, response.headers, b"".join(chunks))

    def _judge(self, status: int, headers: Mapping[str, str], body: bytes) -> _Answer:
        """The answer, if Consul gave it and it proves what it says; else the SourceError it amounts to."""
        if status not in (200, 404):
            raise self._failure(status, body)
        leader = headers.get("X-Consul-Knownleader")
        # Whoever asks for stale reads wants old data rather than none; that something is *not* there, though, is
        # nothing a server without a leader can know: it may not have caught up.
        if leader == "false" and (status == 404 or self._settings.consistency != "stale"):
            raise Unreachable(f"Consul at {self.address} has no cluster leader")
        # Where the connection broke within the headers nothing else would show it.
        if leader != "true" and status == 404:
            raise self._bad("404 that is not from Consul's key-value store", body)
        number = headers.get("X-Consul-Index", "")
        index = int(number) if number.isascii() and number.isdigit() and len(number) <= 20 else 0
        if index <= 0:
            raise self._bad(f"{status} without an index, so not from Consul's key-value store", body)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self._bad("compressed answer, which was not asked for")
        filtered = headers.get("X-Consul-Results-Filtered-By-ACLs", "").lower() == "true"
        return _Answer(body if status == 200 else None, index, filtered)

    def _failure(self, status: int, body: bytes) -> SourceError:
        if status in (401, 403):
            return Forbidden(f"Consul at {self.address} refuses the token: {status} {self._excerpt(body)}".rstrip())
        # Consul 1.21.5 answers 400 or 500 for a key with any of `@ + : *` in it (hashicorp/consul#22835); were that
        # an outage, one recipient could stop the answers to all.
        if b"invalid key name" in body.lower():
            return _Refused(
                f"Consul at {self.address} refuses the name of this key (a limit of Consul 1.21.5: upgrade it, or set"
                f' disable_http_unprintable_char_filter, or use mode = "mirror"): {status}'
            )
        text = f"Consul at {self.address}: {status} {self._excerpt(body)}".rstrip()
        if status == 429 or status >= 500:
            return Unreachable(text)
        return _Refused(text) if status >= 400 else BadResponse(text)

    def _bad(self, text: str, body: bytes = b"") -> BadResponse:
        # A web page tells who answered; anything else may hold the values of the table, password hashes among them.
        page = ": " + self._excerpt(body) if body.lstrip().startswith(b"<") else ""
        return BadResponse(f"Consul at {self.address}: {text}{page}")

    def _excerpt(self, body: bytes) -> str:
        """The beginning of a body, as one visible line; without the token, should a proxy echo it."""
        text = body[: 8 * EXCERPT_CHARACTERS].decode(errors="backslashreplace")
        if self._token:
            text = text.replace(self._token, "(token)")
        return shown(" ".join(text.split()), EXCERPT_CHARACTERS)

    def decoded(self, decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
        """The body as what the decoder makes of it; raises BadResponse."""
        try:
            return decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise self._bad(f"unusable answer ({error})", body) from error

    def close(self) -> None:
        self._session.close()

    def _unused(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
        raise NotImplementedError("table-consul only reads")

    put = delete = post = _unused


class _Silence:
    """In place of `os` in the library, which half reads CONSUL_* from the environment; `config` reads it wholly."""

    @staticmethod
    def getenv(_name: str, default: str | None = None) -> str | None:
        return default


base.os = _Silence


class _Consul(base.Consul):  # type: ignore[misc]  # the library has no types
    def __init__(self, settings: ConsulConfig, transport: _Transport) -> None:
        self._transport = transport
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(consistency=settings.consistency, dc=settings.datacenter)

    def http_connect(self, *_args: object, **_kwargs: object) -> _Transport:
        return self._transport


class Client:
    """One conversation with Consul at a time, over kept-alive connections; not for use by two threads at once.

    Every read raises SourceError when Consul cannot tell within `timeout` seconds, all attempts and addresses
    together: Unreachable, Forbidden, BadResponse, or SourceError itself where a local file is at fault.
    """

    def __init__(self, settings: ConsulConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._transport = _Transport(settings, clock)
        self._library = _Consul(settings, self._transport)
        self._token_file = pathlib.Path(settings.token_file) if settings.token_file else None
        self._token_seen: tuple[int, ...] | None = None
        self._library.token = _checked_token(settings.token, "the configured token") if settings.token else None

    @property
    def address(self) -> str:
        """The address in use, for a log line."""
        return self._transport.address

    def get(self, key: bytes, *, timeout: float) -> Pair | None:
        """The entry of exactly this key; None when Consul proved that there is none. Raises ValueError, SourceError."""
        if not addressable(key):
            raise ValueError(f"no URL can name the key {key!r}")

        def accept(answer: _Answer) -> Pair | None:
            if answer.body is None:
                return None
            pairs = self._transport.decoded(_ENTRIES, answer.body)
            if len(pairs) != 1 or pairs[0].key.encode() != key:
                raise BadResponse(f"Consul at {self.address} answers for another key than the one asked")
            return Pair(key, pairs[0].value, pairs[0].modify_index)

        return self._read(key, accept, timeout)

    def list(self, prefix: bytes, *, timeout: float, index: int = 0, wait: float = 0) -> Page:
        """Every entry below the prefix, in Consul's order; none is an empty page. Raises ValueError, SourceError.

        With an `index` of a former page Consul answers when something changed since, or after `wait` seconds plus up to
        a sixteenth: `timeout` must be longer than that.
        """

        def accept(answer: _Answer) -> Page:
            if answer.body is None:
                return Page([], answer.index, answer.filtered)
            entries = self._transport.decoded(_ENTRIES, answer.body)
            pairs = [Pair(entry.key.encode(), entry.value, entry.modify_index) for entry in entries]
            self._check_below(prefix, [pair.key for pair in pairs])
            return Page(pairs, answer.index, answer.filtered)

        _check_prefix(prefix)
        waiting: dict[str, str | int] = {"index": index, "wait": f"{max(1, round(wait * 1000))}ms"} if index else {}
        patience = wait * (1 + JITTER) if index else 0.0
        return self._read(prefix, accept, timeout, patience, recurse=True, **waiting)

    def keys(self, prefix: bytes, *, timeout: float) -> _Keys:
        """Every key below the prefix, in Consul's order.

        Raises ValueError, SourceError; Forbidden also when an ACL hid some of them.
        """

        def accept(answer: _Answer) -> _Keys:
            if answer.filtered:
                raise Forbidden(f"Consul at {self.address} hides keys from this token")
            if answer.body is None:
                return []
            found = [key.encode() for key in self._transport.decoded(_KEYS, answer.body)]
            self._check_below(prefix, found)
            return found

        _check_prefix(prefix)
        return self._read(prefix, accept, timeout, keys=True)

    def reload_token(self) -> None:
        """Read the token file again, changed or not; raises SourceError when it cannot be used."""
        self._token_seen = None
        self._refresh_token()

    def close(self) -> None:
        """Close all connections; a later read finds Consul Unreachable."""
        self._transport.close()

    def _read(
        self, key: bytes, accept: Callable[[_Answer], _T], timeout: float, patience: float = 0.0, **options: str | int
    ) -> _T:
        transport = self._transport
        transport.end = self._clock() + timeout
        transport.accept = accept
        transport.patience = patience
        self._refresh_token()
        name = key.decode()
        kv = self._library.kv
        try:
            return cast("_T", kv.get(name, **options))
        except Forbidden:
            # The file may have changed within the grain of its time stamp.
            refused = self._library.token
            if self._token_file is None:
                raise
            self.reload_token()
            if self._library.token == refused:
                raise
        return cast("_T", kv.get(name, **options))

    def _refresh_token(self) -> None:
        if self._token_file is None:
            return
        try:
            status = self._token_file.stat()
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._token_seen:
                return
            with self._token_file.open(encoding="ascii", errors="replace") as file:
                text = file.read(4096).rstrip()
        except OSError as error:
            raise SourceError(f"token file {self._token_file}: {error.strerror}") from error
        self._library.token = _checked_token(text, f"token file {self._token_file}")
        self._token_seen = seen

    def _check_below(self, prefix: bytes, keys: _Keys) -> None:
        if not all(key.startswith(prefix) for key in keys):
            raise BadResponse(f"Consul at {self.address} lists keys that are not below the prefix asked")


def _check_prefix(prefix: bytes) -> None:
    if prefix and not addressable(prefix.removesuffix(b"/")):
        raise ValueError(f"no URL can name the prefix {prefix!r}")


def _checked_token(text: str, origin: str) -> str:
    # An empty file is one being written, or a mistake; to ask without a token may find an empty table (404), a lie.
    if not _TOKEN.fullmatch(text):
        raise SourceError(f"{origin} is empty or not one line of printable ASCII")
    return text


def _tls_context(settings: ConsulConfig) -> ssl.SSLContext:
    """The context of all HTTPS connections; raises SourceError naming the file that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file, capath=settings.ca_path)
        if settings.cert_file:
            # Without the password function OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
    except OSError as error:
        files = [f for f in (settings.ca_file, settings.ca_path, settings.cert_file, settings.key_file) if f]
        raise SourceError(f"TLS files {', '.join(files)}: {_reason(error)}") from error
    # Since 3.13 Python is stricter about private authorities than RFC 5280 asks, and than the consul command is.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _TimedTLSSocket
    return context


def _cause(error: BaseException) -> BaseException:
    """The error of the socket, TLS or http.client below the wrappings of urllib3 and requests."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError | http.client.HTTPException) and not isinstance(inner, requests.RequestException):
            return inner
        inner = inner.__context__  # urllib3 gives some of its own errors no __cause__.
    return error


def _reason(error: BaseException) -> str:
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
        case OSError(strerror=str(text)):
            return text.lower()
    return shown(f"{type(error).__name__}: {error}", EXCERPT_CHARACTERS)
