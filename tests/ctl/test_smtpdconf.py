"""What `table-consulctl` reads from smtpd.conf: its tables, the services that smtpd looks up in them, inline tables."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.ctl import smtpdconf
from table_consul.ctl.formats import FormatError
from table_consul.services import SERVICES
from tests.ctl.importing import entries, importer
from tests.ctl.parsed import ALIAS, CREDENTIALS, DOMAIN, STRING, pairs, problems
from tests.ctl.parsed import read as parse

NETADDR, MAILADDR = SERVICES["netaddr"], SERVICES["mailaddr"]


@pytest.fixture
def read(tmp_path):
    def run(text, **files):
        for name, content in {"smtpd.conf": text, **files}.items():
            (tmp_path / name).write_text(content.replace("HERE", str(tmp_path)))
        return smtpdconf.read(str(tmp_path / "smtpd.conf"))

    return run


def services(conf, name="t"):
    return [use.services for use in conf.tables[name].uses]


@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("table t consul", None),
        ('table "t" "consul"', None),
        ("table 't' consul:/etc/x.toml  # a comment", "/etc/x.toml"),
        ("table \\\n t\\\n consul", None),
        ('table t "procexec:/usr/libexec/opensmtpd/table-consul /etc/x.toml"', "/etc/x.toml"),
        ('table t "procexec:/usr/libexec/smtpd/table-consul"', None),
        ('c = "consul:/etc/x.toml"\ntable t $c', "/etc/x.toml"),
        ('line = "table t consul:/etc/x.toml"\n$line', "/etc/x.toml"),
        ('c = "con\\\nsul"\ntable t $c', None),
    ],
)
def test_table_of_table_consul_is_found(read, line, config):
    assert {name: each.config for name, each in read(line + "\n").tables.items()} == {"t": config}


@pytest.mark.parametrize(
    "line",
    [
        "table t file:/etc/aliases",
        "table t { a = b }",
        'table t { "table x consul" }',
        "# table t consul",
        "table t redis:/etc/consul",
        'listen on lo tag "table t consul"',
    ],
)
def test_other_tables_are_left_out(read, line):
    conf = read(line)
    assert (conf.tables, conf.problems) == ({}, [])


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('action "a" maildir alias <t>', [("alias",)]),
        ('action "a" maildir virtual <t> userbase <t>', [("alias",), ("userinfo",)]),
        (
            'action "a" relay host smtps://x auth <t> src <t> helo-src <t>',
            [("credentials",), ("source",), ("addrname",)],
        ),
        ('action "a" relay domain <t>', [("relayhost",)]),
        ("match from src <t> for domain <t> action a", [("netaddr",), ("domain",)]),
        ("match from any for domain regex <t> action a", [("regex",)]),
        ("match ! from rdns <t> for rcpt-to <t> action a", [("domain",), ("mailaddr",)]),
        ("match from auth <t> for any action a", [("string", "mailaddr")]),
        ("listen on lo auth <t> hostnames <t> senders <t>", [("credentials", "auth"), ("addrname",), ("mailaddrmap",)]),
        ('listen on lo auth-optional \\\n < "t" >', [("credentials", "auth")]),
        ('filter f phase connect match src <t> disconnect "550 no"', [("netaddr",)]),
        ("filter f phase commit match auth <t> junk", [("string", "credentials")]),
    ],
)
def test_use_of_a_table_determines_its_service(read, statement, expected):
    assert services(read(f"table t consul\n{statement}\n")) == expected


def test_includes_are_followed_and_lines_are_those_of_their_file(read, tmp_path):
    conf = read('include "HERE/more"\naction a maildir alias <t>\n', more="\n\ntable t consul\n")
    table = conf.tables["t"]
    assert (table.where, table.uses[0].where) == (f"{tmp_path}/more:3", f"{tmp_path}/smtpd.conf:2")


def test_include_in_a_macro_is_followed(read):
    assert [*read('file = "\\"HERE/more\\""\ninclude $file\n', more="table t consul\n").tables] == ["t"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('include "/nowhere/x"\n', "cannot include /nowhere/x: no such file or directory"),
        ('include "HERE/smtpd.conf"\n', "includes are nested more than 16 deep"),
        ("table t $missing\n", "macro missing is not defined"),
        ("match from src <t> for any action a\n", "table t is used but not defined"),
        ('include "HERE"\n', "is a directory"),
    ],
)
def test_problem_has_its_place(read, text, problem):
    ((where, what),) = read(text).problems
    assert (where.endswith("/smtpd.conf:1"), problem in what) == (True, True)


@pytest.mark.parametrize(
    "text", ["", "}", "{", '"', "'open", "<", "table", "table t", "= = =", "\\", "$", "\x00\xff", "<t"]
)
def test_broken_file_is_read_without_an_error(read, text):
    assert read(text).tables == {}


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        smtpdconf.read(str(tmp_path / "none"))


# Inline tables.

CONF = rb"""
# table ignored { x }
domain = "example.org"
table aliases file:/etc/mail/aliases
table virtuals { "@example.org" = gilles, Info@example.org => "eric, vera"
    "quoted \"x\"" = 'it is' # a comment with }
    postmaster = root }
table domains { $domain, "*.example.net" \
    example.com }
