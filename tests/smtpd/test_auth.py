from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import ConfigError, EntryError, Forbidden, PeerError, TableConsulError, Unreachable
from table_consul.kv import Pair
from table_consul.protocol import Failed, Found, NotFound, Request
from table_consul.responder import Responder
from table_consul.server import Server
from table_consul.services import SERVICES, Table, passwords
from table_consul.services.entries import Entries
from table_consul.services.passwords import (
    DEFAULT,
    PASSWORD_BYTES,
    SCHEME_PREFIXES,
    Verifier,
    parse,
    strip_scheme,
    verifiable_hash,
    verify_hash,
)
from table_consul.sources.direct import DirectSource
from table_consul.tables import Tables
from tests.dialogue import write_config, write_source

try:
    binding = passwords._binding()
except ConfigError as error:
    pytest.skip(
        f"{error}; it is built from source: apt-get install gcc python3-dev libcrypt-dev", allow_module_level=True
    )
low_level = pytest.importorskip("argon2.low_level", reason="needs argon2-cffi: pip install 'table-consul[auth]'")

TABLE = Table("users", services=("auth", "credentials"))
PASSWORD = "Correct Horse: bättery|"
SETTINGS = {
    "bcrypt": "$2b$04$abcdefghijklmnopqrstuu",
    "bcrypt of PHP": "$2y$04$abcdefghijklmnopqrstuu",
    "SHA-512": "$6$rounds=1000$saltsalt$",
    "SHA-512 without rounds": "$6$saltsalt$",
    "SHA-256": "$5$rounds=1000$saltsalt$",
    "yescrypt": "$y$j75$F5Jx5fExrKuPp53xLKQ..1$",
    "gost-yescrypt": "$gy$j75$F5Jx5fExrKuPp53xLKQ..1$",
    "scrypt": "$7$2/..../....saltsalt$",
    "MD5": "$1$saltsalt$",
    "DES": "ab",
}


def crypt(setting, password=PASSWORD):
    made = binding.crypt(password, setting)
    assert not made.startswith("*"), f"crypt(3) of this system does not know {setting}"
    return made.encode()


def argon2(password=PASSWORD, kind=low_level.Type.ID, memory=64, passes=1):
    return low_level.hash_secret(password.encode(), b"saltsalt", passes, memory, 1, 32, kind)


HASHES = {name: crypt(setting) for name, setting in SETTINGS.items()} | {
    "argon2id": argon2(),
    "argon2i": argon2(kind=low_level.Type.I),
    "argon2d": argon2(kind=low_level.Type.D),
}
SHA512 = HASHES["SHA-512"]
# DES reads eight characters of seven bits, so a wrong password must differ early.
WRONG = "wrong"


def verified(stored, password=PASSWORD, others=(), most=2.0):
    return Verifier().verify("users", stored, password.encode("utf-8", "surrogateescape"), others, most)


# ---- formats ----


@pytest.mark.parametrize("name", HASHES)
def test_right_password_is_verified_and_a_wrong_one_is_not(name):
    assert (verified(HASHES[name]), verified(HASHES[name], WRONG)) == (True, False)


@pytest.mark.parametrize("name", sorted({*HASHES} - {"DES"}))
def test_password_is_case_sensitive(name):
    assert not verified(HASHES[name], PASSWORD.lower())


@pytest.mark.parametrize("name", HASHES)
def test_hash_after_a_user_and_a_scheme_prefix_is_verified(name):
    stored = b"vera:" + strip_scheme(b"{ARGON2ID}" + HASHES[name])
    assert verified(stored)


@pytest.mark.parametrize("mark", SCHEME_PREFIXES)
def test_scheme_prefix_is_stripped_in_any_case(mark):
    assert strip_scheme(mark.title() + SHA512) == SHA512


@pytest.mark.parametrize(
    "stored",
    [
        b"hunter2",
        b"{SSHA512}hunter2",
        b"{PLAIN}hunter2",
        b"{SHA512-CRYPT}hunter2",
        b"$9$salt$hunter2",
        b"$6$salt$hunter2",
        b"$6$rounds=9999999999$saltsalt$" + b"." * 86,
        b"$argon2id$hunter2",
        b"$argon2x$v=19$m=64,t=1,p=1$c2FsdHNhbHQ$hunter2",
        SHA512 + b"x",
        SHA512[:-1],
        b"label:hunter2",
        b"",
    ],
)
def test_unverifiable_credential_is_an_error(stored):
    with pytest.raises(EntryError, match="not a hash that can be verified") as caught:
        verified(stored)
    assert "hunter2" not in str(caught.value)


