"""Each service, looked up by a real smtpd through its line of smtpd.conf."""

from __future__ import annotations

import re

import pytest

from tests.e2e import table_files, until
from tests.rig.root import certificate
from tests.rig.sink import Sink

HEAD = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" mbox
"""
TLS = """
pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"
pki "mail.example.org" key "/etc/ssl/mail.example.org.key"
table consul consul:/etc/mail/table-consul.toml
action "local" mbox
"""


def asked(server, service):
    """The lookups of smtpd for this service: ``(key, answer)`` in order; fetches have no key."""
    lines = re.findall(r"lookup: (?:match|lookup|check|fetch) (.*) in table proc:consul -> (.*)", server.log)
    found = [(re.fullmatch(r'(?:"(.*)" )?as (\w+)', what), answer) for what, answer in lines]
    return [(match[1], answer) for match, answer in found if match and match[2] == service]


@pytest.mark.parametrize(
    ("service", "option", "key", "matching", "other"),
    [
        ("netaddr", "from src <consul> for local", "127.0.0.7", {"source": "127.0.0.7"}, {"source": "127.0.0.8"}),
        ("domain", "from any helo <consul> for local", "mx.good.org", {"helo": "MX.good.org"}, {"helo": "mx.bad.org"}),
        ("mailaddr", "from any mail-from <consul> for local", "a@good.org", {"sender": "a@good.org"}, {}),
        ("regex", "from any mail-from regex <consul> for local", "a@good.org", {"sender": "a@good.org"}, {}),
        ("regex", "from any helo regex <consul> for local", "mx.good.org", {"helo": "mx.good.org"}, {}),
    ],
)
def test_rule_matches_entries_in_consul(consul, smtpd, service, option, key, matching, other):
    consul.kv_put(f"consul/{service}/{key}", "")
    server = smtpd(HEAD + f'match {option} action "local"', table_files(consul))
    assert server.send("eric@localhost", **matching)["eric@localhost"][0] == 250
    assert server.send("eric@localhost", **other)["eric@localhost"][0] == 550
    assert [answer for _, answer in asked(server, service)] == ["true", "false"]


def test_recipients_are_looked_up_as_mail_addresses(consul, smtpd):
    consul.kv_put("consul/mailaddr/eric@localhost", "")
    server = smtpd(HEAD + 'match from any rcpt-to <consul> for local action "local"', table_files(consul))
    replies = server.send("eric@localhost", "gilles@localhost")
    assert [code for code, _ in replies.values()] == [250, 550]
    assert asked(server, "mailaddr") == [("eric@localhost", "true"), ("gilles@localhost", "false")]


def test_listener_without_a_tag_has_none_of_the_tags_in_direct_mode(consul, smtpd):
    consul.kv_put("consul/string/in", "")
    rules = 'match tag <consul> from any for local reject\nmatch from any for local action "local"'
    server = smtpd(HEAD + rules, table_files(consul, mode="direct"))
    assert server.send("eric@localhost")["eric@localhost"][0] == 250
    assert asked(server, "string") == [("", "false")]


@pytest.fixture
def submission(consul, smtpd, root):
    """Starts an smtpd where gilles may log in, with these options of its listener and its rule."""

    def start(listener="", rule="match auth from any for local"):
        consul.kv_put("consul/credentials/gilles", root.encrypt("secret"))
        listen = f'listen on 127.0.0.1 port $smtp_port tls-require pki "mail.example.org" auth <consul> {listener}\n'
        return smtpd(TLS + listen + f'{rule} action "local"\n', table_files(consul) | certificate(root))

    return start


def as_gilles(server, sender):
    """The reply code to gilles who sends from this address."""
    return server.send("eric@localhost", sender=sender, auth=("gilles", "secret"), starttls=True)["eric@localhost"][0]


def test_senders_restricts_the_addresses_of_a_login(consul, submission):
    consul.kv_put("consul/mailaddrmap/gilles", "gilles@example.org\nsupport@example.org\n")
    server = submission(listener="senders <consul>")
    assert as_gilles(server, "support@example.org") == 250
    assert as_gilles(server, "eric@example.org") >= 500
    assert [key for key, _ in asked(server, "mailaddrmap")] == ["gilles", "gilles"]


def test_rule_for_logins_looks_up_strings(consul, submission):
    consul.kv_put("consul/string/gilles", "")
    server = submission(rule="match auth <consul> from any for local")
    assert as_gilles(server, "gilles@example.org") == 250
    consul.kv_delete("consul/string/gilles")
    until(lambda: as_gilles(server, "gilles@example.org"), 550)
    assert {("gilles", "true"), ("gilles", "false")} == set(asked(server, "string"))


def test_users_of_a_userbase_need_no_account(consul, smtpd):
    consul.kv_put("consul/userinfo/vera", "1000:1000:/home/gilles")
    conf = HEAD.replace('"local" mbox', '"local" maildir userbase <consul>')
    server = smtpd(conf + 'match from any for local action "local"', table_files(consul))
    replies = server.send("vera@localhost", "walter@localhost", subject="hi")
    assert [code for code, _ in replies.values()] == [250, 550]
    server.wait_for_mail("gilles", "hi")
    assert asked(server, "userinfo")[0] == ("vera", '"1000:1000:/home/gilles"')


@pytest.mark.parametrize("home", ["", "nowhere"])
def test_user_without_an_absolute_home_gets_mail_as_from_a_file(consul, smtpd, root, home):
    uid, gid = root.accounts["gilles"]
    consul.kv_put("consul/userinfo/vera", f"{uid}:{gid}:{home}")
    files = {**table_files(consul), "/etc/mail/users": f"vera {uid}:{gid}:{home}\n"}
    conf = "table file file:/etc/mail/users\n" + HEAD.replace(
        '"local" mbox', '"local" maildir "/home/gilles/Maildir" userbase <consul>'
    )
    conf += (
        'action "file" maildir "/home/gilles/Maildir" userbase <file>\nmatch from any for domain "file" action "file"\n'
    )
    server = smtpd(conf + 'match from any for local action "local"', files)
    for host in ("localhost", "file"):
        assert server.send(f"vera@{host}", subject=host)[f"vera@{host}"][0] == 250
        server.wait_for_mail("gilles", host)


def test_mail_for_a_user_with_the_ids_of_root_is_deferred(consul, smtpd):
    consul.kv_put("consul/userinfo/vera", "0:0:/root")
    conf = HEAD.replace('"local" mbox', '"local" mbox userbase <consul>')
    server = smtpd(conf + 'match from any for local action "local"', table_files(consul))
    assert 400 <= server.send("vera@localhost")["vera@localhost"][0] < 500


def relayed(server, sink, count):
    """Send ``count`` mails to the relay, each after the arrival of the last."""
    for number in range(1, count + 1):
        assert server.send("bob@example.com", subject=f"mail {number}")["bob@example.com"][0] == 250
        sink.wait_for(number, lambda: f"not relayed:\n{server.log}")
    return sink.received


def test_source_addresses_of_a_relay_rotate(consul, smtpd):
    with Sink() as sink:
        for address in ("127.0.0.5", "127.0.0.6"):
            consul.kv_put(f"consul/source/{address}", "")
        relay = f'action "out" relay host "smtp+notls://{sink.address}:{sink.port}" src <consul>\n'
        # Each mail needs its own connection, because smtpd reuses an open one.
        one_each = "mta limit session-mail-max 1\n"
        server = smtpd(HEAD + one_each + relay + 'match from any for any action "out"', table_files(consul))
        mails = relayed(server, sink, 3)
        assert [mail.peer for mail in mails] == ["127.0.0.5", "127.0.0.6", "127.0.0.5"]


def test_helo_of_a_relay_follows_its_source_address(consul, smtpd):
    with Sink() as sink:
        consul.kv_put("consul/addrname/127.0.0.5", "mx5.example.org")
        target = f'relay host "smtp+notls://{sink.address}:{sink.port}" src 127.0.0.5 helo-src <consul>'
        server = smtpd(HEAD + f'action "out" {target}\nmatch from any for any action "out"', table_files(consul))
        assert [(mail.peer, mail.helo) for mail in relayed(server, sink, 1)] == [("127.0.0.5", "mx5.example.org")]
        assert ("127.0.0.5", '"mx5.example.org"') in asked(server, "addrname")


def test_relay_by_domain_uses_the_host_in_consul(consul, smtpd):
    with Sink() as sink:
        consul.kv_put("consul/relayhost/example.com", f"smtp+notls://{sink.address}:{sink.port}")
        rules = 'action "out" relay domain <consul>\nmatch from any for any action "out"'
        server = smtpd(HEAD + rules, table_files(consul))
        assert [mail.recipients for mail in relayed(server, sink, 1)] == [["bob@example.com"]]
        assert asked(server, "relayhost") == [("example.com", f'"smtp+notls://{sink.address}:{sink.port}"')]
