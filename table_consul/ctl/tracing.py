"""Why an answer is what it is: which entry it comes from, and which rules made the value out of what stands there.

A rule is said to have decided if the value would be another without it: parse_value itself is asked both ways, so that
what is told here cannot be otherwise than what is done there. Nothing here holds any part of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from table_consul.ctl.loader import Reading, Stored, spelled
from table_consul.errors import EntryError, printable
from table_consul.services import Service, Table, fold_key
from table_consul.services.entries import Entries
from table_consul.services.values import DEFAULT_KEY, parse_value


class Step(NamedTuple):
    """One line of an explanation."""

    what: str
    """``source``, ``read``, ``asked``, ``entry``, ``value``, ``safety`` or ``problem``."""
    text: str


class Trace:
    """A source that remembers which buckets another one gave."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._asked: list[tuple[Table, Service, Entries | None]] = []
        self._spellings: dict[bytes, tuple[Stored, int, dict[bytes, bytes]]] = {}

    def entries(self, table: Table, service: Service, key: bytes | None, deadline: float) -> Entries:
        """See responder.Source."""
        place = self._reading.place(table, service)
        if place.reads is not None:
            place.reads.clear()
        self._asked.append((table, service, None))
        bucket = place.source.entries(table, service, key, deadline)
        self._asked[-1] = (table, service, bucket)
        return bucket

    def update(self) -> None:
        """See responder.Source."""

    def explain(self, op: str, key: bytes) -> list[Step]:
        """How the last answer came about, to a request with this key (of ``auth``, the user); then forgets it.

        Raises:
            TableConsulError: what was read before cannot be read again.
        """
        asked, self._asked = self._asked, []
        return [step for table, service, bucket in asked for step in self._explain(table, service, bucket, op, key)]

    def _explain(self, table: Table, service: Service, bucket: Entries | None, op: str, key: bytes) -> Iterator[Step]:
        place = self._reading.place(table, service)
        if place.origin:
            yield Step("source", place.origin)
        if bucket is None:
            return
        folder = bucket.path
        whole = place.reads is None or service.patterns or op == "fetch"
        for read in place.reads or [folder if whole else folder + key]:
            yield Step("read", printable(read) + (f" ({_number(len(bucket))})" if read == folder else ""))
        if op == "fetch":
            what = "the values" if table.fetch == "values" else "the keys"
            yield Step("value", f"{what} in their order, one a fetch (fetch = {table.fetch})")
            return
        folded = fold_key(key)
        if folded != key:
            yield Step("asked", f"{printable(folded)}: smtpd asks in lower case")
        entry, why = _entry(bucket, folded)
        if entry is None:
            yield Step("entry", f"none, nor {printable(DEFAULT_KEY)}" if service.default else "none")
            return
        stored = self._spelling(place.entries, folder).get(entry, entry) if whole else entry
        folding = "" if stored == entry else ", in lower case as all keys are"
        yield Step("entry", f"{printable(folder + stored)}{why}{folding}")
        raw = place.entries.get(folder + stored)
        if op == "lookup" or service.answers == "check":
            yield from rules(table, service, entry, raw)
            if entry == DEFAULT_KEY and service.default and b"%" in bucket.values.get(entry, b""):
                yield Step("value", "%u, %n, %d in the home are filled in")
        told = {f"{printable(folder + name)}: " for name in (entry, stored)}
        for problem in map(str, bucket.problems):
            for head in told:
                if problem.startswith(head) and entry not in bucket.errors:  # that is the answer itself
                    yield Step("problem", problem.removeprefix(head))

    def _spelling(self, entries: Stored, folder: bytes) -> dict[bytes, bytes]:
        known = self._spellings.get(folder)
        if known is None or known[0] is not entries or known[1] != len(entries):
            self._spellings[folder] = known = (entries, len(entries), spelled(entries, folder))
        return known[2]


def _number(entries: int) -> str:
    return f"{entries} {'entry' if entries == 1 else 'entries'}"


def _entry(bucket: Entries, key: bytes) -> tuple[bytes | None, str]:
    """The entry that answers for the key, and why if it is not the key itself."""
    default = DEFAULT_KEY in bucket.values or DEFAULT_KEY in bucket.errors
    if bucket.service.default and default and bucket.uses_default(key) and key != DEFAULT_KEY:
        return DEFAULT_KEY, ", which answers for all who have none of their own"
    entry = bucket.find(key)
    return entry, f", which matches {printable(key)}" if entry not in (None, key) else ""


def rules(table: Table, service: Service, key: bytes, raw: bytes | None) -> list[Step]:
    """What made the value out of what stands in the store, or refused it."""
    value = _outcome(table, service, key, raw)
    found = [] if value is None else list(_value_rules(table, service, key, raw, value))
    for name, remark in (("allow_commands", "commands and files"), ("allow_root", "uid or gid 0")):
        allowed = bool(getattr(table, name))
        other = _outcome(replace(table, **{name: not allowed}), service, key, raw)
        if allowed and value is not None and other is None:
            found.append(Step("safety", f"{name} = true lets {remark} through"))
        elif not allowed and value is None and other is not None:
            found.append(Step("safety", f"{name} = false refuses {remark}"))
    return found


def _value_rules(table: Table, service: Service, key: bytes, raw: bytes | None, value: bytes) -> Iterator[Step]:
    as_text = replace(table, value_format="text")
    if service.fields and _outcome(table, service._replace(fields=()), key, raw) != value:
        yield Step("value", f"{', '.join(service.fields)} of the JSON object (value_format = {table.value_format})")
    elif table.value_format != "text" and _outcome(as_text, service, key, raw) != value:
        yield Step("value", f"decoded from JSON (value_format = {table.value_format})")
    elif raw and raw.rstrip() != raw:
        yield Step("value", "white space at the end is dropped")
    if service.joined and _outcome(table, service._replace(joined=False), key, raw) is None:
        yield Step("value", "lines are joined to one list, without comments")
    if service.hashed:
        unread = _outcome(table, service._replace(hashed=False), key, raw)
        if unread is not None and unread != value:
            dropped = "the mark before the hash is dropped" if b"{" in unread else "a lock is said as smtpd knows it"
            yield Step("value", "$2y$ is said as $2b$" if b"$2y$" in unread and b"{" not in unread else dropped)
    if not value and service.answers == "entry":
        yield Step("value", "there is none, so the entry is the answer")


def _outcome(table: Table, service: Service, key: bytes, raw: bytes | None) -> bytes | None:
    """The value, or None where there is none to be made."""
    try:
        return parse_value(table, service, key, raw)
    except EntryError:
        return None
