"""`table-consulctl expand` and a real smtpd make the same lookups, with the same replies and recipients."""

from __future__ import annotations

import json
import re

import pytest

from tests.control import control
from tests.ctl.expansions import LOCAL, VIRTUAL, chain
from tests.e2e import table_files, until

LISTEN = "listen on 127.0.0.1 port $smtp_port\n"
CONF = {
    "alias": (
        "table t consul\ntable u consul\naction a maildir alias <t> userbase <u>\n"
        "match for domain example.org action a\n"
    ),
    "virtual": (
        "table t consul\ntable u consul\naction a maildir virtual <t> userbase <u>\n"
        "match for domain { example.org, example.net } action a\n"
    ),
}
MORE = {
    "twice": "gilles, again, eric",
    "again": "gilles, |cat, /tmp/file",
    "thrice": "again, |cat, joerg, also",
    "also": "|cat, eric+tag",
    "Upper": "GILLES, gilles",
    "gone": "eric, error:550 gone",
    "later": "error:451 later",
    "broken": "gilles, a b c",
    "unknown": "gilles, nobody-here",
    "bad-user": "broken-user",
    "commas": ", ,",
    "many": ", ".join(f"joerg+{number}" for number in range(100)),
    "gilles+known": "joerg",
    "outside": "vera@example.com, gilles",
}
DATA = {
    "alias": {**LOCAL.aliases, **MORE},
    "virtual": {
        **VIRTUAL.aliases,
        **chain("n", 4, domain="@example.org"),
        **{f"{key}@example.org": value for key, value in MORE.items()},
        "eric": "joerg, eric",
        "eric+more@example.org": "gilles",
        "lists@example.org": "twice@example.org, again@example.org, gilles+x, gilles",
        "cross@example.org": "plus@example.org, eric@example.net, twice@example.org",
    },
}
USERS = {
    **{name: f"{1000 + n}:1000:/home/{name}" for n, name in enumerate(("gilles", "eric", "joerg"))},
    "broken-user": "?",
}
LOOKUP = re.compile(r'lookup: lookup "(.*)" as (\w+) in table proc:\w+ -> (none|error|")')
RESULTS = {"none": "not-found", "error": "error", '"': "found"}


def by_smtpd(server, address):
    """The lookups, the reply to RCPT, and the users of the envelopes."""
    with (server.place / "log").open(errors="replace") as log:
        log.read()
        code, text = server.send(address)[address]
        found = [(key.lower(), service, RESULTS[answer]) for key, service, answer in LOOKUP.findall(log.read())]
    queued = [line.split("|") for line in server.queue()]
    server.smtpctl("remove", "all") if queued else None
    return found, None if code == 250 else f"{code} {text.removesuffix(f': <{address}>')}", len(queued)


def by_expand(answer):
    found = [(each["key"], each["service"], each["result"]) for each in answer["lookups"]]
    return found, answer["reply"], len(answer["recipients"])


@pytest.mark.parametrize("kind", CONF)
def test_expand_makes_the_lookups_of_smtpd_with_the_same_result(consul, smtpd, tmp_path, kind):
    consul.kv_txn({f"t/alias/{key}": value for key, value in DATA[kind].items()})
    consul.kv_txn({f"u/userinfo/{key}": value for key, value in USERS.items()})
    relay = "action out relay host smtp://127.0.0.1:9\nmatch for domain example.com action out\n"
    server = smtpd(LISTEN + CONF[kind] + relay, table_files(consul, "allow_commands = true"))
    until(lambda: server.send("short1@example.org").popitem()[1][0], 250)
    server.smtpctl("pause", "mda")
    server.smtpctl("pause", "mta")
    until(lambda: [server.smtpctl("remove", "all"), server.queue()][1], [])
    path = tmp_path / "c.toml"
    path.write_text(f'[consul]\naddress = "http://{consul.address}"\n[defaults]\nallow_commands = true\n')
    keys = dict.fromkeys(key if "@" in key else f"{key}@example.org" for key in DATA[kind])
    addresses = [key for key in keys if not key.startswith("@")]
    addresses += ["NoBody@example.org", "gilles+Unknown@example.org", "gilles+known@example.org", "x+@example.org"]
    options = ["--virtual", "t"] if kind == "virtual" else []
    done = control("-c", path, "expand", "t", *addresses, *options, "--userinfo", "u", "--json")
    ours = {answer["address"]: by_expand(answer) for answer in map(json.loads, done.text.splitlines())}
    theirs = {address: by_smtpd(server, address) for address in addresses}
    assert [(address, theirs[address], ours[address]) for address in ours if theirs[address] != ours[address]] == []
