"""Commands, files and includes in the value of an alias, in every notation that smtpd reads as one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from table_consul.errors import EntryError
from table_consul.services.addresses import is_plain_list, parse_element, split_list
from table_consul.services.judge import element_problem
from tests.services.expansion import alias_type, expand_line_split, text_to_expandnode
from tests.services.parsing import COMMANDS, TABLE, read, refusal
from tests.services.strategies import ELEMENTS, LINES


def test_array_of_commands_keeps_each_command_whole():
    assert read(b'["gilles", "|a, b", "|c"]', table=COMMANDS) == b'gilles, "|a, b", "|c"'


@pytest.mark.parametrize(
    ("raw", "command"),
    [
        (b'"|command, with comma"', b"command, with comma"),
        (b'"|plain"', b"plain"),
        (b'"|echo it\'s"', b"echo it's"),
        (b'"|echo \\"a, b\\""', b'echo "a, b"'),
        (b'"|printf a\\\\nb"', b"printf a\\nb"),
    ],
)
def test_quoted_command_reaches_smtpd_unchanged(raw, command):
    """aliases(5) puts commands in quotes, which JSON decoding would remove; smtpd needs them in the answer."""
    (node,) = split_list(read(raw, table=COMMANDS))
    assert command == (node[2:-1] if node.startswith(b'"') else node[1:])


COMMANDS_IN_DISGUISE = [
    b"|/bin/sh",
    b"gilles,|/bin/sh",
    b"gilles, |/bin/sh",
    b"gilles\n|/bin/sh",
    b'"|/bin/sh -c id"',
    b'"|/bin/sh, -c, id"',
    b'gilles, "|sh"',
    b"\\|sh",
    b"\\\\|sh"[1:],
    b'\\"|sh\\"',
    b"\\ |sh",
    b"\\\t\\ |sh",
    b"/etc/passwd",
    b"\\/etc/passwd",
    b" /var/mail/x",
    b":include:/etc/passwd",
    b"include:/etc/passwd",
    b":INCLUDE:/etc/passwd",
    b"InClude:/x",
    b"\\:include:/x",
    b":inc\\lude:/x",
    b"i\\n\\c\\l\\u\\d\\e:/x",
    b'["gilles", "|sh"]',
    b'["gilles", "/tmp/x"]',
    b'"gilles, |sh"',
    b'"\\u007csh"',
    b"'a, b', |sh",
    b'"a, b",\\|sh',
    b"a\\, b\n|sh",
    b"error:550 no,|sh",
    b"\x0b|sh",
    b",,|sh",
]


@pytest.mark.parametrize("raw", COMMANDS_IN_DISGUISE)
def test_alias_command_file_or_include_is_rejected_in_every_disguise(raw):
    text = refusal(raw)
    assert "set allow_commands = true" in text


@pytest.mark.parametrize("raw", COMMANDS_IN_DISGUISE)
def test_alias_command_is_accepted_with_allow_commands(raw):
    assert read(raw, table=COMMANDS)


@pytest.mark.parametrize(
    "raw",
    [
        b"error:550 no such user",
        b":error:450 try again, later",
        b"gilles",
        b"gilles@example.org, eric+x@example.org",
        b"a\\|b",
        b"'|' is no command",
        b"",
    ],
)
def test_alias_users_addresses_and_errors_need_no_permission(raw):
    assert raw == read(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"/dev/null",
        b"gilles, /dev/null",
        b"\\/dev/null",
        b" /dev/null\n",
        b'["/dev/null", "eric"]',
    ],
)
def test_alias_that_discards_mail_needs_no_permission(raw):
    assert b"/dev/null" in read(raw)
    assert read(b'"/dev/null"') == b"/dev/null"


@pytest.mark.parametrize("table", [TABLE, COMMANDS])
@pytest.mark.parametrize("value_format", ["auto", "text"])
def test_quotes_around_dev_null_which_smtpd_rejects_are_removed(table, value_format):
    def served(raw):
        return read(raw, table=table, value_format=value_format)

    assert served(b'"/dev/null"') == b"/dev/null"
    assert served(b'gilles, "/dev/null" ,"/dev/null"') == b"gilles, /dev/null ,/dev/null"
    assert served(b'gilles\n"/dev/null"') == b"gilles, /dev/null"


@pytest.mark.parametrize(
    "raw",
    [
        b"/dev/null2",
        b"/dev/null/",
        b"/dev/./null",
        b"/dev/NULL",
        b"/dev/null, /etc/x",
        b":include:/dev/null",
        b"/dev/null;x",
        b'/dev/null\\"',
    ],
)
def test_alias_that_only_looks_like_discarding_is_rejected(raw):
    assert "set allow_commands = true" in refusal(raw)


@pytest.mark.parametrize("raw", [b"it's", b'"gilles', b"gilles\\", b"'a\", b", b"a, 'b"])
def test_alias_with_an_open_quote_or_escape_is_rejected(raw):
    assert "ends inside a quote or an escape" in refusal(raw, table=COMMANDS)


def test_pipe_in_a_string_is_data():
    assert read(b"|x", "string") == b"|x"


# ---- expansion in smtpd ----


@given(LINES)
@example(b"a\\")
@example(b'"\'"')
def test_split_list_splits_like_smtpd(line):
    try:
        nodes = split_list(line)
    except EntryError:
        nodes = None
    assert expand_line_split(line) == nodes


@given(LINES)
def test_alias_that_smtpd_reads_as_a_command_is_rejected(line):
    try:
        value = read(line)
    except EntryError:
        return
    assert [node for node in expand_line_split(value) or [] if alias_type(node)] == []


@given(ELEMENTS)
@example(b'"/dev/null"')
def test_element_has_a_problem_where_smtpd_rejects_or_truncates_it(element):
    kind = text_to_expandnode(element)
    problem = element_problem(element)
    effect = "rejects" if kind is None else "delivers" if kind == "username" and b"@" in element else ""
    assert (problem is not None and f"smtpd {effect}" in problem) is bool(effect)


@given(ELEMENTS)
@example(b"|" + b"x" * 1020 + b"@example.org")
@example(b'"|' + b"x" * 1023 + b'"')
def test_element_is_parsed_as_by_smtpd(element):
    kind, parsed = text_to_expandnode(element), parse_element(element)
    names = {"filter": "command", "filename": "file", "username": "user"}
    assert (parsed and parsed.kind) == names.get(kind, kind)


@pytest.mark.parametrize("raw", [b"o'brien@example.org", b"gilles@example.org\\"])
def test_mailaddrmap_with_an_open_quote_or_escape_is_rejected(raw):
    assert "ends inside a quote or an escape" in refusal(raw, "mailaddrmap")


@given(LINES | st.from_regex(rb"[a-z.@,|/: ]{0,12}", fullmatch=True))
def test_plain_list_contains_nothing_that_smtpd_rejects_or_runs(line):
    if is_plain_list(line):
        nodes = expand_line_split(line)
        assert all(alias_type(node) is None and b"'" not in node and b'"' not in node for node in nodes)
        assert nodes == split_list(line)