def test_hash_that_crypt_does_not_know_is_an_error(monkeypatch):
    monkeypatch.setattr(binding, "crypt", lambda word, salt: "*0")
    with pytest.raises(EntryError, match="by SHA-512, which crypt"):
        verified(SHA512)
    assert not verified(None)


def test_failing_crypt_is_an_error(monkeypatch):
    def fail(word, salt):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(binding, "crypt", fail)
    with pytest.raises(EntryError, match="does not know"):
        verified(SHA512)


def test_argon2_hash_that_cannot_be_calculated_is_an_error():
    with pytest.raises(EntryError, match="by argon2 that cannot be verified"):
        verified(argon2().replace(b"p=1", b"p=0"))


@pytest.mark.parametrize(
    "stored", [b"*", b"!", b"!!", b"*LK*", b"*0", b"!" + SHA512, b"vera:!" + SHA512, b"*" + SHA512]
)
def test_locked_account_is_rejected(stored):
    assert not verified(stored)


@pytest.mark.parametrize("password", ["", "a\0b", "x" * (PASSWORD_BYTES + 1), PASSWORD + "\0"])
def test_password_that_no_hash_is_made_of_is_rejected(password):
    assert (verified(SHA512, password), verified(None, password)) == (False, False)


def test_longest_password_is_verified():
    long = "x" * PASSWORD_BYTES
    assert verified(crypt("$6$rounds=1000$salt$", long), long)


@pytest.mark.parametrize("stored", [SHA512, None])
def test_password_that_is_not_utf_8_is_an_error_for_every_user(stored):
    with pytest.raises(PeerError, match="the password is not UTF-8") as caught:
        verified(stored, "hunter2\udcff")
    assert "hunter2" not in repr(caught.value)


def test_argon2_verifies_any_bytes():
    stored = low_level.hash_secret(b"\xff\0x", b"saltsalt", 1, 64, 1, 32, low_level.Type.ID)
    assert verified(stored, "\udcff\0x")


# ---- cost ----

B64 = b"." * 43


@pytest.mark.parametrize(
    ("cheap", "costly"),
    [
        (b"$2b$14$" + b"." * 53, b"$2b$15$" + b"." * 53),
        (b"$6$rounds=2000000$s$" + b"." * 86, b"$6$rounds=2000001$s$" + b"." * 86),
        (b"$5$rounds=999999$s$" + B64, b"$5$rounds=999999999$s$" + B64),
        (b"$y$jDT$salt$" + B64, b"$y$jFT$salt$" + B64),
        (b"$7$CU..../....salt$" + B64, b"$7$NU..../....salt$" + B64),
        (
            b"$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$" + B64.replace(b".", b"A"),
            b"$argon2id$v=19$m=2097152,t=1,p=4$c2FsdHNhbHQ$" + B64.replace(b".", b"A"),
        ),
    ],
)
def test_hash_that_takes_longer_than_the_deadline_is_not_calculated(cheap, costly):
    assert verifiable_hash(cheap, 2.0).text == cheap
    with pytest.raises(EntryError, match=r"takes about [0-9.]+ s to verify, more than the deadline of 2 s"):
        verified(costly)
    assert not verified(None, others=[costly])


def test_longer_deadline_allows_a_costlier_hash():
    assert verifiable_hash(b"$2b$15$" + b"." * 53, 5.0) is not None


@pytest.mark.parametrize("name", HASHES)
def test_estimated_cost_is_not_below_the_real_one(name):
    """The figures are twice those of a slow core: else they would let through what breaks the deadline."""
    began = time.process_time()
    verified(HASHES[name])
    assert time.process_time() - began < parse(strip_scheme(HASHES[name])).seconds + 0.5


# ---- absent users ----


class RecordingVerifier(Verifier):
    """Records the hashes that it would verify."""

    def __init__(self):
        super().__init__(lambda known, password: self.calculated.append(known) or False)
        self.calculated = []

    def settings(self):
        return [known.setting for known in self.calculated]


