"""`table-consulctl expand` and a real smtpd make the same lookups, with the same replies and recipients."""

from __future__ import annotations

import json
import re

import pytest

from tests.ctl.expansions import LOCAL, VIRTUAL, chain
from tests.e2e import table_files, until
from tests.rig.root import File

LISTEN = "listen on 127.0.0.1 port $smtp_port\n"
CONF = {
    "alias": (
        "table t consul\ntable u consul\naction a maildir alias <t> userbase <u>\n"
        "match for domain example.org action a\n"
        "table v consul\naction b maildir alias <v> userbase <u>\nmatch for domain example.net action b\n"
    ),
    "virtual": (
        "table t consul\ntable u consul\naction a maildir virtual <t> userbase <u>\n"
        "match for domain { example.org, example.net } action a\n"
    ),
}
# Included files, in /lists.
LISTS = {
    "users": "gilles, eric+x\nida",
    "empty": "",
    "blank": "\n , ,\n\n",
    "comments": "# a comment\ngilles\n#\n# another\neric # more\nida\n",
    "joined": "gilles,\\\neric\nida, \\,\n",
    "crlf": "gilles\r\n\r\neric, ida\r\n",
    "nested": ":include:/lists/users, eric\n:include:/lists/users\n",
    "nested-alone": ":include:/lists/users\n",
    "others": "vera@example.com, short5@example.org, in-users@example.org\n",
    "invalid": "gilles, a b, eric\nida\n",
    "quote": 'gilles, "eric\nida\n',
    "long": "x" * 2048 + "\ngilles\n",
    "special": "|cat, /tmp/file, gilles, |cat\n",
    "refused": "gilles, error:550 no list\n",
    "unknown": "gilles, nobody-here\n",
    "forwards": "forward-several, forward-command, forward-file\n",
    "self": "in-self, gilles\n",
    "loop": "loop, gilles\n",
    "secret": "gilles\n",
}
INCLUDES = {
    **{f"in-{name}": f":include:/lists/{name}" for name in LISTS},
    **{f"beside-{name}": f"eric, :include:/lists/{name}" for name in LISTS},
    "in-none": ":include:/lists/none",
    "beside-none": "eric, :include:/lists/none",
    "in-folder": ":include:/lists",
    "beside-folder": "eric, :include:/lists",
    "loop": ":include:/lists/loop, eric",
    "in-none-and-empty": ":include:/lists/none, :include:/lists/empty",
    "forward-command": ":include:/lists/none",
    "included-twice": ":include:/lists/users, :include:/lists/users",
    "included-again": "in-users, beside-users, :include:/lists/users",
    "below-a-file": ":include:/lists/users/none",
}
# The files ~/.forward of users with their homes in /homes.
FORWARDS = {
    "user": "gilles",
    "several": "gilles, eric+x\nida\n",
    "self": "forward-self\n",
    "self-and-user": "forward-self-and-user, gilles",
    "self-with-tag": "forward-self-with-tag+x",
    "self-as-address": "forward-self-as-address@example.org",
    "self-in-capitals": "FORWARD-SELF-IN-CAPITALS",
    "ping": "forward-pong",
    "pong": "forward-ping",
    "on": "forward-user, forward-several",
    "alias": "short5, again",
    "address": "short5@example.org",
    "outside": "vera@example.com, gilles",
    "unknown": "gilles, nobody-here",
    "error": "gilles, error:550 moved",
    "command": '|cat, "|cat x", gilles',
    "file": "/tmp/file",
    "include": ":include:/lists/users",
    "include-and-user": ":include:/lists/users, gilles",
    "empty": "",
    "blank": "\n",
    "comment": "# nobody\n",
    "comments": "# a comment\ngilles # more\n\n, eric\nida#",
    "comment-escaped": "gilles, eric\\#x\n",
    "joined-comment": "#\\\ngilles, \\#\n",
    "joined": "gilles,\\\n er\\\nic, \\\n# a comment\n ida\\",
    "escaped": "gilles, \\eric\n\\ida, \\forward-escaped\n",
    "crlf": "gilles\r\neric\r\n\r\n",
    "invalid": "gilles, a b\n",
    "quote": 'gilles, "eric\n',
    "large": "gilles\n" + "#" * 4088,
    "too-large": "gilles\n" + "#" * 4089,
    "long": "gilles," * 293,
    "many": "".join(f"eric+{number}\n" for number in range(97)),
    "too-many": "".join(f"eric+{number}\n" for number in range(99)),
    "link": "gilles",
    "of-root": "gilles",
    "of-eric": "gilles",
    "folder": "gilles",
    "pipe": "gilles",
    "group-writable": "gilles",
    "world-writable": "gilles",
    "secret": "gilles",
    "home-of-eric": "gilles",
    "home-of-root": "gilles",
    "home-writable": "gilles",
    "home-sticky": "gilles",
    "home-sticky-empty": "gilles",
    "home-secret": "gilles",
    "home-link": "gilles",
    "home-none": "gilles",
    "home-file": "gilles",
    "none": "gilles",
}
PREPARE = """
chown gilles: /homes/*; chown root: /homes/root-*
cd /homes
mv link/.forward link/x; ln -s x link/.forward
chown root: of-root/.forward; chown eric: of-eric/.forward
rm folder/.forward; mkdir folder/.forward; chown gilles folder/.forward
rm pipe/.forward; mkfifo pipe/.forward; chown gilles pipe/.forward
chmod 664 group-writable/.forward; chmod 646 world-writable/.forward; chmod 0 secret/.forward
chown eric: home-of-eric; chown root: home-of-root; chmod 775 home-writable; chmod 0 home-secret
chmod 1755 home-sticky home-sticky-empty; rm home-sticky-empty/.forward
mv home-link home-target; chmod 777 .; ln -s home-target home-link
rm -r home-none home-file none/.forward; : > home-file
chmod 600 /lists/secret; chown root: /lists/secret
"""
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
    **INCLUDES,
    "crowd": "forward-blank, " + ", ".join(f"joerg+{number}" for number in range(100)),
    "crowd-comment": "forward-comment, " + ", ".join(f"joerg+{number}" for number in range(100)),
    "crowd-include": "forward-include, " + ", ".join(f"joerg+{number}" for number in range(100)),
    "crowd-user": "forward-user, " + ", ".join(f"joerg+{number}" for number in range(100)),
    "both": "forward-command, forward-several, |cat",
    "twice-forward": "forward-user, forward-user+x",
}
USERS = {
    **{name: f"{1000 + n}:1000:/home/{name}" for n, name in enumerate(("gilles", "eric", "joerg", "ida"))},
    **{f"forward-{name}": f"1000:1000:/homes/{name}" for name in FORWARDS},
    **{f"root-{name}": f"0:0:/homes/root-{name}" for name in ("user", "command", "file")},
    "in-self": "1000:1000:/homes/user",
    "broken-user": "?",
}
TAGGED = ("forward-self+x", "forward-self-with-tag+x", "forward-user+x", "forward-none+x")
DATA = {
    "alias": {**LOCAL.aliases, **MORE},
    "virtual": {
        **VIRTUAL.aliases,
        **chain("n", 4, domain="@example.org"),
        **{f"{key}@example.org": value for key, value in MORE.items()},
        **{f"{key}@example.org": key for key in (*USERS, *TAGGED) if "-" in key},
        "eric": "joerg, eric",
        "eric+more@example.org": "gilles",
        "lists@example.org": "twice@example.org, again@example.org, gilles+x, gilles",
        "cross@example.org": "plus@example.org, eric@example.net, twice@example.org",
    },
}
# Those of a table without permission for commands.
PLAIN = {"cmd": "|cat", "inc": ":include:/lists/users", "file": "/tmp/file", "fwd": "forward-command, forward-file"}
EXPAND = """\
import sys
sys.path[:0] = ["/opt/table-consul/own", "/opt/table-consul/dependencies"]
import json
from table_consul.ctl.main import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""
# smtpd misses some duplicates, because it changes keys in its tree, and delivers the mail twice; expand shows one.
TWICE = ("beside-users", "beside-forwards", "both", "twice-forward")
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
    lookups = [each for each in answer["lookups"] if each["service"] not in ("include", "forward")]
    found = [(each["key"], each["service"], each["result"]) for each in lookups]
    return found, answer["reply"], len(answer["recipients"])


def files():
    """The included files and homes, all of user gilles."""
    texts = {f"/lists/{name}": text for name, text in LISTS.items()}
    texts |= {f"/homes/{name}/.forward": text for name, text in FORWARDS.items()}
    root = {"user": "gilles", "command": "gilles, |cat", "file": "/tmp/file"}
    roots = {f"/homes/root-{name}/.forward": text for name, text in root.items()}
    return {path: File(text, owner="gilles") for path, text in texts.items()} | roots


@pytest.mark.parametrize("kind", CONF)
def test_expand_makes_the_lookups_of_smtpd_with_the_same_result(consul, smtpd, kind):
    consul.kv_txn({f"t/alias/{key}": value for key, value in DATA[kind].items()})
    consul.kv_txn({f"u/userinfo/{key}": value for key, value in USERS.items()})
    consul.kv_txn({f"v/alias/{key}": value for key, value in PLAIN.items()})
    relay = "action out relay host smtp://127.0.0.1:9\nmatch for domain example.com action out\n"
    config = table_files(consul, "allow_commands = true\nallow_root = true\n[tables.v]\nallow_commands = false")
    server = smtpd(LISTEN + CONF[kind] + relay, {**config, **files()})
    server.run("sh", "-ec", PREPARE)
    until(lambda: server.send("short1@example.org").popitem()[1][0], 250)
    server.smtpctl("pause", "mda")
    server.smtpctl("pause", "mta")
    until(lambda: [server.smtpctl("remove", "all"), server.queue()][1], [])
    keys = dict.fromkeys(key if "@" in key else f"{key}@example.org" for key in DATA[kind])
    addresses = [key for key in keys if not key.startswith(("@", *TWICE))]
    addresses += ["NoBody@example.org", "gilles+Unknown@example.org", "gilles+known@example.org", "x+@example.org"]
    addresses += [f"{name}@example.org" for name in (*USERS, *TAGGED) if f"{name}@example.org" not in keys]
    options = ["--virtual", "t"] if kind == "virtual" else []
    runs = [["expand", "t", *addresses, *options, "--userinfo", "u", "--json"]]
    if kind == "alias":
        plain = [f"{key}@example.net" for key in PLAIN]
        runs.append(["expand", "v", *plain, "--userinfo", "u", "--json"])
        addresses += plain
    lines = server.run("python3", "-I", "-c", EXPAND, json.dumps(runs)).splitlines()
    ours = {answer["address"]: by_expand(answer) for answer in map(json.loads, lines)}
    theirs = {address: by_smtpd(server, address) for address in addresses}
    assert [
        (address, theirs[address], ours[address]) for address in addresses if theirs[address] != ours[address]
    ] == []
