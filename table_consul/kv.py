"""Reads of Consul's key-value store, each within one deadline: what is there, provenly nothing, or a SourceError.

Knows Consul's HTTP interface, and nothing of tables, services or mail. connection.py is below it; here the HTTP client
of the Consul library is replaced (`_Transport`): addresses in turn, status, headers, strict decoding.

Why the stock client of the library will not do: its time-outs are per receive, it follows redirects out of the asked
key, and it half reads the environment. Only `Consul.kv.get` of it is used, which builds path, parameters and headers.
"""

from __future__ import annotations

import http.client
import pathlib
import re
import ssl
import time
import urllib.parse
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

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
from table_consul.errors import BadResponse, Forbidden, SourceError, Unreachable, shown

with warnings.catch_warnings():
    # python-consul2 is of 2020: Python warns about its spelling, and itself of what it deprecates (in _Consul).
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
JITTER = 1 / 16  # Consul adds up to this part of `wait` (its api-docs/features/blocking, "wait").

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# Where one entry of Consul's list ends and the next begins. Within a JSON string no quote follows like that: it would
# end the string, and after its end comes no letter.
_NEXT_ENTRY = re.compile(rb'\},\s*\{\s*"[A-Za-z]')
_TOKEN = re.compile("[\x21-\x7e]+")  # What a header can carry as it is.

_T = TypeVar("_T")
Take = Callable[[list[tuple[bytes, bytes | None]]], None]
_Keys = list[bytes]  # A name of its own: inside Client `list` is a method.


class Pair(NamedTuple):
    """One entry of the store; `value` is None where Consul says null, which is how it spells an empty value."""

    key: bytes
    value: bytes | None
    modify_index: int


class Seen(NamedTuple):
    """What `Client.watch` has brought: the index to wait on, and whether an ACL hid some entries."""

    index: int  # type: ignore[assignment]  # as in Page
    filtered: bool


class Page(NamedTuple):
    """One answer to `Client.list`: the entries, the index to wait on, and whether an ACL hid some of them."""

    pairs: list[Pair]
    index: int  # type: ignore[assignment]  # Consul's word for it; nobody looks for the place of an element here
    filtered: bool


class _Entry(msgspec.Struct, rename="pascal", gc=False):
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


class _Transport(base.HTTPClient):  # type: ignore[misc]  # the library has no types
    """What the Consul library sends its requests through: one conversation, strict and in time.

    `get` leaves the library's callback uncalled and returns an `_Answer`: the callback takes any 404 for absence, any
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
        self.accept: Callable[[_Answer], Any] = lambda answer: answer
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

    def _exchange(self) -> _Answer:
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

    def _stream(self, response: Response, begin: Callable[[int], Callable[[bytes], None] | None]) -> _Answer:
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

    def watch(
        self,
        prefix: bytes,
        begin: Callable[[int], Take | None],
        *,
        timeout: float,
        index: int = 0,
        wait: float = 0,
    ) -> Seen:
        """Every entry below the prefix, in Consul's order, a few at a time. Raises ValueError, SourceError.

        When an answer begins to arrive `begin` is given its index, and says what takes the entries, or None when they
        are of no interest. It is called again if that answer breaks off and another one is tried. `index` and `wait`
        are as for `list`; `timeout` is what Consul may take beyond that until the answer begins.

        Without an index the leader makes sure that it is one and has caught up, unless `stale` is configured: one that
        was elected a moment ago answers from before its last entries, and makes them look absent (hashicorp/consul
        #3285, #10989). Waiting on an index needs no such proof.
        """
        last = prefix

        def start(seen: int) -> Callable[[bytes], None] | None:
            nonlocal last
            last = prefix
            take = begin(seen)
            return None if take is None else lambda body: pass_on(body, take)

        def pass_on(body: bytes, take: Take) -> None:
            nonlocal last
            entries = self._transport.decoded(_ENTRIES, body)
            keys = [entry.key.encode() for entry in entries]
            if not keys:
                return
            self._check_below(prefix, keys)
            if keys[0] < last or keys != sorted(keys):
                raise BadResponse(f"Consul at {self.address} lists keys out of order")
            last = keys[-1]
            take([(key, entry.value) for key, entry in zip(keys, entries, strict=True)])

        def accept(answer: _Answer) -> Seen:
            if answer.body is None:
                begin(answer.index)
            return Seen(answer.index, answer.filtered)

        _check_prefix(prefix)
        waiting: dict[str, str | int] = {"index": index, "wait": f"{max(1, round(wait * 1000))}ms"} if index else {}
        if not index and self._library.consistency == "default":
            waiting["consistency"] = "consistent"
        patience = wait * (1 + JITTER) if index else 0.0
        self._transport.begin = start
        try:
            return self._read(prefix, accept, timeout + patience, patience, recurse=True, **waiting)
        finally:
            self._transport.begin = None

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
