from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import ReplyError
from table_consul.protocol import (
    DIALECTS,
    MAX_LINE,
    Failed,
    Found,
    Malformed,
    NotFound,
    Ready,
    Request,
    Session,
    Updated,
)
from table_consul.services import DEFAULT_SERVICES
from tests.dialogue import TRANSCRIPTS, converse, open_tables, read_transcript, write_config

HELLO = b"config|ready\n"
CHECK = Request("check", b"1", "t", "alias", b"root")
LOOKUP = replace(CHECK, op="lookup")
FETCH = Request("fetch", b"1", "t", "source", b"")
UPDATE = Request("update", b"1", "t", "", b"")


def events(*chunks):
    session = Session()
    found = []
    for chunk in chunks:
        found += session.receive_data(chunk)
    return found


def session(dialect):
    made = Session()
    made.receive_data(HELLO if dialect == "smtpd-tables" else b"table|\n")
    assert dialect == made.dialect
    return made


# ---- transcripts ----


@pytest.fixture(scope="module", params=TRANSCRIPTS, ids=lambda path: path.stem)
def dialogue(request, tmp_path_factory):
    found = read_transcript(request.param)
    folder = tmp_path_factory.mktemp("transcript")
    return found, lambda chunks: converse(open_tables(write_config(folder, *found.defaults)), chunks)


def test_each_turn_of_a_transcript_gets_its_replies(dialogue):
    transcript, answered = dialogue
    for number in range(len(transcript.turns)):
        so_far = transcript.turns[: number + 1]
        assert b"".join(answer for _, answer in so_far) == answered([said for said, _ in so_far])


def test_transcript_in_one_piece_gets_the_same_replies(dialogue):
    transcript, answered = dialogue
    assert transcript.answered == answered([transcript.said])


def test_transcript_byte_by_byte_gets_the_same_replies(dialogue):
    transcript, answered = dialogue
    assert transcript.answered == answered(bytes([c]) for c in transcript.said)


@settings(max_examples=20)
@given(cuts=st.sets(st.integers(0, 4000)))
def test_transcript_in_random_cuts_gets_the_same_replies(dialogue, cuts):
    transcript, answered = dialogue
    places = sorted({0, *cuts, 5000})
    assert transcript.answered == answered(transcript.said[a:b] for a, b in itertools.pairwise(places))


# ---- dialects ----


def test_first_line_decides_the_dialect():
    dialects = []
    for line in (b"config|protocol|0.1\n", b"table|0.1\n", b"hello\n", b""):
        made = Session()
        made.receive_data(line)
        dialects.append(made.dialect)
    assert dialects == ["smtpd-tables", "procexec", None, None]


def test_requests_without_a_handshake_are_in_the_dialect_of_2020():
    assert [Request("lookup", b"x", "n", "alias", b"k")] == events(b"table|0.1|0|n|lookup|x|alias|k\n")


def test_requests_after_a_handshake_have_the_service_before_the_id():
    assert Request("lookup", b"x", "n", "alias", b"k") == events(HELLO + b"table|0.1|0|n|lookup|alias|x|k\n")[1]


def test_handshake_has_the_parameters_of_smtpd():
    said = b"config|smtpd-version|7.9.0-portable\nconfig|protocol|0.1\nconfig|tablename|a|b\nconfig|ready\n"
    assert [Ready({"smtpd-version": "7.9.0-portable", "protocol": "0.1", "tablename": "a|b"})] == events(said)


@pytest.mark.parametrize("rest", [b"table|0.1|0|t|check|alias|2|x", b"config|ready", b"x", b""])
def test_key_with_a_line_break_is_one_request_and_an_error(rest):
    made = Session()
    made.receive_data(b"config|smtpd-version|7.6.0-portable\nconfig|tablename|t\nconfig|ready\n")
    asked = Request("lookup", b"1", "t", "credentials", b"gilles")
    line = b"table|0.1|0|t|lookup|credentials|1|gilles\n"
    assert [Malformed("the key contains a line break", asked)] == made.receive_data(line + rest + b"\n")
    assert [asked] == made.receive_data(line)


def test_endless_handshake_takes_bounded_memory():
    (ready,) = events(b"".join(b"config|%d|x\n" % n for n in range(1000)) + HELLO)
    assert len(ready.config) == 64


def test_handshake_after_requests_of_2020_is_refused_without_an_answer():
    assert [event.request for event in events(b"table|0.1|0|t|update|1\n", HELLO)[1:]] == [None]


def test_services_are_registered_in_order_and_end_with_ready():
    assert Session().register(["alias", "domain"]) == b"register|alias\nregister|domain\nregister|ready\n"


