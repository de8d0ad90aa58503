from __future__ import annotations

import itertools
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from table_consul.errors import ReplyError
from table_consul.imsg import HEADER, MAX_MESSAGE, MAX_VALUE, Session, speaks
from table_consul.protocol import Failed, Found, Malformed, NotFound, Ready, Request, Updated
from table_consul.services import DEFAULT_SERVICES, SERVICES
from tests.dialogue import ENTRIES, converse, open_tables, write_config, write_source
from tests.e2e.record_imsg import FOLDER, MORE
from tests.smtpd.imsg import ALIAS, CHECK, CLOSE, FETCH, LOOKUP, OPEN, OPS, SOURCE, UPDATE, message, opening, question

# smtpd: smtpd-api.h, enum table_service.
ENUM = "alias domain credentials netaddr userinfo source mailaddr addrname mailaddrmap relayhost string regex auth"
BITS = {name: 1 << place for place, name in enumerate(ENUM.split())}
CHECKED = Request("check", b"", "t", "alias", b"root")
LOOKED_UP = Request("lookup", b"", "t", "alias", b"root")
FETCHED = Request("fetch", b"", "t", "source", b"")
UPDATED = Request("update", b"", "t", "", b"")


def events(*chunks):
    session = Session()
    found = []
    for chunk in chunks:
        found += session.receive_data(chunk)
    return found


def asked(*messages):
    """The events of these messages after an OPEN, the same in one piece and byte by byte."""
    data = b"".join((opening(), *messages))
    whole, pieces = events(data), events(*(bytes([each]) for each in data))
    assert pieces == whole
    return whole[1:]


# ---- transcripts of real smtpds ----


def replayed(folder, chunks):
    tables = open_tables(write_config(folder, address=f"file://{write_source(folder, ENTRIES | MORE)}"))
    return converse(tables, chunks)


@pytest.fixture(scope="module", params=sorted(Path(FOLDER).glob("*.hex")), ids=lambda path: path.stem)
def recorded(request, tmp_path_factory):
    turns = [line.split() for line in request.param.read_text().splitlines() if line[0] != "#"]
    said, answered = (b"".join(bytes.fromhex(text) for mark, text in turns if mark == which) for which in "><")
    assert HEADER.unpack_from(said)[0] == OPEN, "recorded on a machine of the other byte order"
    chunks = [bytes.fromhex(text) for mark, text in turns if mark == ">"]
    return said, answered, chunks, tmp_path_factory.mktemp("recorded")


def test_recorded_conversation_has_every_kind_of_request(recorded):
    said, _, _, _ = recorded
    ops = {(event.op, event.service) for event in events(said) if isinstance(event, Request)}
    assert {
        ("lookup", "alias"),
        ("check", "domain"),
        ("lookup", "credentials"),
        ("check", "netaddr"),
        ("fetch", "source"),
        ("check", "mailaddr"),
        ("lookup", "addrname"),
        ("update", ""),
    } <= ops


def test_recorded_conversation_gets_the_recorded_answers(recorded):
    _, answered, chunks, folder = recorded
    assert replayed(folder, chunks) == answered


def test_recorded_conversation_in_one_piece_gets_the_same_answers(recorded):
    said, answered, _, folder = recorded
    assert replayed(folder, [said]) == answered


def test_recorded_conversation_byte_by_byte_gets_the_same_answers(recorded):
    said, answered, _, folder = recorded
    assert replayed(folder, (bytes([each]) for each in said)) == answered


@settings(max_examples=20)
@given(cuts=st.sets(st.integers(0, 4000)))
def test_recorded_conversation_in_random_cuts_gets_the_same_answers(recorded, cuts):
    said, answered, _, folder = recorded
    places = sorted({0, *cuts, len(said)})
    assert replayed(folder, (said[a:b] for a, b in itertools.pairwise(places))) == answered


# ---- messages of smtpd ----


@pytest.mark.parametrize("data", [opening(), message(CHECK), b"\0\0\0\2"])
def test_small_number_is_imsg(data):
    assert speaks(data)


@pytest.mark.parametrize("data", [b"", b"config|", b"table|", b"\n", b"\xff"])
def test_letters_are_not_imsg(data):
    assert not speaks(data)


def test_open_has_the_table_and_the_version():
    assert [Ready({"tablename": "users", "protocol": "imsg 2"})] == events(opening(b"users"))


@pytest.mark.parametrize("body", [b"", b"\2", struct.pack("=I", 3) + b"t", struct.pack("=I", 2)])
def test_any_open_is_answered(body):
    assert [Ready] == [type(event) for event in events(message(OPEN, body))]


def test_name_may_fill_its_field_without_a_nul():
    (event,) = events(message(OPEN, struct.pack("=I", 2) + b"n" * 2048))
    assert event.config["tablename"] == "n" * 2048


