"""Most of a folder is deleted in Consul: no mail bounces until an update or the end of its time ends the hold."""

from __future__ import annotations

import contextlib

import pytest

from tests.conftest import _or_skip
from tests.e2e import table_files, until
from tests.e2e.programs import Programs
from tests.rig.opensmtpd import LAUNCHER
from tests.rig.root import File, Root

LOCAL = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""
ALIASES = {f"consul/alias/user{number}": "gilles" for number in range(30)}
RECIPIENTS = [f"user{number}@localhost" for number in range(30)]
CTL = {"/usr/sbin/table-consulctl": File(LAUNCHER.replace("table_consul.cli", "table_consul.ctl.main"), 0o755)}


@pytest.fixture(scope="module", params=("7.9", "6.8"))
def root(request):
    """An OpenSMTPD that speaks lines, and one that speaks imsg."""
    with _or_skip():
        return Root(request.param)


@pytest.fixture
def smtpd(root):
    """Starts an smtpd of ``root`` with the arguments of ``Programs``, and ends it after the test."""
    with contextlib.ExitStack() as running, _or_skip():
        yield lambda *arguments, **options: running.enter_context(Programs(root, *arguments, **options))


def codes(server, *recipients, subject="hi"):
    """The different codes of the replies to these recipients."""
    return {code for code, _ in server.send(*recipients, subject=subject).values()}


def filled(consul, smtpd, defaults="", files=None):
    """An smtpd that has accepted mail for every alias."""
    consul.kv_txn(ALIASES)
    server = smtpd(LOCAL, {**table_files(consul, defaults), **(files or {})})
    assert codes(server, *RECIPIENTS, "nobody-of-this-name@localhost") == {250, 550}
    return server


def delete(consul, server):
    """Delete the folder, and return once the table has noticed."""
    consul.kv_delete("consul/alias/", recurse=True)
    consul.kv_put("consul/alias/arrived", "eric")
    until(lambda: codes(server, "arrived@localhost"), {250})


@pytest.mark.parametrize("command", ["smtpctl update table consul", "table-consulctl accept consul"])
def test_deleted_folder_bounces_no_mail_until_the_deletion_is_accepted(consul, smtpd, command):
    server = filled(consul, smtpd, files=CTL)
    before = server.pids
    delete(consul, server)
    assert codes(server, *RECIPIENTS, subject="after it") == {250}
    assert codes(server, "nobody-of-this-name@localhost") == {550}
    server.wait_for_mail("gilles", "after it")
    server.run(*command.split())
    until(lambda: codes(server, *RECIPIENTS), {550})
    assert codes(server, "arrived@localhost") == {250}
    assert server.pids == before


def test_restored_folder_answers_as_before_and_can_be_deleted_again(consul, smtpd):
    server = filled(consul, smtpd)
    delete(consul, server)
    consul.kv_txn(ALIASES | {"consul/alias/back": "gilles"})
    until(lambda: codes(server, "back@localhost"), {250})
    delete(consul, server)
    assert codes(server, *RECIPIENTS) == {250}


def test_hold_ends_after_its_time(consul, smtpd):
    server = filled(consul, smtpd, "hold_deletions = 2")
    delete(consul, server)
    until(lambda: codes(server, *RECIPIENTS), {550})


def test_hold_of_0_seconds_bounces_immediately(consul, smtpd):
    server = filled(consul, smtpd, "hold_deletions = 0")
    delete(consul, server)
    assert codes(server, *RECIPIENTS) == {550}
