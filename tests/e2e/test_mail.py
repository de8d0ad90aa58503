"""Mail through a real OpenSMTPD whose tables are stored in a real Consul."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import table_files, until

LOCAL = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""
VIRTUAL = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "virtual" maildir virtual <consul>
match from any for domain <consul> action "virtual"
"""


@pytest.fixture(params=["mirror", "direct"])
def mode(request):
    return request.param


def code(server, recipient, **options):
    """The last reply code for a mail to one recipient."""
    return server.send(recipient, **options)[recipient][0]


def test_next_mail_follows_the_key_without_a_restart(consul, smtpd, mode):
    server = smtpd(LOCAL, table_files(consul, mode=mode))
    before = server.pids
    assert code(server, "root@localhost", subject="before") == 250
    server.wait_for_mail("root", "before")
    # A made-up recipient shows when the edit has arrived, before the next mail is sent.
    consul.kv_txn({"consul/alias/root": "gilles", "consul/alias/arrived": "eric"})
    until(lambda: code(server, "arrived@localhost"), 250)
    assert code(server, "root@localhost", subject="after") == 250
    server.wait_for_mail("gilles", "after")
    assert server.subjects("root") == ["before"]
    assert server.pids == before


def test_alias_may_have_several_recipients_one_a_line(consul, smtpd):
    consul.kv_put("consul/alias/postmaster", "# the humans\ngilles\neric\n")
    server = smtpd(LOCAL, table_files(consul))
    assert server.send("postmaster@localhost", subject="both")["postmaster@localhost"][0] == 250
    server.wait_for_mail("gilles", "both")
    server.wait_for_mail("eric", "both")


def test_alias_that_discards_mail_needs_no_permission(consul, smtpd):
    consul.kv_put("consul/alias/nobody", "/dev/null, gilles")
    server = smtpd(LOCAL, table_files(consul))
    assert server.send("nobody@localhost", subject="gone")["nobody@localhost"][0] == 250
    server.wait_for_mail("gilles", "gone")
    until(server.queue, [])


def test_deleted_alias_is_an_unknown_recipient(consul, smtpd, mode):
    consul.kv_put("consul/alias/hostmaster", "gilles")
    server = smtpd(LOCAL, table_files(consul, mode=mode))
    assert code(server, "hostmaster@localhost") == 250
    consul.kv_delete("consul/alias/hostmaster")
    until(lambda: code(server, "hostmaster@localhost"), 550)


def test_virtual_domain_created_in_consul_accepts_mail(consul, smtpd, mode):
    server = smtpd(VIRTUAL, table_files(consul, mode=mode))
    assert code(server, "info@example.org") == 550
    consul.kv_put("consul/domain/example.org", "")
    consul.kv_put("consul/alias/info@example.org", "gilles")
    consul.kv_put("consul/alias/@example.org", "eric")
    consul.kv_put("consul/domain/example.net", "")
    until(lambda: code(server, "any@example.net"), 524)
    replies = server.send("info@example.org", "any@example.org", "any@example.net", "info@example.com", subject="hi")
    assert {recipient: code for recipient, (code, _) in replies.items()} == {
        "info@example.org": 250,
        "any@example.org": 250,
        "any@example.net": 524,
        "info@example.com": 550,
    }
    server.wait_for_mail("gilles", "hi")
    server.wait_for_mail("eric", "hi")


@pytest.mark.parametrize("value", ["|/bin/sh -c 'touch /tmp/owned'", "/tmp/owned", ":include:/etc/passwd"])
def test_command_in_an_alias_defers_the_mail_and_does_not_run(consul, smtpd, value):
    consul.kv_put("consul/alias/root", f'"{value}"' if "'" not in value else value)
    server = smtpd(LOCAL, table_files(consul))
    assert 400 <= server.send("root@localhost")["root@localhost"][0] < 500
    assert not server.exists("/tmp/owned")
    assert server.alive


def test_update_is_answered_and_keeps_all_processes(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(LOCAL, table_files(consul))
    before = server.pids
    assert "command succeeded" in server.smtpctl("update", "table", "consul")
    assert server.send("root@localhost", subject="updated")["root@localhost"][0] == 250
    server.wait_for_mail("gilles", "updated")
    assert server.pids == before


def test_backend_ends_with_smtpd(consul, smtpd):
    server = smtpd(LOCAL, table_files(consul))
    (backend,) = server.backends
    server.stop()
    assert not Path(f"/proc/{backend}").exists()
