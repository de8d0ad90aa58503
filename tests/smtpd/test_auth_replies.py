"""Replies of the service auth, the sources of its credentials, and the secrecy of passwords."""

from __future__ import annotations

import itertools
import logging
import socket
import time

import pytest
from msgspec.structs import replace

from table_consul import config
from table_consul.errors import Forbidden, TableConsulError, Unreachable
from table_consul.kv import Pair
from table_consul.protocol import Failed, Found, NotFound, Request
from table_consul.responder import Responder
from table_consul.server import Server
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.services.passwords import Verifier
from table_consul.sources.direct import DirectSource
from table_consul.tables import Tables
from tests.dialogue import write_config, write_source
from tests.smtpd.auth import HASHES, PASSWORD, SHA512, crypt

TABLE = Table("users", services=("auth", "credentials"))


# ---- replies ----


class Scripted:
    """A source with entries by service that records its requests."""

    def __init__(self, **services):
        self.services = services
        self.errors = {}
        self.asked = []

    def entries(self, table, service, key, deadline):
        self.asked.append((service.name, key, deadline))
        if service.name in self.errors:
            raise self.errors[service.name]
        return Entries(table, service, self.services.get(service.name, {}).items())


def ask(source, key, op="check", table=TABLE):
    if isinstance(key, str):
        key = key.encode()
    deadline = 1000.0 + table.deadline
    try:
        return Responder().answer(
            Request(op, b"1", "users", "auth", key),
            table,
            lambda service, user: source.entries(table, service, user, deadline),
        )
    except TableConsulError as error:
        return Failed(str(error), error)


def test_check_with_the_right_password_is_found_and_with_a_wrong_one_is_not():
    source = Scripted(auth={b"vera": SHA512})
    assert (ask(source, f"vera:{PASSWORD}"), ask(source, "vera:wrong")) == (Found(), NotFound())


def test_check_folds_the_user_but_not_the_password():
    source = Scripted(auth={b"Vera@Example.org": SHA512})
    replies = [ask(source, f"VERA@example.ORG:{PASSWORD}"), ask(source, f"vera@example.org:{PASSWORD.lower()}")]
    assert replies == [Found(), NotFound()]
    assert {key for _, key, _ in source.asked} == {b"vera@example.org"}


def test_check_splits_at_the_first_colon():
    source = Scripted(auth={b"vera": crypt("$6$rounds=1000$salt$", ":a:b:")})
    assert ask(source, "vera::a:b:") == Found()


def test_check_reads_both_services_for_every_user():
    source = Scripted(auth={b"eric": SHA512}, credentials={b"vera": b"vera:" + SHA512, b"eric": b"nonsense"})
    assert [ask(source, f"{user}:{PASSWORD}") for user in ("vera", "eric", "walter")] == [Found(), Found(), NotFound()]
    assert [name for name, *_ in source.asked] == ["auth", "credentials"] * 3  # else timing would reveal the service
    assert {deadline for *_, deadline in source.asked} == {1000.0 + TABLE.deadline}


def test_clear_text_relay_password_is_an_error():
    reply = ask(Scripted(credentials={b"label": b"user:hunter2"}), "label:hunter2")
    assert isinstance(reply, Failed)
    assert reply.reason.startswith("users/credentials/label: not a hash that can be verified")
    assert "hunter2" not in reply.reason


@pytest.mark.parametrize("missing", ["auth", "credentials"])
def test_unreadable_service_is_an_error(missing):
    source = Scripted()
    source.errors[missing] = Unreachable("away")
    assert ask(source, f"vera:{PASSWORD}") == Failed("away", source.errors[missing])


def test_user_of_the_first_service_does_not_need_the_second():
    source = Scripted(auth={b"vera": SHA512})
    source.errors["credentials"] = Unreachable("away")
    assert [ask(source, f"vera:{word}") for word in (PASSWORD, "wrong")] == [Found(), NotFound()]


def test_record_without_password_leaves_the_user_to_the_other_service():
    password = b'{"password": "{SHA512-CRYPT}%b", "uid": 1000}' % SHA512
    source = Scripted(auth={b"vera": password, b"eric": b'{"uid": 1}', b"walter": b"{}"}, credentials={b"eric": SHA512})
    assert [ask(source, f"{user}:{PASSWORD}") for user in ("vera", "eric")] == [Found(), Found()]
    reply = ask(source, f"walter:{PASSWORD}")
    assert reply.reason == "users/auth/walter: the record has no password, which auth needs"


