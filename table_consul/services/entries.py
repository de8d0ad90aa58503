"""The entries of one service in one table: how they are built from keys and values, and how a key is found among them.

Keys and values come in as Consul stores them; every value that comes out is a valid reply to smtpd.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from table_consul.errors import EntryError, printable
from table_consul.services import DEFAULT_KEY, MAX_KEY_BYTES, Service, Table, fold_key
from table_consul.services.elements import is_plain_list
from table_consul.services.judge import NO_NETWORK, key_problem, usual_key, value_problem
from table_consul.services.passwords import Kind, calculated_hash
from table_consul.services.values import MissingFields, expand_home, is_valid_reply_value, parse_value

if TYPE_CHECKING:
    from table_consul.services.index import Index, SecondsLeft


REPLACEMENT = "\ufffd".encode()
NOT_UTF8 = (
    "the key is not UTF-8 (Consul lists its bytes as U+FFFD), so no lookup finds it; delete it over HTTP, by its bytes"
    " (DELETE /v1/kv/FOLDER/%80)"
)


class Problem(NamedTuple):
    """An entry that smtpd cannot use as it is stored, with the cause and what to do."""

    key: bytes
    """The whole key, as it is spelled in the store."""
    text: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {self.text}"


class EntriesBuilder:
    """Builds `Entries` from pairs, in as many steps as it takes. A bad entry affects no other."""

    def __init__(self, table: Table, service: Service, former: Entries | None = None, below: bytes = b"") -> None:
        """``former`` are the entries of an earlier load; values that have not changed since are not parsed again."""
        self.below = below
        self.table = table
        self.service = service
        self.path = table.path(service)
        self.values: dict[bytes, bytes] = {}
        """By folded key; ``b""`` where the entry has no value."""
        self.errors: dict[bytes, Problem] = {}
        """By folded key: entries whose lookup is an error. No key is both here and in ``values``."""
        self.incomplete: set[bytes] = set()
        """Those of them that are records without any field of this service, which another service may use."""
        self.warnings: dict[bytes, Problem] = {}
        """By folded key: entries that are served, although smtpd would reject or misread them."""
        self.spelling: list[Problem] = []
        """Keys that are never looked up, as another one, which differs only in case, takes precedence."""
        self.original_case: dict[bytes, bytes] = {}
        """Folded key to the stored one, where they differ."""
        self._hashed = service.hashed and "auth" in table.services
        self._kinds: dict[Kind, tuple[bytes, bytes]] = {}
        self._former = former if former is not None and former.path == self.path else None
        self._reusable: Entries | None = None
        # Other settings, such as allow_commands, may judge the same value otherwise; hashes and patterns are judged by
        # the deadline, and keys by the services that read the folder.
        if self._former is not None and self._former.table.same_entries(table):
            before = self._former.table
            same_deadline = before.deadline == table.deadline or not (service.hashed or service.patterns)
            self._reusable = self._former if same_deadline and before.services == table.services else None
        # A value that came out of parse_value is valid as it is, unless it would be decoded once more. One with a
        # warning is judged again, and so are expressions, which depend on how they are spelled.
        self._valid: Mapping[bytes, bytes] = {}
        if self._reusable is not None and table.value_format != "json" and service.name != "regex":
            self._valid = self._reusable.values
            if warned := self._reusable.warnings:
                self._valid = {key: value for key, value in self._valid.items() if key not in warned}
        self._decoded = (b'"', b"[", b"{") if table.value_format == "auto" else ()
        self._former_keys = iter(self._valid)
        self._usual_key = usual_key(service)
        self._judges_empty = service.needs_value or service.name in ("source", "relayhost")
        self._takes_lists = service.joined and table.value_format != "json"
        self.seed()

    def seed(self) -> None:
        former = self._former
        if former is None or not self.below:
            return
        for name in ("values", "errors", "warnings"):
            mine = getattr(self, name)
            for key, value in getattr(former, name).items():
                if not former.original_case.get(key, key).startswith(self.below):
                    mine[key] = value
                    if key in former.original_case:
                        self.original_case[key] = former.original_case[key]

    conclusive = True

    def take(self, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Add pairs, whose keys are relative to the folder."""
        values, errors, valid, former_keys = self.values, self.errors, self._valid, self._former_keys
        for key, raw in pairs:
            if not key or key[-1] == 0x2F:
                continue  # the folder itself, and folders made in the UI
            folded = fold_key(key)
            if (folded != key or folded in values or folded in errors) and not self._resolve_case(key, folded):
                continue
            if raw and valid.get(folded) == raw and raw[:1] not in self._decoded:
                for former in former_keys:  # in the same order; its own object, or a reload would hold every key twice
                    if former == folded:
                        folded = former
                        break
                values[folded] = valid[folded]
            else:
                self._parse(folded, key, raw)

    def _resolve_case(self, key: bytes, folded: bytes) -> bool:
        """Whether this key answers: of those that differ only in case, the lower-case one does, else the first.

        Consul lists a key twice only where two that are not UTF-8 look alike; whatever is listed twice is an error.
        """
        if not self.has(folded):
            self.original_case[folded] = key
            return True
        rival = self.original_case.get(folded, folded)
        if rival == key:
            if self.values.pop(folded, None) is not None:
                self.warnings.pop(folded, None)
                self.errors[folded] = Problem(self.path + key, "Consul lists this key twice")
            return False
        winner, loser = (key, rival) if key == folded else (rival, key)
        path = printable(self.path + winner)
        text = f"differs only in case from {path}, which takes precedence; delete one of the two"
        self.spelling.append(Problem(self.path + loser, text))
        if winner != key:
            return False
        for mapping in (self.values, self.errors, self.warnings, self.original_case):
            mapping.pop(folded, None)
        self.incomplete.discard(folded)
        return True

    def _parse(self, folded: bytes, key: bytes, raw: bytes | None) -> None:
        if REPLACEMENT in key:
            self.errors[folded] = Problem(self.path + key, NOT_UTF8)
            return
        problem, value = None, raw or b""
        if raw and not (self._takes_lists and is_plain_list(raw)):  # as nearly all lists are
            try:
                value = parse_value(self.table, self.service, folded, raw)
            except EntryError as error:
                self.errors[folded] = Problem(self.path + key, str(error))
                if isinstance(error, MissingFields):
                    self.incomplete.add(folded)
                return
            problem = value_problem(self.table, self.service, folded, value)
        elif not raw and self._judges_empty:
            problem = value_problem(self.table, self.service, folded, value)
        self.values[folded] = value
        if self._hashed:
            self._note_kind(folded, value)
        if len(folded) > MAX_KEY_BYTES or not self._usual_key(folded):
            problem = key_problem(self.table, self.service, folded, key) or problem
        if problem is not None:
            self.warnings[folded] = Problem(self.path + key, problem)

    def _note_kind(self, folded: bytes, value: bytes) -> None:
        if (known := calculated_hash(value, self.table.deadline)) is not None:
            self._kinds.setdefault(known.kind, (folded, value))

    def kinds(self) -> dict[Kind, tuple[bytes, bytes]]:
        """An entry and its value for each kind of hash; looked for among all only when such an entry has changed."""
        if self._reusable is not None:
            self._kinds = self._reusable.kinds | self._kinds
        if any(self.values.get(folded) != value for folded, value in self._kinds.values()):
            self._kinds = {}
            for folded, value in self.values.items():
                self._note_kind(folded, value)
        return self._kinds

    def has(self, folded: bytes) -> bool:
        """Whether an entry of this folded key was taken."""
        return folded in self.values or folded in self.errors

    def missing_keys(self) -> dict[bytes, bytes]:
        """The keys that the former entries had and these have not, from folded to stored, relative to the folder."""
        former = self._former
        if former is None:
            return {}
        values, errors = self.values, self.errors
        missing = [key for key in (*former.values, *former.errors) if key not in values and key not in errors]
        return {key: former.original_case.get(key, key) for key in missing}

    def keep(self, folded: Iterable[bytes]) -> None:
        """Have these keys, which the former entries have and these lack, answer as they did; after the last `take`."""
        former = self._former
        assert former is not None
        for key in folded:
            for name in ("values", "errors", "warnings", "original_case"):
                if (found := getattr(former, name).get(key)) is not None:
                    getattr(self, name)[key] = found
            if key in former.incomplete:
                self.incomplete.add(key)

    def finish(self) -> Entries:
        """The entries; the former ones themselves if nothing has changed."""
        former = self._reusable
        if former is not None:
            compared = ("values", "errors", "warnings", "spelling", "original_case")
            if all(getattr(former, name) == getattr(self, name) for name in compared):
                return former
        return Entries(self.table, self.service, builder=self)


