"""Entries of a service: their paths and keys, and what a lookup of each returns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.protocol import Found
from table_consul.services import DEFAULT_SERVICES, SERVICES, fold_key
from table_consul.services.entries import Entries
from tests.services.parsing import TABLE, entries
from tests.services.strategies import RAW, SERVICE, TABLES

LISTS = ("domain", "netaddr", "source", "mailaddr", "relayhost", "regex")

# ---- layout ----


def test_path_is_prefix_table_and_service():
    assert replace(TABLE, prefix="mail/hosts").path(SERVICES["alias"]) == b"mail/hosts/aliases/alias/"


def test_path_without_prefix_begins_with_the_table():
    assert TABLE.path(SERVICES["domain"]) == b"aliases/domain/"


def test_paths_move_one_service_only():
    table = replace(TABLE, prefix="mail", paths={"alias": "shared/people"})
    assert tuple(table.path(SERVICES[name]) for name in ("alias", "domain")) == (
        b"shared/people/",
        b"mail/aliases/domain/",
    )


def test_auth_is_registered_only_when_configured():
    assert {*SERVICES} - {"auth"} == {*DEFAULT_SERVICES}


# ---- keys ----


def test_fold_key_changes_ascii_letters_only():
    assert "straße@É.example".encode() == fold_key("STRAßE@É.Example".encode())


def test_upper_case_key_answers_a_lower_case_lookup():
    assert entries("alias", (b"Root", b"gilles")).lookup(b"root") == b"gilles"


@pytest.mark.parametrize("order", [1, -1])
def test_lower_case_key_takes_precedence_and_a_problem_names_both(order):
    found = entries("alias", *[(b"Root", b"eric"), (b"root", b"gilles")][::order])
    (problem,) = found.problems
    assert (
        found.lookup(b"root"),
        str(problem).startswith("aliases/alias/Root: "),
        "only in case from aliases/alias/root, which takes precedence" in str(problem),
    ) == (b"gilles", True, True)


def test_first_of_two_upper_case_keys_takes_precedence():
    found = entries("alias", (b"ROOT", b"gilles"), (b"Root", b"eric"))
    assert (found.lookup(b"root"), len(found.problems)) == (b"gilles", 1)


def test_lower_case_key_replaces_a_case_variant_good_or_bad():
    fixed = entries("alias", (b"Root", b"|sh"), (b"root", b"gilles"))
    broken = entries("alias", (b"Root", b"gilles"), (b"root", b"|sh"))
    assert (fixed.lookup(b"root"), fixed.errors, broken.values) == (b"gilles", {}, {})


def test_folders_are_not_entries():
    found = entries("alias", (b"", None), (b"staff/", None), (b"staff/root", b"gilles"))
    assert (len(found), found.find(b"staff/"), found.lookup(b"staff/root")) == (1, None, b"gilles")


def test_keys_may_contain_slashes():
    assert entries("netaddr", (b"192.0.2.0/24", None)).find(b"192.0.2.0/24") is not None


def test_utf_8_keys_and_values_are_unchanged():
    key, value = "jörg@exämple.org".encode(), "jörg".encode()
    assert value == entries("string", (key, value)).lookup(key)


def test_lookup_of_an_absent_key_is_none():
    assert entries("alias", (b"root", b"gilles")).lookup(b"nobody") is None
    assert entries("alias").find(b"nobody") is None


# ---- internationalised names ----


NAMES = ["jörg@exämple.org", "用户@例子.公司", "пользователь@пример.рф", "δοκιμή@παράδειγμα.ελ", "a\u0301@e\u0301.org"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("service", ["alias", "mailaddrmap", "mailaddr", "string"])
def test_internationalised_names_are_unchanged(service, name):
    key = name.encode()
    found = entries(service, (key, key))
    assert (found.lookup(key), found.find(key)) == (key, key)


@pytest.mark.parametrize("name", NAMES)
def test_internationalised_domains_match_as_bytes(name):
    domain = name.partition("@")[2].encode()
    found = entries("domain", (b"*." + domain, None))
    assert (found.find(b"mx." + domain), found.find(domain)) == (b"*." + domain, None)


def test_unicode_normal_forms_are_different_keys():
    composed, decomposed = "j\u00f6rg".encode(), "jo\u0308rg".encode()
    assert entries("alias", (composed, b"gilles")).lookup(decomposed) is None


def test_bytes_that_are_not_utf_8_are_unchanged():
    assert entries("alias", (b"j\xf6rg", b"j\xf6rg")).lookup(b"j\xf6rg") == b"j\xf6rg"


# ---- empty ----


@pytest.mark.parametrize("service", LISTS)
@pytest.mark.parametrize("raw", [b"", None, b" \n", b'""'])
def test_list_entry_without_value_answers_with_its_key(service, raw):
    found = entries(service, (b"example.org", raw))
    assert (found.find(b"example.org"), found.lookup(b"example.org")) == (b"example.org", b"example.org")


@pytest.mark.parametrize("service", ["alias", "credentials", "userinfo", "addrname", "mailaddrmap", "string"])
@pytest.mark.parametrize("raw", [b"", None, b" \n"])
def test_value_entry_without_value_exists_but_its_lookup_is_an_error(service, raw):
    found = entries(service, (b"root", raw))
    with pytest.raises(EntryError, match=f"aliases/{service}/root: missing value"):
        found.lookup(b"root")
    assert found.find(b"root") is not None


def test_list_entry_with_a_value_answers_with_the_value():
    assert entries("domain", (b"example.org", b"yes")).lookup(b"example.org") == b"yes"


def test_relayhost_with_a_value_answers_with_the_host():
    relays = entries("relayhost", (b"example.org", b"smtp://mx.example.net"), (b"smtp://mx.example.com", b""))
    assert relays.lookup(b"example.org") == b"smtp://mx.example.net"
    assert relays.lookup(b"smtp://mx.example.com") == b"smtp://mx.example.com"


@pytest.mark.parametrize("key", [b"a\nb", b"a\rb", b"a\0b"])
def test_key_that_is_not_a_valid_reply_is_an_error(key):
    with pytest.raises(EntryError, match="contains a control character"):
        entries("domain", (key, None)).lookup(key)


# ---- bad entries ----


def test_bad_entry_affects_no_other():
    found = entries("alias", (b"bad", b"|sh"), (b"root", b"gilles"), (b"worse", b'"\xff'))
    assert (b"gilles", {b"bad", b"worse"}, 2) == (found.lookup(b"root"), set(found.errors), len(found.problems))


def test_bad_entry_exists_and_its_lookup_names_the_key():
    found = entries("alias", (b"bad", b"|sh"))
    with pytest.raises(EntryError, match=r"^aliases/alias/bad: the value contains a \|command"):
        found.lookup(b"bad")
    assert found.find(b"bad") is not None


def test_problem_escapes_control_characters_of_its_key():
    (problem,) = entries("alias", (b"a\x1b[31m\n", b"|sh")).problems
    assert str(problem).startswith("aliases/alias/a\\x1b[31m\\n: ")


def test_repeated_lookups_of_a_bad_entry_do_not_grow_the_traceback():
    found = entries("alias", (b"bad", b"|sh"))
    depth = 0
    for _ in range(50):
        with pytest.raises(EntryError) as caught:
            found.lookup(b"bad")
        depth = len(caught.traceback)
    assert depth < 10


# ---- properties ----


@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_answers_are_valid_replies(table, service, key, raw):
    found = Entries(table, service, [(key, raw)])
    for ask in (lambda: found.lookup(fold_key(key)), lambda: (found.next_after(None) or (None, None))[1]):
        try:
            value = ask()
        except EntryError:
            continue
        assert value is None or Found(value).value == value