def test_requests_have_the_table_name_and_the_key():
    assert asked(
        question(CHECK, ALIAS, b"root\0"),
        question(LOOKUP, ALIAS, b"root\0"),
        question(FETCH, SOURCE),
        message(UPDATE),
    ) == [CHECKED, LOOKED_UP, FETCHED, UPDATED]


@pytest.mark.parametrize("name", BITS)
def test_service_is_a_bit(name):
    (event,) = asked(question(LOOKUP, BITS[name], b"k\0"))
    assert name == event.service


@pytest.mark.parametrize("bit", [0, 3, 0x2000, -1, -(2**31), 2**31 - 1])
def test_unknown_service_is_a_request_without_a_known_service(bit):
    (event,) = asked(question(LOOKUP, bit, b"k\0"))
    assert (isinstance(event, Request), event.service in SERVICES) == (True, False)


def test_empty_key_is_valid():
    assert [event.key for event in asked(question(LOOKUP, ALIAS, b"\0"))] == [b""]


def test_parameters_before_the_key_are_skipped():
    (event,) = asked(question(LOOKUP, ALIAS, b"a\0b\0c\0\0root\0", count=2))
    assert event == LOOKED_UP
    assert asked(question(FETCH, SOURCE, b"a\0b\0", count=1)) == [FETCHED]


@pytest.mark.parametrize(
    ("kind", "rest", "count"),
    [
        (LOOKUP, b"", 0),
        (LOOKUP, b"root", 0),
        (CHECK, b"ro\0ot\0", 0),
        (CHECK, b"\0\0", 0),
        (LOOKUP, b"a\0b", 1),
        (LOOKUP, b"a\0b\0", 1),
        (LOOKUP, b"a\0b\0root", 1),
        (LOOKUP, b"root\0", 2**64 - 1),
        (LOOKUP, b"root\0", 6),
        (FETCH, b"root\0", 0),
        (FETCH, b"a\0", 1),
    ],
)
def test_invalid_request_is_an_error_and_does_not_affect_the_next(kind, rest, count):
    first, second = asked(question(kind, ALIAS, rest, count), question(LOOKUP, ALIAS, b"root\0"))
    assert (Malformed, OPS[kind], LOOKED_UP) == (type(first), first.request.op, second)


@pytest.mark.parametrize(("count", "noun"), [(1, "parameter"), (6, "parameters")])
def test_parameters_that_do_not_fit_are_counted_in_the_error(count, noun):
    (event,) = asked(question(LOOKUP, ALIAS, b"a\0", count))
    assert event.reason == f"the message is too short for its {count} {noun}"


@pytest.mark.parametrize("body", [b"", b"\1", struct.pack("=i", 1), struct.pack("=i", 1) + b"\0" * 7])
@pytest.mark.parametrize("kind", [CHECK, LOOKUP, FETCH])
def test_short_request_is_an_error(kind, body):
    (event,) = asked(message(kind, body))
    assert (Malformed, OPS[kind]) == (type(event), event.request.op)


@pytest.mark.parametrize("kind", [0, 1, 8, 255, 2**32 - 1])
def test_unknown_type_is_reported_and_not_answered(kind):
    first, second = asked(message(kind, b"x" * 99), question(LOOKUP, ALIAS, b"root\0"))
    assert (Malformed(f"unknown message type {kind}", None), LOOKED_UP) == (first, second)


@pytest.mark.parametrize("length", [0, 1, 15, MAX_MESSAGE + 1, 65535])
def test_input_after_an_invalid_length_is_ignored(length):
    lie = message(LOOKUP, b"\1\0\0\0root\0", length=length)
    (event,) = asked(lie, question(LOOKUP, ALIAS, b"root\0"))
    assert (Malformed, None) == (type(event), event.request)


def test_ignored_input_takes_no_memory():
    session = Session()
    tracemalloc.start()
    events = [event for _ in range(100) for event in session.receive_data(b"\0" * 65536)]
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(events), grown < 3 * 65536) == (1, True)


def test_longest_message_is_read():
    (event,) = asked(question(LOOKUP, ALIAS, b"k" * (MAX_MESSAGE - 16 - 12 - 1) + b"\0"))
    assert len(event.key) == MAX_MESSAGE - 29


def test_close_ends_the_conversation():
    session = Session()
    found = session.receive_data(opening() + message(CLOSE) + question(LOOKUP, ALIAS, b"root\0"))
    assert ([Ready], True) == ([type(event) for event in found], session.closed)
    assert session.receive_data(question(LOOKUP, ALIAS, b"root\0")) == []


def test_conversation_is_open_until_close():
    session = Session()
    assert [Ready, Request] == [type(event) for event in session.receive_data(opening() + message(UPDATE))]
    assert not session.closed


# ---- replies ----


def outcome_of(data, value=b""):
    """The result code and the value of a well-formed reply."""
    kind, length, flags, _, _ = HEADER.unpack_from(data)
    assert (0, len(data), 0) == (kind, length, flags)
    return struct.unpack_from("=i", data, 16)[0], data[20:]


def test_answer_to_open_is_empty():
    assert message(0)[:12] + b"\0\0\0\0" == Session().register(DEFAULT_SERVICES)


