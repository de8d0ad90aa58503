"""Reads of Consul's key-value store: entries, proven absence, or a SourceError, each within one deadline.

Knows the paths and parameters of Consul's HTTP interface, and nothing of tables, services or mail. The Consul library
(`Consul.kv.get`) builds path, parameters and headers; transport.py sends them.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import msgspec

from table_consul.errors import UNDECODABLE, BadResponse, Forbidden, SourceError, TooLarge
from table_consul.files import open_regular_file
from table_consul.transport import BROKEN, Answer, Request, Transport

with warnings.catch_warnings():
    # python-consul2 is of 2020: Python warns about its spelling, and it warns about what it deprecates itself.
    warnings.simplefilter("ignore")
    from consul import base

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

JITTER = 1 / 16  # Consul adds up to this part of `wait` (its api-docs/features/blocking, "wait").

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_TOKEN = re.compile("[\x21-\x7e]+")  # What a header can carry as it is.
# Where one entry of Consul's list ends and the next begins. Within a JSON string no quote follows like that: it would
# end the string, and after its end comes no letter.
_NEXT_ENTRY = re.compile(rb'\},\s*\{\s*"[A-Za-z]')

T = TypeVar("T")
Keys = list[bytes]  # A name of its own: inside Client `list` is a method.


class Limits(NamedTuple):
    """Bounds on the body of an answer."""

    chunk_bytes: int = 16 << 10
    """Read at a time, and discarded to keep a connection. Decoding that much holds Python's lock for some 50
    microseconds, in which no reply leaves; the read before the next chunk releases it."""
    body_bytes: int = 128 << 20
    """Some 400,000 entries of 100 bytes; more than that no mail host should hold in memory."""
    read_seconds: float = 10.0
    """For each chunk of a blocking query; the body as a whole may take for as long as it goes on arriving."""


LIMITS = Limits()


class Pair(NamedTuple):
    """One entry of the store; ``value`` is None where Consul says null, which is how it spells an empty value."""

    key: bytes
    value: bytes | None
    modify_index: int
    flags: int = 0


class Page(NamedTuple):
    """The entries below a prefix, the index to wait on, and whether an ACL hides some of the entries."""

    pairs: list[Pair]
    index: int  # type: ignore[assignment]  # Consul's word for it; the method of tuples is not needed here
    filtered: bool


class _Entry(msgspec.Struct, rename="pascal", gc=False):
    key: str
    value: bytes | None  # msgspec decodes base64, and refuses what is not exactly that.
    modify_index: int
    flags: int = 0


_ENTRIES = msgspec.json.Decoder(list[_Entry])
_KEYS = msgspec.json.Decoder(list[str])


class _NoEnvironment:
    """Replaces `os` in the library, which half reads CONSUL_* from the environment; `config` reads all of it."""

    @staticmethod
    def getenv(_name: str, default: str | None = None) -> str | None:
        return default


base.os = _NoEnvironment


class _RequestBuilder(base.HTTPClient):  # type: ignore[misc]  # the library has no types
    """The library's HTTP client, which sends nothing: it returns the request for `Transport.send`.

    The library's callback is left uncalled: it takes any 404 for absence and any base64 for a value, and differs
    between python-consul2 and py-consul.
    """

    def get(self, _callback: object, path: str, params: Any = None, headers: Any = None, **_extra: Any) -> Request:  # noqa: ANN401 - the library's
        return Request(path, params or (), headers or {})

    def put(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the library's
        raise NotImplementedError("table-consul only reads")

    delete = post = put

    def close(self) -> None:
        """Nothing; py-consul requires it."""


class _Library(base.Consul):  # type: ignore[misc]  # the library has no types
    def __init__(self, settings: ConsulConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(consistency=settings.consistency, dc=settings.datacenter)

    def http_connect(self, *_args: object, **_kwargs: object) -> _RequestBuilder:
        return _RequestBuilder()


class Response:
    """An answer whose status and headers were validated; its body is read only when it is asked for, and once.

    A context manager. Closing it discards what is left of a small body, and closes the connection of a large one.
    """

    def __init__(self, transport: Transport, answer: Answer, limits: Limits, prefix: bytes, *, steps: bool) -> None:
        """With ``steps`` each chunk may take `Limits.read_seconds`; without, the deadline holds for the whole body."""
        self.index = answer.index
        self.filtered = answer.filtered
        """An ACL hides some of the keys."""
        self.absent = answer.absent
        self._transport = transport
        self._body = answer.raw
        self._unread = True
        self._limits = limits
        self._prefix = prefix
        self._steps = steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._unread:
            with contextlib.suppress(*BROKEN):
                self._body.raw.read(self._limits.chunk_bytes)
        self._body.close()

    def pairs(self) -> Iterator[list[tuple[bytes, bytes | None]]]:
        """Keys and values below the prefix, in Consul's order, a few at a time.

        Raises:
            TooLarge: the body has more than `Limits.body_bytes`.
            SourceError: it broke off, stopped arriving, or is not a list of such entries.
        """
        for keys, entries in self._entries():
            yield [(key, entry.value) for key, entry in zip(keys, entries, strict=True)]

    def all(self) -> list[Pair]:
        """Every entry below the prefix, with index and flags; raises as `pairs`."""
        return [
            Pair(key, entry.value, entry.modify_index, entry.flags)
            for keys, entries in self._entries()
            for key, entry in zip(keys, entries, strict=True)
        ]

    def _entries(self) -> Iterator[tuple[Keys, list[_Entry]]]:
        last = self._prefix
        for piece in _split_list(self._chunks()):
            if self.absent:
                continue
            entries = self.decoded(_ENTRIES, piece)
            keys = [entry.key.encode() for entry in entries]
            if not keys:
                continue
            self.check_below(self._prefix, keys)
            if keys[0] < last or keys != sorted(keys):
                raise self.bad("lists keys out of order")
            last = keys[-1]
            yield keys, entries

    def _chunks(self) -> Iterator[bytes]:
        limits, deadline, size = self._limits, self._transport.deadline, 0
        self._unread = False
        while True:
            if self._steps:
                deadline.answer_by = deadline.clock() + limits.read_seconds
            try:
                chunk = self._body.raw.read(limits.chunk_bytes)
            except BROKEN as error:
                failure = self._transport.failure(error)
                self._transport.next_address()
                raise failure from error
            if not chunk:
                return
            size += len(chunk)
            if size > limits.body_bytes:
                raise TooLarge(f"Consul at {self._transport.address}: more than {limits.body_bytes >> 20} MiB of data")
            yield chunk

    def decoded(self, decoder: msgspec.json.Decoder[T], piece: bytes | None = None) -> T:
        """What the decoder makes of the body, or of this piece of it; raises as `pairs`."""
        text = b"".join(self._chunks()) if piece is None else piece
        try:
            return decoder.decode(text)
        except UNDECODABLE as error:
            raise self.bad(f"unusable answer ({error})", text) from error

    def check_below(self, prefix: bytes, keys: Keys) -> None:
        """Refuse keys that were not asked for; raises BadResponse."""
        if not all(key.startswith(prefix) for key in keys):
            raise self.bad("lists keys that are not below the prefix")

    def bad(self, what: str, text: bytes = b"") -> BadResponse:
        """The error for an answer that Consul would not give; the next request goes to the next address."""
        error = self._transport.bad(what, text)
        self._transport.next_address()
        return error


def _split_list(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of one JSON list of objects, as lists of whole objects."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        end = rest.rfind(b"},")
        while end > 0 and not _NEXT_ENTRY.match(rest, end):
            end = rest.rfind(b"},", 0, end)
        if end > 0:
            yield rest[: end + 1] + b"]"
            rest = b"[" + rest[end + 2 :]
    yield rest


def is_url_safe(key: bytes) -> bool:
    """Whether a URL can name exactly this key, and Consul would look it up as it is.

    Go's request multiplexer, in front of Consul, answers empty, `.` and `..` segments with a redirect to another path,
    and Consul refuses control characters: no key that an operator made with a URL has them.
    """
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(text) and not {"", ".", ".."}.intersection(text.split("/"))


class Client:
    """One conversation with Consul at a time, over kept-alive connections; not for use by two threads at once.

    Every read raises ValueError for a key that no URL can name, and SourceError when there is no answer within
    ``timeout`` seconds, all attempts and addresses together: Unreachable, Forbidden, BadResponse, TooLarge, or
    SourceError itself where a local file is at fault.
    """

    def __init__(
        self, settings: ConsulConfig, *, clock: Callable[[], float] = time.monotonic, limits: Limits = LIMITS
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._transport = Transport(settings, clock)
        self._library = _Library(settings)
        self._token_file = pathlib.Path(settings.token_file) if settings.token_file else None
        self._token_stamp: tuple[int, ...] | None = None
        self._library.token = _checked_token(settings.token, "the configured token") if settings.token else None

    @property
    def address(self) -> str:
        """The address in use, for a log line."""
        return self._transport.address

    def get(self, key: bytes, *, timeout: float) -> Pair | None:
        """The entry of exactly this key; None when Consul proved that there is none."""
        if not is_url_safe(key):
            raise ValueError(f"no URL can name the key {key!r}")
        with self._ask(key, timeout) as response:
            if response.absent:
                return None
            entries = response.decoded(_ENTRIES)
            if len(entries) != 1 or entries[0].key.encode() != key:
                raise response.bad("returned a different key from the one requested")
            return Pair(key, entries[0].value, entries[0].modify_index, entries[0].flags)

    def blocking_query(self, prefix: bytes, *, timeout: float, index: int = 0, wait: float = 0.0) -> Response:
        """The entries below the prefix, still to be read; a context manager.

        With the ``index`` of a former response Consul answers when something changed since, or after ``wait`` seconds
        plus up to a sixteenth; ``timeout`` is what it may take beyond that until the answer begins.

        Without an index the leader makes sure that it is one and has caught up, unless `stale` is configured: one that
        was elected a moment ago answers from before its last entries, and makes them look absent (hashicorp/consul
        #3285, #10989). Waiting on an index needs no such proof.
        """
        _check_prefix(prefix)
        if index:
            held = wait * (1 + JITTER)
            milliseconds = max(1, round(wait * 1000))
            return self._ask(
                prefix, timeout + held, held, steps=True, recurse=True, index=index, wait=f"{milliseconds}ms"
            )
        consistency = "consistent" if self._library.consistency == "default" else self._library.consistency
        return self._ask(prefix, timeout, steps=True, recurse=True, consistency=consistency)

    def list(self, prefix: bytes, *, timeout: float) -> Page:
        """Every entry below the prefix, in Consul's order; none is an empty page."""
        _check_prefix(prefix)
        with self._ask(prefix, timeout, recurse=True) as response:
            return Page(response.all(), response.index, response.filtered)

    def keys(self, prefix: bytes, *, timeout: float) -> Keys:
        """Every key below the prefix, in Consul's order; Forbidden also when an ACL hides some of them."""
        _check_prefix(prefix)
        with self._ask(prefix, timeout, keys=True) as response:
            if response.filtered:
                raise Forbidden(f"Consul at {self.address} hides keys from this token")
            keys = [] if response.absent else [key.encode() for key in response.decoded(_KEYS)]
            response.check_below(prefix, keys)
            return keys

    def reload(self) -> None:
        """Read the token file again, changed or not, and the TLS files with the next connection.

        Raises:
            SourceError: the token file cannot be used.
        """
        self._transport.reset()
        self._token_stamp = None
        self._refresh_token()

    def close(self) -> None:
        """Close all connections; a later read finds Consul Unreachable."""
        self._transport.close()

    def _ask(self, key: bytes, timeout: float, held: float = 0.0, *, steps: bool = False, **options: Any) -> Response:  # noqa: ANN401 - the library's
        name = key.decode()
        return self._send(lambda: self._library.kv.get(name, **options), timeout, held, prefix=key, steps=steps)

    def _send(
        self,
        build: Callable[[], Request],
        timeout: float,
        held: float = 0.0,
        *,
        prefix: bytes = b"",
        steps: bool = False,
    ) -> Response:
        """Send what ``build`` makes, with the token of the moment."""
        by = self._clock() + timeout
        self._refresh_token()
        try:
            answer = self._transport.send(build(), by=by, held=held)
        except Forbidden:
            # The file may have changed within the grain of its time stamp.
            refused = self._library.token
            if self._token_file is None:
                raise
            self._token_stamp = None
            self._refresh_token()
            if self._library.token == refused:
                raise
            answer = self._transport.send(build(), by=by, held=held)
        return Response(self._transport, answer, self._limits, prefix, steps=steps)

    def _refresh_token(self) -> None:
        if self._token_file is None:
            return
        try:
            status = self._token_file.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp == self._token_stamp:
                return
            with open(self._token_file, "rb", opener=open_regular_file) as file:
                text = file.read(4096).decode("ascii", "replace").rstrip()
        except OSError as error:
            raise SourceError(f"token file {self._token_file}: {error.strerror}") from error
        self._library.token = _checked_token(text, f"token file {self._token_file}")
        self._token_stamp = stamp


def _check_prefix(prefix: bytes) -> None:
    if prefix and not is_url_safe(prefix.removesuffix(b"/")):
        raise ValueError(f"no URL can name the prefix {prefix!r}")


def _checked_token(text: str, origin: str) -> str:
    # An empty file is one being written, or a mistake; to ask without a token may find an empty table (404), a lie.
    if not _TOKEN.fullmatch(text):
        raise SourceError(f"{origin} is empty or not one line of printable ASCII")
    return text
