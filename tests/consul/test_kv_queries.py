from __future__ import annotations

import base64
import json
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul import kv
from table_consul.errors import BadResponse, TooLarge, Unreachable
from tests.consul.clients import ROOT, SLACK, TRUE, Silent, closed_port, each_version, query
from tests.fake_consul import Answer, FakeConsul, cut, stall, trickle

# Blocking queries.


@each_version
def test_blocking_query_returns_on_a_change(client, fake):
    index = query(client).index
    change = threading.Timer(0.1, fake.put, (b"consul/alias/new", b"x"))
    change.start()
    page = query(client, timeout=10, index=index, wait=8)
    change.join()
    assert [key for key, _ in page.pairs] == [b"consul/alias/new", ROOT]
    assert fake.requests[-1].params == {"index": str(index), "wait": "8000ms", "recurse": "1"}


@each_version
def test_blocking_query_returns_the_same_after_its_wait(client, fake):
    assert query(client, timeout=2, index=fake.index, wait=0.1).index == fake.index


@each_version
def test_blocking_query_shows_an_index_that_went_back(client, fake):
    former = fake.index
    change = threading.Timer(0.1, fake.reset_index, (3,))
    change.start()
    assert query(client, timeout=10, index=former, wait=8).index == former  # ends at once, with the old state
    change.join()
    assert query(client, timeout=2, index=former, wait=0.1).index == 3


def test_unanswered_blocking_query_ends_at_its_deadline(client, fake):
    fake.handle = stall
    begun = time.monotonic()
    with pytest.raises(Unreachable):
        query(client, timeout=0.4, index=5, wait=0.2)
    assert 0.5 < time.monotonic() - begun < 0.7 + SLACK


def test_waiting_blocking_query_does_not_fail_over(fake, connect):
    client = connect(fake.address, closed_port())
    assert query(client, timeout=1.0, index=fake.index, wait=0.8).index == fake.index
    assert client.address == fake.address


def test_blocking_query_fails_over_when_an_address_does_not_connect(fake, connect):
    with Silent(full=True) as dead:
        client = connect(dead.address, fake.address)
        assert query(client, timeout=2, index=fake.index, wait=0.5).index == fake.index
        assert client.address == fake.address


def test_query_after_an_unanswered_blocking_query_uses_the_next_address(fake, connect):
    with Silent() as dead:
        client = connect(dead.address, fake.address)
        with pytest.raises(Unreachable):
            query(client, timeout=0.3, index=5, wait=0.2)
        assert query(client, timeout=0.3).index == fake.index


# A list in pieces.


def listing(*pairs, indent=None):
    """The body of a list as Consul writes it."""
    entries = [
        {
            "LockIndex": 0,
            "Key": key,
            "Flags": 0,
            "Value": base64.b64encode(value).decode() if value else None,
            "CreateIndex": 4,
            "ModifyIndex": 5,
        }
        for key, value in pairs
    ]
    return json.dumps(entries, indent=indent, separators=(",", ": ") if indent else (",", ":")).encode()


def whole(fake, body, **options):
    fake.handle = lambda request: Answer(200, TRUE, body, **options)


TRAPS = [
    't/a},{"Key":"t/b"',
    't/}, {"',
    "t/},",
    't/"},{"K',
    "t/\\",
    't/\\"},{"A',
    "t/[{",
    "t/}]",
    "t/\u2028},{",
    "t/" + '},{"Aa' * 50,
    "t/\U0001f600",
]


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 1 << 20])
def test_query_yields_whole_entries_from_pieces_of_any_size(fake, connect, step, indent):
    pairs = sorted((key, b"x" * (number * 7)) for number, key in enumerate(TRAPS))
    whole(fake, listing(*pairs, indent=indent))
    read = query(connect(fake.address, limits={"chunk_bytes": step}), b"t/")
    assert read.pairs == sorted((key.encode(), value or None) for key, value in pairs)
    assert (read.index, read.filtered) == (5, False)