@pytest.mark.parametrize("op", ["lookup", "fetch"])
def test_auth_answers_neither_lookup_nor_fetch(op):
    source = Scripted(auth={b"vera": SHA512})
    reply = ask(source, f"vera:{PASSWORD}" if op == "lookup" else "", op)
    assert (isinstance(reply, Failed), source.asked) == (True, [])


@pytest.mark.parametrize("key", ["", "vera", "hunter2"])
def test_malformed_auth_key_is_an_error_that_does_not_contain_it(key):
    reply = ask(Scripted(), key)
    assert isinstance(reply, Failed)
    assert reply.reason == "the service auth supports only check, with a key USER:PASSWORD"


def test_empty_user_is_not_found():
    assert ask(Scripted(auth={b"": SHA512}), f":{PASSWORD}") == NotFound()


def test_star_in_auth_is_not_a_default_entry():
    assert ask(Scripted(auth={b"*": SHA512}), f"vera:{PASSWORD}") == NotFound()


# ---- sources ----


class Client:
    address = "http://consul:8500"
    consistency = "consistent"

    def __init__(self, **store):
        self.store = {f"users/{key.replace('_', '/', 1)}".encode(): value for key, value in store.items()}
        self.asked = []
        self.errors = {}

    def get(self, key, *, timeout):
        self.asked.append(key)
        if key in self.errors:
            raise self.errors[key]
        return Pair(key, self.store[key], 1) if key in self.store else None

    def visible_keys(self, prefix, *, timeout, proven):
        return [key for key in self.store if key.startswith(prefix)], False


@pytest.mark.parametrize(
    ("user", "reply", "reads"),
    [
        ("vera", Found(), [b"users/auth/vera", b"users/credentials/vera"]),
        ("eric", Found(), [b"users/auth/eric", b"users/credentials/eric"]),
        ("walter", NotFound(), [b"users/auth/walter", b"users/credentials/walter"]),
    ],
)
def test_direct_mode_reads_two_keys_for_any_user_that_a_url_can_name(user, reply, reads):
    client = Client(auth_vera=SHA512, credentials_eric=SHA512)
    assert ask(DirectSource(client, lambda: 1000.0), f"{user}:{PASSWORD}") == reply
    assert client.asked == reads


@pytest.mark.parametrize("user", ["../credentials/eric", "..", "a\0b"])
def test_direct_mode_reads_no_key_for_a_user_that_no_url_can_name(user):
    client = Client(auth_vera=SHA512, credentials_eric=SHA512)
    assert isinstance(ask(DirectSource(client, lambda: 1000.0), f"{user}:{PASSWORD}"), Failed)
    assert client.asked == []


def test_direct_mode_does_not_treat_403_as_absence():
    client = Client()
    client.errors[b"users/credentials/vera"] = Forbidden("403")
    assert isinstance(ask(DirectSource(client, lambda: 1000.0), f"vera:{PASSWORD}"), Failed)


@pytest.mark.parametrize(
    ("services", "read"),
    [
        (("auth",), ("auth", "credentials")),
        (("credentials", "auth"), ("credentials", "auth")),
        (("alias",), ("alias",)),
    ],
)
def test_mirror_of_auth_includes_credentials(services, read):
    assert replace(TABLE, services=services).folders() == {b"users/": [*read]}


def test_file_source_reads_credentials_when_only_auth_is_registered(tmp_path):
    path = write_config(tmp_path, 'services = ["auth"]')
    write_source(tmp_path, {"users/credentials/vera": SHA512})
    assert replies(path, [f"vera:{PASSWORD}"]) == [b"register|auth", b"register|ready", b"check-result|1|found"]


# ---- secrecy ----


