"""Values of userinfo, UID:GID:HOME, which must never let a delivery run as root."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.services.parsing import TABLE, read, refusal

ROOT_ALLOWED = replace(TABLE, allow_root=True)
ROOT_IN_DISGUISE = [b"0:0:/root", b"0:1000:/", b"1000:0:/", b"00:1000:/", b"1000:000000000000:/"]
NO_USERS = [
    b"+0:1000:/",
    b"-0:1000:/",
    b"0x0:1000:/",
    b" 0:1000:/",
    "\u0660:1000:/".encode(),
    b"1000",
    b"1000:1000",
    b"1000::/",
    b":1000:/",
    b"gilles:1000:1000:/home",
    b"1_0:10:/",
    b"\xb2:10:/",
]
# (uid_t)-1 makes setresuid(2) leave the ids as they are: those of root. 2**32 and more may wrap to 0.
WRAPPING = [b"4294967295:1000:/", b"1000:4294967295:/", b"4294967296:1000:/", b"1000:18446744073709551616:/"]


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_uid_or_gid_0_is_rejected_in_every_notation(raw):
    assert "mail as root; set allow_root = true" in refusal(raw, "userinfo")


@pytest.mark.parametrize("raw", ROOT_IN_DISGUISE)
def test_uid_or_gid_0_is_accepted_with_allow_root(raw):
    assert raw == read(raw, "userinfo", ROOT_ALLOWED)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", NO_USERS)
def test_malformed_user_is_rejected(raw, table):
    assert "expected UID:GID:HOME" in refusal(raw, "userinfo", table)


@pytest.mark.parametrize("table", [TABLE, ROOT_ALLOWED])
@pytest.mark.parametrize("raw", WRAPPING)
def test_ids_that_would_leave_the_process_root_are_always_rejected(raw, table):
    assert "1 to 4294967294" in refusal(raw, "userinfo", table)


def test_id_of_thousands_of_digits_is_rejected():
    assert "1 to 4294967294" in refusal(b"9" * 5000 + b":1000:/home", "userinfo")


def test_largest_ids_are_accepted():
    assert read(b"4294967294:4294967294:/home/x", "userinfo") == b"4294967294:4294967294:/home/x"


def test_user_name_with_a_colon_cannot_inject_another_uid():
    assert "the key contains a colon" in refusal(b"1000:1000:/home/x", "userinfo", key=b"gilles:0")


@pytest.mark.parametrize("home", [b"", b"home/vera", b".", b"a:b", b" "])
def test_any_home_is_accepted_as_smtpd_delivers_without_one(home):
    assert read(b"1000:1000:" + home, "userinfo") == (b"1000:1000:" + home).rstrip()


@pytest.mark.parametrize("home", [b"/home/../%u", b"./%u", b"%u/."])
def test_default_home_with_a_dot_segment_is_rejected(home):
    assert "contains . or .. as a segment" in refusal(b"1:1:" + home, "userinfo", key=b"*")
    assert read(b"1:1:" + home, "userinfo", key=b"vera") == b"1:1:" + home


def test_default_home_with_an_unknown_placeholder_is_rejected():
    assert read(b"1:1:/%u/%n/%d/%%x", "userinfo", key=b"*") == b"1:1:/%u/%n/%d/%%x"
    for home in (b"/%h", b"/%", b"/%%%x"):
        assert "unknown placeholder" in refusal(b"1:1:" + home, "userinfo", key=b"*")
        assert read(b"1:1:" + home, "userinfo", key=b"vera") == b"1:1:" + home