table creds "file:/etc/mail/creds"
action "in" maildir virtual <virtuals>
match from any for domain <domains> action "in"
match from src { 192.0.2.1, 192.0.2.2 } for any action "out"
"""


def test_inline_table_of_smtpd_conf_is_read_by_its_name():
    parsed = parse(CONF, ALIAS, "auto", below="virtuals")
    assert parsed.format == "conf"
    assert pairs(parsed) == [
        (b"@example.org", b"gilles"),
        (b"info@example.org", b"eric, vera"),
        (b'quoted "x"', b"it is"),
        (b"postmaster", b"root"),
    ]
    assert [entry.line for entry in parsed.entries] == [5, 5, 6, 7]


def test_macro_and_continued_line_are_read_as_smtpd_reads_them():
    found = pairs(parse(CONF, DOMAIN, "auto", below="domains"))
    assert [key for key, _ in found] == [b"example.org", b"*.example.net", b"example.com"]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (b"# a comment \\\n that goes on }\ntable x { a }\n", [b"a"]),
        (b"table x { a\\b, 'c\\'d', \"e\\'f\", \"g\nh\" }\n", [b"ab", b"c'd", b"e\\'f", b"gh"]),
        (b"table x { a }\ninclude '/etc/more'\n{ m = b }\n", [b"a"]),
        (b"table x { 'caf\xe9', 'caf\xc3\xa9' }\n", [b"caf\xe9", b"caf\xc3\xa9"]),
    ],
)
def test_words_of_smtpd_conf_are_split_as_smtpd_splits_them(text, keys):
    assert [key for key, _ in pairs(parse(text, STRING, "conf"))] == keys


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (b"table x { a }\ntable y { b }\n", None, r"choose an inline table of this smtpd.conf: x, y"),
        (b"table x { a }\ntable aliases file:/etc/aliases\n", None, "aliases is file:/etc/aliases"),
        (b"table x { a }\ntable y { b }\n", "z", "--from TABLE"),
        (b"table x { a }\n", "z", "--from TABLE"),
        (b"table x { a\n", None, "has no closing brace"),
        (b"table x { $y }\n", None, "line 1: macro y is not defined"),
        (b"table z db:/etc/z.db\n", None, "there are none"),
    ],
)
def test_smtpd_conf_without_the_table_is_an_error(text, name, expected):
    with pytest.raises(FormatError, match=expected):
        parse(text, STRING, "auto", below=name)


def test_empty_inline_table_has_no_entries():
    assert parse(b"table aliases { }\ntable x { a }\n", STRING, "conf").entries == []


def test_only_inline_table_needs_no_name():
    assert pairs(parse(b"table x { a, b }\n", STRING, "auto")) == [(b"a", b""), (b"b", b"")]
    assert pairs(parse(b"table x{a}\n", STRING, "auto")) == [(b"a", b"")]


@pytest.mark.parametrize(
    ("text", "service", "line", "expected"),
    [
        (b"table x { a,\n b = c }", STRING, 1, "has no value"),
        (b"table x { a = }", STRING, 1, "has no value"),
        (b"table x {\n a = b }", NETADDR, 2, "as a mapping, but netaddr requires a list"),
        (b"table x {\n a }", ALIAS, 2, "but alias requires values"),
        (b"table x { a = }", NETADDR, 1, "has no value"),
    ],
)
def test_bad_inline_table_is_a_problem_with_its_line(text, service, line, expected):
    assert expected in problems(parse(text, service, "auto"))[line]


@pytest.mark.parametrize(
    ("inside", "service", "sign"),
    [
        (b"label = user:pa=ss", CREDENTIALS, "="),
        (b"label = user:pa(ss", CREDENTIALS, "("),
        (b"label = user:pa!ss, other = user:x", CREDENTIALS, "!"),
        (b"192.0.2.0/24, !192.0.2.1", NETADDR, "!"),
        (b"@example.org", MAILADDR, "@"),
        (b"= b", ALIAS, "="),
        (b"a\n (\n", STRING, "("),
    ],
)
def test_word_that_needs_quotes_is_never_read_in_part(inside, service, sign):
    with pytest.raises(FormatError, match=rf"line \d: expected a key, not {re.escape(sign)} \("):
        parse(b"table x { %b }\n" % inside, service, "auto")


def test_inline_table_is_imported_by_its_name(consul):
    text = b'table domains { example.org }\ntable aliases { root = "gilles" }\n'
    for more in ([], ["--from", "aliases"]):
        done = importer(consul, "aliases", "alias", "-", *more, stdin=text)
        assert (done.status, entries(consul)) == (0, {"root": b"gilles"}), done.said


@given(
    st.lists(
        st.sampled_from(
            [b"table x {", b"a", b"=", b"=>", b",", b"}", b"{", b"\n", b'"', b"'", b"\\", b"#", b"$a", b" "]
        ),
        max_size=12,
    ).map(b"".join),
    st.sampled_from([STRING, ALIAS, NETADDR]),
)
def test_any_smtpd_conf_gives_entries_or_an_error(data, service):
    try:
        parsed = parse(data, service, "conf")
    except FormatError:
        return
    lines = data.count(b"\n") + 1
    assert all(1 <= each.line <= lines for each in (*parsed.entries, *parsed.problems))
