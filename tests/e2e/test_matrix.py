"""Every supported OpenSMTPD through both lines of smtpd.conf, each with the Python of its own Debian release."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import smtplib
import threading
import time

import pytest

from tests.conftest import _or_skip
from tests.e2e import table_files, until
from tests.e2e.programs import ARTICLE, DUMMY, OF_2020, Programs
from tests.rig.opensmtpd import CONFIG, LIBEXEC
from tests.rig.root import SUITES, Root, certificate
from tests.rig.sink import Sink
from tests.rig.waiting import wait_for

LINES = {
    "consul": "table consul consul",
    "consul:": f"table consul consul:{CONFIG}",
    "procexec:": f'table consul "procexec:/{LIBEXEC}/table-consul {CONFIG}"',
}
LOCAL = """
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""
SUBMISSION = """
pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"
pki "mail.example.org" key "/etc/ssl/mail.example.org.key"
listen on 127.0.0.1 port $smtp_port tls-require pki "mail.example.org" auth <consul>
action "local" mbox
match auth from any for local action "local"
"""
OLD = ("6.8", "7.4")


@pytest.fixture(scope="module", params=SUITES)
def root(request):
    """Each OpenSMTPD of ``SUITES``, one after the other."""
    with _or_skip():
        return Root(request.param)


@pytest.fixture
def smtpd(root):
    """Starts an smtpd of ``root`` with the arguments of ``Programs``, and ends it after the test."""
    with contextlib.ExitStack() as running, _or_skip():
        yield lambda *arguments, **options: running.enter_context(Programs(root, *arguments, **options))


only_old = pytest.mark.parametrize("root", OLD, indirect=True)
through_both = pytest.mark.parametrize("line", LINES.values(), ids=LINES)


def processes(root, line):
    """The number of processes of a table with this line: the bridge remains only where smtpd speaks imsg."""
    return 2 if "procexec:" in line and root.release in OLD else 1


@pytest.fixture(scope="module")
def table(request):
    """Results by release and line, printed at the end."""
    cells = {}
    yield cells
    rows = [f"{'OpenSMTPD':24}{'Python':10}" + "".join(f"{f'table consul {name}':28}" for name in LINES)]
    for version, python in dict.fromkeys(cell[:2] for cell in cells):
        told = (cells.get((version, python, name), "not tried") for name in LINES)
        rows.append(f"{version:24}{python:10}" + "".join(f"{text:28}" for text in told))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print("\n\nMail to root, key put, mail to root, nothing restarted:", *rows, sep="\n")


@pytest.mark.parametrize("name", LINES)
def test_next_mail_follows_the_key_without_a_restart(consul, smtpd, root, name, table):
    cell = (root.version, root.python, name)
    table[cell] = "FAILED"
    server = smtpd(LINES[name] + LOCAL, table_files(consul), processes=processes(root, LINES[name]))
    assert server.send("root@localhost", subject="before")["root@localhost"][0] == 250
    server.wait_for_mail("root", "before")
    before = [*server.pids], server.backends  # table-procexec has either become its child or remains as the bridge
    # A made-up recipient shows when the edit has arrived, before the next mail is sent.
    consul.kv_txn({"consul/alias/root": "gilles", "consul/alias/arrived": "eric"})
    until(lambda: server.send("arrived@localhost")["arrived@localhost"][0], 250)
    assert server.send("root@localhost", subject="after")["root@localhost"][0] == 250
    server.wait_for_mail("gilles", "after")
    assert server.subjects("root") == ["before"]
    assert ([*server.pids], server.backends) == before
    table[cell] = f"ok, {len(server.backends)} process{'es' * (len(server.backends) > 1)}"


def test_line_without_a_file_uses_the_environment_of_the_consul_command(consul, smtpd, root):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(LINES["consul"] + LOCAL, environment={"CONSUL_HTTP_ADDR": consul.address})
    assert server.send("root@localhost", subject="hi")["root@localhost"][0] == 250
    server.wait_for_mail("gilles", "hi")


@only_old
@through_both
def test_password_in_consul_logs_in_and_another_is_rejected(consul, smtpd, root, line):
    consul.kv_put("consul/credentials/gilles", root.encrypt("Correct Horse"))
    files = table_files(consul) | certificate(root)
    server = smtpd(line + SUBMISSION, files, processes=processes(root, line))

    def log_in(user, password):
        try:
            return server.send("eric@localhost", auth=(user, password), starttls=True)["eric@localhost"][0]
        except smtplib.SMTPAuthenticationError as refused:
            return refused.smtp_code

    assert log_in("gilles", "Correct Horse") == 250
    assert [log_in("gilles", "wrong"), log_in("eric", "Correct Horse")] == [535, 535]


