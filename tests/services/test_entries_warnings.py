"""Values that are served although smtpd would reject or misread them, each with a warning."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.services.parsing import COMMANDS, TABLE, entries


@pytest.mark.parametrize(
    ("service", "key", "raw", "warning"),
    [
        ("alias", b" root", b"gilles", "begins or ends with white space"),
        ("domain", b"example.org\n", None, "begins or ends with white space"),
        ("alias", b"root", b"gilles, eric schmidt", "element 2 of the value contains white space (is a comma missing"),
        ("alias", b"root", "jörg@exämple.org".encode(), "xn--...); smtpd rejects the whole alias"),
        ("alias", b"root", "joerg@exämple.org".encode(), "delivers to the local user before the @"),
        (
            "alias",
            b"root",
            b"error:nonsense",
            "element 1 of the value is not an error reply in smtpd's form (write error:550 text)",
        ),
        (
            "mailaddrmap",
            b"vera",
            b"a@example.org, " + b"x" * 300 + b"@example.org",
            "element 2 of the value has more than 255 bytes before",
        ),
        ("credentials", b"vera", b"hunter2", "not a hash that smtpd's crypt"),
        ("credentials", b"vera", b"{SSHA512}hunter2", "not a hash that smtpd's crypt"),
        ("credentials", b"vera", b"vera:{plain}hunter2", "not a hash that smtpd's crypt"),
        (
            "credentials",
            b"vera",
            b"{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzo",
            "not a hash that",
        ),
        ("auth", b"vera", b"{SSHA512}hunter2", "not a hash that can be verified"),
        ("alias", b"root", None, "missing value: alias requires one"),
        ("mailaddrmap", b"vera", b" \n", "missing value: mailaddrmap requires one"),
        ("auth", b"vera", None, "missing value: auth requires one"),
        ("source", b"mail.example.org", None, "not an address to send mail from"),
        ("source", b"192.0.2.256", None, "not an address to send mail from"),
        ("source", b"192.0.2.0/24", None, "not an address to send mail from"),
        ("auth", b"vera", b"$2b$31$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u", "to verify, more than the"),
    ],
)
def test_value_that_smtpd_would_reject_is_served_with_a_warning(service, key, raw, warning):
    found = entries(service, (key, raw), (b"other", None if service == "domain" else b"other@example.org"))
    (problem,) = [problem for problem in found.problems if "/other" not in str(problem)]
    assert warning in str(problem)
    assert str(problem).startswith("aliases/")
    assert "hunter2" not in str(problem)
    assert (key in found.values, found.errors) == (True, {})


@pytest.mark.parametrize(
    ("service", "raw"),
    [
        ("alias", b"gilles, eric@example.org, error:550 no such user, a.b+c@x-y.org, :error:450 4.2.1 later"),
        ("alias", b"bang!path%x@example.org"),
        ("mailaddrmap", b"gilles@example.org, @example.com, @, eric, gilles@*.example.org, vera+x@[192.0.2.1]"),
        ("credentials", b"vera:clear {text}"),
        ("credentials", b"vera:{something} else"),
        ("credentials", b"!$6$salt$hash"),
        ("credentials", b"$sha1$1$salt$rtI8apYHXaqy9MbxM3TD51VTdkna"),
        ("credentials", b"vera:$2b$10$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u"),
        ("auth", b"*"),
        ("auth", b"!$6$salt$hash"),
        ("string", b"anything"),
    ],
)
def test_valid_value_has_no_problem(service, raw):
    assert entries(service, (b"vera", raw)).problems == []


@pytest.mark.parametrize("address", [b"192.0.2.25", b"2001:db8::25", b"[2001:db8::25]", b"fe80::1%eth0"])
def test_source_address_has_no_problem(address):
    assert entries("source", (address, None)).problems == []
    assert entries("source", (b"first", address), table=replace(TABLE, fetch="values")).problems == []


def test_permitted_commands_have_no_problem():
    values = b'"|command, with comma", /var/mail/x, :include:/etc/list, |plain'
    assert entries("alias", (b"root", values), table=COMMANDS).problems == []


def test_argon2_credential_has_no_problem_with_auth():
    table = replace(TABLE, services=("auth", "credentials"))
    argon2 = b"$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$qVQ8m7ozNVzoeV1W0lpcI9V2SPUOK+NCcQHYOu+C/us"
    assert entries("credentials", (b"vera", argon2), table=table).problems == []


def test_upper_case_key_in_direct_mode_is_a_problem():
    direct = replace(TABLE, mode="direct")
    (problem,) = entries("relayhost", (b"Example.org", b"smtp://mx"), table=direct).problems
    assert "aliases/relayhost/Example.org: smtpd asks in lower case" in str(problem)
    assert entries("domain", (b"Example.org", None), table=direct).problems == []
