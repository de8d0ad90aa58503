"""The lines that table-procexec sends to a child, and the lines that it accepts as replies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.child import parse_reply, question_template
from table_consul.protocol import DIALECTS, Failed, Found, NotFound, Request, Updated

ASKED = {
    ("smtpd-tables", "check"): b"table|0.1|1.500000|t|check|alias|7|a|b\n",
    ("smtpd-tables", "lookup"): b"table|0.1|1.500000|t|lookup|alias|7|a|b\n",
    ("smtpd-tables", "fetch"): b"table|0.1|1.500000|t|fetch|alias|7\n",
    ("smtpd-tables", "update"): b"table|0.1|1.500000|t|update|7\n",
    ("procexec", "check"): b"table|0.1|1.500000|t|check|7|alias|a|b\n",
    ("procexec", "lookup"): b"table|0.1|1.500000|t|lookup|7|alias|a|b\n",
    ("procexec", "fetch"): b"table|0.1|1.500000|t|fetch|7|alias\n",
    ("procexec", "update"): b"table|0.1|1.500000|t|update|7\n",
}


def line_of(dialect, request):
    return question_template(dialect, request.op, request.table, request.service) % (1.5, b"7", request.key)


@pytest.mark.parametrize(("how", "line"), ASKED.items(), ids=map("-".join, ASKED))
def test_question_has_the_fields_of_its_dialect(how, line):
    dialect, op = how
    assert line_of(dialect, Request(op, b"", "t", "alias", b"a|b" if op in ("check", "lookup") else b"")) == line


@pytest.mark.parametrize(("dialect", "op"), ASKED)
def test_question_is_parsed_by_table_consul(dialect, op):
    asked = Request(op, b"7", "t%", "" if op == "update" else "alias", b"a|b" if op in ("check", "lookup") else b"")
    assert DIALECTS[dialect](line_of(dialect, asked).rstrip(b"\n")) == asked


@pytest.mark.parametrize(
    ("dialect", "op", "line", "reply"),
    [
        ("smtpd-tables", "check", b"check-result|7|found", Found()),
        ("smtpd-tables", "check", b"check-result|7|found|x", Found()),
        ("smtpd-tables", "lookup", b"lookup-result|7|found|a|b", Found(b"a|b")),
        ("smtpd-tables", "lookup", b"lookup-result|7|not-found", NotFound()),
        ("smtpd-tables", "fetch", b"fetch-result|7|found|a", Found(b"a")),
        ("smtpd-tables", "update", b"update-result|7|ok", Updated()),
        ("smtpd-tables", "update", b"update-result|7|error|no", Failed("the table reported: no")),
        ("smtpd-tables", "lookup", b"lookup-result|7|error", Failed("the table reported a failure")),
        ("procexec", "check", b"table-response|7|found", Found()),
        ("procexec", "lookup", b"table-result|7|found|a", Found(b"a")),
        ("procexec", "lookup", b"table-result|7|failure", Failed("the table reported a failure")),
        ("procexec", "update", b"table-response|7|updated", Updated()),
        ("procexec", "fetch", b"table-response|7|not-found", NotFound()),
        ("smtpd-tables", "update", b"update-result|7|not-found", None),
        ("smtpd-tables", "update", b"update-result|7|found", None),
        ("smtpd-tables", "lookup", b"check-result|7|found|a", None),
        ("smtpd-tables", "lookup", b"lookup-result|8|found|a", None),
        ("smtpd-tables", "lookup", b"lookup-result|7|found", None),
        ("smtpd-tables", "lookup", b"lookup-result|7|", None),
        ("smtpd-tables", "lookup", b"table-result|7|found|a", None),
        ("procexec", "lookup", b"lookup-result|7|found|a", None),
        ("smtpd-tables", "lookup", b"", None),
    ],
)
def test_line_is_a_reply_only_to_its_question(dialect, op, line, reply):
    assert parse_reply(dialect, op, b"7", line) == reply


@given(
    st.sampled_from([*DIALECTS]),
    st.sampled_from(["check", "lookup", "fetch", "update"]),
    st.lists(
        st.sampled_from([b"lookup-result", b"table-result", b"7", b"found", b"not-found", b"error", b"ok"])
        | st.binary(max_size=4)
    ).map(b"|".join),
)
def test_any_line_is_a_valid_reply_or_no_reply(dialect, op, line):
    reply = parse_reply(dialect, op, b"7", line)
    assert reply is None or isinstance(reply, Found | NotFound | Updated | Failed)
    if isinstance(reply, Found):
        assert (reply.value is None) is (op == "check")
        assert op != "update"
