"""Entries that smtpd's parsers reject: each problem names the cause, and the answer does not change."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from table_consul.services import SERVICES
from table_consul.services.entries import Entries, EntriesBuilder
from tests.services.parsing import TABLE, entries, refusal


def problem_of(service, key, raw=b"", table=TABLE):
    (problem,) = entries(service, (key, raw), table=table).problems
    return problem.text


# ---- keys ----

PLAIN = {"alias": b"gilles", "userinfo": b"1:1:/", "relayhost": b"mx.example.org", "source": b"192.0.2.1"}


@pytest.mark.parametrize(
    ("service", "key", "cause"),
    [
        ("domain", ".example.org", "begins with a dot (write *.example.org"),
        ("domain", "@example.org", "is a mail address (write the part after the @)"),
        ("domain", "gilles@example.org", "is a mail address"),
        ("domain", "*@example.org", "is a mail address"),
        ("domain", "<gilles@example.org>", "angle brackets"),
        ("domain", "example.org.", "ends in a dot"),
        ("domain", "a..example.org", "two dots in a row"),
        ("domain", '"example.org"', "quotes"),
        ("domain", "example.org example.com", "white space"),
        ("domain", "example.org,example.com", "a comma"),
        ("domain", "{example.org}", "braces"),
        ("domain", "{ example.org, example.com }", "white space"),
        ("domain", "# our domains", "is a comment"),
        ("domain", "#example.org", "is a comment"),
        ("domain", "example.org #note", "white space"),
        ("domain", "^.*\\.example\\.org$", "is a regular expression (store it for the service regex)"),
        ("domain", "müller.example", "outside ASCII (write internationalised domains as xn--...)"),
        ("domain", "example.org\u200b", "a zero-width space"),
        ("domain", "\ufeffexample.org", "a byte order mark"),
        ("domain", "-example.org", "no address may contain"),
        ("mailaddr", "*@example.org", "where * is not a pattern (write @example.org, or @ for all)"),
        ("mailaddr", "*", "where * is not a pattern"),
        ("mailaddr", "@.example.org", "begins with a dot"),
        ("mailaddr", ".example.org", "begins with a dot"),
        ("mailaddr", "gilles@example.org.", "ends in a dot"),
        ("mailaddr", "gilles.", "ends in a dot"),
        ("mailaddr", '"gilles"@example.org', "quotes"),
        ("mailaddr", "gilles eric", "white space"),
        ("mailaddr", "gilles@example.org, eric@example.org", "white space"),
        ("mailaddr", "a@example.org,b@example.org", "a comma"),
        ("mailaddr", "{gilles@example.org}", "braces"),
        ("mailaddr", "<gilles@example.org>", "angle brackets"),
        ("mailaddr", "# people", "is a comment"),
        ("mailaddr", "a@b@example.org", "two @"),
        ("alias", "*", "where * is not a pattern (write @example.org, or @ for all)"),
        ("alias", "*@example.org", "where * is not a pattern"),
        ("alias", "@*.example.org", "alias keys are not patterns (write a key for each domain)"),
        ("alias", "gilles@*.example.org", "alias keys are not patterns"),
        ("alias", ".example.org", "begins with a dot"),
        ("alias", "@.example.org", "begins with a dot"),
        ("alias", "gilles@example.org.", "ends in a dot"),
        ("alias", "jörg", "outside ASCII"),
        ("alias", "gil\u200bles", "a zero-width space"),
        ("alias", "gilles\u00a0", "a non-breaking space"),
        ("alias", "<gilles@example.org>", "angle brackets"),
        ("alias", "mailto:gilles@example.org", "begins with mailto:"),
        ("alias", "root:", "ends in a colon, as in an aliases file"),
        ("alias", "gilles,eric", "a comma"),
        ("alias", '"gilles"', "quotes"),
        ("alias", "x" * 1024, "1024 bytes; smtpd never asks for more than 1023"),
        ("userinfo", " vera", "begins or ends with white space"),
        ("string", "x" * 1024, "1024 bytes"),
        ("regex", "^\\S+@example\\.org$", "\\S, \\W or \\B"),
        ("regex", "\\W", "write [^[:space:]] or [^[:alnum:]_]"),
        ("regex", "x\\B", "reverses the meaning"),
    ],
)
def test_key_that_smtpd_never_looks_up_is_served_and_reported(service, key, cause):
    raw = PLAIN.get(service, b"")
    found = entries(service, (key.encode(), raw))
    assert cause in " ".join(problem.text for problem in found.problems)
    assert (found.refused, found.errors) == (1, {})


@pytest.mark.parametrize(
    ("service", "keys"),
    [
        ("domain", "example.org *.example.org * mx*.example [192.0.2.1] [IPv6:2001:db8::1] <unknown> a_b.x localhost"),
        ("mailaddr", "gilles gilles@ @example.org gilles@*.example.org @ gilles+x@[192.0.2.1] {a}@b a/b@x o'brien@x.y"),
        ("alias", "root gilles@example.org @example.org @ a+b a+b@x a/b x#y@z {a} a*b @[192.0.2.1] o'brien _x-"),
        ("regex", "\\\\S \\s [[:space:]] \\w \\b"),
        ("string", "* a|b <x> ü \u200b"),
        ("credentials", "vera@example.org jörg"),
    ],
)
def test_key_that_smtpd_looks_up_has_no_problem(service, keys):
    hashed = b"$6$saltsalt$TVLlQcbpFVof5W3Yz4DTP6gRstiNuHwwTt6GLc1E5n0U0aDehy0S5knV8wiOQSpT0Y77vwPZN.Pq.H91p5hVO1"
    raw = hashed if service == "credentials" else PLAIN.get(service, b"")
    assert entries(service, *((key.encode(), raw) for key in keys.split())).problems == []


def test_key_in_a_shared_folder_is_a_problem_only_if_no_service_looks_it_up():
    shared = replace(TABLE, paths=dict.fromkeys(("domain", "mailaddr"), "entries"))
    assert entries("domain", (b"gilles@example.org", b""), table=shared).problems == []
    assert "two dots" in problem_of("domain", b"a..b", table=shared)
    alone = replace(shared, services=("domain",))
    assert "is a mail address" in problem_of("domain", b"gilles@example.org", table=alone)


def test_warning_of_a_key_depends_on_its_stored_case():
    former = entries("regex", (b"\\S", b"x"))
    builder = EntriesBuilder(TABLE, SERVICES["regex"], former)
    builder.take([(b"\\s", b"x")])
    assert (len(former.problems), builder.finish().problems) == (1, [])
    builder = EntriesBuilder(TABLE, SERVICES["regex"], entries("regex", (b"\\s", b"x")))
    builder.take([(b"\\S", b"x")])
    assert len(builder.finish().problems) == 1


# ---- values ----


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"gilles eric", "element 1 of the value contains white space (is a comma missing?); smtpd rejects the whole"),
        (b"gilles, a@x.org c@example.org", "element 2 of the value contains white space (is a comma missing?); smtpd"),
        (b"a@b@c", "contains two @ (is a comma missing?); smtpd delivers to the local user before the @ instead"),
        (b"gilles; eric", "white space"),
        (b"gilles;eric", "a comma or semicolon"),
        (b"error: 550 no", "is not an error reply in smtpd's form (write error:550 text)"),
        (b":fail: no such user", "is not an error reply"),
        (b":blackhole:", "write /dev/null"),
        (b"<gilles@example.org>", "angle brackets (write the address alone)"),
        (b"Gilles <gilles@example.org>", "angle brackets"),
        (b"@example.org", "is a whole domain"),
        (b"gilles@", "has nothing after the @"),
        (b"mailto:gilles@example.org", "begins with mailto:"),
        ("\ufeffgilles".encode(), "byte order mark"),
        ("gilles,\u00a0eric".encode(), "a non-breaking space"),
        ("gil\u200bles".encode(), "a zero-width space"),
        ("gilles\uff0ceric".encode(), "a full-width comma"),
        ("\u201cgilles\u201d".encode(), "curly quotes"),
        (b"gilles&#64;example.org", "an HTML entity"),
        (b"&lt;gilles@example.org&gt;", "an HTML entity"),
        (b"gilles, 'eric'", "element 2 of the value contains quotes (remove them)"),
        (b"['gilles', 'eric']", "is a list in Python syntax (write a JSON array; with Ansible, use to_json)"),
        (b"[u'gilles']", "a list in Python syntax"),
        (b"- gilles\n- eric", "the value is a YAML list"),
        (b'["gilles", "eric"', "the value starts like JSON but is not valid JSON"),
        (b'["gilles", 7]', "the value is JSON, but is not read as an array of strings"),
        (b"root: gilles\npostmaster: root", "looks like a line of an aliases file"),
        (b"jo\xc3\xabl@example.org", "outside ASCII"),
        (b"gilles@example_org", "is neither a user nor an address (a domain is letters, digits, - and .)"),
        (b"%1@example.org", "begins with a placeholder"),
        (b"$1@example.org", "begins with a placeholder"),
        (b"x" * 256, "is neither a user (letters, digits and _.+-, at most 255)"),
    ],
)
def test_alias_problem_names_the_element_and_the_cause(raw, problem):
    text = problem_of("alias", b"root", raw)
    assert problem in text
    assert "gilles" not in text


@pytest.mark.parametrize(("raw", "why"), [(b"[\"o'brien\", 'x']x\"", "JSON"), (b"['o'brien']", "in Python syntax")])
def test_list_in_another_format_with_an_open_quote_is_an_error_that_names_the_format(raw, why):
    assert why in refusal(raw)


@pytest.mark.parametrize("service", ["alias", "mailaddrmap"])
@pytest.mark.parametrize("raw", [b",", b" , ,,"])
def test_list_of_commas_is_served_and_reported(service, raw):
    assert dict(entries(service, (b"k", raw)).values) == {b"k": raw.strip()}
    assert "the value contains only commas" in problem_of(service, b"k", raw)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"gilles@example.org, *", "element 2 of the value has * as its user, where * is not a pattern"),
        (b"a@example.org b@example.org", "contains white space (is a comma missing?); no sender ever matches it"),
        (b'"a b"@example.org', "contains quotes"),
        (b"<a@example.org>", "angle brackets"),
        (b"*@example.org", "write @example.org, or @ for all"),
        (b"a@.example.org", "begins with a dot"),
    ],
)
def test_mailaddrmap_problem_names_the_element_and_the_cause(raw, problem):
    assert problem in problem_of("mailaddrmap", b"vera", raw)


# Results of text_to_relayhost of smtpd, compiled separately.
@pytest.mark.parametrize(
    "raw",
    [
        "mx.example.org",
        "mx:25",
        "mx: +25",
        "smtp://mx",
        "SMTP+TLS://label@mx:587",
        "smtps://l@[2001:db8::1]:465",
        "[192.0.2.1]",
        "lmtp://[IPv6:::1]:24",
        "smtp+notls://mx_1",
        "@mx",
        "smtp://@mx",
        "a" * 62 + ".b",
        "smtp://mx/",
    ],
)
def test_relayhost_that_smtpd_accepts_has_no_problem(raw):
    assert entries("relayhost", (b"example.org", raw.encode())).problems == []


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("tls://mx.example.org", "unknown scheme (use smtp, smtp+tls, smtp+notls, smtps or lmtp)"),
        ("tls+auth://label@mx", "unknown scheme"),
        ("smtp://mx:0", "the port of the value must be between 1 and 65535"),
        ("smtp://mx:65536", "between 1 and 65535"),
        ("smtp://mx:smtp", "between 1 and 65535"),
        ("smtp://mx:", "between 1 and 65535"),
        ("smtp:[mx.example.org]:25", "write Postfix's TRANSPORT:[HOST]:PORT as smtp://HOST:PORT"),
        ("mailman:", "Postfix's"),
        ("discard:", "Postfix's"),
        ("lmtp:unix:/run/dovecot/lmtp", "Postfix's"),
        ("label@mx.example.org", "a label without TLS, which smtpd rejects (use smtp+tls:// or smtps://)"),
        ("smtp+notls://label@mx", "a label without TLS"),
        ("lmtp://mx", "lmtp has no default (write lmtp://HOST:24)"),
        ("[mx.example.org]:25", "only addresses may be in brackets"),
        ("[192.0.2.1", "the host of the value is missing"),
        ("smtp://", "the host of the value is not a host name"),
        ("mx.example.org.", "ends in a dot"),
        ("mx..example.org", "two dots"),
        ("a" * 65, "more than 64 bytes"),
        ("mx1 mx2", "smtpd ignores the text after the host of the value: contains white space"),
        ("mx1,mx2", "smtpd ignores the text after"),
        ("\u200bmx", "a zero-width space"),
        ("\ufeffmx", "byte order mark"),
        ("smtp://" + "a" * 1020, "more than 1023 bytes"),
    ],
)
def test_relayhost_that_smtpd_rejects_is_a_problem(raw, problem):
    assert problem in problem_of("relayhost", b"example.org", raw.encode())


def test_relayhost_without_a_value_is_checked_by_its_key():
    assert "the key has an unknown scheme" in problem_of("relayhost", b"ssl://mx")
    assert entries("relayhost", (b"smtp://mx", None)).problems == []


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"mail example.org", "the value is the name that smtpd uses for itself, and contains white space"),
        (b"mail.example.org.", "ends in a dot"),
        (b"x" * 65, "more than 64 bytes"),
        (b"[mail.example.org]", "only addresses may be in brackets"),
    ],
)
def test_addrname_that_is_not_a_host_name_is_a_problem(raw, problem):
    assert problem in problem_of("addrname", b"192.0.2.1", raw)


@pytest.mark.parametrize(
    ("service", "raw", "problem"),
    [
        ("credentials", b"$apr1$salt$hash", "Apache's htpasswd, which crypt(3) does not read"),
        ("credentials", b"vera:$apr1$salt$hash", "Apache's htpasswd"),
        ("auth", b"$apr1$salt$hash", "Apache's htpasswd"),
        ("credentials", b"hunter2hunter", "not a hash that smtpd's crypt(3) reads"),
        ("credentials", b"correcthorses", "not a hash that smtpd's crypt(3) reads"),
        ("credentials", b"$pbkdf2$29000$x", "not a hash that smtpd's crypt(3) reads"),
        ("credentials", "\ufeff$6$salt$hash".encode(), "byte order mark"),
        ("auth", b"hunter2hunter", "13 letters that only look like a DES hash"),
        ("userinfo", b"1000:1000:/" + b"x" * 2036, "more than 2047 bytes"),
    ],
)
def test_credential_or_user_that_smtpd_cannot_use_is_a_problem(service, raw, problem):
    assert problem in problem_of(service, b"vera", raw)


@pytest.mark.parametrize(
    "raw", [b"abNANd1rDfiNc", b"_J9..rasmBYk8r9AiWNc", b"$1$salt$x", b"$gy$j9T$salt$hash", b"$md5,rounds=1$x"]
)
def test_hash_of_any_crypt_has_no_problem(raw):
    assert entries("credentials", (b"vera", raw)).problems == []


# ---- tags ----


def test_mail_address_matches_without_its_tag():
    found = entries("mailaddr", (b"gilles@x", b""), table=replace(TABLE, subaddress_delimiter="_"))
    assert [found.contains(key) for key in (b"gilles_tag@x", b"gilles+tag@x")] == [True, False]
    assert entries("mailaddr", (b"gilles@x", b"")).contains(b"gilles+tag@x")


# ---- counts ----


def test_refused_entries_are_those_that_smtpd_cannot_use():
    found = entries("alias", (b"root", b"|sh"), (b"*", b"two words"), (b"ok", b"gilles"), (b"Ok", b"eric"))
    assert (found.refused, len({problem.key for problem in found.problems})) == (3, 3)
    assert entries("userinfo", (b"vera", b'{"password": "x"}')).refused == 0
    assert entries("regex", (b"(", b""), (b"a", b"")).refused == 1


def test_host_name_among_networks_is_reported_and_not_counted():
    found = entries("netaddr", (b"mail.example.org", b""), (b"192.0.2.0/24", b""))
    assert (len(found.problems), found.refused) == (1, 0)


def test_warnings_change_no_answer():
    stored = {b"*": b"two words", b"root": b"gilles"}
    found = Entries(TABLE, SERVICES["alias"], stored.items())
    assert {key: found.lookup(key) for key in stored} == stored
