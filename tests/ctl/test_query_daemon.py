"""`table-consulctl query` returns the same answers as the daemon."""

from __future__ import annotations

import json
import random

import pytest

from table_consul.errors import printable
from table_consul.services import SERVICES
from tests.ctl.queries import HASH, MARKED, query
from tests.dialogue import Child, write_config
from tests.fake_consul import FakeConsul


def daemon_answers(conf, questions):
    """The answers of the daemon to questions (operation, service, key)."""
    answers = []
    with Child(str(conf)) as child:
        child.handshake()
        for number, (op, service, key) in enumerate(questions):
            head = f"table|0.1|0|aliases|{op}|{service}|{number}".encode()
            line = child.ask(head if op == "fetch" else head + b"|" + key.lower())
            answers.append(line.split(b"|", 2)[2])
        child.end()
    return answers


def control_answers(conf, questions):
    """The objects that `query --json` prints for the questions."""
    answers = []
    for op, service in dict.fromkeys((op, service) for op, service, _ in questions):
        keys = [key for each, name, key in questions if (each, name) == (op, service)]
        if op == "fetch":
            done = query(conf, service, "--op", op, "--count", len(keys), "--json")
        else:
            done = query(conf, service, "--op", op, "-", "--json", stdin=b"\n".join(keys))
        answers += [json.loads(line) for line in done.text.splitlines()]
    return answers


def as_on_the_wire(answer):
    """An object of `query --json` as a reply to smtpd, with the reason shortened."""
    if answer["result"] == "found":
        return "found" + (f"|{answer['value']}" if "value" in answer else "")
    return "not-found" if answer["result"] == "not-found" else f"error|{printable(answer['reason'], 400)}"


def differing(conf, questions):
    """The questions that the daemon and query answer differently, with both answers."""
    questions = sorted(questions)  # the order of control_answers
    theirs = [line.decode("utf-8", "backslashreplace") for line in daemon_answers(conf, questions)]
    ours = [as_on_the_wire(answer) for answer in control_answers(conf, questions)]
    both = [*zip(questions, theirs, ours, strict=True)]
    # Every kind of answer must have been compared.
    assert {their.partition("|")[0] for their in theirs} == {"found", "not-found", "error"}
    return [each for each in both if each[1] != each[2]]


FETCHES = [("fetch", service, b"") for service in ("source", "relayhost", "alias", "string", "regex") for _ in range(7)]


def test_query_answers_as_the_daemon_does_from_a_file(tmp_path):
    keys = [b"root", b"staff", b"quoted", b"command", b"a|b", b"nobody", b"broken", b"gilles", b"example.org", b"*"]
    services = [name for name in SERVICES if name != "auth"]
    questions = [(op, service, key) for service in services for op in ("check", "lookup") for key in keys]
    assert differing(write_config(tmp_path), [*questions, *FETCHES]) == []


WORDS = {
    "alias": [
        "gilles",
        "gilles, eric@example.org",
        "a\nb\n# c",
        '"gilles"',
        '["a", "b"]',
        "|/bin/sh",
        "a b",
        "x" * 2100,
    ],
    "userinfo": ["1000:1000:/home/v", "0:0:/root", "nobody", '{"uid": 1, "gid": 1, "home": "/h"}', '{"password": "x"}'],
    "credentials": [MARKED.decode(), HASH.decode(), "vera:secret", "x", '{"password": "vera:secret"}', "!"],
    "mailaddrmap": ["a@b, @c", "a\nb", '"open'],
    "addrname": ["mail.example.org", ""],
}
NAMES = {
    "domain": ["*.example.org", "example.org", "mail.*", "*", "MAIL.example.org"],
    "netaddr": ["192.0.2.0/24", "2001:db8::/32", "local", "192.0.2.7", "no/99", "[2001:db8::1]"],
    "mailaddr": ["vera@example.org", "@example.org", "vera", "vera+tag@example.org", "@*.example.org"],
    "addrname": ["192.0.2.25", "::1", "[2001:db8::25]"],
    "source": ["192.0.2.25", "192.0.2.26", "2001:db8::25"],
    "relayhost": ["example.org", "smtps://label@mail.example.net"],
    "regex": ["^a+$", "(?i)ROOT", "("],
    "userinfo": ["*", "vera", "Root", "a:b"],
}
COMMON = ["root", "Root", "vera", "a/b", "a//b", "ROOT", "gr\u00fc\u00dfe", "a|b", " x", "folder/", "-", "sch\u00f6n@x"]
ASKED = [
    "192.0.2.200",
    "2001:db8::7",
    "[::1]",
    "mail.example.org",
    "eric@example.org",
    "nobody",
    "a:b",
    "../root",
    "aaa",
]


