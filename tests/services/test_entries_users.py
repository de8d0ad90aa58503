"""Entries of users: records, which serve several services, and the default entry of userinfo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul.errors import EntryError
from tests.services.parsing import RECORD, entries

# ---- records ----


def test_records_serve_several_services():
    assert entries("userinfo", (b"vera", RECORD)).lookup(b"vera") == b"1000:1000:/home/vera"
    assert entries("credentials", (b"vera", RECORD)).lookup(b"vera") == b"$6$salt$hash"


def test_record_for_another_service_is_an_error_but_no_problem():
    found = entries("userinfo", (b"vera", b'{"password": "x"}'))
    with pytest.raises(EntryError, match="aliases/userinfo/vera: the record has no uid and no gid and no home, which"):
        found.lookup(b"vera")
    assert (found.problems, found.find(b"vera")) == ([], b"vera")


def test_record_without_some_fields_is_a_problem():
    found = entries("userinfo", (b"vera", b'{"uid": 1, "home": null}'), (b"*", b"1000:1000:/home/%u"))
    with pytest.raises(EntryError, match="the record has no gid"):
        found.lookup(b"vera")
    assert len(found.problems) == 1


# ---- the default entry ----


DEFAULT = (b"*", b"5000:5000:/var/vmail/%d/%n")


def test_default_entry_answers_for_users_without_entry():
    users = entries("userinfo", DEFAULT, (b"gilles", b"1000:1000:/home/gilles"), (b"eric", b'{"password": "x"}'))
    assert [users.lookup(user) for user in (b"gilles", b"vera@example.org")] == [
        b"1000:1000:/home/gilles",
        b"5000:5000:/var/vmail/example.org/vera",
    ]
    with pytest.raises(EntryError, match=r"aliases/userinfo/\*: the user name has no domain for the %d"):
        users.lookup(b"eric")
    assert (users.contains(b"vera"), users.find(b"vera")) == (True, None)


@pytest.mark.parametrize(
    ("home", "user", "answer"),
    [
        (b"/home/%u", b"vera", b"/home/vera"),
        (b"/home/%u", b"vera@example.org", b"/home/vera@example.org"),
        (b"/home/%n", b"vera", b"/home/vera"),
        (b"/home/%n", b"a@b@example.org", b"/home/a@b"),
        (b"/100%%/%u%%", b"%u", b"/100%/%u%"),
        (b"/home/all", b"vera", b"/home/all"),
        (b"/home/%u", "jörg".encode(), "/home/jörg".encode()),
        (b"/home/%u", b"*", b"/home/*"),
        (b"/home/%u", b"\\1\\g<0>", b"/home/\\1\\g<0>"),
        (b"/home/%u", b"...", b"/home/..."),
        (b"home/%n", b"vera", b"home/vera"),
        (b"", b"vera", b""),
        (b"a:%u", b"vera", b"a:vera"),
    ],
)
def test_default_home_is_filled_in_with_the_user(home, user, answer):
    assert entries("userinfo", (b"*", b"5000:5000:" + home)).lookup(user) == b"5000:5000:" + answer


@pytest.mark.parametrize(
    "user", [b"..", b".", b"a/b", b"/", b"../x", b"a\x1bb", b"a\x7f", b"", b"x:0", b"x:0:0:/root", b"a\0"]
)
@pytest.mark.parametrize("home", [b"/home/%u", b"/home/%n", b"/home/all"])
def test_user_name_that_is_unsafe_in_the_default_home_is_not_found(user, home):
    users = entries("userinfo", (b"*", b"5000:5000:" + home))
    if user in (b"..", b".") and b"%" not in home:
        assert users.lookup(user) == b"5000:5000:/home/all"
        return
    assert (users.lookup(user), users.contains(user)) == (None, False)


def test_user_name_that_makes_two_dots_of_the_default_home_is_not_found():
    assert entries("userinfo", (b"*", b"5000:5000:/home/.%u/x")).lookup(b".") is None


def test_unsafe_user_name_with_its_own_entry_is_found():
    users = entries("userinfo", DEFAULT, (b"a/b", b"1000:1000:/home/a"))
    assert (users.lookup(b"a/b"), users.contains(b"a/b")) == (b"1000:1000:/home/a", True)


def test_check_of_a_user_is_found_where_the_lookup_has_a_value():
    users = entries("userinfo", (b"*", b"5000:5000:/home/%u"), (b"eric", b'{"password": "x"}'))
    asked = (b"vera", b"eric", b"*", b"a/b", b"")
    assert [users.contains(user) for user in asked] == [users.lookup(user) is not None for user in asked]


def test_bad_default_entry_is_an_error_only_for_users_without_entry():
    users = entries("userinfo", (b"*", b"0:0:/root"), (b"gilles", b"1000:1000:/home/gilles"))
    assert users.lookup(b"gilles") == b"1000:1000:/home/gilles"
    with pytest.raises(EntryError, match="uid or gid 0"):
        users.lookup(b"vera")


def test_absent_user_without_default_entry_is_none():
    assert entries("userinfo", (b"gilles", b"1000:1000:/")).lookup(b"vera") is None


def test_star_is_an_ordinary_key_in_other_services():
    assert entries("string", (b"*", b"x")).lookup(b"vera") is None


@given(user=st.binary() | st.text(".%/:@aun\0").map(str.encode), home=st.text("/%und.").map(str.encode))
def test_default_entry_keeps_its_ids_and_home_for_any_user(user, home):
    users = entries("userinfo", (b"*", b"5000:5001:" + home))
    try:
        value = users.lookup(user)
    except EntryError:
        return
    if value is None:
        return
    name, uid, gid, path = (user + b":" + value).split(b":", 3)  # smtpd: to.c, text_to_userinfo
    assert (name, uid, gid, value.count(b"\n")) == (user, b"5000", b"5001", 0)
    assert b"%" not in home or b".." not in path.split(b"/")
