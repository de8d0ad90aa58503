"""Values as the services read them: formats, lists of lines, and limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.errors import EntryError
from table_consul.services import SERVICES
from table_consul.services.values import LINE_MAX, is_valid_reply_value, parse_value
from tests.services.parsing import entries, read, refusal
from tests.services.strategies import RAW, SERVICE, TABLES

# ---- formats ----


def test_trailing_white_space_is_dropped():
    assert read(b"gilles \t\r\n") == b"gilles"


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'"gilles"', b"gilles"),
        (b'"gilles"\n', b"gilles"),
        (b'["gilles", "eric"]', b"gilles, eric"),
        (b"[]", b""),
        (b'""', b""),
        (b'"gi\\u006cles"', b"gilles"),
        (b"gilles", b"gilles"),
    ],
)
def test_auto_format_decodes_json_strings_and_arrays(raw, value):
    assert read(raw) == value


@pytest.mark.parametrize("raw", [b"[2001:db8::1]", b"[::1]:25", b"{}", b"null", b"12", b'["a", 1]', b'[["a"]]'])
def test_auto_format_reads_other_json_as_text(raw):
    assert raw == read(raw, "string")


def test_auto_format_reads_quoted_invalid_utf_8_as_text():
    assert read(b'"\xff"', "string") == b'"\xff"'


def test_auto_format_reads_a_lone_surrogate_as_text():
    assert read(b'"\\ud800"', "string") == b'"\\ud800"'


def test_text_format_decodes_nothing():
    assert read(b'"gilles"', "string", value_format="text") == b'"gilles"'


@pytest.mark.parametrize(("raw", "value"), [(b' "gilles"\n', b"gilles"), (b"null", b""), (b"", b""), (None, b"")])
def test_json_format_reads_strings_and_null(raw, value):
    assert value == read(raw, value_format="json")


@pytest.mark.parametrize("raw", [b"gilles", b"{}", b"12", b'"gilles', b"[1]", b'"\xff"'])
def test_json_format_rejects_everything_else(raw):
    assert 'such as "a" or ["a", "b"]' in refusal(raw, value_format="json")


def test_list_for_a_service_of_single_values_is_rejected():
    assert refusal(b'["1:1:/a", "2:2:/b"]', "userinfo") == "the value is a list; userinfo takes a single value"


def test_list_of_one_is_a_single_value():
    assert read(b'["1:1:/a"]', "userinfo") == b"1:1:/a"


# ---- lines ----


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"gilles\neric\n", b"gilles, eric"),
        (b"gilles,\r\neric,\r\n", b"gilles, eric"),
        (b"# who reads root\ngilles\n\n  # and\n\teric", b"gilles, eric"),
        (b"# nobody", b""),
        (b" # nobody", b""),
        (b"  gilles", b"gilles"),
        (b"\n", b""),
    ],
)
@pytest.mark.parametrize("service", ["alias", "mailaddrmap"])
def test_lines_and_comments_become_one_list(service, raw, value):
    assert value == read(raw, service)


@pytest.mark.parametrize("service", sorted({*SERVICES} - {"alias", "mailaddrmap"}))
@pytest.mark.parametrize("raw", [b"one\ntwo", b"one\rtwo", b"one\0two"])
def test_line_break_or_nul_is_rejected(service, raw):
    assert "a line break or a NUL; " in refusal(raw, service)


def test_nul_or_lone_carriage_return_in_a_list_is_rejected():
    assert all("a line break or a NUL; " in refusal(raw) for raw in (b"gil\0les", b"gil\rles"))


def test_hash_sign_in_a_single_value_is_data():
    assert read(b"#1", "string") == b"#1"


# ---- limits ----


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_value_of_2047_bytes_is_accepted(service):
    assert len(read(b"a" * 2047, service)) == LINE_MAX - 1


@pytest.mark.parametrize("service", ["alias", "credentials"])
def test_value_of_2048_bytes_is_rejected(service):
    assert "the value has 2048 bytes; smtpd rejects 2048 or more" in refusal(b"a" * 2048, service)


def test_value_limit_counts_the_reply_not_the_stored_text():
    assert read(b"a\n# " + b"x" * 4000) == b"a"


def test_value_of_other_services_has_no_limit():
    assert len(read(b"a" * 5000, "string")) == 5000


# ---- any value ----


@pytest.mark.parametrize(
    ("service", "raw"),
    [
        ("credentials", b"hunter2\nhunter2"),
        ("credentials", b"hunter2:"),
        ("credentials", b"hunter2" * 400),
        ("userinfo", b"hunter2"),
        ("alias", b"|hunter2"),
        ("alias", b"hunter2'"),
        ("string", b'["hunter2", "hunter2"]'),
    ],
)
def test_messages_contain_no_part_of_the_value(service, raw):
    assert "hunter2" not in refusal(raw, service) + "".join(map(str, entries(service, (b"k", raw)).problems))


@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_parsed_value_is_a_valid_reply_or_empty(table, service, key, raw):
    try:
        value = parse_value(table, service, key, raw)
    except EntryError:
        return
    assert value == b"" or is_valid_reply_value(value)
