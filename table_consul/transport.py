"""How a request of the Consul library becomes an answer that proves what it says: addresses in turn, status, headers.

Takes the place of the library's HTTP client; connection.py is below it. Why that client will not do: its time-outs are
per receive, it follows redirects out of the asked key, and it half reads the environment.
"""

from __future__ import annotations

import http.client
import re
import ssl
import urllib.parse
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import urllib3.exceptions

from table_consul import __version__
from table_consul.connection import (
    Deadline,
    Endpoint,
    Headers,
    PreparedRequest,
    Response,
    Session,
    cause_of,
    reason_of,
    tls_context,
)
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, printable

with warnings.catch_warnings():
    # python-consul2 is of 2020: Python warns about its spelling, and itself of what it deprecates (in Library).
    warnings.simplefilter("ignore")
    from consul import base

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

BODY_LIMIT_BYTES = 128 << 20  # Some 400,000 entries of 100 bytes; more than that no mail host should hold in memory.
EXCERPT_CHARACTERS = 120  # Of a body, in a message: enough to recognise a proxy's error page by its title.
READ_BYTES = 1 << 20
# Of the body of a watch at a time: decoding one piece holds Python's lock for some 50 microseconds, in which no answer
# leaves; between two pieces there is a read, which lets go of it.
STEP_BYTES = 16 << 10
# From the first byte of a watch's answer to its last; 100,000 entries from an agent on this host take less than one.
BODY_SECONDS = 10.0

# Where one entry of Consul's list ends and the next begins. Within a JSON string no quote follows like that: it would
# end the string, and after its end comes no letter.
_NEXT_ENTRY = re.compile(rb'\},\s*\{\s*"[A-Za-z]')

_T = TypeVar("_T")


class Answer(NamedTuple):
    """What Consul said with a 200 or a 404 that is to be trusted."""

    body: bytes | None  # None: a trusted 404.
    index: int  # type: ignore[assignment]  # Consul's word for it; nobody looks for the place of an element here
    filtered: bool


class Refused(BadResponse):
    """Consul's own no to this one request: another address would say the same."""


