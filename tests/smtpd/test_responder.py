from __future__ import annotations

from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import BadResponse, ConfigError, Forbidden, SourceError, TableConsulError, Unreachable
from table_consul.protocol import Failed, Found, NotFound, Request
from table_consul.responder import Responder
from table_consul.services import DEFAULT_SERVICES, SERVICES, Table
from table_consul.services.entries import Entries

ARRIVED = 1000.0


class Scripted:
    """A source with entries by table and service, or an error to raise, that records its requests."""

    def __init__(self, **services):
        self.services = services
        self.error: Exception | None = None
        self.asked = []

    def entries(self, table, service, key, deadline):
        self.asked.append((table.name, service.name, key, deadline))
        if self.error is not None:
            raise self.error
        entries = self.services.get(service.name, {})
        return Entries(table, service, entries.items() if isinstance(entries, dict) else ((e, b"") for e in entries))


def ask(source, op, service="alias", key=b"root", table="aliases", **options):
    return answered(Responder(), source, Request(op, b"1", table, service, key), replace(Table(table), **options))


def answered(responder, source, request, table):
    """The reply; an error of the source becomes an error reply, as in Tables."""
    deadline = ARRIVED + table.deadline
    try:
        return responder.answer(request, table, lambda service, key: source.entries(table, service, key, deadline))
    except TableConsulError as error:
        return Failed(str(error), error)


def test_present_key_is_found_with_its_value():
    assert Found(b"gilles") == ask(Scripted(alias={b"root": b"gilles"}), "lookup")


def test_check_is_answered_without_a_value():
    assert Found() == ask(Scripted(alias={b"root": b"gilles"}), "check")


@pytest.mark.parametrize("op", ["check", "lookup", "fetch"])
@pytest.mark.parametrize("service", DEFAULT_SERVICES)
def test_key_proven_absent_is_not_found(op, service):
    assert NotFound() == ask(Scripted(), op, service)


@pytest.mark.parametrize("op", ["check", "lookup", "fetch"])
@pytest.mark.parametrize("error", [SourceError, Unreachable, Forbidden, BadResponse, ConfigError])
def test_failure_is_never_absence(op, error):
    source = Scripted(source=[b"192.0.2.1"])
    source.error = error("no data")
    assert Failed("no data", source.error) == ask(source, op, "source")


def test_unknown_service_is_an_error_with_its_escaped_name():
    assert ask(Scripted(), "lookup", "a\x1bb").reason == "unknown service 'a\\\\x1bb'"


def test_unconfigured_service_is_an_error_without_a_read():
    source = Scripted(alias={b"root": b"gilles"})
    reply = ask(source, "lookup", services=("domain",))
    assert (reply.reason, source.asked) == ("service alias is not among the services of table 'aliases'", [])


def test_bad_value_is_an_error_for_lookup_and_found_for_check():
    source = Scripted(alias={b"root": b"|sh"})
    assert (True, Found()) == (isinstance(ask(source, "lookup"), Failed), ask(source, "check"))


def test_deadline_of_a_source_counts_from_arrival():
    source = Scripted()
    ask(source, "lookup", deadline=0.5)
    assert source.asked == [("aliases", "alias", b"root", ARRIVED + 0.5)]


def test_fetch_reads_the_whole_folder():
    source = Scripted()
    ask(source, "fetch", "source", key=b"")
    assert source.asked == [("aliases", "source", None, ARRIVED + 2.0)]


def test_unexpected_exception_is_not_caught():
    source = Scripted()
    source.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        ask(source, "lookup")


# ---- fetch ----


class Rounds:
    def __init__(self, source):
        self.responder, self.source = Responder(), source

    def __call__(self, table="relays", service="source"):
        reply = answered(self.responder, self.source, Request("fetch", b"1", table, service, b""), Table(table))
        return reply.value if isinstance(reply, Found) else reply


def test_fetches_return_keys_in_order_and_wrap():
    fetch = Rounds(Scripted(source=[b"b", b"a", b"c"]))
    assert [fetch() for _ in range(4)] == [b"a", b"b", b"c", b"a"]


def test_each_table_and_service_has_its_own_fetch_position():
    fetch = Rounds(Scripted(source=[b"a", b"b"], relayhost=[b"x", b"y"]))
    assert [fetch(), fetch(service="relayhost"), fetch(table="others"), fetch(), fetch(service="relayhost")] == [
        b"a",
        b"x",
        b"a",
        b"b",
        b"y",
    ]


def test_failure_between_fetches_keeps_the_position():
    source = Scripted(source=[b"a", b"b"])
    fetch = Rounds(source)
    first = fetch()
    source.error = Unreachable("away")
    failed = fetch()
    source.error = None
    assert (b"a", Failed("away"), b"b") == (first, replace(failed, cause=None), fetch())


def test_emptied_folder_is_not_found_and_keeps_the_position():
    source = Scripted(source=[b"a", b"b"])
    fetch = Rounds(source)
    first, source.services = fetch(), {}
    empty, source.services = fetch(), {"source": [b"a", b"b"]}
    assert (b"a", NotFound(), b"b") == (first, empty, fetch())


KEYS = st.sampled_from([bytes([c]) for c in b"abcdefgh"])


@given(stays=st.sets(KEYS, min_size=1), changes=st.lists(st.sets(KEYS), max_size=40))
def test_remaining_keys_are_fetched_once_a_round_despite_changes(stays, changes):
    source = Scripted()
    fetch = Rounds(source)
    given_ = []
    for others in changes:
        source.services = {"source": stays | others}
        given_.append(fetch())
    steady = [value for value in given_ if value in stays]
    assert [*islice(cycle(sorted(stays)), len(steady))] == steady


@given(
    op=st.sampled_from(["check", "lookup", "fetch"]),
    service=st.sampled_from([*SERVICES]) | st.text(),
    key=st.binary(),
    table=st.text(),
    raw=st.binary() | st.none(),
)
def test_any_request_and_any_entry_have_a_reply(op, service, key, table, raw):
    source = Scripted(**{name: {key: raw} for name in SERVICES})
    assert isinstance(ask(source, op, service, key, table), Found | NotFound | Failed)


def test_every_error_of_the_package_has_one_root():
    assert all(issubclass(e, TableConsulError) for e in (SourceError, ConfigError, Unreachable, Forbidden, BadResponse))
