"""The table of smtpd.conf lines and their services in docs/keys.md, verified with an old and a new smtpd."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import smtplib

import pytest

from tests.conftest import _or_skip
from tests.documents.document import page, rows
from tests.e2e.programs import Programs
from tests.rig.opensmtpd import CONFIG
from tests.rig.root import SUITES, Root, certificate
from tests.rig.sink import Sink
from tests.rig.waiting import wait_for

LOGIN = "gilles"
# The keys of smtpd's lookups in the session of these tests, by their name in the table.
KEYS = {
    "the client's address": "127.0.0.1",
    "the client's host name": "localhost",
    "the recipient": "eric@localhost",
    "the recipient's domain": "localhost",
    "the recipient's user": "eric",
    "the sender": "alice@remote.example",
    "the name in `HELO` or `EHLO`": "remote.example",
    "the tag of the listener": "in",
    "the login": LOGIN,
    "the label of the relay": "label",
    "the source address": "127.0.0.1",
    "the address of the listener": "127.0.0.1",
    "(fetch)": "",
}
EMPTY = {CONFIG: '[consul]\naddress = "file:///etc/mail/export.json"\n', "/etc/mail/export.json": "[]"}
HEAD = """
table consul consul
pki "mail.example.org" cert "/etc/ssl/mail.example.org.crt"
pki "mail.example.org" key "/etc/ssl/mail.example.org.key"
"""
LISTEN = 'listen on 127.0.0.1 port $smtp_port tls-require pki "mail.example.org" tag in'


def documented(kind):
    """The documented lines that begin with this word, each with its lookups: ``(service, key)`` in order."""
    found = []
    for lines, services, key in rows(page("docs/keys.md").section("## Services by line of smtpd.conf")):
        asked = [(service, KEYS[key.partition(";")[0]]) for service in re.findall(r"`(\w+)`", services)]
        found += [(line, asked) for line in re.findall(r"`([^`]*<table>)`", lines) if line.startswith(kind)]
    assert found
    return [(line.replace("<table>", "<consul>"), asked) for line, asked in found]


def asked(server):
    """The lookups of smtpd in order: service and key, empty for a fetch."""
    pattern = r'lookup: (?:(?:match|lookup) "(.*)" as (\w+) in|fetch (\w+) from) table proc:consul ->'
    found = re.finditer(pattern, server.log)
    return [((one[2] or one[3]).lower(), one[1] or "") for one in found]


@pytest.fixture(params=["6.8", "7.9"])
def root(request):
    with _or_skip():
        return Root(request.param)


@pytest.fixture
def start(root):
    """Starts an smtpd whose table is empty; LOGINS in its configuration is a table with the login of the tests."""
    with contextlib.ExitStack() as running, _or_skip():

        def start(conf, login=LOGIN):
            conf = conf.replace("LOGINS", f'{{ "{login}" = "{root.encrypt("secret")}" }}')
            return running.enter_context(Programs(root, HEAD + conf, EMPTY | certificate(root)))

        yield start


def mail(server, login=LOGIN):
    """Send a mail from a user who logs in, and ignore the reply."""
    with contextlib.suppress(smtplib.SMTPAuthenticationError):
        server.send("eric@localhost", auth=(login, "secret"), starttls=True)


def with_regex(pairs):
    """Each line, and the same line with a table of expressions."""
    for line, services in pairs:
        yield line, services
        yield line.replace("<consul>", "regex <consul>"), [("regex", services[0][1])]


@pytest.mark.parametrize("login", [LOGIN, "gilles@example.org"])
def test_rules_make_the_documented_lookups(start, login):
    pairs = [*with_regex(documented("match "))]
    rules = []
    for line, _ in pairs:
        rest = "" if " from " in line else " from any"
        rest += "" if " for " in line else " for local"
        rules.append(f'{line}{rest} action "a"\n')
    server = start(f'{LISTEN} auth LOGINS\naction "a" mbox\n{"".join(rules)}', login)
    mail(server, login)
    # The second service of a line is for a login with an @.
    expected = [services[-1] if "@" in login else services[0] for _, services in pairs]
    assert asked(server) == [(service, login if key == LOGIN else key) for service, key in expected]


def test_filters_make_the_documented_lookups(start):
    pairs = [*with_regex(documented("filter "))]
    filters = "".join(
        f'{line.replace("...", f"f{number} phase rcpt-to")} reject "550 no"\n' for number, (line, _) in enumerate(pairs)
    )
    names = ", ".join(f"f{number}" for number in range(len(pairs)))
    rule = 'action "a" mbox\nmatch from any for local action "a"\n'
    server = start(f"{filters}{LISTEN} auth LOGINS filter {{ {names} }}\n{rule}")
    mail(server)
    assert asked(server) == [each for _, services in pairs for each in services]


@pytest.mark.parametrize(("line", "services"), documented("listen "), ids=lambda each: str(each)[:60])
def test_listeners_make_the_documented_lookups(start, line, services):
    logins = "" if " auth" in line else " auth LOGINS"
    rule = 'action "a" mbox\nmatch from any for local action "a"\n'
    server = start(line.replace("listen ...", LISTEN + logins) + "\n" + rule)
    mail(server)
    assert asked(server)[:1] == services


@pytest.mark.parametrize(("line", "services"), documented("action "), ids=lambda each: str(each)[:60])
def test_actions_make_the_documented_lookups(start, line, services):
    with Sink() as sink:
        relay = f"smtp+notls://{sink.address}:{sink.port}"
        if "relay" in line:
            host = "" if re.search("relay (host|domain)", line) else f" host {relay}"
            host = host.replace("+notls://", "+tls://label@") if " auth " in line else host
            source = " src 127.0.0.1" if "helo-src" in line else ""
            line = line.replace("relay ...", "relay").replace("relay", f"relay{host}{source}", 1)
        line = line.replace("...", '"a"' if "relay" in line else '"a" maildir')
        server = start(f'{LISTEN} auth LOGINS\n{line}\nmatch from any for local action "a"\n')
        mail(server)
        wait_for(lambda: asked(server), 10, lambda: f"nothing asked:\n{server.log}")
        assert asked(server)[:1] == services


@pytest.mark.parametrize("root", SUITES, indirect=True)
def test_smtpd_exits_at_the_next_lookup_after_its_table_exits(start):
    server = start(f'{LISTEN}\naction "a" mbox alias <consul>\nmatch from any for local action "a"\n')
    server.send("eric@localhost", starttls=True)  # the table has started
    (table,) = server.backends
    os.kill(table, signal.SIGKILL)
    wait_for(lambda: not server.backends, 10, lambda: "the table is still there")
    with smtplib.SMTP("127.0.0.1", server.port) as session:
        assert (session.noop()[0], server.alive) == (250, True)
    with contextlib.suppress(smtplib.SMTPException, OSError):
        server.send("eric@localhost", starttls=True)
    wait_for(lambda: not server.alive, 10, lambda: f"smtpd is still there:\n{server.log}")
