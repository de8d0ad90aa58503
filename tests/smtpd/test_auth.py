"""Verification of passwords: formats, cost, and users without a hash."""

from __future__ import annotations

import contextlib
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_consul.errors import ConfigError, EntryError, PeerError, Unreachable
from table_consul.services import SERVICES, Table
from table_consul.services.entries import Entries
from table_consul.services.passwords import (
    DEFAULT,
    MAX_KINDS,
    PASSWORD_BYTES,
    SCHEME_PREFIXES,
    Verifier,
    parse,
    strip_scheme,
    verifiable_hash,
    verify_hash,
)
from tests.smtpd.auth import HASHES, PASSWORD, SETTINGS, SHA512, argon2, binding, crypt, low_level

# DES reads eight characters of seven bits, so a wrong password must differ early.
WRONG = "wrong"


def verified(stored, password=PASSWORD, others=(), most=2.0):
    return Verifier().verify("users", stored, password.encode("utf-8", "surrogateescape"), others, most)


# ---- formats ----


@pytest.mark.parametrize("name", HASHES)
def test_right_password_is_verified_and_a_wrong_one_is_rejected(name):
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
    with pytest.raises(EntryError, match="does not support hashes by SHA-512"):
        verified(SHA512)
    assert not verified(None)


def test_failing_crypt_is_an_error(monkeypatch):
    def fail(word, salt):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(binding, "crypt", fail)
    with pytest.raises(EntryError, match="does not support hashes by"):
        verified(SHA512)


def test_argon2_hash_that_cannot_be_calculated_is_an_error():
    with pytest.raises(EntryError, match="the argon2 hash cannot be verified"):
        verified(argon2().replace(b"p=1", b"p=0"))


@pytest.mark.parametrize(
    "stored", [b"*", b"!", b"!!", b"*LK*", b"*0", b"!" + SHA512, b"vera:!" + SHA512, b"*" + SHA512]
)
def test_locked_account_is_rejected(stored):
    assert not verified(stored)


@pytest.mark.parametrize("password", ["", "a\0b", "x" * (PASSWORD_BYTES + 1), PASSWORD + "\0"])
def test_invalid_password_is_rejected(password):
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


ARGON2 = b"$argon2id$v=19$m=%d,t=1,p=%d$c2FsdHNhbHQ$" + b"A" * 43


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (ARGON2 % (262144, 1), ARGON2 % (262145, 1)),
        (ARGON2 % (65536, 1), ARGON2 % (900000, 1)),
        (b"$y$jDT$salt$" + B64, b"$y$jET$salt$" + B64),
        (b"$7$CU..../....salt$" + B64, b"$7$FU..../....salt$" + B64),
    ],
)
def test_hash_that_takes_too_much_memory_is_not_calculated(allowed, refused):
    assert verifiable_hash(allowed, 60.0).text == allowed
    with pytest.raises(EntryError, match=r"takes about \d+ MiB to verify, more than 256 MiB \(lower its memory cost\)"):
        verified(refused, most=60.0)
    assert not verified(None, others=[refused], most=60.0)


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [(ARGON2 % (1024, 16), ARGON2 % (1024, 17)), (b"$7$2/....E....salt$" + B64, b"$7$2/....F....salt$" + B64)],
)
def test_hash_with_too_much_parallelism_is_not_calculated(allowed, refused):
    assert verifiable_hash(allowed, 2.0).text == allowed
    with pytest.raises(EntryError, match=r"a parallelism of 17, more than 16 \(lower it\)"):
        verified(refused)


@pytest.mark.parametrize("stored", [ARGON2 % (900000, 1), ARGON2 % (1024, 99), b"$2b$15$" + b"." * 53])
def test_hash_that_costs_too_much_is_a_problem(stored):
    for service in ("auth", "credentials"):
        found = Entries(Table("users", services=("auth",)), SERVICES[service], [(b"vera", stored), (b"eric", SHA512)])
        ((key, text),) = found.problems
        assert (key, text.endswith(")")) == (b"users/%b/vera" % service.encode(), True)


@pytest.mark.parametrize("stored", [b"$6$rounds=1900000$s$" + b"." * 86, None])
def test_password_too_long_for_the_deadline_is_not_hashed(recorder, stored):
    others = [b"$6$rounds=1900000$s$" + b"." * 86]
    with pytest.raises(Unreachable, match="too little time left before the deadline of 2 s"):
        recorder.verify("users", stored, b"x" * PASSWORD_BYTES, others, 2.0, 2.0)
    recorder.verify("users", stored, b"x" * 16, others, 2.0, 2.0)
    assert len(recorder.calculated) == 1


@pytest.mark.parametrize("name", HASHES)
def test_cost_grows_with_the_password_only_in_sha_crypt_and_md5(name):
    known = parse(strip_scheme(HASHES[name]))
    growth = known.seconds_for(b"x" * PASSWORD_BYTES) / known.seconds_for(b"x" * 8)
    assert growth > 9.6 if known.scheme in ("SHA-512", "SHA-256", "MD5") else growth == 1


def test_bcrypt_reads_72_bytes_of_a_password():
    stored = crypt(SETTINGS["bcrypt"], "x" * 72)
    assert [verified(stored, "x" * length) for length in (71, 72, 73)] == [False, True, True]


