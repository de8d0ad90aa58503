"""Reading virtual and transport maps of Postfix, and quotes and comments of aliases(5)."""

from __future__ import annotations

import pytest

from table_consul.ctl.formats import read_aliases
from table_consul.services import SERVICES
from tests.ctl.importing import entries, importer
from tests.ctl.parsed import ALIAS, pairs, problems, read

RELAYHOST = SERVICES["relayhost"]

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
