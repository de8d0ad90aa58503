"""`table-consulctl check` on a host with a real OpenSMTPD, run by root."""

from __future__ import annotations

import json
from subprocess import CalledProcessError

from tests.e2e import table_files
from tests.rig.opensmtpd import CONFIG, LIBEXEC
from tests.rig.root import File

CONF = """
table aliases consul
include "/etc/more.conf"
listen on 127.0.0.1 port $smtp_port
action "local" maildir alias <aliases>
match from any for local action "local"
"""
MORE = 'where = "consul:/etc/mail/table-consul.toml"\ntable hosts $where\nmatch from src <hosts> for any reject\n'
COMMAND = """\
import sys
sys.path[:0] = ["/opt/table-consul/own", "/opt/table-consul/dependencies"]
from table_consul.ctl.main import main
sys.exit(main(["check", "--json"]))
"""


def check(server):
    """The problems by place, and the summary of the checks."""
    try:
        output = server.run("python3", "-I", "-c", COMMAND)
    except CalledProcessError as failed:
        output = failed.output
    document = json.loads(output)
    return {each["where"]: each["problem"] for each in document["problems"]}, document["checked"]


def test_check_finds_no_problem_and_then_each_fault(consul, smtpd):
    consul.kv_txn({"aliases/alias/root": "gilles", "hosts/netaddr/192.0.2.1": ""})
    server = smtpd(CONF, {**table_files(consul), "/etc/more.conf": MORE})
    problems, checked = check(server)
    assert (problems, checked[0]) == ({}, "/etc/smtpd.conf (2 tables)")
    assert checked[1:3] == [
        f"/{LIBEXEC}/table-consul",
        f"{CONFIG}, as user opensmtpd (uid {server.root.accounts['opensmtpd'][0]})",
    ]
    consul.kv_delete("hosts/netaddr/192.0.2.1")
    server.write(CONFIG, File(f'[consul]\naddress = "http://{consul.address}"\n', 0o600))
    server.write(f"/{LIBEXEC}/table-consul", File("#!/bin/sh\n", 0o700))
    server.write("/etc/more.conf", MORE + "nonsense\n")
    problems, _ = check(server)
    assert "smtpd -n: /etc/more.conf:4: syntax error" in problems.pop("/etc/smtpd.conf")
    assert "cannot run it: permission denied" in problems.pop(f"/{LIBEXEC}/table-consul")
    assert "not readable by user opensmtpd" in problems.pop(CONFIG)
    assert problems == {}