KEYS = st.text(st.sampled_from('ab/},{"Key:[]\\ \n') | st.characters(codec="utf-8"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(KEYS, st.binary(max_size=40), max_size=12),
    step=st.integers(1, 200),
    indent=st.sampled_from([None, 0, 1, 4]),
    chunked=st.booleans(),
)
def test_any_list_in_any_pieces_gives_the_same_pairs(fake, connect, entries, step, indent, chunked):
    pairs = sorted((("t/" + key).encode(), value or None) for key, value in entries.items())
    whole(fake, listing(*((key.decode(), value) for key, value in pairs), indent=indent), chunked=chunked)
    assert query(connect(fake.address, limits={"chunk_bytes": step}), b"t/").pairs == pairs


def test_query_yields_a_long_list_in_batches(fake, client):
    pairs = [(f"t/{number:05}", b"x" * 50) for number in range(2000)]
    whole(fake, listing(*pairs))
    sizes = [len(batch) for batch in query(client, b"t/").batches]
    assert sum(sizes) == 2000
    assert max(sizes) < 400


def test_query_reads_the_largest_value_that_consul_stores(fake, client):
    whole(fake, listing(("t/a", b"1"), ("t/b", b"x" * (512 << 10)), ("t/c", b"2")))
    assert [(key, len(value)) for key, value in query(client, b"t/").pairs] == [
        (b"t/a", 1),
        (b"t/b", 512 << 10),
        (b"t/c", 1),
    ]


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("keys", [("t/a", "u/b"), ("s/a", "t/b"), ("t/a", "s/b", "t/b"), ("t/a", "u", "t/b"), ("t",)])
def test_query_refuses_keys_below_another_prefix(fake, connect, keys, step):
    whole(fake, listing(*((key, b"x") for key in keys)))
    with pytest.raises(BadResponse, match="below"):
        query(connect(fake.address, limits={"chunk_bytes": step}), b"t/")


NOT_LISTS = [
    b"",
    b"[",
    b"{}",
    b"null",
    b'[{"Key":"t/a"}]',
    b"[]]",
    b"[] []",
    listing(("t/a", b"x"))[:-1],
    listing(("t/a", b"x")) + b"x",
    listing(("t/a", b"x")).replace(b'"eA=="', b'"e*=="'),
    listing(("t/a", b"x"), ("t/b", b"y")).replace(b"},{", b"},,{"),
]


@pytest.mark.parametrize("body", NOT_LISTS)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_query_refuses_a_body_other_than_a_list_of_entries(fake, connect, body, step):
    whole(fake, body)
    with pytest.raises(BadResponse):
        query(connect(fake.address, limits={"chunk_bytes": step}), b"t/")


@pytest.mark.parametrize("chunked", [False, True])
def test_query_with_a_truncated_body_fails(fake, client, chunked):
    answer = Answer(200, TRUE, listing(("t/a", b"x"), ("t/b", b"y"), ("t/c", b"z")), chunked=chunked)
    for length in range(answer.wire().rindex(b"]") + 1):
        fake.handle = cut(answer, length)
        with pytest.raises((Unreachable, BadResponse)):
            query(client, b"t/", timeout=1)


def test_query_after_a_truncated_one_starts_over(fake, client):
    answer = Answer(200, TRUE, listing(("t/a", b"x"), ("t/b", b"y")))
    fake.handle = lambda request: answer
    query(client, b"t/")
    fake.handle = cut(answer, len(answer.wire()) - 9)
    with pytest.raises(Unreachable, match="truncated"):
        query(client, b"t/")
    fake.handle = lambda request: answer
    assert query(client, b"t/").pairs == [(b"t/a", b"x"), (b"t/b", b"y")]


def test_query_after_a_truncated_one_uses_the_next_address(fake, connect):
    with FakeConsul() as other:
        other.put(b"t/a", b"x")
        answer = Answer(200, TRUE, listing(("t/a", b"x"), ("t/b", b"y")))
        fake.handle = cut(answer, len(answer.wire()) - 9)
        client = connect(fake.address, other.address)
        with pytest.raises(Unreachable, match=fake.address):
            query(client, b"t/")
        assert query(client, b"t/").pairs == [(b"t/a", b"x")]


@each_version
def test_query_of_an_empty_prefix_has_an_index_and_no_entries(fake, client):
    read = query(client, b"t/")
    assert (read.pairs, read.index, read.filtered) == ([], fake.index, False)
    whole(fake, b"[]")
    assert query(client, b"t/").pairs == []


def test_query_accepts_only_a_404_of_consul_as_empty(fake, client):
    for headers in ({}, {"X-Consul-Index": "5"}, {"X-Consul-Index": "5", "X-Consul-Knownleader": "false"}):
        fake.handle = lambda request, headers=headers: Answer(404, headers)
        with pytest.raises((Unreachable, BadResponse)):
            query(client, b"t/")


def unread(client):
    with client.blocking_query(b"t/", timeout=2) as response:
        return response.index


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "kept"), [(0, True), (5_000, True), (5_000_000, False)])
def test_small_unread_response_keeps_its_connection(fake, client, size, kept, chunked):
    whole(fake, b"x" * size, chunked=chunked)
    assert unread(client) == 5
    whole(fake, listing(("t/a", b"x")))
    assert query(client, b"t/").pairs == [(b"t/a", b"x")]
    assert [request.connection for request in fake.requests] == ([1, 1] if kept else [1, 2])