@pytest.fixture
def recorder():
    return RecordingVerifier()


@pytest.mark.parametrize("name", HASHES)
def test_absent_user_costs_as_much_as_a_wrong_password(recorder, name):
    stored = strip_scheme(HASHES[name])
    recorder.verify("users", stored, b"x", [], 2.0)
    recorder.verify("users", None, b"x", [stored], 2.0)
    assert recorder.settings() == [parse(stored).setting] * 2
    assert recorder.calculated[1].text != stored


def test_locked_user_costs_as_much_as_a_wrong_password(recorder):
    recorder.verify("users", b"*LK*", b"x", [b"clear", SHA512], 2.0)
    assert recorder.settings() == [parse(SHA512).setting]


@pytest.mark.parametrize("stored", [HASHES["bcrypt"], None, b"*LK*"])
def test_hash_that_takes_longer_than_what_is_left_is_not_calculated(recorder, stored):
    cost = parse(HASHES["bcrypt"]).seconds
    with pytest.raises(Unreachable, match="too little left of the deadline of 2 s to verify a password"):
        recorder.verify("users", stored, b"x", [HASHES["bcrypt"]], 2.0, cost * 0.9)
    assert recorder.calculated == []
    recorder.verify("users", stored, b"x", [HASHES["bcrypt"]], 2.0, cost)
    assert recorder.settings() == [parse(HASHES["bcrypt"]).setting]


def test_absent_user_without_others_costs_the_last_hash_of_the_same_table(recorder):
    recorder.verify("users", HASHES["bcrypt"], b"x", [], 2.0)
    recorder.verify("users", None, b"x", [], 2.0)
    recorder.verify("others", None, b"x", [], 2.0)
    bcrypt = parse(HASHES["bcrypt"]).setting
    assert recorder.settings() == [bcrypt, bcrypt, DEFAULT.setting]


@pytest.mark.parametrize("name", HASHES)
def test_verifier_remembers_no_digest(recorder, name):
    stored = strip_scheme(HASHES[name])
    recorder.verify("users", stored, PASSWORD.encode(), [], 2.0)
    recorder.verify("users", None, PASSWORD.encode(), [], 2.0)
    remembered = recorder.calculated[1]
    assert remembered.setting == parse(stored).setting
    assert HASHES[name][-10:] not in remembered.text
    assert not verify_hash(remembered, PASSWORD.encode())


@pytest.mark.parametrize("name", HASHES)
def test_hash_of_another_user_is_no_password_of_an_absent_one(name):
    assert not verified(None, others=[HASHES[name]])


def test_default_hash_is_one_that_crypt_calculates():
    assert not verify_hash(DEFAULT, b"x")
    assert parse(DEFAULT.text).setting == DEFAULT.setting


# ---- missing packages ----


@pytest.mark.parametrize(
    ("module", "package", "stored"),
    [("crypt_r", "crypt-r", SHA512), ("argon2", "argon2-cffi", HASHES["argon2id"]), ("crypt_r", "crypt-r", None)],
)
def test_missing_package_is_an_error_that_names_it(monkeypatch, module, package, stored):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "crypt", None)
    with pytest.raises(ConfigError, match=rf"package {package} is not installed; install table-consul\[auth\]"):
        verified(stored)


@settings(deadline=None, max_examples=200)
@given(
    stored=st.none() | st.binary() | st.text("$26yabc./:{}!*=,0123456789").map(str.encode),
    password=st.binary(max_size=20),
)
def test_verifier_answers_for_any_credential_and_password(stored, password):
    with contextlib.suppress(EntryError, PeerError):
        assert Verifier().verify("users", stored, password, [b"", stored or b"x"], 0.1) in (True, False)


# ---- the answer ----


class Scripted:
    """A source that holds entries by service; it notes what it was asked for."""

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
    assert [name for name, *_ in source.asked] == ["auth", "credentials"] * 3  # or time would tell where a user is
    assert {deadline for *_, deadline in source.asked} == {1000.0 + TABLE.deadline}


def test_relay_password_in_clear_text_is_an_error():
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
    assert reply.reason == "the service auth answers check alone, with a key USER:PASSWORD"


