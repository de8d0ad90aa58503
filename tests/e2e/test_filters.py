"""Effect of a table error on smtpd: rules defer the mail, built-in filters treat it as no match."""

from __future__ import annotations

import smtplib

import pytest

from tests.rig.opensmtpd import CONFIG
from tests.rig.root import File

LISTEN = """
table hosts consul:/etc/mail/table-consul.toml
{filter}
listen on 127.0.0.1 port $smtp_port {use}
action "local" mbox
{rule}
match from any for local action "local"
"""
NOBODY_THERE = '[consul]\naddress = "http://127.0.0.1:1"\n'


@pytest.fixture
def cut_off(smtpd):
    """An smtpd whose table has never read Consul."""

    def start(*, filter_="", rule=""):
        conf = LISTEN.format(
            filter=f'filter "f" phase connect match {filter_} disconnect "550 not you"' if filter_ else "",
            use='filter "f"' if filter_ else "",
            rule=rule,
        )
        return smtpd(conf, {CONFIG: File(NOBODY_THERE, 0o640, "root", "opensmtpd")})

    return start


def greeted(server):
    try:
        return server.send("gilles@localhost")["gilles@localhost"][0]
    except smtplib.SMTPConnectError as refused:
        return refused.smtp_code


def test_filter_that_rejects_hosts_accepts_everyone_on_a_table_error(cut_off):
    assert greeted(cut_off(filter_="src <hosts>")) == 250


def test_filter_that_accepts_only_hosts_rejects_everyone_on_a_table_error(cut_off):
    assert greeted(cut_off(filter_="!src <hosts>")) == 550


def test_rule_defers_mail_on_a_table_error(cut_off):
    assert 400 <= greeted(cut_off(rule="match from src <hosts> for any reject")) < 500