def test_unread_response_is_not_read(fake, client):
    sent = []

    def handle(request):
        answer = Answer(200, TRUE, b"x" * (64 << 20)).wire()
        for at in range(0, len(answer), 1 << 16):
            request.send(answer[at : at + (1 << 16)])
            sent.append(at)

    fake.handle = handle
    assert unread(client) == 5
    assert len(sent) < 512  # what the sockets' buffers hold


def test_query_left_early_does_not_affect_the_next(fake, client):
    whole(fake, listing(*((f"t/{number:05}", b"x" * 50) for number in range(2000))))
    with client.blocking_query(b"t/", timeout=2) as response:
        assert next(response.pairs())[0] == kv.Pair("t/00000", b"x" * 50, 5)
    assert len(query(client, b"t/").pairs) == 2000


def test_query_limits_the_size_of_the_body(fake, connect):
    whole(fake, listing(*((f"t/{number:05}", b"x" * 50) for number in range(2000))), chunked=True)
    with pytest.raises(TooLarge, match=r"0 MiB in \d+ entries is more than smtpd can use"):
        query(connect(fake.address, limits={"body_bytes": 100_000, "entry_bytes": 10}), b"t/")


def test_body_limit_grows_with_the_number_of_entries(fake, connect):
    whole(fake, listing(*((f"t/{number:05}", b"x" * 50) for number in range(2000))), chunked=True)
    assert len(query(connect(fake.address, limits={"body_bytes": 20_000, "entry_bytes": 400}), b"t/").pairs) == 2000


def test_largest_usable_entry_fits_its_share_of_the_body_limit():
    largest = listing(("t/" + "k" * 1023, b"x" * 2047))
    assert len(largest) < kv.Client.entry_bytes


def test_query_refuses_a_body_of_endless_white_space(fake, connect):
    with FakeConsul() as other:
        whole(fake, b"[" + b" " * (9 << 20) + b"]")
        whole(other, listing(("t/a", b"x")))
        client = connect(fake.address, other.address)
        with pytest.raises(BadResponse, match="8 MiB without an entry"):
            query(client, b"t/")
        assert query(client, b"t/").pairs == [(b"t/a", b"x")]


def test_query_with_an_entry_larger_than_consul_stores_by_default_is_too_large(fake, client):
    whole(fake, listing(("t/a", b"1"), ("t/b", b"x" * (9 << 20)), ("t/c", b"2")))
    with pytest.raises(TooLarge, match="an entry of more than 8 MiB"):
        query(client, b"t/")


def test_list_that_misses_the_deadline_is_too_large(fake, connect):
    client = connect(fake.address, limits={"flowing_bytes": 100_000})
    names = [f"t/{number:0100}" for number in range(2000)]
    bodies = {"recurse": listing(*((name, b"x" * 50) for name in names)), "keys": json.dumps(names).encode()}

    def stops(request):
        (body,) = (bodies[name] for name in bodies if name in request.params)
        request.send(Answer(200, TRUE, body, length=1 << 30).wire())
        stall(request)

    fake.handle = stops
    for read in (client.list, client.visible_keys):
        with pytest.raises(TooLarge, match="0 MiB of a list arrived in time"):
            read(b"t/", timeout=0.3)