def test_lines_end_only_at_a_newline():
    (request,) = events("table|0.1|0|t|lookup|1|alias|a\u2028b\x85c\x0bd\re\n".encode())
    assert "a\u2028b\x85c\x0bd\re".encode() == request.key


def test_incomplete_line_is_not_an_event():
    assert events(b"table|0.1|0|t|lookup|1|alias|root") == []


def test_table_and_service_that_are_not_utf_8_are_escaped():
    (request,) = events(b"table|0.1|0|t\xff|lookup|1|al\xffias|k\xff\n")
    assert (request.table, request.service, request.key) == ("t\\xff", "al\\xffias", b"k\xff")


# ---- length ----


def in_both_framings(line):
    whole = events(HELLO, line + b"\n" + b"table|0.1|0|t|update|2\n")
    pieces = events(HELLO, *(line[at : at + 1000] for at in range(0, len(line), 1000)), b"\ntable|0.1|0|t|update|2\n")
    assert whole == pieces
    assert Request("update", b"2", "t", "", b"") == whole[-1]
    return whole[1:-1]


def test_longest_line_is_a_request():
    head = b"table|0.1|0|t|lookup|alias|1|"
    (event,) = in_both_framings(head + b"a" * (MAX_LINE - len(head)))
    assert isinstance(event, Request)


@pytest.mark.parametrize("size", [MAX_LINE + 1, 2 * MAX_LINE, 3 * MAX_LINE + 7])
def test_oversized_line_is_refused_once_with_its_id_and_the_next_is_read(size):
    head = b"table|0.1|0|t|lookup|alias|1|"
    (event,) = in_both_framings(head + b"a" * (size - len(head)))
    assert (event.request.id, "longer than 65536 bytes" in event.reason) == (b"1", True)


@pytest.mark.parametrize("line", [b"x", b"config|x|", b"table|0.1|0|t|", b"table|0.1|0|t|lookup|alias|" + b"9" * 3000])
def test_oversized_line_without_an_id_is_refused_without_an_answer(line):
    (event,) = in_both_framings(line.ljust(MAX_LINE + 1, b"x"))
    assert event.request is None


def test_oversized_line_before_any_dialect_is_refused_without_an_answer():
    (event,) = events(b"table|".ljust(MAX_LINE + 1, b"x") + b"\n")
    assert event.request is None


def test_endless_line_takes_bounded_memory():
    made = Session()
    tracemalloc.start()
    rejected = [event for _ in range(200) for event in made.receive_data(b"x" * MAX_LINE)]
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(rejected), grown < 4 * MAX_LINE) == (1, True)


# ---- replies ----


@pytest.mark.parametrize("value", [b"", b"a\nb", b"\n", b"a\r", b"a\0b"])
def test_invalid_reply_value_is_a_reply_error(value):
    with pytest.raises(ReplyError):
        Found(value)


@given(st.binary())
def test_valid_reply_value_is_one_nonempty_line(value):
    try:
        reply = Found(value)
    except ReplyError:
        return
    line = session("smtpd-tables").send(LOOKUP, reply)
    assert (1, b"lookup-result|1|found|" + value) == (line.count(b"\n"), line[:-1])
    assert value


SMTPD_TABLES = {
    (CHECK, Found()): b"check-result|1|found\n",
    (CHECK, NotFound()): b"check-result|1|not-found\n",
    (CHECK, Failed("no|data")): b"check-result|1|error|no|data\n",
    (LOOKUP, Found(b"v|w")): b"lookup-result|1|found|v|w\n",
    (LOOKUP, NotFound()): b"lookup-result|1|not-found\n",
    (LOOKUP, Failed("no\ndata")): b"lookup-result|1|error|no\\ndata\n",
    (FETCH, Found(b"v")): b"fetch-result|1|found|v\n",
    (FETCH, NotFound()): b"fetch-result|1|not-found\n",
    (FETCH, Failed("")): b"fetch-result|1|error|\n",
    (UPDATE, Updated()): b"update-result|1|ok\n",
    (UPDATE, Failed("no data")): b"update-result|1|error|no data\n",
}
PROCEXEC = {
    (CHECK, Found()): b"table-response|1|found\n",
    (CHECK, NotFound()): b"table-response|1|not-found\n",
    (LOOKUP, Found(b"v|w")): b"table-response|1|found|v|w\n",
    (LOOKUP, Failed("no data")): b"table-response|1|failure\n",
    (FETCH, Found(b"v")): b"table-response|1|found|v\n",
    (UPDATE, Updated()): b"table-response|1|updated\n",
    (UPDATE, Failed("no data")): b"table-response|1|failure\n",
    (replace(LOOKUP, table=""), NotFound()): b"table-result|1|not-found\n",
}


