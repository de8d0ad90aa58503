"""Reading inline tables of smtpd.conf, virtual and transport maps of Postfix, and special lines of aliases(5)."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.ctl.formats import FormatError, read_aliases
from table_consul.services import SERVICES
from tests.ctl.importing import entries, importer
from tests.ctl.parsed import ALIAS, CREDENTIALS, DOMAIN, STRING, pairs, problems, read

RELAYHOST, NETADDR, MAILADDR = SERVICES["relayhost"], SERVICES["netaddr"], SERVICES["mailaddr"]

# aliases(5).


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"gilles"', b"gilles"),
        (b'gilles, "eric@example.org" ,vera', b"gilles, eric@example.org ,vera"),
        (b'"/var/mail/a, b"', rb"/var/mail/a\, b"),
        (b'":include:/etc/mail/list"', b":include:/etc/mail/list"),
        (b'"error:550 no, sorry"', rb"error:550 no\, sorry"),
        (b'"o\'brien@example.org"', rb"o\'brien@example.org"),
        (b'"john.doe"@example.org', b"john.doe@example.org"),
        (b'"john doe"@example.org, "a b"', b'"john doe"@example.org, "a b"'),
        (rb'"|/bin/a \"x, y\" z", "eric"', rb'"|/bin/a \"x, y\" z", eric'),
        (b'"|/bin/a,", "|/bin/b"', b'"|/bin/a,", "|/bin/b"'),
        (b'|"/bin/a, b", "eric"', b'"|/bin/a, b", eric'),
        (b'""', b'""'),
    ],
)
def test_elements_in_quotes_are_written_as_smtpd_reads_them(text, value):
    assert pairs(read_aliases(b"x: " + text + b"\n")) == [(b"x", value)]


@pytest.mark.parametrize(
    "line",
    [
        b"root: gilles # the boss",
        b"root:gilles\t#",
        b'root gilles # don\'t, "quote" \\',
        b'root: "gilles" # "',
        b"root: gilles,\n  # between\n  # and, more",
    ],
)
def test_comment_after_an_alias_is_dropped(line):
    assert pairs(read(line + b"\neric: vera\n", ALIAS, "auto")) == [(b"root", b"gilles"), (b"eric", b"vera")]


# virtual(5).

VIRTUAL = b"""\
# Postfix
example.org     anything
@example.org    gilles
info@example.org eric, vera@example.net
john.doe        gilles
"""


def test_domains_of_a_virtual_map_are_noted_and_left_out():
    parsed = read(VIRTUAL, ALIAS, "auto")
    assert pairs(parsed) == [
        (b"@example.org", b"gilles"),
        (b"info@example.org", b"eric, vera@example.net"),
        (b"john.doe", b"gilles"),
    ]
    ((line, text, key),) = parsed.notes
    assert (line, key, "import it for the service domain" in text) == (2, b"example.org", True)


def test_virtual_map_is_imported_with_notes(consul):
    done = importer(consul, "virtuals", "alias", "-", stdin=VIRTUAL)
    assert (done.status, len(entries(consul, "virtuals/alias/"))) == (0, 3), done.said
    assert done.said.startswith("note: standard input:2: example.org: declares a domain")


@pytest.mark.parametrize("line", [b"/^info@/ gilles", b"!/x$/i gilles", b"if /^example/", b"if !/(a|b)/"])
def test_expressions_of_postfix_are_a_problem(line):
    found = problems(read(b"root gilles\n" + line + b"\n", ALIAS, "auto"))
    assert "expression of a Postfix regexp: or pcre: map" in found[2]


@pytest.mark.parametrize("line", [b"//a: gilles", b"/a/b: gilles", b"if: /dev/null", b"if: eric"])
def test_slashes_alone_are_not_an_expression(line):
    assert len(pairs(read(line + b"\n", ALIAS, "auto"))) == 1


# transport(5).


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (b"smtp:[mx.example.org]", b"smtp://mx.example.org"),
        (b"relay:[mx.example.org]:587", b"smtp://mx.example.org:587"),
        (b":[mx.example.org]:submission", b"smtp://mx.example.org:587"),
        (b"smtps:[192.0.2.1]:465", b"smtps://192.0.2.1:465"),
        (b"smtp:[IPv6:2001:db8::1]:25", b"smtp://[2001:db8::1]:25"),
        (b"lmtp:inet:localhost:24", b"lmtp://localhost:24"),
        (b"lmtp:[127.0.0.1]", b"lmtp://127.0.0.1:24"),
        (b"smtp+tls://mx.example.org", b"smtp+tls://mx.example.org"),
    ],
)
def test_transport_becomes_a_relay_host(value, url):
    parsed = read(b"# x\nexample.net smtp:[mx]\nExample.org\t" + value + b"\n", RELAYHOST, "auto")
    assert (parsed.format, pairs(parsed)[1]) == ("transport", (b"example.org", url))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"example.org smtp:mx.example.org", "write [HOST]"),
        (b"example.org smtp:", "by MX"),
        (b"example.org :", "by MX"),
        (b"example.org local:", "the Postfix transport local"),
        (b"example.org error:5.1.1 gone", "the Postfix transport error"),
        (b"example.org slow:[mx]", "the Postfix transport slow"),
        (b"example.org lmtp:unix:/run/lmtp", "must be [HOST]"),
        (b"example.org smtp:[a], [b]", "must be [HOST]"),
        (b".example.org smtp:[mx]", "hosts below a domain"),
        (b"eric@example.org smtp:[mx]", "matches an address"),
        (b"* smtp:[mx]", "matches all domains"),
        (b"example.org", "no transport"),
    ],
)
def test_transport_without_an_equivalent_is_a_problem_with_its_name(line, expected):
    parsed = read(b"example.net smtp:[mx]\n" + line + b"\n", RELAYHOST, "auto")
    assert expected in problems(parsed)[2]
    assert len(parsed.entries) == 1


@pytest.mark.parametrize(
    "text", [b"example.org smtp://mx.example.org\n", b"example.org mx:25\n", b"smtp://mx.example.org\n", b"mx\n"]
)
def test_relay_hosts_of_smtpd_are_not_a_transport_map(text):
    assert read(text, RELAYHOST, "auto").format == "table"


def test_imported_transports_are_valid_relay_hosts(consul):
    text = b"a.example smtp:[mx]:587\nb.example lmtp:[2001:db8::1]\nc.example smtps:[192.0.2.1]\n"
    done = importer(consul, "t", "relayhost", "-", stdin=text)
    assert (done.status, done.said) == (0, "")
    assert entries(consul, "t/relayhost/")["b.example"] == b"lmtp://[2001:db8::1]:24"


# smtpd.conf(5).

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
    parsed = read(CONF, ALIAS, "auto", below="virtuals")
    assert parsed.format == "conf"
    assert pairs(parsed) == [
        (b"@example.org", b"gilles"),
        (b"info@example.org", b"eric, vera"),
        (b'quoted "x"', b"it is"),
        (b"postmaster", b"root"),
    ]
    assert [entry.line for entry in parsed.entries] == [5, 5, 6, 7]


def test_macro_and_continued_line_are_read_as_smtpd_reads_them():
    found = pairs(read(CONF, DOMAIN, "auto", below="domains"))
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
    assert [key for key, _ in pairs(read(text, STRING, "conf"))] == keys


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
        read(text, STRING, "auto", below=name)


def test_empty_inline_table_has_no_entries():
    assert read(b"table aliases { }\ntable x { a }\n", STRING, "conf").entries == []


def test_only_inline_table_needs_no_name():
    assert pairs(read(b"table x { a, b }\n", STRING, "auto")) == [(b"a", b""), (b"b", b"")]
    assert pairs(read(b"table x{a}\n", STRING, "auto")) == [(b"a", b"")]


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
    assert expected in problems(read(text, service, "auto"))[line]


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
        read(b"table x { %b }\n" % inside, service, "auto")


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
        parsed = read(data, service, "conf")
    except FormatError:
        return
    lines = data.count(b"\n") + 1
    assert all(1 <= each.line <= lines for each in (*parsed.entries, *parsed.problems))
