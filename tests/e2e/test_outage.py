"""During an outage of Consul mail waits, none bounces, and recovery needs no restart."""

from __future__ import annotations

import time

from tests.e2e import table_files, until
from tests.rig.sink import Sink
from tests.rig.waiting import wait_for

LOCAL = """
table consul consul:/etc/mail/table-consul.toml
listen on 127.0.0.1 port $smtp_port
action "local" mbox alias <consul>
match from any for local action "local"
"""


def is_temporary(reply):
    return 400 <= reply[0] < 500


def test_mail_is_deferred_while_consul_is_stopped_and_accepted_later(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(LOCAL, table_files(consul, mode="direct"))
    before = server.pids
    consul.stop()
    replies = server.send("root@localhost", "nobody-of-this-name@localhost", "eric@localhost")
    assert [reply for reply in replies.values() if not is_temporary(reply)] == []
    assert server.queue() == []
    consul.start()
    until(lambda: server.send("root@localhost", subject="back")["root@localhost"][0], 250)
    server.wait_for_mail("gilles", "back")
    assert server.pids == before


def test_mail_is_deferred_in_time_while_consul_hangs(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(LOCAL, table_files(consul, "deadline = 0.5", mode="direct"))
    consul.pause()
    started = time.monotonic()
    assert is_temporary(server.send("root@localhost")["root@localhost"])
    assert time.monotonic() - started < 5  # six lookups share one deadline of half a second
    consul.resume()
    until(lambda: server.send("root@localhost", subject="back")["root@localhost"][0], 250)
    server.wait_for_mail("gilles", "back")


def test_accepted_mail_stays_queued_without_consul_and_is_delivered_later(consul, smtpd):
    with Sink() as sink:
        consul.kv_put("consul/source/127.0.0.5", "")
        server = smtpd(
            f"""
            table consul consul:/etc/mail/table-consul.toml
            listen on 127.0.0.1 port $smtp_port
            action "out" relay host "smtp+notls://{sink.address}:{sink.port}" src <consul>
            match from any for any action "out"
            """,
            table_files(consul, mode="direct"),
        )
        consul.stop()
        assert server.send("bob@example.com", subject="later")["bob@example.com"][0] == 250
        server.wait_for_log(r'result="TempFail')
        assert len(server.queue()) == 1
        consul.start()

        def has_come():
            server.smtpctl("schedule", "all")
            return bool(sink.received)

        wait_for(has_come, 20, lambda: f"the mail did not go out:\n{server.log}")
        assert [(mail.peer, mail.recipients) for mail in sink.received] == [("127.0.0.5", ["bob@example.com"])]
        assert "PermFail" not in server.log


def test_mirror_serves_mail_while_consul_is_stopped_and_sees_later_edits(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    server = smtpd(LOCAL, table_files(consul))
    before = server.pids
    assert server.send("root@localhost", subject="before")["root@localhost"][0] == 250
    consul.stop()
    replies = server.send("root@localhost", "nobody-of-this-name@localhost", subject="meanwhile")
    assert [code for code, _ in replies.values()] == [250, 550]
    server.wait_for_mail("gilles", "meanwhile")
    consul.start()
    consul.kv_put("consul/alias/nobody-of-this-name", "eric")
    until(lambda: server.send("nobody-of-this-name@localhost")["nobody-of-this-name@localhost"][0], 250)
    assert server.pids == before


def test_mirror_that_never_read_consul_defers_mail_until_it_does(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    consul.stop()
    server = smtpd(LOCAL, table_files(consul))
    replies = server.send("root@localhost", "nobody-of-this-name@localhost")
    assert [reply for reply in replies.values() if not is_temporary(reply)] == []
    consul.start()
    until(lambda: server.send("root@localhost", subject="back")["root@localhost"][0], 250)
    server.wait_for_mail("gilles", "back")