def test_empty_user_is_not_found():
    assert ask(Scripted(auth={b"": SHA512}), f":{PASSWORD}") == NotFound()


def test_star_in_auth_is_no_default():
    assert ask(Scripted(auth={b"*": SHA512}), f"vera:{PASSWORD}") == NotFound()


# ---- sources ----


class Client:
    address = "http://consul:8500"

    def __init__(self, **store):
        self.store = {f"users/{key.replace('_', '/', 1)}".encode(): value for key, value in store.items()}
        self.asked = []
        self.errors = {}

    def get(self, key, *, timeout):
        self.asked.append(key)
        if key in self.errors:
            raise self.errors[key]
        return Pair(key, self.store[key], 1) if key in self.store else None


@pytest.mark.parametrize(
    ("user", "reply", "reads"),
    [
        ("vera", Found(), [b"users/auth/vera", b"users/credentials/vera"]),
        ("eric", Found(), [b"users/auth/eric", b"users/credentials/eric"]),
        ("walter", NotFound(), [b"users/auth/walter", b"users/credentials/walter"]),
        ("../credentials/eric", NotFound(), []),
        ("..", NotFound(), []),
        ("a\0b", NotFound(), []),
    ],
)
def test_direct_mode_reads_two_keys_for_any_user_that_a_url_can_name(user, reply, reads):
    client = Client(auth_vera=SHA512, credentials_eric=SHA512)
    assert ask(DirectSource(client, lambda: 1000.0), f"{user}:{PASSWORD}") == reply
    assert client.asked == reads


def test_direct_mode_does_not_take_403_for_absence():
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


def test_file_source_is_asked_for_credentials_when_only_auth_is_registered(tmp_path):
    path = write_config(tmp_path, 'services = ["auth"]')
    write_source(tmp_path, {"users/credentials/vera": SHA512})
    assert said(path, [f"vera:{PASSWORD}"]) == [b"register|auth", b"register|ready", b"check-result|1|found"]


@pytest.mark.parametrize("user", ["vera", "walter"])
def test_reads_and_verification_share_one_deadline(tmp_path, user):
    path = write_config(tmp_path, 'services = ["auth"]')
    write_source(tmp_path, {"users/auth/vera": HASHES["SHA-512 without rounds"]})
    from table_consul import config

    tables = Tables(lambda: config.load(str(path), {}))
    request = Request("check", b"1", "users", "auth", f"{user}:{PASSWORD}".encode())
    assert isinstance(tables.answer(request, time.monotonic()), Found if user == "vera" else NotFound)
    late = tables.answer(request, time.monotonic() - tables.table("users").deadline)
    assert (type(late), type(late.cause)) == (Failed, Unreachable)
    assert late.reason == "too little left of the deadline of 2 s to verify a password"


# ---- secrecy ----


def said(path, keys, caplog=None, version="7.9.0"):
    """What the process answers to these keys, with the configuration at that path."""
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
    said.cells = sources.counters.cells()
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
    answers = said(path, [f"{user}:hunter2{end}" for user in users for end in ("", "\udcff", "x" * 600)] + ["hunter2"])
    told = b"\n".join(answers).decode() + caplog.text + repr(said.cells)
    assert len(answers) == 2 + 3 * len(users) + 1
    assert not {word for word in ("hunter2", "SECRETHASH", SHA512.decode()[-20:]) if word in told}
    assert "users/auth/eric: not a hash that can be verified" in caplog.text


def test_request_repr_contains_no_password():
    assert "hunter2" not in repr(Request("check", b"1", "users", "auth", b"vera:hunter2"))
    assert "root" in repr(Request("check", b"1", "users", "alias", b"root"))


@pytest.mark.parametrize(
    ("version", "registered"), [("7.8.0p1", False), ("7.9.0", True), ("7.10.1", True), ("", False)]
)
def test_auth_is_registered_only_with_smtpd_that_keeps_the_case_of_passwords(tmp_path, version, registered):
    path = write_config(tmp_path, 'services = ["auth", "credentials"]')
    assert (b"register|auth" in said(path, [], version=version)) is registered


def test_auth_is_the_only_service_with_secret_keys():
    assert [service.name for service in SERVICES.values() if service.answers == "check"] == ["auth"]