REPLIES = {
    "check found": (CHECKED, Found(), (1, b"")),
    "check not found": (CHECKED, NotFound(), (0, b"")),
    "check failed": (CHECKED, Failed("no data"), (-1, b"")),
    "lookup found": (LOOKED_UP, Found(b"gilles"), (1, b"gilles\0")),
    "lookup not found": (LOOKED_UP, NotFound(), (0, b"")),
    "lookup failed": (LOOKED_UP, Failed("no data"), (-1, b"")),
    "fetch found": (FETCHED, Found(b"192.0.2.1"), (1, b"192.0.2.1\0")),
    "fetch not found": (FETCHED, NotFound(), (0, b"")),
    "fetch failed": (FETCHED, Failed("no data"), (-1, b"")),
    "update done": (UPDATED, Updated(), (1, b"")),
    "update failed": (UPDATED, Failed("no data"), (0, b"")),
    "the longest value": (LOOKED_UP, Found(b"v" * MAX_VALUE), (1, b"v" * MAX_VALUE + b"\0")),
}


@pytest.mark.parametrize(("request_", "reply", "expected"), REPLIES.values(), ids=REPLIES)
def test_replies(request_, reply, expected):
    assert expected == outcome_of(Session().send(request_, reply))


def test_longest_reply_is_the_longest_message():
    assert len(Session().send(LOOKED_UP, Found(b"v" * MAX_VALUE))) == MAX_MESSAGE


def test_oversized_value_is_a_reply_error():
    with pytest.raises(ReplyError, match="16364 bytes; this smtpd accepts at most 16363"):
        Session().send(LOOKED_UP, Found(b"v" * (MAX_VALUE + 1)))


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (CHECKED, Found(b"secret")),
        (LOOKED_UP, Found()),
        (FETCHED, Found()),
        (UPDATED, Found()),
        (UPDATED, Found(b"secret")),
        (UPDATED, NotFound()),
        (CHECKED, Updated()),
        (LOOKED_UP, Updated()),
        (FETCHED, Updated()),
        (Request("dump", b"", "t", "alias", b""), Found(b"secret")),
    ],
)
def test_reply_of_the_wrong_kind_is_a_reply_error(request_, reply):
    with pytest.raises(ReplyError) as raised:
        Session().send(request_, reply)
    assert "secret" not in str(raised.value)


# ---- properties ----

HEADERS = st.builds(
    lambda kind, length, rest: struct.pack("=IHHII", kind, length, 0, 0, 0) + rest,
    st.integers(0, 9) | st.integers(0, 2**32 - 1),
    st.integers(0, 64) | st.integers(0, 2**16 - 1),
    st.binary(max_size=64),
)
TEXTS = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b""))
QUESTIONS = st.builds(
    question,
    st.sampled_from([CHECK, LOOKUP, FETCH, UPDATE, OPEN]),
    st.sampled_from([*BITS.values()]) | st.integers(-(2**31), 2**31 - 1),
    st.binary(max_size=40),
    st.integers(0, 5) | st.integers(0, 2**64 - 1),
)
BYTES = st.lists(HEADERS | QUESTIONS | st.binary(max_size=40), max_size=8).map(b"".join)


@given(st.lists(BYTES, max_size=5))
@example([message(CLOSE), b"x"])
def test_any_bytes_are_events_and_every_answer_is_one_message(chunks):
    for event in events(*chunks):
        assert isinstance(event, Ready | Request | Malformed)
        request = event if isinstance(event, Request) else getattr(event, "request", None)
        if request is not None:
            assert (0 if request.op == "update" else -1, b"") == outcome_of(Session().send(request, Failed("no data")))


@given(chunk=BYTES, cuts=st.sets(st.integers(0, 300)))
def test_any_bytes_are_the_same_events_in_every_framing(chunk, cuts):
    places = sorted({0, *cuts, max(300, len(chunk))})
    assert events(chunk) == events(*(chunk[a:b] for a, b in itertools.pairwise(places)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([CHECK, LOOKUP]),
            st.sampled_from(DEFAULT_SERVICES),
            st.lists(st.tuples(TEXTS, TEXTS), max_size=3),
            TEXTS,
        )
    ),
    TEXTS,
)
def test_pipelined_questions_are_read_in_order_with_their_keys(questions, name):
    data = opening(name)
    for kind, service, parameters, key in questions:
        before = b"".join(b"%b\0%b\0" % pair for pair in parameters)
        data += question(kind, BITS[service], before + key + b"\0", len(parameters))
    table = name.decode("utf-8", "backslashreplace")
    assert [Request(OPS[kind], b"", table, service, key) for kind, service, _, key in questions] == events(data)[1:]


@given(st.binary(max_size=200))
def test_valid_value_arrives_whole(value):
    try:
        reply = Found(value)
    except ReplyError:
        return
    assert (1, value + b"\0") == outcome_of(Session().send(LOOKED_UP, reply))