@only_old
@through_both
def test_source_addresses_of_a_relay_rotate(consul, smtpd, root, line):
    with Sink() as sink:
        for address in ("127.0.0.5", "127.0.0.6"):
            consul.kv_put(f"consul/source/{address}", "")
        conf = f"""{line}
            listen on 127.0.0.1 port $smtp_port
            mta limit session-mail-max 1
            action "out" relay host "smtp+notls://{sink.address}:{sink.port}" src <consul>
            match from any for any action "out"
            """
        server = smtpd(conf, table_files(consul), processes=processes(root, line))
        for number in range(1, 4):
            assert server.send("bob@example.com", subject=f"mail {number}")["bob@example.com"][0] == 250
            sink.wait_for(number, lambda: f"not relayed:\n{server.log}")
        assert [mail.peer for mail in sink.received] == ["127.0.0.5", "127.0.0.6", "127.0.0.5"]


@only_old
@through_both
def test_mail_is_deferred_while_consul_is_stopped_and_accepted_later(consul, smtpd, root, line):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(line + LOCAL, table_files(consul, mode="direct"), processes=processes(root, line))
    before = server.pids
    assert server.send("root@localhost")["root@localhost"][0] == 250
    consul.stop()
    replies = server.send("root@localhost", "nobody-of-this-name@localhost", "eric@localhost")
    assert [reply for reply in replies.values() if not 400 <= reply[0] < 500] == []
    consul.start()
    until(lambda: server.send("root@localhost", subject="back")["root@localhost"][0], 250)
    server.wait_for_mail("gilles", "back")
    assert server.pids == before


@only_old
@through_both
def test_update_is_answered(consul, smtpd, root, line):
    server = smtpd(line + LOCAL, table_files(consul), processes=processes(root, line))
    assert "command succeeded" in server.smtpctl("update", "table", "consul")
    assert server.alive


CHILDREN = {"table-dummy": DUMMY, "table-article": ARTICLE, "table-of-2020": OF_2020}
SERVED = [(release, name) for release in SUITES for name in CHILDREN]
RESTARTS = f"#!/bin/sh\nexec /{LIBEXEC}/table-procexec --restart /{LIBEXEC}/table-dummy\n"


def bridges(server):
    return [pid for pid in server.backends if "/table-procexec" in server.command_line(pid)]


def children(server):
    return [pid for pid in server.backends if "/table-procexec" not in server.command_line(pid)]


def bridged(smtpd, root, name, *, may_die=False):
    """An smtpd with this child as its table: the plain line, or --restart where smtpd would end with the child."""
    rules = LOCAL.replace("match from any", "match from any mail-from <consul>")
    programs = {name: CHILDREN[name], "table-script": RESTARTS}
    today = name == "table-dummy"
    if may_die and today and root.release not in OLD:
        return smtpd(f"table consul procexec:/{LIBEXEC}/table-script\n" + rules, programs=programs)
    # Up to 7.5, a child of 2020 that exits at the handshake is restarted with the first question.
    count = 1 if today != (root.release in OLD) else 2
    return smtpd(f"table consul procexec:/{LIBEXEC}/{name}\n" + rules, programs=programs, processes=count)


@pytest.mark.parametrize(("root", "name"), SERVED, indirect=["root"])
def test_any_program_that_speaks_lines_works_as_a_table(smtpd, root, name):
    server = bridged(smtpd, root, name)
    if name == "table-dummy" and root.release not in OLD:
        until(lambda: (bridges(server), len(children(server))), ([], 1))  # the trial has ended
    else:
        assert len(bridges(server)) == 1
    assert server.send("eric@localhost", sender="gilles@poolp.org", subject="hi")["eric@localhost"][0] == 250
    server.wait_for_mail("eric", "hi")
    assert server.send("eric@localhost", sender="eric@poolp.org")["eric@localhost"][0] == 550
    assert server.alive
    assert re.search(r'lookup "root" as \w+ in table proc:consul -> "gilles@poolp.org"', server.log) is None
    server.send("root@localhost", sender="gilles@poolp.org")
    server.wait_for_log(r'lookup "root" as \w+ in table proc:consul -> "gilles@poolp.org"')


@pytest.mark.parametrize(("root", "name"), SERVED, indirect=["root"])
def test_child_killed_under_load_is_replaced_without_loss(smtpd, root, name):
    server = bridged(smtpd, root, name, may_die=True)
    before = server.pids

    until(lambda: len(bridges(server)), 1)  # the interpreter of the script
    over = threading.Event()
    codes = []

    def load():
        while not over.is_set():
            codes.append(server.send("eric@localhost", sender="gilles@poolp.org")["eric@localhost"][0])

    senders = [threading.Thread(target=load) for _ in range(3)]
    for sender in senders:
        sender.start()
    try:
        for _ in range(2):
            heard = len(codes)
            wait_for(lambda seen=heard: 250 in codes[seen:], 15, lambda: f"{codes}\n{server.log}")
            (child,) = children(server)
            os.kill(child, signal.SIGKILL)
            killed = time.monotonic()
            wait_for(
                lambda gone=child: children(server) not in ([], [gone]) and codes[-1] == 250,
                5,
                lambda: f"no answer 5 s after the child was killed: {codes}\n{server.log}",
            )
            assert time.monotonic() - killed < 5
    finally:
        over.set()
        for sender in senders:
            sender.join()
    assert {code for code in codes if code != 250 and not 400 <= code < 500} == set()
    assert server.alive
    assert {pid for pid in before if pid in server.pids} == set(before)
