"""Read Consul's key-value store: entries, proven absence, or a SourceError, each within one deadline.

This module contains the paths and parameters of Consul's HTTP API, and nothing about tables, services or mail. The
Consul library (`Consul.kv.get`) builds path, parameters and headers; transport.py sends them.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from table_consul.body import OBJECTS, STRINGS, LargeObjectError, body_of, split_list
from table_consul.connection import cause_of
from table_consul.errors import (
    UNDECODABLE,
    BadResponse,
    Forbidden,
    SourceError,
    TooLarge,
    Unreachable,
    counted,
    printable,
)
from table_consul.files import TOKEN, read_token
from table_consul.transport import BROKEN, Library, Request, Transport, WaitCut

if TYPE_CHECKING:
    import requests

    from table_consul.config import ConsulConfig

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_INVALID_ESCAPE = re.compile(b"%(?![0-9a-fA-F]{2})")

T = TypeVar("T")


class Pair(msgspec.Struct, rename="pascal", gc=False):
    """One entry of the store; ``value`` is None for JSON null, Consul's form of an empty value."""

    name: str = msgspec.field(name="Key")
    value: bytes | None  # msgspec decodes base64 and rejects anything else.
    modify_index: int
    flags: int = 0

    @property
    def key(self) -> bytes:
        return self.name.encode()


_PAIRS = msgspec.json.Decoder(list[Pair])
_NAMES = msgspec.json.Decoder(list[str])