@pytest.mark.parametrize("layout", ["", 'mode = "direct"', "max_keys = 20", 'paths = { userinfo = "people" }'])
def test_query_answers_as_the_daemon_does_from_consul(consul, tmp_path, layout):
    rng = random.Random(layout)
    store, questions = {}, [*FETCHES]
    for service in SERVICES:
        if service == "auth":
            continue
        keys = [*NAMES.get(service, ()), *rng.sample(COMMON, 7), *(f"{service}-{number}" for number in range(15))]
        folder = "people" if "people" in layout and service == "userinfo" else f"mail/aliases/{service}"
        for key in keys:
            store[f"{folder}/{key}"] = rng.choice(WORDS.get(service, ["", "x", '"quoted"', "two\nlines", "[1]"]))
        asked = {key.encode() for key in [*keys, *COMMON, *ASKED] if key}
        questions += [(op, service, key) for op in ("check", "lookup") for key in asked]
    consul.kv_txn(store)
    conf = tmp_path / "c.toml"
    defaults = f'[defaults]\nprefix = "mail"\n{layout}\n[log]\nlevel = "error"\n'
    conf.write_text(f'[consul]\naddress = "http://{consul.address}"\n{defaults}')
    assert len(store) > 200
    assert differing(conf, questions) == []


STORED = {
    "alias/root": b"gilles",
    "alias/vip": b"x",
    "alias/Staff": b"gilles",
    "userinfo/boss": b"1000:1000:/home/boss",
    "userinfo/vera": b"1001:1001:/home/vera",
    "userinfo/*": b"5000:5000:/var/vmail/%u",
    "netaddr/192.0.2.0/24": b"",
    "netaddr/203.0.113.0/24": b"",
    "domain/example.org": b"",
}
DENIED = ("alias/vip", "userinfo/boss", "netaddr/203.0.113.0/24")


# Consul before 1.11 reports no hidden keys: lists, and with them a mirror, prove nothing about them.
@pytest.mark.parametrize("layout", ["", 'mode = "direct"', "max_keys = 3"])
@pytest.mark.parametrize("version", ["1.8.7", "1.22"])
def test_query_answers_as_the_daemon_does_where_keys_are_hidden(tmp_path, version, layout):
    asked = {
        "alias": (b"root", b"vip", b"staff", b"nobody"),
        "userinfo": (b"boss", b"vera", b"nobody", b"*"),
        "netaddr": (b"192.0.2.1", b"203.0.113.1", b"198.51.100.1"),
        "domain": (b"example.org", b"example.net"),
    }
    questions = [(op, name, key) for op in ("check", "lookup") for name, keys in asked.items() for key in keys]
    questions = sorted([*questions, ("fetch", "source", b"")])
    conf = tmp_path / "c.toml"
    (tmp_path / "token").write_text("T")
    rules = "".join(f'key "mail/aliases/{key}" {{ policy = "deny" }} ' for key in DENIED)
    with FakeConsul(version=version) as fake:
        for key, value in STORED.items():
            fake.put(f"mail/aliases/{key}".encode(), value)
        fake.tokens["T"] = f'key_prefix "mail/" {{ policy = "read" }} {rules}'
        settings = f'[consul]\naddress = "{fake.address}"\ntoken_file = "{tmp_path}/token"\n'
        conf.write_text(f'{settings}[defaults]\nprefix = "mail"\n{layout}\n[log]\nlevel = "error"\n')
        answers = [line.decode() for line in daemon_answers(conf, questions)]
        assert answers == [as_on_the_wire(each) for each in control_answers(conf, questions)]
    refused = {key for (_, _, key), answer in zip(questions, answers, strict=True) if answer.startswith("error")}
    hidden = {b"vip", b"boss"} if layout or version != "1.8.7" else set()
    patterns = {b"203.0.113.1", b"198.51.100.1"} if version != "1.8.7" else set()
    assert refused == hidden | patterns
