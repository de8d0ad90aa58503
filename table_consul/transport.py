"""HTTP for kv.py: failover between addresses, deadlines, kept-alive connections, validation of status and headers.

requests applies a timeout to each receive, so a server that sends one byte per second never exceeds it. Here every
socket, and name resolution, has the deadline of the whole exchange.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import re
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
import zlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import urllib3.exceptions

from table_consul import __version__
from table_consul.body import Read, body_of
from table_consul.connection import CLIENT_CERTIFICATE, Endpoint, Exchange, cause_of, reason_of
from table_consul.errors import (
    BadName,
    BadRequest,
    BadResponse,
    Forbidden,
    SourceError,
    TooManyConnections,
    Unreachable,
    printable,
)

with warnings.catch_warnings():
    # requests warns about versions of optional dependencies. python-consul2 dates from 2020: Python warns about its
    # syntax, and it warns about its own deprecations.
    warnings.simplefilter("ignore")
    import requests
    from consul import base

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

log = logging.getLogger("table_consul")

# A connection that closes sooner was idle for too long, or its server restarted. Later, a timeout has cut the wait: 30
# seconds in Consul 1.22.4 (http_config.write_timeout), or that of a proxy.
LEAST_CUT_SECONDS = 2.0
# With these a proxy reports a wait that its own timeout, or Consul's, has cut; 503: Varnish and Envoy, 524: Cloudflare.
_GATEWAY_TIMEOUTS = (408, 502, 503, 504, 524)
# A server that has not heard from its leader for longer may lack entries.
MAX_STALE_SECONDS = 10.0
# The size of the kernel's receive buffer while a response is read.
WIDE_BYTES = 1 << 20
_HEADERS = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json"}
_MAX_INDEX = 2**63 - 1
BROKEN = (OSError, urllib3.exceptions.HTTPError)  # What a request may raise; requests' errors are OSErrors.
# The error texts of Consul 1.8 to 2.0. If the request has a token, no other text is quoted: a proxy may echo the token
# in any encoding. The names of keys and tokens are left out.
_OWN_WORDS = re.compile(
    rb"Permission denied(?:: anonymous token)?|lacks permission '(?:key|acl):(?:read|write|list)'|ACL not found"
    rb"|ACL support disabled|Access is restricted|Endpoint is blocked by agent configuration"
    rb'|Invalid query parameter: "(?:ns|partition)" - (?:Namespaces|Partitions) are a Consul Enterprise feature'
    rb"|Cannot specify \?stale with \?consistent|Invalid (?:index|wait time)|Missing key name|Failed to parse body"
    rb"|Client sent an HTTP request to an HTTPS server"
    rb"|(?i:invalid key name)(?:, leading/trailing spaces are not allowed|, path traversal is not allowed|, keys should"
    rb" respect the)?|Request body(?=\(\d+ bytes\) too large)|Transaction contains too many operations"
    rb"|rate limit exceeded(?: for operation that can only be performed by the leader)?(?:, try again later)?"
    rb"(?: or against a different server)?|RPC rate limit exceeded|Your IP is issuing too many concurrent connections"
    rb"|No cluster leader|No path to datacenter|Not ready to serve consistent reads|No known Consul servers"
    rb"|rpc error (?:making call|getting client)|failed to get conn|i/o (?:deadline reached|timeout)|EOF"
    rb"|connection re(?:fused|set by peer)|leadership lost while committing log|node is not the leader"
)
# Go's HTTP server limits the headers of a request, and a proxy its URL. Only the key makes a request this long.
_TOO_LONG = (414, 431)
# By words of Consul's errors.
NO_LEADER = "start a majority of the servers"
_HINTS = {
    "No known Consul servers": "join this agent to the servers",
    "No path to datacenter": "check datacenter in the configuration",
    "leader|rpc error": NO_LEADER,
    "rate limit": "raise limits in Consul's configuration",
}


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
    recent: bool = False
    """Whether a server without a leader must not answer, even with `stale`."""


# The library reads some CONSUL_* variables; `config` reads all of them.
base.os = SimpleNamespace(getenv=lambda _name, default=None: default)


class _RequestBuilder(base.HTTPClient):  # type: ignore[misc]  # the library has no types
    """The library's HTTP client, which sends nothing: it returns the request for `Transport.send`.

    The library's callback is not called: it accepts any 404 as absence and any base64 as a value, and differs between
    python-consul2 and py-consul.
    """

    def get(self, _callback: object, path: str, params: Any = None, headers: Any = None, **_extra: Any) -> Request:  # noqa: ANN401 - the library's
        return Request(path, params or (), headers or {})

    def put(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the library's
        raise NotImplementedError("table-consul only reads")

    delete = post = put

    def close(self) -> None:
        """Does nothing; py-consul requires it."""


class Library(base.Consul):  # type: ignore[misc]  # the library has no types
    """Consul's client, whose methods return the request instead of sending it."""

    def http_connect(self, *_args: object, **_kwargs: object) -> _RequestBuilder:
        return _RequestBuilder()


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
        self._indexed, self._recent = request.indexed, request.recent
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
        recent = self._recent or status == 404
        if leader == "false" and (recent or not self._stale):
            raise Unreachable(f"Consul at {self.address} has no cluster leader", NO_LEADER)
        if leader not in ("true", "false") or not is_index:
            raise self.bad(f"status {status}, but not from Consul's key-value store", _beginning(response))
        contact = headers.get("X-Consul-Lastcontact", "0")
        late = not contact.isascii() or not contact.isdigit() or int(contact[:19]) > MAX_STALE_SECONDS * 1000
        if recent and late:
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


