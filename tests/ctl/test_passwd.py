"""`table-consulctl passwd`: where the hash is stored, which fields are kept, and which passwords are refused."""

from __future__ import annotations

import json

import pytest

from table_consul.services import passwords
from tests.control import at_terminal, control
from tests.ctl.importing import HASH, entries
from tests.dialogue import write_config

AUTH = '[tables.users]\nservices = ["auth", "userinfo"]'
SHARED = '[tables.users]\npaths = { credentials = "people", userinfo = "people" }'
RECORD = {"password": HASH, "uid": 1000, "gid": 100, "home": "/home/vera", "quota": 5}


@pytest.fixture
def passwd(fake, tmp_path):
    def run(*arguments, more="", stdin=b"secret\n"):
        conf = write_config(tmp_path, more=more, address=fake.address)
        return control("-c", conf, "passwd", "users", *arguments, stdin=stdin)

    return run


def verifies(text, word=b"secret"):
    known = passwords.parse(text)
    return known is not None and passwords.verify_hash(known, word)


def test_password_is_asked_twice_and_not_shown(consul):
    status, shown = at_terminal(
        *("passwd", "users", "vera"),
        turns=[
            (b"New password", b"secret\n"),
            (b"Repeat password", b"sceret\n"),
            (b"New password", b"secret\n"),
            (b"Repeat password", b"secret\n"),
        ],
        CONSUL_HTTP_ADDR=consul.address,
    )
    assert (status, "1 written" in shown, "secret" in shown, "$" in shown) == (0, True, False, False), shown
    (hashed,) = entries(consul, "users/credentials/").values()
    assert verifies(hashed)
    assert not verifies(hashed, b"sceret")


@pytest.mark.parametrize("scheme", ["yescrypt", "bcrypt"])
def test_scheme_can_be_chosen(passwd, fake, scheme):
    done = passwd("Vera", "--scheme", scheme)
    assert done.status == 0, done.said
    hashed = fake.store.entries[b"users/credentials/vera"].value
    known = passwords.parse(hashed)
    assert (known is not None and known.scheme, verifies(hashed)) == (scheme, True)


def test_bcrypt_is_used_where_crypt_does_not_know_yescrypt(passwd, fake, monkeypatch):
    make = passwords.make_hash
    monkeypatch.setattr(
        passwords, "make_hash", lambda scheme, *more: None if scheme == "yescrypt" else make(scheme, *more)
    )
    assert passwd("vera").status == 0
    assert fake.store.entries[b"users/credentials/vera"].value.startswith(b"$2b$12$")
    monkeypatch.setattr(passwords, "make_hash", lambda *_: None)
    done = passwd("vera")
    assert (done.status, "does not support yescrypt or bcrypt" in done.said) == (2, True)


def test_argon2_needs_the_service_auth(passwd, fake):
    done = passwd("vera", "--scheme", "argon2")
    assert (done.status, "requires the service auth" in done.said, fake.store.entries) == (2, True, {})
    assert passwd("vera", "--scheme", "argon2", more=AUTH).status == 0
    assert fake.store.entries[b"users/auth/vera"].value.startswith(b"$argon2id$")


@pytest.mark.parametrize(
    ("there", "goes_to"), [((), "auth"), (("credentials",), "credentials"), (("auth", "credentials"), "auth")]
)
def test_hash_replaces_that_of_the_user(passwd, fake, there, goes_to):
    for service in there:
        fake.put(f"users/{service}/vera".encode(), HASH.encode())
    assert passwd("vera", more=AUTH).status == 0
    changed = [key for key, each in fake.store.entries.items() if each.value != HASH.encode()]
    assert changed == [f"users/{goes_to}/vera".encode()]


def test_password_of_a_record_is_its_field(passwd, fake):
    fake.put(b"people/vera", json.dumps(RECORD).encode())
    done = passwd("vera", more=SHARED)
    assert (done.status, done.text) == (0, "~ vera (not shown)\n1 written\n")
    record = json.loads(fake.store.entries[b"people/vera"].value)
    assert verifies(record["password"].encode())
    assert {**record, "password": HASH} == RECORD


def test_user_before_the_hash_is_kept(passwd, fake):
    fake.put(b"users/credentials/label", b"vera:" + HASH.encode())
    assert passwd("label").status == 0
    user, _, hashed = fake.store.entries[b"users/credentials/label"].value.partition(b":")
    assert (user, verifies(hashed)) == (b"vera", True)


def test_relay_password_is_not_replaced(passwd, fake):
    fake.put(b"users/credentials/label", b"vera:relay")
    done = passwd("label")
    assert (done.status, "contains a relay password" in done.said, "vera:relay" in done.said) == (2, True, False)
    assert fake.store.entries[b"users/credentials/label"].value == b"vera:relay"


@pytest.mark.parametrize("lock", [b"*", b"!" + HASH.encode()])
def test_locked_account_is_unlocked_with_a_note(passwd, fake, lock):
    fake.put(b"users/credentials/vera", lock)
    done = passwd("vera")
    assert (done.status, done.said) == (0, "note: vera was locked and can now log in\n")
    assert verifies(fake.store.entries[b"users/credentials/vera"].value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"a\x1b[A\n", "control characters"),
        (b"\xff\n", "not valid UTF-8"),
        (b"x" * 512, "longer than 511 bytes"),
        (b"x" * 100_000, "longer than 511 bytes"),
    ],
)
def test_unusable_password_is_refused(passwd, fake, typed, said):
    done = passwd("vera", stdin=typed)
    assert (done.status, said in done.said, fake.store.entries) == (2, True, {})


def test_password_that_bcrypt_would_truncate_is_refused(passwd, fake):
    done = passwd("vera", "--scheme", "bcrypt", stdin=b"x" * 73)
    assert (done.status, "bcrypt would ignore the rest" in done.said, fake.store.entries) == (2, True, {})


def test_hash_that_takes_longer_than_the_deadline_is_refused(passwd, fake):
    done = passwd("vera", "--scheme", "bcrypt", more=f"deadline = 0.2\n{AUTH}")
    assert (done.status, "more than the deadline" in done.said, "--force" in done.said) == (2, True, False)
    assert fake.store.entries == {}


@pytest.mark.parametrize("scheme", ["yescrypt", "bcrypt"])
def test_hash_depends_on_the_salt(scheme):
    first, second, again = (
        passwords.make_hash(scheme, "secret", salt) for salt in (b"\0" * 16, b"\xff" * 16, b"\0" * 16)
    )
    assert first == again != second
