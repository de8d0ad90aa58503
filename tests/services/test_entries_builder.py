"""Entries built from former ones: reused, replaced and reported entries."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.errors import EntryError
from table_consul.services import SERVICES, fold_key
from table_consul.services.entries import Entries, EntriesBuilder
from tests.services.parsing import COMMANDS, TABLE, entries
from tests.services.state import CASE_VARIANTS, REUSING_TABLES, SHA512, STORED, state
from tests.services.strategies import RAW, SERVICE, TABLES


class TestBuilder:
    def build(self, *pairs, former=None, table=TABLE, service="alias"):
        builder = EntriesBuilder(table, SERVICES[service], former)
        builder.take(pairs)
        return builder

    def test_entries_added_in_batches_equal_those_added_at_once(self):
        builder = self.build((b"Root", b"eric"))
        builder.take([(b"root", b"gilles"), (b"bad", b"|sh")])
        whole = entries("alias", (b"Root", b"eric"), (b"root", b"gilles"), (b"bad", b"|sh"))
        built = builder.finish()
        assert (whole.values, whole.problems) == (built.values, built.problems)

    def test_unchanged_entries_are_the_former_object(self):
        former = entries("alias", (b"root", b"gilles\n"), (b"bad", b"|sh"))
        assert former is self.build((b"root", b"gilles"), (b"bad", b"|sh"), former=former).finish()

    def test_changed_entries_leave_the_former_ones_alone(self):
        former = entries("alias", (b"root", b"gilles"))
        built = self.build((b"root", b"eric"), former=former).finish()
        assert (built.lookup(b"root"), former.lookup(b"root")) == (b"eric", b"gilles")

    def test_unchanged_entries_with_a_bad_pattern_are_the_former_object(self):
        former = entries("netaddr", (b"192.0.2.0/24", None), (b"nonsense/99", None))
        same = self.build(*((key, None) for key in former.values), former=former, service="netaddr").finish()
        assert (former is same, len(former.problems)) == (True, 1)

    def test_deleted_case_variant_is_no_longer_a_problem(self):
        former = entries("alias", (b"Root", b"x"), (b"root", b"gilles"))
        assert self.build((b"root", b"gilles"), former=former).finish().problems == []

    def test_missing_keys_are_those_of_the_former_entries_only(self):
        former = entries("alias", (b"root", b"gilles"), (b"bad", b"|sh"), (b"kept", b"eric"))
        builder = self.build((b"kept", b"x"), former=former)
        assert ([*builder.missing_keys()], [*self.build((b"a", b"b")).missing_keys()]) == ([b"root", b"bad"], [])

    def test_revoked_permission_applies_to_unchanged_values(self):
        former = entries("alias", (b"root", b"|sh"), table=COMMANDS)
        assert {b"root"} == set(self.build((b"root", b"|sh"), former=former).finish().errors)

    def test_bad_case_variant_does_not_shadow_good_key(self):
        former = entries("alias", (b"root", b"gilles"))
        built = self.build((b"Root", b"|sh"), (b"root", b"gilles"), former=former).finish()
        assert (built.lookup(b"root"), built.errors, len(built)) == (b"gilles", {}, 1)
        assert [problem.key for problem in built.problems] == [b"aliases/alias/Root"]

    def test_key_stored_again_in_another_case_is_reported_and_missing_in_that_case(self):
        former = entries("alias", (b"Root", b"gilles"))
        built = self.build((b"root", b"gilles"), former=former).finish()
        assert [*self.build(former=built).missing_keys()] == [b"root"]

    def test_shorter_deadline_refuses_patterns_that_had_time(self):
        pairs = [(b"*" + b"*".join(b"%c" % c for c in row), None) for row in product(b"ab", repeat=12)]
        former = entries("domain", *pairs, table=replace(TABLE, deadline=60.0))
        built = self.build(*pairs, former=former, table=replace(TABLE, deadline=0.05), service="domain").finish()
        assert (former.problems, former.find(b"zz")) == ([], None)
        assert {problem.key for problem in built.problems} < {b"aliases/domain/" + key for key, _ in pairs}
        with pytest.raises(EntryError, match="aliases/domain/: too many patterns"):
            built.find(b"zz")

    def test_key_is_judged_again_when_a_service_stops_sharing_the_folder(self):
        shared = replace(TABLE, services=("alias", "string"), paths={"alias": "people", "string": "people"})
        former = entries("alias", (b"gilles chehade", b"gilles"), table=shared)
        alone = replace(shared, paths={"alias": "people"})
        built = self.build((b"gilles chehade", b"gilles"), former=former, table=alone).finish()
        assert former.problems == []
        assert built.problems == entries("alias", (b"gilles chehade", b"gilles"), table=alone).problems != []

    def test_missing_keys_survive_a_change_of_settings(self):
        former = entries("alias", (b"Root", b"gilles"))
        table = replace(TABLE, allow_commands=True)
        assert self.build(former=former, table=table).missing_keys() == {b"root": b"Root"}
        moved = replace(TABLE, paths={"alias": "elsewhere"})
        assert self.build(former=former, table=moved).missing_keys() == {}


def test_warning_of_an_unchanged_entry_remains_when_others_change():
    former = entries("credentials", (b"vera", b"hunter2"), (b"gone", b"hunter2"))
    builder = EntriesBuilder(TABLE, SERVICES["credentials"], former)
    builder.take([(b"vera", b"hunter2"), (b"new", b"$6$salt$hash")])
    built = builder.finish()
    assert [str(problem).partition(":")[0] for problem in built.problems] == ["aliases/credentials/vera"]
    builder = EntriesBuilder(TABLE, SERVICES["credentials"], built)
    builder.take([(b"vera", b"hunter2"), (b"new", b"$6$salt$hash")])
    assert builder.finish() is built


AUTH = replace(TABLE, services=("auth",))
BCRYPT = b"$2b$10$" + b"." * 53


def test_kinds_of_hashes_follow_every_change():
    former = None
    for pairs, kinds in (
        ({b"vera": BCRYPT, b"eric": BCRYPT, b"walter": SHA512}, {"bcrypt", "SHA-512"}),
        ({b"vera": BCRYPT, b"eric": SHA512, b"walter": SHA512}, {"bcrypt", "SHA-512"}),
        ({b"eric": BCRYPT, b"walter": SHA512}, {"bcrypt", "SHA-512"}),
        ({b"eric": b"*LK*", b"walter": SHA512, b"label": b"user:hunter2"}, {"SHA-512"}),
    ):
        builder = EntriesBuilder(AUTH, SERVICES["credentials"], former)
        builder.take(pairs.items())
        former = builder.finish()
        assert {scheme for scheme, _ in former.kinds} == kinds


def test_hashes_that_smtpd_verifies_have_no_kinds():
    assert entries("credentials", (b"vera", BCRYPT)).kinds == {}


# ---- properties ----


# Consul lists a key twice if two keys that are not UTF-8 look the same.
PAIRS = st.lists(st.tuples(st.sampled_from(CASE_VARIANTS), STORED), unique=True)


@pytest.mark.parametrize("service", SERVICES)
@given(stages=st.lists(st.tuples(REUSING_TABLES, PAIRS), min_size=2, max_size=4))
@example(stages=[(TABLE, [(b"root", b"gilles")]), (TABLE, [(b"Root", b"|sh"), (b"root", b"gilles")])])
@example(stages=[(TABLE, [(b"Root", b"")]), (TABLE, [(b"root", b"")])])
@example(stages=[(TABLE, [(b"root", b'"\\"gilles\\""')]), (TABLE, [(b"root", b'"gilles"')])])
def test_entries_built_on_former_ones_equal_those_built_from_scratch(service, stages):
    former = None
    for table, pairs in stages:
        builder = EntriesBuilder(table, SERVICES[service], former)
        for pair in pairs:
            builder.take([pair])
        former = builder.finish()
        assert state(former) == state(Entries(table, SERVICES[service], pairs))


@given(table=TABLES, service=SERVICE, key=st.binary(min_size=1), raw=RAW)
def test_parsed_value_stored_again_is_the_same(table, service, key, raw):
    """EntriesBuilder may reuse a value equal to the former one only because parsing it again changes nothing."""
    former = Entries(table, service, [(key, raw)])
    again = [(key, former.values.get(fold_key(key), raw))]
    builder = EntriesBuilder(table, service, former)
    builder.take(again)
    built, fresh = builder.finish(), Entries(table, service, again)
    assert (fresh.values, set(fresh.errors)) == (built.values, set(built.errors))