def excerpt(body: bytes, *, token: bool) -> str:
    """The error text of Consul in a body. Without a token, other text is quoted too, to identify a proxy's page."""
    if words := _OWN_WORDS.findall(body[:1000]):
        return " ... ".join(word.decode() for word in dict.fromkeys(words))
    if body and token:
        return "(text not quoted: it may contain the token)"
    return printable(" ".join(body[:1000].decode(errors="backslashreplace").split()))


def refusal(consul: str, status: int, body: bytes, *, token: bool) -> SourceError:
    """The error for this status. ``consul`` names the server; ``token``: the request had a token."""
    reply = f"{status} {excerpt(body, token=token)}".rstrip()
    if status in (401, 403):
        if "Access is restricted" in reply:
            return Forbidden(f"{consul} rejects writes from this host: {reply}", "add it to allow_write_http_from")
        if "Endpoint is blocked" in reply:
            return Forbidden(f"{consul}: {reply}", "check http_config.block_endpoints")
        if not token:
            return Forbidden(f"{consul}: {reply}", "no token is configured: set token_file")
        done = "denies the token access" if "Permission denied" in reply else "rejects the token"
        return Forbidden(f"{consul} {done}: {reply}")
    if "Enterprise feature" in reply:
        setting = "partition" if "Partitions" in reply else "namespace"
        return SourceError(f"{consul}: {reply}", f"remove {setting} from the configuration")
    # 1.21.5 rejects the `@` of mail addresses (hashicorp/consul#22835), later versions a leading or trailing blank. If
    # this counted as an outage, one recipient could block the lookups of all others.
    if "invalid key name" in reply.lower():
        hint = "rename the key, or set disable_kv_key_validation in Consul's configuration"
        if "should respect" in reply:
            hint = "upgrade Consul 1.21.5, or set disable_http_unprintable_char_filter in its configuration"
        return BadName(f"{consul} rejects the name of this key: {reply}", hint)
    if status == 400 and not body:  # Consul's filter of unprintable characters; its other responses have a text
        return BadName(f"{consul} rejects the name of this key: {reply}", "remove unprintable characters from it")
    if status in _TOO_LONG:
        return BadName(f"{consul} rejects the name of this key: {reply}", "shorten it")
    if "to an HTTPS server" in reply:  # the address is wrong; another may be right
        return BadResponse(f"{consul}: {reply}", "should the address be https://?")
    if "too many concurrent connections" in reply:
        return TooManyConnections(f"{consul}: {reply}", "raise limits.http_max_conns_per_client")
    kind = Unreachable if status == 429 or status >= 500 else BadRequest if status >= 400 else BadResponse
    return kind(f"{consul}: {reply}", next((hint for words, hint in _HINTS.items() if re.search(words, reply)), ""))


def broken_exchange(consul: str, error: Exception, *, fresh: bool = False) -> SourceError:
    """The error for a broken connection; ``consul`` names the server.

    ``fresh``: the connection was new, and broke soon. Consul 1.8 closes connections beyond its limit without a
    response.
    """
    cause = cause_of(error)
    if fresh and isinstance(cause, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError):  # RemoteDisconnected too
        hint = "this host may have too many connections: check limits.http_max_conns_per_client"
        return TooManyConnections(f"{consul}: {reason_of(cause)}", hint)
    ended = isinstance(cause, OSError | http.client.IncompleteRead)
    kind = BadResponse if isinstance(cause, http.client.HTTPException) and not ended else Unreachable
    return kind(f"{consul}: {reason_of(cause)}", _tls_hint(cause))


def _tls_hint(error: BaseException) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return "check ca_file and tls_server_name"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "should the address be http://?"
        case ssl.SSLError(reason=str(reason)) if CLIENT_CERTIFICATE.search(reason):
            return "check cert_file and key_file"
    return ""
