"""SMTP AUTH against credentials in Consul."""

from __future__ import annotations

import contextlib
import smtplib
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e import table_files
from tests.rig.root import certificate

CONF = """
pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"
pki "mail.example.org" key "/etc/ssl/mail.example.org.key"
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port tls-require pki "mail.example.org" auth <consul>
action "local" mbox
match auth from any for local action "local"
"""

ESCAPES = (
    "../../other/secret",
    "gilles/../../../other/secret",
    "..%2f..%2fother%2fsecret",
    "%2e%2e/%2e%2e/other/secret",
    "/../../other/secret",
    "//other/secret",
    "..",
    ".",
    "/",
    "gilles?raw",
    "x?recurse",
    "?keys",
    "gilles#",
    "gilles/",
)


@pytest.fixture(scope="module")
def encrypted(root):
    return root.encrypt("Correct Horse"), root.encrypt("Battery Staple")


@pytest.fixture
def server(consul, smtpd, root, encrypted):
    consul.kv_put("consul/credentials/gilles", encrypted[0])
    return smtpd(CONF, table_files(consul, mode="direct") | certificate(root))


def log_in(server, user, password, subject="hello"):
    """The reply code to AUTH if it is refused, otherwise to the message."""
    try:
        return server.send("eric@localhost", subject=subject, auth=(user, password), starttls=True)["eric@localhost"][0]
    except smtplib.SMTPAuthenticationError as refused:
        return refused.smtp_code


def test_right_password_may_send(server):
    assert log_in(server, "gilles", "Correct Horse", "authorised") == 250
    server.wait_for_mail("eric", "authorised")


@pytest.mark.parametrize(("user", "password"), [("gilles", "correct horse"), ("gilles", "wrong"), ("eric", "wrong")])
def test_wrong_password_and_an_unknown_user_are_refused_alike(server, user, password):
    assert log_in(server, user, password) == 535


def test_changed_hash_takes_effect_immediately(server, consul, encrypted):
    assert log_in(server, "gilles", "Battery Staple") == 535
    consul.kv_put("consul/credentials/gilles", encrypted[1])
    assert log_in(server, "gilles", "Battery Staple") == 250
    assert log_in(server, "gilles", "Correct Horse") == 535


def test_login_without_consul_fails_temporarily(server, consul):
    consul.stop()
    assert 400 <= log_in(server, "gilles", "Correct Horse") < 500
    assert server.alive


def test_no_user_name_reads_another_folder(server, consul, encrypted):
    consul.kv_put("other/secret", encrypted[0])
    consul.kv_put("consul/other/secret", encrypted[0])
    # Concurrent, because smtpd delays the reply to a refused login.
    with ThreadPoolExecutor(len(ESCAPES)) as pool:
        codes = pool.map(lambda user: log_in(server, user, "Correct Horse"), ESCAPES)
        assert {user: code for user, code in zip(ESCAPES, codes, strict=True) if code not in (421, 454, 535)} == {}
    assert log_in(server, "gilles", "Correct Horse") == 250
    assert server.alive


def test_login_with_a_line_break_cannot_end_smtpd(server):
    for line in ("config|ready", "table|0.1|0|consul|check|alias|00000000|x"):
        user = f"gilles\n{line}"
        with contextlib.suppress(smtplib.SMTPServerDisconnected):
            assert log_in(server, user, "Correct Horse") != 250
    assert log_in(server, "gilles", "Correct Horse") == 250
    assert server.alive