class Response:
    """A response with valid status and headers. Its body is read on demand, and once.

    A context manager. Closing it discards the rest of a small body and closes the connection of a large one.
    """

    def __init__(self, client: Client, raw: requests.Response, prefix: bytes = b"", *, steps: bool = False) -> None:
        """With ``steps`` each chunk may take `Client.read_seconds`; without, the deadline holds for the whole body."""
        self.absent = raw.status_code == 404
        self.filtered = raw.headers.get("X-Consul-Results-Filtered-By-ACLs", "").lower() == "true"
        """An ACL hides some of the keys."""
        self._client = client
        self._raw = raw
        self._body = body_of(raw)
        self._prefix = prefix.decode()
        self._seconds = client.read_seconds if steps else None
        self._unread = True
        self._size = 0

    @property
    def index(self) -> int:
        """Consul's index of the requested data; writes have none."""
        return int(self._raw.headers["X-Consul-Index"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._unread:
            transport = self._client.transport
            transport.answer_by = min(transport.answer_by, time.monotonic() + self._client.discard_seconds)
            with contextlib.suppress(*BROKEN):
                self._raw.raw.read(self._client.discard_bytes)
        self.close()

    def close(self) -> None:
        """Close the connection, unless all of the body was read."""
        self._raw.close()

    def pairs(self) -> Iterator[list[Pair]]:
        """The entries below the prefix, in the order they arrive, a few at a time.

        Consul sorts by bytes, but lists every byte that is not UTF-8 as U+FFFD: keys may be out of order, and equal.

        Raises:
            TooLarge: they exceed `Client.body_bytes` plus `Client.entry_bytes` each, or the deadline while arriving.
            SourceError: the body is truncated, stopped arriving, or is not a list of such entries.
        """
        for pairs in self._elements(_PAIRS, OBJECTS):
            self._check_below([pair.name for pair in pairs])
            yield pairs

    def names(self) -> Iterator[list[str]]:
        """The keys below the prefix, a few at a time; raises as `pairs`."""
        for names in self._elements(_NAMES, STRINGS):
            self._check_below(names)
            yield names

    def _elements(self, decoder: msgspec.json.Decoder[list[T]], boundaries: re.Pattern[bytes]) -> Iterator[list[T]]:
        count = 0
        try:
            for piece in split_list(self._chunks(), boundaries=boundaries):
                found = [] if self.absent else self.decoded(decoder, piece)
                count += len(found)
                self._check_size(count)
                if found:
                    yield found
        except LargeObjectError as error:
            raise TooLarge(f"Consul at {self._client.address}: {error}") from error
        except ValueError as error:
            raise self.bad(str(error)) from error

    def _chunks(self) -> Iterator[bytes]:
        client = self._client
        self._unread = False
        try:
            while chunk := client.transport.read(self._body, client.chunk_bytes, self._seconds):
                self._size += len(chunk)
                yield chunk
        except Unreachable as error:
            flowing = self._seconds is None and self._size > client.flowing_bytes
            if not flowing or not isinstance(cause_of(error), TimeoutError):
                raise
            text = f"Consul at {client.address}: only {self._size >> 20} MiB of a list arrived in time"
            raise TooLarge(text) from error

    def _check_size(self, count: int) -> None:
        client = self._client
        if self._size > client.body_bytes + count * client.entry_bytes:
            large = f"{self._size >> 20} MiB in {counted(count, 'entry', 'entries')}"
            raise TooLarge(f"Consul at {client.address}: {large} is more than smtpd can use")

    def decoded(self, decoder: msgspec.json.Decoder[T], piece: bytearray | None = None) -> T:
        """The decoded body, or the decoded piece of it; raises as `pairs`."""
        text = piece if piece is not None else bytearray()
        for chunk in self._chunks() if piece is None else ():
            text += chunk
            self._check_size(0)
        try:
            return decoder.decode(text)
        except UNDECODABLE as error:
            raise self.bad(f"invalid response body ({error})", text) from error

    def _check_below(self, names: list[str]) -> None:
        """Reject keys outside the prefix.

        Raises:
            BadResponse: there is such a key.
        """
        # All strings between two with the same prefix have this prefix.
        if names and not (min(names).startswith(self._prefix) and max(names).startswith(self._prefix)):
            raise self.bad("listed keys that are not below the prefix")

    def bad(self, what: str, text: bytes | bytearray = b"") -> BadResponse:
        """The error for an invalid response; the next request uses the next address."""
        transport = self._client.transport
        error = transport.bad(what, text)
        transport.disconnect()
        transport.next_address()
        return error


def is_url_safe(key: bytes) -> bool:
    """Whether a URL can name exactly this key, and Consul looks it up unchanged.

    Go's request multiplexer redirects paths with empty, `.` and `..` segments, and Consul rejects control characters:
    no key that was written by URL has them.
    """
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(text) and not {"", ".", ".."}.intersection(text.split("/"))


def modern_name_problem(key: bytes) -> str:
    """Why no URL reads, writes or deletes this key on Consul 1.21.6 and later; empty if one does.

    A transaction accepts any name. The rules are those of Consul's agent/kvs_endpoint.go, validateKVKey, and of its
    filter of unprintable characters.
    """
    decoded = key if _INVALID_ESCAPE.search(key) else urllib.parse.unquote_to_bytes(key)
    if not is_url_safe(key):
        part = "an empty segment, . or .., or a control character"
    elif not key.decode().isprintable():
        part = "an unprintable character"
    elif key != key.strip(b" "):
        part = "a leading or trailing blank"
    elif decoded != key and (b" " in decoded or b".." in decoded):
        part = "escapes such as %41 that decode to a blank or .."
    else:
        return ""
    return f"the key has {part}, so no URL can read or delete it on Consul 1.21.6 and later"


class Client:
    """Sends one request at a time over kept-alive connections; not for use by two threads at once.

    The ``timeout`` of a read, in seconds, covers all attempts and addresses.

    Raises:
        ValueError: no URL can name the key.
        SourceError: Unreachable, Forbidden, BadResponse, TooLarge; or SourceError itself, if a local file is the cause.
    """

    chunk_bytes = 16 << 10
    """Bytes per read. Decoding them holds Python's lock for about 50 microseconds, in which no reply is sent."""
    discard_bytes = 64 << 10
    """The most to read of a body that is not needed, to keep the connection; a new one costs more."""
    body_bytes = 128 << 20
    entry_bytes = 4 << 10
    """A body may have ``body_bytes`` plus ``entry_bytes`` per entry. The longest key and value that smtpd can use need
    less in JSON, so only ``max_keys`` limits a table of such entries."""
    flowing_bytes = 1 << 20
    """If more of a list has arrived by its deadline, the list is too large for that time; this is not an outage."""
    read_seconds = 10.0
    """The timeout of each chunk of a blocking query, for links as slow as 1.6 KB/s; the whole body has no timeout."""
    late_seconds = 30.0
    """The most that a list may start after its timeout: Consul first encodes it, 1,000,000 entries in 2 seconds."""
    discard_seconds = 1.0
    """The timeout for discarding a body: after an early response to a blocking query, its deadline is far away."""

    def __init__(self, settings: ConsulConfig) -> None:
        self.transport = Transport(settings)
        self._address_count = len(settings.addresses)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._library = Library(consistency=settings.consistency, dc=settings.datacenter)
        self._late: dict[bytes, float] = {}
        """By prefix, how many seconds after its timeout a list may start."""
        self._token, self._token_file = settings.token, settings.token_file
        if self._token_file is None:
            self._read_token()

    @property
    def address(self) -> str:
        """The address in use, for a log line."""
        return self.transport.address

    @property
    def consistency(self) -> str:
        """The configured consistency of reads: ``default``, ``stale`` or ``consistent``."""
        return str(self._library.consistency)

    def get(self, key: bytes, *, timeout: float, proven: bool = False) -> Pair | None:
        """The entry of exactly this key; None if there is none, which only ``proven`` proves.

        A server that has just started, and a new leader, answer before they have read their log: entries look absent.
        Only a consistent read waits for that.
        """

        def read(response: Response) -> Pair | None:
            if response.absent:
                return None
            pairs = response.decoded(_PAIRS)
            if len(pairs) != 1 or pairs[0].key != key:
                raise response.bad("returned a different key from the one requested")
            return pairs[0]

        return self._read(read, key, timeout, **({"consistency": "consistent"} if proven else {}))

    def blocking_query(
        self,
        prefix: bytes,
        *,
        timeout: float,
        index: int = 0,
        wait: float = 0.0,
        keys: bool = False,
        separator: str | None = None,
    ) -> Response:
        """A response with the entries below the prefix, which are not read yet; a context manager.

        ``keys``: only the names, up to the next ``separator`` if there is one; the index covers all entries below.

        With the ``index`` of an earlier response, Consul answers after a change, or after ``wait`` seconds plus up to a
        sixteenth (its api-docs/features/blocking). ``timeout`` is how much later the response may start. It grows after
        a late response, because responses that always come too late would be an endless outage.

        Without an index, the leader first confirms its leadership and catches up, unless `stale` is configured. A new
        leader may otherwise answer without its last entries, which then look absent (hashicorp/consul#3285, #10989).
        Waiting on an index needs no such proof. A server that has lost its leader does not answer, even with `stale`:
        otherwise it would confirm old data.
        """
        options: dict[str, Any] = {"keys": True, "separator": separator} if keys else {"recurse": True}
        consistency, late = self._library.consistency, self._late.get(prefix, 0.0)
        held = late + (wait * (1 + 1 / 16) if index else 0.0)
        if index:
            options |= {"index": index, "wait": f"{max(1, round(wait * 1000))}ms"}
        else:
            options["consistency"] = "consistent" if consistency == "default" else consistency
        began = time.monotonic()
        try:
            response = self._ask(prefix, timeout + held, held, steps=True, **options)
        except WaitCut as cut:
            if index or math.isinf(cut.seconds):
                raise
            raise Unreachable(str(cut)) from cut
        except Unreachable:
            if self.transport.late:
                self._late[prefix] = min(max(timeout, 2 * late), self.late_seconds)
            raise
        if not index:
            self._late[prefix] = min(max(0.0, 4 * (time.monotonic() - began) - timeout), self.late_seconds)
        return response

    def all_names(self, prefix: bytes, *, timeout: float) -> Response:
        """A response with the keys below the prefix, to read with `Response.names`; a context manager.

        Even with `stale`, the leader answers: an index or a name that is missing from a late response would otherwise
        look as if nothing had changed.
        """
        return self._ask(prefix, timeout, steps=True, keys=True, consistency="consistent")

    def list(self, prefix: bytes, *, timeout: float) -> Sequence[Pair]:
        """Every entry below the prefix, in Consul's order; Forbidden also when an ACL hides some of them."""
        pairs, hides = self.visible(prefix, timeout=timeout)
        if hides:
            raise Forbidden(f"Consul hides keys under {printable(prefix)} from the token")
        return pairs

    def visible(self, prefix: bytes, *, timeout: float, proven: bool = False) -> tuple[Sequence[Pair], bool]:
        """The entries below the prefix that the token may read, and whether an ACL hides others.

        ``proven``: even with `stale` none is missing.
        """

        def read(response: Response) -> tuple[Sequence[Pair], bool]:
            return [*chain.from_iterable(response.pairs())], response.filtered

        return self._read(read, prefix, timeout, recurse=True, **self._consistency(proven=proven))

    def visible_keys(self, prefix: bytes, *, timeout: float, proven: bool = False) -> tuple[Sequence[bytes], bool]:
        """As `visible`, without the values."""

        def read(response: Response) -> tuple[Sequence[bytes], bool]:
            return [name.encode() for name in chain.from_iterable(response.names())], response.filtered

        return self._read(read, prefix, timeout, keys=True, **self._consistency(proven=proven))

    def _consistency(self, *, proven: bool) -> dict[str, str]:
        return {} if self.consistency == "stale" and not proven else {"consistency": "consistent"}

    def hides_keys(self, prefix: bytes, *, timeout: float) -> bool:
        """Whether Consul reports that an ACL hides keys below the prefix (from 1.11 on, to requests with a token)."""
        with self._ask(prefix, timeout, keys=True, separator="/") as response:
            return response.filtered

    def reload(self) -> None:
        """Read the token file now, and the TLS files with the next connection.

        Raises:
            SourceError: the token file cannot be used.
        """
        self.transport.close()
        self._read_token()

    def interrupt(self) -> None:
        """End the blocking query that waits, or the next one, with WaitCut; any thread may call this."""
        self.transport.interrupt()

    def close(self) -> None:
        """Close the connections; a later read opens others."""
        self.transport.close()

    def _read(self, read: Callable[[Response], T], key: bytes, timeout: float, **options: Any) -> T:  # noqa: ANN401 - the library's
        """The result of ``read`` for a response, of the next address if one is truncated or invalid."""
        by = time.monotonic() + timeout
        for others in range(self._address_count)[::-1]:
            with self._ask(key, by - time.monotonic(), **options) as response:
                try:
                    return read(response)
                except (Unreachable, BadResponse):
                    if not others or time.monotonic() >= by:
                        raise
        raise AssertionError

    def _ask(self, key: bytes, timeout: float, held: float = 0.0, *, steps: bool = False, **options: Any) -> Response:  # noqa: ANN401 - the library's
        """Request a key, or the keys below a prefix, which unlike a key may be empty or end in /."""
        lists = not options.keys().isdisjoint(("keys", "recurse"))
        if not is_url_safe(key.removesuffix(b"/") if lists else key) and (key or not lists):
            raise ValueError(f"no URL can name {key!r}")
        name = key.decode()
        flags = {"compress": lists, "recent": steps}
        raw = self._send(lambda: self._library.kv.get(name, **options)._replace(**flags), timeout, held)
        return Response(self, raw, key, steps=steps)

    def _send(self, build: Callable[[], Request], timeout: float, held: float = 0.0) -> requests.Response:
        """Send the request that ``build`` returns, with the current token."""
        by = time.monotonic() + timeout
        token = self._read_token()
        try:
            return self.transport.send(build(), by=by, held=held)
        except Forbidden:
            if self._read_token() == token:
                raise
        return self.transport.send(build(), by=by, held=held)

    def _read_token(self) -> str | None:
        token, origin = self._token, "the configured token"
        if self._token_file is not None:
            origin = f"token file {self._token_file}"
            try:
                token = read_token(self._token_file)
            except OSError as error:
                hint = "smtpd's user must be able to read it" if isinstance(error, PermissionError) else ""
                raise SourceError(f"{origin}: {error.strerror}", hint) from error
        # Without a token, Consul may return 404 for keys that exist.
        if token is not None and not TOKEN.fullmatch(token):
            raise SourceError(f"{origin} is empty or not one line of printable ASCII")
        self._library.token = token
        return token
