"""SMTP AUTH verified by table-consul, and users from records or from the default entry."""

from __future__ import annotations

import json

import pytest

from tests.e2e import table_files, until
from tests.e2e.test_auth import CONF, log_in
from tests.rig.root import certificate
from tests.rig.waiting import wait_for

PASSWORD = "Correct Horse: Battery"
# The hash that crypt(3) makes of the password.
SHA512 = "$6$saltsalt$arkXp9BqDFu/7.si8l.cKgtNQgqQsC7N4N/QOwxkHmMSK5gAr6PhcdZCCZkgY9pVUmLq0CEiFKgJBXKL79RaV."
BCRYPT = "$2y$06$abcdefghijklmnopqrstuuvtyya11FF9cKELsrYpxcEfGEllVF45y"
# smtpd before 7.9 lower-cases passwords, and table-consul does not register auth with it.
VERIFYING = pytest.mark.parametrize("root", ["7.9"], indirect=True)
AUTH = 'services = ["auth"]'


@pytest.fixture
def server(consul, smtpd, root):
    """Starts an smtpd whose table verifies passwords."""

    def start(mode="mirror", services=AUTH):
        return smtpd(CONF, table_files(consul, services, mode=mode) | certificate(root))

    return start


@VERIFYING
@pytest.mark.parametrize("mode", ["mirror", "direct"])
@pytest.mark.parametrize("stored", [SHA512, "{BLF-CRYPT}" + BCRYPT, json.dumps({"password": SHA512, "uid": 1000})])
def test_only_the_right_password_may_send(consul, server, mode, stored):
    consul.kv_put("consul/auth/gilles", stored)
    smtpd = server(mode)
    assert log_in(smtpd, "gilles", PASSWORD, "authorised") == 250
    smtpd.wait_for_mail("eric", "authorised")
    refused = [("gilles", PASSWORD.lower()), ("gilles", "wrong"), ("walter", PASSWORD)]
    assert [log_in(smtpd, *credentials) for credentials in refused] == [535] * 3
    # Direct mode cannot prove the absence of a key that no URL can name, because a transaction can write it.
    assert log_in(smtpd, "../auth/gilles", PASSWORD) == (421 if mode == "direct" else 535)
    assert smtpd.alive


@VERIFYING
def test_login_is_not_case_sensitive(consul, server):
    consul.kv_put("consul/auth/gilles@example.org", SHA512)
    assert log_in(server(), "Gilles@Example.ORG", PASSWORD) == 250


@VERIFYING
def test_argon2_and_hashes_of_credentials_are_verified_too(consul, server):
    low_level = pytest.importorskip("argon2.low_level", reason="needs argon2-cffi: pip install 'table-consul[auth]'")
    argon2 = low_level.hash_secret(PASSWORD.encode(), b"saltsalt", 1, 1024, 1, 32, low_level.Type.ID).decode()
    consul.kv_put("consul/auth/gilles", "{ARGON2ID}" + argon2)
    consul.kv_put("consul/credentials/eric", SHA512)
    smtpd = server()
    assert [log_in(smtpd, user, PASSWORD) for user in ("gilles", "eric")] == [250, 250]
    assert log_in(smtpd, "gilles", "wrong") == 535


@VERIFYING
def test_unverifiable_hash_is_temporary_and_a_lock_is_permanent(consul, server):
    consul.kv_put("consul/auth/gilles", "{SSHA512}hunter2")
    consul.kv_put("consul/auth/eric", "!" + SHA512)
    smtpd = server()
    assert 400 <= log_in(smtpd, "gilles", PASSWORD) < 500
    assert log_in(smtpd, "eric", PASSWORD) == 535
    assert "hunter2" not in smtpd.log
    assert "consul/auth/gilles: not a hash that can be verified" in smtpd.log


@VERIFYING
def test_user_locked_in_consul_is_rejected_immediately(consul, server):
    consul.kv_put("consul/auth/gilles", SHA512)
    smtpd = server()
    assert log_in(smtpd, "gilles", PASSWORD) == 250
    consul.kv_put("consul/auth/gilles", "!" + SHA512)
    until(lambda: log_in(smtpd, "gilles", PASSWORD), 535, 30.0)


@VERIFYING
def test_login_without_consul_fails_temporarily(consul, server):
    consul.kv_put("consul/auth/gilles", SHA512)
    smtpd = server("direct")
    consul.stop()
    assert 400 <= log_in(smtpd, "gilles", PASSWORD) < 500
    assert smtpd.alive


@pytest.mark.parametrize("root", ["7.6"], indirect=True)
def test_older_smtpd_verifies_passwords_itself(consul, server):
    consul.kv_put("consul/credentials/gilles", "{CRYPT}" + SHA512)
    smtpd = server(services='services = ["auth", "credentials"]')
    assert [log_in(smtpd, "gilles", password) for password in (PASSWORD, PASSWORD.lower())] == [250, 535]


# ---- users ----

USERBASE = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" maildir userbase <consul>
match from any for local action "local"
"""


@pytest.mark.parametrize("mode", ["mirror", "direct"])
def test_default_entry_serves_all_virtual_users(consul, smtpd, mode):
    consul.kv_put("consul/userinfo/*", "1000:1000:/home/gilles/%u")
    server = smtpd(USERBASE, table_files(consul, mode=mode))
    replies = server.send("vera@localhost", "walter@localhost", "a/b@localhost")
    assert [code for code, _ in replies.values()] == [250, 250, 550]
    for user in list(replies)[:2]:
        home = f"/home/gilles/{user.partition('@')[0]}"
        wait_for(lambda home=home: server.exists(f"{home}/Maildir/new"), 10.0, lambda: server.log)


def test_record_serves_logins_and_deliveries(consul, smtpd, root):
    record = {"password": "{SHA512-CRYPT}" + SHA512, "uid": 1000, "gid": "1000", "home": "/home/gilles"}
    consul.kv_put("people/vera", json.dumps(record))
    conf = CONF.replace('action "local" mbox', 'action "local" maildir userbase <consul>')
    paths = '[defaults.paths]\ncredentials = "people"\nuserinfo = "people"'
    server = smtpd(conf, table_files(consul, paths) | certificate(root))
    code = server.send("vera@localhost", subject="hi", auth=("vera", PASSWORD), starttls=True)["vera@localhost"][0]
    assert code == 250
    server.wait_for_mail("gilles", "hi")