def test_longer_deadline_allows_a_costlier_hash():
    assert verifiable_hash(b"$2b$15$" + b"." * 53, 5.0) is not None


@pytest.mark.parametrize("name", HASHES)
def test_estimated_cost_is_not_below_the_real_one(name):
    """The figures are twice those of a slow core; lower ones would admit hashes that exceed the deadline."""
    began = time.process_time()
    verified(HASHES[name])
    assert time.process_time() - began < parse(strip_scheme(HASHES[name])).seconds + 0.5


# ---- absent users ----


class RecordingVerifier(Verifier):
    """Records hashes instead of verifying them."""

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


MIXED = [HASHES[name] for name in ("bcrypt", "SHA-512", "argon2id", "DES")]


@pytest.mark.parametrize("stored", [*MIXED, None, b"*LK*"])
def test_every_failing_login_costs_one_hash_of_each_kind_in_the_table(recorder, stored):
    recorder.verify("users", stored, b"x", MIXED, 2.0, complete=True)
    assert {each.kind for each in recorder.calculated} == {parse(each).kind for each in MIXED}
    assert len(recorder.calculated) == len(MIXED)


def test_hashes_of_different_cost_are_different_kinds(recorder):
    cheap, dear = (b"$2b$%02d$" % cost + b"." * 53 for cost in (4, 10))
    for stored in (cheap, dear, None):
        recorder.verify("users", stored, b"x", [cheap, dear], 2.0, complete=True)
    costs = [each.cost.work for each in recorder.calculated]
    assert sorted(costs[:2]) == sorted(costs[2:4]) == sorted(costs[4:]) == [16, 1024]


def test_right_password_costs_its_own_hash():
    calculated = []
    verifier = Verifier(lambda known, password: calculated.append(known) or True)
    assert verifier.verify("users", SHA512, b"x", MIXED, 2.0)
    assert [each.text for each in calculated] == [SHA512]


@pytest.mark.parametrize("stored", [*(b"$2b$%02d$" % cost + b"." * 53 for cost in (14, 13, 4)), None])
def test_kinds_beyond_half_the_deadline_are_skipped_except_the_costliest(recorder, stored):
    kinds = [b"$2b$%02d$" % cost + b"." * 53 for cost in (14, 13, 4)]
    recorder.verify("users", stored, b"x", kinds, 2.0, complete=True)
    assert 1 << 14 in {each.cost.work for each in recorder.calculated}
    assert sum(each.seconds for each in recorder.calculated if each.text[:7] != (stored or b"")[:7]) <= 2.0


def test_kinds_of_a_table_that_is_read_key_by_key_are_remembered(recorder):
    for stored in (HASHES["bcrypt"], SHA512):
        recorder.verify("users", stored, b"x", [stored], 2.0)
    recorder.calculated.clear()
    recorder.verify("users", None, b"x", [], 2.0)
    assert {each.scheme for each in recorder.calculated} == {"bcrypt", "SHA-512"}


def test_number_of_remembered_kinds_is_bounded(recorder):
    for cost in range(1000, 1100):
        recorder.verify("users", b"$6$rounds=%d$s$" % cost + b"." * 86, b"x", [], 2.0)
    recorder.calculated.clear()
    recorder.verify("users", None, b"x", [], 2.0)
    assert len(recorder.calculated) <= MAX_KINDS


def test_locked_user_costs_as_much_as_a_wrong_password(recorder):
    recorder.verify("users", b"*LK*", b"x", [b"clear", SHA512], 2.0)
    assert recorder.settings() == [parse(SHA512).setting]


@pytest.mark.parametrize("stored", [HASHES["bcrypt"], None, b"*LK*"])
def test_hash_that_takes_longer_than_the_remaining_time_is_not_calculated(recorder, stored):
    cost = parse(HASHES["bcrypt"]).seconds
    with pytest.raises(Unreachable, match="too little time left before the deadline of 2 s to verify a password"):
        recorder.verify("users", stored, b"x", [HASHES["bcrypt"]], 2.0, cost * 0.9)
    assert recorder.calculated == []
    recorder.verify("users", stored, b"x", [HASHES["bcrypt"]], 2.0, cost)
    assert recorder.settings() == [parse(HASHES["bcrypt"]).setting]


def test_absent_user_of_an_empty_table_costs_its_last_hash(recorder):
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
def test_hash_of_another_user_never_verifies_an_absent_one(name):
    assert not verified(None, others=[HASHES[name]])


def test_default_hash_is_supported_by_crypt():
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
    with pytest.raises(ConfigError, match=rf"package {package} is not installed \(install table-consul\[auth\]\)"):
        verified(stored)


@settings(max_examples=2 * settings().max_examples)
@given(
    stored=st.none() | st.binary() | st.text("$26yabc./:{}!*=,0123456789").map(str.encode),
    password=st.binary(max_size=20),
)
def test_verifier_answers_for_any_credential_and_password(stored, password):
    with contextlib.suppress(EntryError, PeerError):
        assert Verifier().verify("users", stored, password, [b"", stored or b"x"], 0.1) in (True, False)
