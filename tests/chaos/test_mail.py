"""With a real smtpd, no fault of Consul bounces a mail."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import pytest

from tests.chaos import LONG, cluster_or_skip
from tests.e2e import table_files
from tests.rig.waiting import wait_for

pytestmark = pytest.mark.real

ILL_SECONDS = 30.0 if LONG else 6.0
LOCAL = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" maildir alias <consul>
match from any for local action "local"
"""


class Sender(threading.Thread):
    """Sends mails in sequence; ``accepted`` are the subjects that smtpd has accepted."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self._server = server
        self._end = threading.Event()
        self.replies = Counter()
        self.accepted = []
        self.refused = []

    def run(self):
        number = 0
        while not self._end.is_set():
            number += 1
            subject = f"chaos {number}"
            code, text = self._server.send("root@localhost", subject=subject)["root@localhost"]
            self.replies[code] += 1
            if code == 250:
                self.accepted.append(subject)
            elif not 400 <= code < 500:
                self.refused.append((subject, code, text))

    def stop(self):
        self._end.set()
        self.join(60)


# One OpenSMTPD suffices: all releases handle an answer alike.
@pytest.mark.parametrize("root", ["7.9"], indirect=True)
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["mirror", "direct"] if LONG else ["mirror"])
def test_every_mail_is_delivered_queued_or_deferred_during_restarts_of_consul(smtpd, mode):
    with cluster_or_skip() as cluster:
        contacted = cluster.members[0]
        contacted.kv_put("consul/alias/root", "gilles")
        server = smtpd(LOCAL, table_files(contacted, mode=mode))
        before = server.pids
        server.send("root@localhost", subject="first")
        server.wait_for_mail("gilles", "first")
        sender = Sender(server)
        sender.start()
        time.sleep(1.0)
        for member in cluster.members:
            member.kill()
        time.sleep(ILL_SECONDS / 2)
        for member in cluster.members:
            member.launch()
        time.sleep(ILL_SECONDS / 2)
        for member in cluster.members:
            member.wait_for_leader()
        back = sender.replies[250]
        wait_for(lambda: sender.replies[250] > back, 10, lambda: f"no mail is accepted:\n{server.log}")
        sender.stop()
        with contextlib.suppress(Exception):
            server.smtpctl("schedule", "all")

        def all_are_there():
            return not set(sender.accepted) - set(server.subjects("gilles"))

        wait_for(all_are_there, 30, lambda: f"{set(sender.accepted) - set(server.subjects('gilles'))}\n{server.log}")
        assert sender.refused == []
        assert sender.accepted
        assert server.queue() == []
        assert {name: server.mails(name) for name in ("root", "eric")} == {"root": [], "eric": []}  # no bounces
        assert "PermFail" not in server.log
        assert server.pids == before
        if mode == "mirror":
            assert set(sender.replies) == {250}, "a table in memory never defers mail"
