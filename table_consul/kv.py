"""Reads of Consul's key-value store, each within one deadline: what is there, provenly nothing, or a SourceError.

Knows the paths and parameters of Consul's HTTP interface, and nothing of tables, services or mail. Of the Consul
library `Consul.kv.get` is used, which builds path, parameters and headers; transport.py sends them.
"""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import msgspec

from table_consul.errors import BadResponse, Forbidden, SourceError
from table_consul.transport import Answer, Library, Transport

if TYPE_CHECKING:
    from table_consul.config import ConsulConfig

JITTER = 1 / 16  # Consul adds up to this part of `wait` (its api-docs/features/blocking, "wait").

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
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


def is_url_safe(key: bytes) -> bool:
    """Whether a URL can name exactly this key, and Consul would look it up as it stands.

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

    Every read raises SourceError when Consul cannot tell within `timeout` seconds, all attempts and addresses
    together: Unreachable, Forbidden, BadResponse, or SourceError itself where a local file is at fault.
    """

    transport: type[Transport] = Transport
    """What a client with more to say than reads sends its requests through."""

    def __init__(self, settings: ConsulConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._transport = self.transport(settings, clock)
        self._library = Library(settings, self._transport)
        self._token_file = pathlib.Path(settings.token_file) if settings.token_file else None
        self._token_seen: tuple[int, ...] | None = None
        self._library.token = _checked_token(settings.token, "the configured token") if settings.token else None

    @property
    def address(self) -> str:
        """The address in use, for a log line."""
        return self._transport.address

    def get(self, key: bytes, *, timeout: float) -> Pair | None:
        """The entry of exactly this key; None when Consul proved that there is none. Raises ValueError, SourceError."""
        if not is_url_safe(key):
            raise ValueError(f"no URL can name the key {key!r}")

        def accept(answer: Answer) -> Pair | None:
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

        def accept(answer: Answer) -> Seen:
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

        def accept(answer: Answer) -> Page:
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

        def accept(answer: Answer) -> _Keys:
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
        self, key: bytes, accept: Callable[[Answer], _T], timeout: float, patience: float = 0.0, **options: str | int
    ) -> _T:
        name = key.decode()
        return self._ask(lambda: self._library.kv.get(name, **options), accept, timeout, patience)

    def _ask(
        self, ask: Callable[[], object], accept: Callable[[Answer], _T], timeout: float, patience: float = 0.0
    ) -> _T:
        """What ``accept`` makes of the answer to what ``ask`` has the library send, by a token that is still good."""
        transport = self._transport
        transport.end = self._clock() + timeout
        transport.accept = accept
        transport.patience = patience
        self._refresh_token()
        try:
            return cast("_T", ask())
        except Forbidden:
            # The file may have changed within the grain of its time stamp.
            refused = self._library.token
            if self._token_file is None:
                raise
            self.reload_token()
            if self._library.token == refused:
                raise
        return cast("_T", ask())

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
    if prefix and not is_url_safe(prefix.removesuffix(b"/")):
        raise ValueError(f"no URL can name the prefix {prefix!r}")


def _checked_token(text: str, origin: str) -> str:
    # An empty file is one being written, or a mistake; to ask without a token may find an empty table (404), a lie.
    if not _TOKEN.fullmatch(text):
        raise SourceError(f"{origin} is empty or not one line of printable ASCII")
    return text