def test_stalled_blocking_query_is_not_too_large(fake, connect):
    client = connect(fake.address, limits={"flowing_bytes": 0, "read_seconds": 0.1})

    def stops(request):
        request.send(Answer(200, TRUE, listing(("t/a", b"x")), length=1 << 30).wire())
        stall(request)

    fake.handle = stops
    with pytest.raises(Unreachable):
        query(client, b"t/")


@each_version
def test_query_reports_entries_hidden_by_an_acl(fake, client):
    fake.put(b"t/a", b"x")
    fake.put(b"t/secret", b"y")
    fake.denied = (b"t/secret",)
    read = query(client, b"t/")
    assert (read.pairs, read.filtered) == ([(b"t/a", b"x")], fake.since >= (1, 11))


@each_version
def test_query_waits_on_its_index_and_returns_the_edit(fake, client):
    fake.put(b"t/a", b"x")
    index = query(client, b"t/").index
    timer = threading.Timer(0.1, fake.put, (b"t/a", b"y"))
    timer.start()
    read = query(client, b"t/", index=index, wait=20, timeout=0.5)
    timer.join()
    assert (read.pairs, read.index) == ([(b"t/a", b"y")], index + 1)
    assert fake.requests[-1].params == {"recurse": "1", "index": str(index), "wait": "20000ms"}


@pytest.mark.parametrize(
    ("consistency", "params"),
    [("default", {"consistent": "1"}), ("stale", {"stale": "1"}), ("consistent", {"consistent": "1"})],
)
@each_version
def test_first_query_of_a_watch_is_consistent(fake, connect, consistency, params):
    client = connect(fake.address, consistency=consistency)
    index = query(client, b"t/").index
    assert fake.requests[-1].params == {"recurse": "1", **params}
    query(client, b"t/", index=index, wait=0.05)
    waiting = {"recurse": "1", "index": str(index), "wait": "50ms"}
    assert fake.requests[-1].params == {**waiting, **({consistency: "1"} if consistency != "default" else {})}


def test_query_held_beyond_its_wait_is_unreachable(fake, client):
    fake.handle = stall
    began = time.monotonic()
    with pytest.raises(Unreachable):
        query(client, b"t/", index=5, wait=0.3, timeout=0.2)
    assert 0.5 <= time.monotonic() - began < 0.5 + SLACK


def test_steady_body_of_a_query_may_exceed_the_deadline(fake, connect):
    client = connect(fake.address, limits={"chunk_bytes": 64, "read_seconds": 3.0})
    pairs = [(f"t/{number}", b"x") for number in range(9)]
    slow = trickle(Answer(200, TRUE, listing(*pairs)), pause=0.002)
    fake.handle = slow
    began = time.monotonic()
    assert len(query(client, b"t/", timeout=1.2).pairs) == 9
    assert time.monotonic() - began > 1.2


def test_stalled_body_of_a_query_is_unreachable(fake, connect):
    client = connect(fake.address, limits={"read_seconds": 0.2})
    answer = Answer(200, TRUE, listing(("t/a", b"x")), length=1000)

    def stops(request):
        request.send(answer.wire())
        stall(request)

    for stalling in (stops, trickle(Answer(200, TRUE, listing(("t/a", b"x" * 5000))), pause=0.002)):
        fake.handle = stalling
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer in time"):
            query(client, b"t/", timeout=1)
        assert time.monotonic() - began < 1.2 + SLACK


def test_deadline_of_a_list_covers_the_whole_body(fake, client):
    answer = Answer(200, TRUE, listing(("t/a", b"x" * 5000)))

    def slow(request):
        request.send(answer.wire()[:200])
        trickle(Answer(200, TRUE, b"x" * 5000), pause=0.01)(request)

    fake.handle = slow
    began = time.monotonic()
    with pytest.raises(Unreachable):
        client.list(b"t/", timeout=0.4)
    assert time.monotonic() - began < 0.4 + SLACK