def replies(path, keys, caplog=None, version="7.9.0"):
    """The replies of the process to these keys, with the configuration at ``path``."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(f"config|smtpd-version|{version}\nconfig|tablename|users\nconfig|ready\n".encode())
        for number, key in enumerate(keys, 1):
            theirs.sendall(f"table|0.1|0|users|check|auth|{number}|{key}\n".encode("utf-8", "surrogateescape"))
        theirs.shutdown(socket.SHUT_WR)
        from table_consul import config

        sources = Tables(lambda: config.load(str(path), {}))
        Server(sources, lambda _: None, counters=sources.counters).serve(ours.fileno(), ours.fileno())
        ours.shutdown(socket.SHUT_WR)
        answers = b"".join(itertools.takewhile(bool, (theirs.recv(65536) for _ in itertools.count())))
    replies.cells = sources.counters.sums()
    return answers.splitlines()


def test_log_replies_and_counters_contain_no_password_or_hash(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    entries = {
        "users/auth/vera": SHA512,
        "users/auth/eric": b"{SSHA512}SECRETHASH",
        "users/auth/lock": b"!" + SHA512,
        "users/auth/dear": b"$2b$31$" + b"." * 53,
        "users/auth/list": b'["SECRETHASH", "SECRETHASH"]',
        "users/auth/torn": b'{"password": "SECRETHASH',
        "users/credentials/relay": b"user:SECRETHASH",
    }
    path = write_config(tmp_path, 'services = ["auth"]')
    write_source(tmp_path, entries)
    users = [*(key.rpartition("/")[2] for key in entries), "absent", "", ".."]
    answers = replies(
        path, [f"{user}:hunter2{end}" for user in users for end in ("", "\udcff", "x" * 600)] + ["hunter2"]
    )
    seen = b"\n".join(answers).decode() + caplog.text + repr(replies.cells)
    assert len(answers) == 2 + 3 * len(users) + 1
    assert not {word for word in ("hunter2", "SECRETHASH", SHA512.decode()[-20:]) if word in seen}
    assert "users/auth/eric: not a hash that can be verified" in caplog.text


def test_request_repr_contains_no_password():
    assert "hunter2" not in repr(Request("check", b"1", "users", "auth", b"vera:hunter2"))
    assert "root" in repr(Request("check", b"1", "users", "alias", b"root"))


@pytest.mark.parametrize(
    ("version", "registered"), [("7.8.0p1", False), ("7.9.0", True), ("7.10.1", True), ("", False)]
)
def test_auth_is_registered_only_with_smtpd_that_keeps_the_case_of_passwords(tmp_path, version, registered):
    path = write_config(tmp_path, 'services = ["auth", "credentials"]')
    assert (b"register|auth" in replies(path, [], version=version)) is registered


def test_auth_is_the_only_service_with_secret_keys():
    assert [service.name for service in SERVICES.values() if service.answers == "check"] == ["auth"]


def test_logins_in_one_write_are_each_answered_within_the_deadline_from_arrival(tmp_path):
    """Each login takes most of the deadline by the estimate, which leaves no time for the following ones."""
    path = write_config(tmp_path, 'services = ["auth"]', "deadline = 0.5")
    write_source(tmp_path, {"users/auth/vera": crypt("$2b$12$abcdefghijklmnopqrstuu")})
    began = time.monotonic()
    answers = replies(path, [f"vera:{PASSWORD}", *["vera:wrong", "walter:wrong"] * 6])[2:]
    assert time.monotonic() - began < 2.0  # all 13 would take 3 s and more on any machine
    assert answers[0] == b"check-result|1|found"
    late = b"error|too little time left before the deadline of 0.5 s to verify a password"
    assert {answer.partition(b"|")[2].partition(b"|")[2] for answer in answers[3:]} == {late}


def test_failing_logins_calculate_the_same_hashes_for_every_user():
    calculated = []
    source = Scripted(auth={b"vera": HASHES["MD5"], b"lock": b"*LK*"}, credentials={b"eric": b"eric:" + SHA512})
    responder = Responder(Verifier(lambda known, password: calculated.append(known.scheme) or False))
    for user in (b"vera", b"eric", b"lock", b"walter"):
        request = Request("check", b"1", "users", "auth", user + b":wrong")
        responder.answer(request, TABLE, lambda service, key: source.entries(TABLE, service, key, 0.0))
    assert [sorted(calculated[n : n + 2]) for n in range(0, 8, 2)] == [["MD5", "SHA-512"]] * 4
    assert len(calculated) == 8


@pytest.mark.parametrize("user", ["vera", "walter"])
def test_reads_and_verification_share_one_deadline(tmp_path, user):
    path = write_config(tmp_path, 'services = ["auth"]')
    write_source(tmp_path, {"users/auth/vera": HASHES["SHA-512 without rounds"]})
    tables = Tables(lambda: config.load(str(path), {}))
    request = Request("check", b"1", "users", "auth", f"{user}:{PASSWORD}".encode())
    assert isinstance(tables.answer(request, time.monotonic()), Found if user == "vera" else NotFound)
    late = tables.answer(request, time.monotonic() - tables.table("users").deadline)
    assert (type(late), type(late.cause)) == (Failed, Unreachable)
    assert late.reason == "too little time left before the deadline of 2 s to verify a password"