@pytest.mark.parametrize(("asked", "line"), SMTPD_TABLES.items())
def test_replies_of_smtpd_tables(asked, line):
    assert line == session("smtpd-tables").send(*asked)


@pytest.mark.parametrize(("asked", "line"), PROCEXEC.items())
def test_replies_of_2020(asked, line):
    assert line == session("procexec").send(*asked)


def test_first_word_of_a_reply_of_2020_depends_on_the_table():
    made = Session({"t": "table-result", "": "table-response"}.__getitem__)
    assert [made.send(request, Found()) for request in (CHECK, replace(CHECK, table=""))] == [
        b"table-result|1|found\n",
        b"table-response|1|found\n",
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (CHECK, Found(b"v")),
        (LOOKUP, Found()),
        (FETCH, Found()),
        (UPDATE, Found()),
        (UPDATE, Found(b"v")),
        (UPDATE, NotFound()),
        (CHECK, Updated()),
        (LOOKUP, Updated()),
        (FETCH, Updated()),
    ],
)
def test_reply_of_the_wrong_kind_is_a_reply_error(dialect, request_, reply):
    with pytest.raises(ReplyError):
        session(dialect).send(request_, reply)


@given(st.text() | st.text(st.characters(categories=["Cc", "Cs", "Zl", "Cf"])))
def test_any_reason_is_one_bounded_printable_line(reason):
    line = session("smtpd-tables").send(LOOKUP, Failed(reason))
    assert (line.count(b"\n"), line[:-1].decode().isprintable(), len(line) < 4 * 404 + 40) == (1, True, True)


# ---- properties ----

FRAGMENTS = st.sampled_from(
    [
        b"table",
        b"config",
        b"ready",
        b"0.1",
        b"|",
        b"\n",
        b"check",
        b"lookup",
        b"fetch",
        b"update",
        b"alias",
        b"\0",
        b"\xff",
    ]
)
BYTES = st.one_of(
    st.binary(),
    st.lists(FRAGMENTS).map(b"".join),
    st.lists(st.lists(FRAGMENTS | st.binary(max_size=4), max_size=9).map(b"|".join)).map(b"\n".join),
)


@given(st.lists(BYTES))
@example([b"table|" + b"x" * MAX_LINE, b"x" * MAX_LINE, b"\n\n"])
def test_any_bytes_are_events_and_every_answer_is_one_line_with_its_id(chunks):
    made = Session()
    for chunk in chunks:
        for event in made.receive_data(chunk):
            assert isinstance(event, Ready | Request | Malformed)
            request = event if isinstance(event, Request) else getattr(event, "request", None)
            if request is not None:
                line = made.send(request, Failed("no data"))
                assert b"|" + request.id + b"|" in line
                assert (line.count(b"\n"), line[-1:]) == (1, b"\n")


@given(chunk=BYTES, cuts=st.sets(st.integers(0, 200)))
def test_any_bytes_are_the_same_events_in_every_framing(chunk, cuts):
    places = sorted({0, *cuts, max(200, len(chunk))})
    assert events(chunk) == events(*(chunk[a:b] for a, b in itertools.pairwise(places)))


FIELD = st.binary(min_size=1, max_size=20).map(lambda data: data.translate(None, b"|\n")).filter(bool)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"check", b"lookup", b"fetch", b"update"]),
            st.sampled_from([name.encode() for name in DEFAULT_SERVICES]),
            FIELD,
            st.binary(max_size=30).map(lambda data: data.translate(None, b"\n")),
        )
    ),
    st.sampled_from([*DIALECTS]),
)
def test_pipelined_requests_are_read_in_order_with_their_ids_and_keys(asked, dialect):
    made = session(dialect)
    lines = []
    for op, service, ident, key in asked:
        middle = (service, ident) if dialect == "smtpd-tables" else (ident, service)
        fields = [b"table|0.1|0|t", op, *(middle if op != b"update" else (ident,))]
        lines.append(b"|".join([*fields, key] if op in (b"check", b"lookup") else fields) + b"\n")
    seen = [
        (event.op.encode(), event.service.encode(), event.id, event.key) for event in made.receive_data(b"".join(lines))
    ]
    assert [
        (op, service if op != b"update" else b"", ident, key if op in (b"check", b"lookup") else b"")
        for op, service, ident, key in asked
    ] == seen