class Transport(base.HTTPClient):  # type: ignore[misc]  # the library has no types
    """What the Consul library sends its requests through: one conversation, strict and in time.

    `get` leaves the library's callback uncalled and returns an `Answer`: the callback takes any 404 for absence, any
    base64 for a value, and differs between python-consul2 and py-consul.
    """

    def __init__(self, settings: ConsulConfig, clock: Callable[[], float]) -> None:
        super().__init__()
        self._settings = settings
        self._context: ssl.SSLContext | None = None
        self.deadline = Deadline(clock)
        self._endpoints = [Endpoint(a, self._tls_context, settings.tls_server_name) for a in settings.addresses]
        self._current = 0
        self._session = Session(self._endpoints, self.deadline)
        self._scope = [(k, v) for k, v in (("ns", settings.namespace), ("partition", settings.partition)) if v]
        self._request = PreparedRequest()
        self._request.method = "GET"
        self._request.prepare_cookies({})
        self._token: str | None = None
        self._set_headers({})
        self.end = 0.0
        self.patience = 0.0  # How long a healthy Consul may sit on the request: the wait of a blocking query.
        self.accept: Callable[[Answer], Any] = lambda answer: answer
        self.begin: Callable[[int], Callable[[bytes], None] | None] | None = None

    @property
    def address(self) -> str:
        return self._endpoints[self._current].address

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = tls_context(self._settings)
        return self._context

    def _set_headers(self, headers: Mapping[str, str]) -> None:
        self._given = dict(headers)
        self._token = headers.get("X-Consul-Token")
        # Compression costs more than it saves on a host's own network, and one bound is easier held than two.
        fixed = {"User-Agent": f"table-consul/{__version__}", "Accept": "application/json"}
        self._request.headers = Headers({**fixed, "Accept-Encoding": "identity", **headers})

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
            except Refused:
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

    def _attempt(self, target: str) -> Answer:
        self._request.url = self.address + target
        try:
            try:
                return self._exchange()
            except (OSError, urllib3.exceptions.HTTPError) as error:
                # A connection kept alive may have been closed meanwhile: that says nothing about Consul.
                if self.deadline.connected or isinstance(cause_of(error), TimeoutError):
                    raise
                return self._exchange()
        except (OSError, urllib3.exceptions.HTTPError) as error:
            cause = cause_of(error)
            garbled = isinstance(cause, http.client.HTTPException) and not isinstance(
                cause, http.client.RemoteDisconnected | http.client.IncompleteRead
            )
            kind = BadResponse if garbled else Unreachable
            raise kind(f"Consul at {self.address}: {reason_of(cause)}") from error

    def _exchange(self) -> Answer:
        self.deadline.connected = False
        response = self._session.send(self._request, stream=True, allow_redirects=False, proxies={})
        try:
            if self.begin is not None and response.status_code == 200:
                return self._stream(response, self.begin)
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

    def _stream(self, response: Response, begin: Callable[[int], Callable[[bytes], None] | None]) -> Answer:
        """Hand the body on in pieces that are lists of whole entries, or drop it when nobody wants it."""
        answer = self._judge(200, response.headers, b"")
        self.deadline.answer_by = self.deadline.clock() + BODY_SECONDS
        take = begin(answer.index)
        rest, size = b"", 0
        while chunk := response.raw.read(STEP_BYTES if take else READ_BYTES):
            size += len(chunk)
            if size > BODY_LIMIT_BYTES:
                raise self._bad(f"answers with more than {BODY_LIMIT_BYTES >> 20} MiB")
            if take is None:
                continue
            rest += chunk
            end = rest.rfind(b"},")
            while end > 0 and not _NEXT_ENTRY.match(rest, end):
                end = rest.rfind(b"},", 0, end)
            if end > 0:
                take(rest[: end + 1] + b"]")
                rest = b"[" + rest[end + 2 :]
        if take is not None:
            take(rest)
        return answer

    def _judge(self, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
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
        return Answer(body if status == 200 else None, index, filtered)

    def _failure(self, status: int, body: bytes) -> SourceError:
        if status in (401, 403):
            return Forbidden(f"Consul at {self.address} refuses the token: {status} {self._excerpt(body)}".rstrip())
        # Consul 1.21.5 answers 400 or 500 for a key with any of `@ + : *` in it (hashicorp/consul#22835); were that
        # an outage, one recipient could stop the answers to all.
        if b"invalid key name" in body.lower():
            return Refused(
                f"Consul at {self.address} refuses the name of this key (a limit of Consul 1.21.5: upgrade it, or set"
                f' disable_http_unprintable_char_filter, or use mode = "mirror"): {status}'
            )
        text = f"Consul at {self.address}: {status} {self._excerpt(body)}".rstrip()
        if status == 429 or status >= 500:
            return Unreachable(text)
        return Refused(text) if status >= 400 else BadResponse(text)

    def _bad(self, text: str, body: bytes = b"") -> BadResponse:
        # A web page tells who answered; anything else may hold the values of the table, password hashes among them.
        page = ": " + self._excerpt(body) if body.lstrip().startswith(b"<") else ""
        return BadResponse(f"Consul at {self.address}: {text}{page}")

    def _excerpt(self, body: bytes) -> str:
        """The beginning of a body, as one visible line; without the token, should a proxy echo it."""
        text = body[: 8 * EXCERPT_CHARACTERS].decode(errors="backslashreplace")
        if self._token:
            text = text.replace(self._token, "(token)")
        return printable(" ".join(text.split()), EXCERPT_CHARACTERS)

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


class Library(base.Consul):  # type: ignore[misc]  # the library has no types
    """The library, which builds path, parameters and headers, with our transport below it."""

    def __init__(self, settings: ConsulConfig, transport: Transport) -> None:
        self._transport = transport
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(consistency=settings.consistency, dc=settings.datacenter)

    def http_connect(self, *_args: object, **_kwargs: object) -> Transport:
        return self._transport