class Entries:
    """The entries of one service in one table at one moment. Never changed once built; any thread may read them."""

    def __init__(
        self,
        table: Table,
        service: Service,
        pairs: Iterable[tuple[bytes, bytes | None]] = (),
        builder: EntriesBuilder | None = None,
    ) -> None:
        """Build from pairs, whose keys are relative to the folder; a builder may have taken others before."""
        builder = builder or EntriesBuilder(table, service)
        builder.take(pairs)
        self.table, self.service, self.path = table, service, builder.path
        self.values = builder.values
        self.errors = builder.errors
        self.incomplete = builder.incomplete
        self.warnings = builder.warnings
        self.spelling = builder.spelling
        self.original_case = builder.original_case
        self.kinds = builder.kinds()
        """An entry and its value for each kind of hash, where passwords are verified here."""
        refused = (problem for key, problem in self.errors.items() if key not in self.incomplete)
        self.problems: list[Problem] = [*refused, *self.spelling, *self.warnings.values()]
        """Every entry that smtpd cannot use as it is stored."""
        if table.mode == "direct" and not service.patterns and service.name != "source":
            text = "smtpd asks in lower case, so mode direct never finds this key; rename it"
            self.problems += [Problem(self.path + key, text) for key in self.original_case.values()]
        self._order: list[bytes] | None = None
        self._index: Index | None = None
        if service.patterns and (self.values or self.errors):
            from table_consul.services.index import INDEXES, Addresses

            # A pattern that is not what was stored would match something else.
            patterns = [*self.values, *(key for key in self.errors if REPLACEMENT not in key)]
            index, delimiter = INDEXES[service.name], table.subaddress_delimiter.encode()
            more = {"delimiter": delimiter} if index is Addresses else {}
            self._index = index(patterns, table.deadline / 10, **more)
            self.problems += [Problem(self._stored(key), text) for key, text in self._index.problems]
        self.refused = len({problem.key for problem in self.problems if problem.text != NO_NETWORK})
        """How many entries smtpd cannot use; a host name among networks may be meant for `match from rdns`."""
        self._default = service.default and self.find(DEFAULT_KEY) is not None
        self._undecodable = next((problem for key, problem in self.errors.items() if REPLACEMENT in key), None)
        self._exact = self._index is None and not self._default and self._undecodable is None
        self.plain = self._exact and not self.errors and all(self.values.values())
        """Every entry is an exact key with a value: ``values.get`` is a `lookup`."""
        self.timed = self._index is not None and self._index.timed
        """Whether matching a key may take so long that it needs the clock of its request."""

    def __len__(self) -> int:
        return len(self.values) + len(self.errors)

    def _stored(self, key: bytes) -> bytes:
        return self.path + self.original_case.get(key, key)

    def _error(self, entry: bytes, text: str) -> EntryError:
        return EntryError(str(Problem(self._stored(entry), text)))

    def find(self, key: bytes, seconds_left: SecondsLeft | None = None) -> bytes | None:
        """The entry, good or bad, of this folded key; None if there is none. The default entry is ignored.

        Raises:
            EntryError: the time that is left, by default forever, is too short to match the key.
        """
        if self._index is not None:
            try:
                return self._index.find(key) if seconds_left is None else self._index.find(key, seconds_left)
            except EntryError as error:
                raise EntryError(str(Problem(self.path, str(error)))) from None
        return key if key in self.values or key in self.errors else None

    def contains(self, key: bytes, seconds_left: SecondsLeft | None = None) -> bool:
        """Whether the key is in the table: by an entry for it, or by the default entry of the service.

        Raises:
            EntryError: as `find`; the key is not UTF-8, and may be one that Consul does not list as it is.
        """
        self._raise_if_undecodable(key)
        if self.find(key, seconds_left) is not None and not self.uses_default(key):
            return True
        try:
            return self._default and (key == DEFAULT_KEY or self._expanded(key) is not None)
        except EntryError:
            return True

    def _raise_if_undecodable(self, key: bytes) -> None:
        if self._undecodable is not None:
            try:
                key.decode()
            except UnicodeDecodeError:
                raise EntryError(str(self._undecodable)) from None

    def uses_default(self, key: bytes) -> bool:
        """Whether the default entry of the service, if there is one, answers for this key."""
        return self.service.default and key not in self.values and (key not in self.errors or key in self.incomplete)

    def lookup(self, key: bytes, seconds_left: SecondsLeft | None = None) -> bytes | None:
        """The value of the key, never empty, or None when the key is not in the table.

        Raises:
            MissingFields: the entry is a record without any field of this service.
            EntryError: the entry has no value that smtpd can use, or as `contains`.
        """
        if self._exact:
            value = self.values.get(key)
            if value:
                return value
            if value is None and key not in self.errors:
                return None
        self._raise_if_undecodable(key)
        if self._default and (key == DEFAULT_KEY or self.uses_default(key)):
            return self._expanded(key)
        entry = self.find(key, seconds_left)
        return None if entry is None else self._value(entry)

    def _expanded(self, key: bytes) -> bytes | None:
        value = self._value(DEFAULT_KEY)
        try:
            return expand_home(value, key)
        except EntryError as error:
            raise self._error(DEFAULT_KEY, str(error)) from None

    def _value(self, entry: bytes) -> bytes:
        if entry in self.errors:
            raise (MissingFields if entry in self.incomplete else EntryError)(str(self.errors[entry]))
        if self.values[entry]:
            return self.values[entry]
        if self.service.answers != "entry":
            raise self._error(entry, f"there is no value, and {self.service.name} needs one")
        return self._key(entry)

    def _key(self, entry: bytes) -> bytes:
        if not is_valid_reply_value(entry):
            raise self._error(entry, "the key contains a control character")
        if REPLACEMENT in entry:
            raise self._error(entry, NOT_UTF8)
        return entry

    def next_after(self, last: bytes | None) -> tuple[bytes, bytes] | None:
        """The entry that follows ``last`` in the order of keys, wrapping, and its reply to a fetch.

        None when there is no entry at all. ``last`` may have been removed: additions and removals between two fetches
        neither repeat nor skip other entries. Entries that are errors are skipped.

        Raises:
            EntryError: all entries are errors.
        """
        if self._order is None:
            self._order = sorted([*self.values, *self.errors])
        order = self._order
        start = 0 if last is None else bisect_right(order, last)
        failure: EntryError | None = None
        for step in range(len(order)):
            entry = order[(start + step) % len(order)]
            try:
                return entry, self._value(entry) if self.table.fetch == "values" else self._key(entry)
            except EntryError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None
