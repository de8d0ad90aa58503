"""The changes of an import, computed from entries of a file and entries of Consul."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from table_consul.ctl import formats, import_, plan
from table_consul.ctl.formats import FileEntry, ParsedFile
from table_consul.ctl.plan import Change, Stored
from table_consul.services import SERVICES
from table_consul.services.entries import Entries
from tests.ctl.parsed import ALIAS, CREDENTIALS, DOMAIN, HASH, STRING, TABLE, USERINFO


def parsed(entries, name="table"):
    return ParsedFile(name, [FileEntry(key, value, line) for line, (key, value) in enumerate(entries, 1)], [])


def stored(service, entries, table=TABLE):
    return [Stored(table.path(service) + key, value, 10 + at) for at, (key, value) in enumerate(entries)]


def planned(service, entries, there=(), *, name="table", table=TABLE, **options):
    return plan.plan(table, service, parsed(entries, name), stored(service, there, table), **options)


def signs(plan, service=ALIAS):
    assert plan.problems == []
    signs = {"add": "+", "change": "~", "remove": "-"}
    return [(signs[change.kind], change.key[len(TABLE.path(service)) :], change.value) for change in plan.changes]


def test_new_changed_and_unchanged_entries():
    plan = planned(ALIAS, [(b"b", b"y"), (b"a", b"x"), (b"c", b"z")], [(b"b", b"Y"), (b"c", b"z"), (b"d", b"left")])
    assert signs(plan) == [("+", b"a", b"x"), ("~", b"b", b"y")]
    assert plan.unchanged == 1
    assert [change.old and change.old.modify_index for change in plan.changes] == [None, 10]


def test_prune_removes_entries_the_file_lacks_but_no_folders():
    there = [(b"", b""), (b"a", b"x"), (b"b", b"y"), (b"folder/", b""), (b"inner/key", b"z")]
    plan = planned(ALIAS, [(b"a", b"x")], there, prune=True, others=[TABLE.path(ALIAS) + b"inner/"])
    assert signs(plan) == [("-", b"b", None)]


@pytest.mark.parametrize(
    ("service", "text", "there"),
    [
        (ALIAS, b"gilles, eric", b"gilles, eric\n"),
        (ALIAS, b"gilles, eric", b"gilles\n# x\neric\n"),
        (ALIAS, b"gilles, eric", b'["gilles", "eric"]'),
        (ALIAS, b"gilles", b'"gilles"'),
        (USERINFO, b"1000:100:/home/vera", b'{"uid": 1000, "gid": 100, "home": "/home/vera", "quota": 5}'),
        (CREDENTIALS, HASH, b'{"password": "{CRYPT}%b"}' % HASH),
        (CREDENTIALS, b"{CRYPT}" + HASH, HASH),
        (DOMAIN, b"", b"example.org"),
        (DOMAIN, b"a", b""),
        (DOMAIN, b"yes", b"yes\n"),
    ],
)
def test_entry_with_the_same_answer_is_unchanged(service, text, there):
    key = b"a" if there != b"example.org" else b"example.org"
    plan = planned(service, [(key, text)], [(key, there)])
    assert (plan.changes, plan.problems, plan.unchanged) == ([], [], 1)


def test_export_is_compared_byte_by_byte():
    plan = planned(ALIAS, [(b"a", b"gilles"), (b"b", b"x")], [(b"a", b"gilles\n"), (b"b", b"x")], name="export")
    assert signs(plan) == [("~", b"a", b"gilles")]


def test_upper_case_entry_is_changed_under_its_stored_key():
    plan = planned(ALIAS, [(b"root", b"eric")], [(b"Root", b"gilles")], prune=True)
    assert signs(plan) == [("~", b"Root", b"eric")]


@pytest.mark.parametrize(("service", "count"), [(ALIAS, 1), (DOMAIN, 0)])
@pytest.mark.parametrize("name", ["table", "export"])
def test_key_in_another_case_is_never_unchanged_in_direct_mode(service, count, name):
    there, direct = [(b"Root.example", b"gilles")], replace(TABLE, mode="direct")
    made = planned(service, [(b"root.example", b"gilles")], there, table=direct, name=name)
    assert (made.changes, [problem.key for problem in made.problems]) == ([], [b"Root.example"][:count])
    assert all("mode direct never finds this key; rename it" in problem.text for problem in made.problems)
    assert planned(service, there, there, table=direct, name="export").problems == []


def test_case_variant_that_answers_is_changed_and_the_other_pruned():
    there = [(b"Root", b"gilles"), (b"root", b"gilles")]
    assert signs(planned(ALIAS, [(b"root", b"eric")], there)) == [("~", b"root", b"eric")]
    assert signs(planned(ALIAS, [(b"root", b"eric")], there, prune=True)) == [
        ("-", b"Root", None),
        ("~", b"root", b"eric"),
    ]


@pytest.mark.parametrize(("flags", "there"), [(0, 42), (7, 0), (7, 42)])
@pytest.mark.parametrize("value", [b"x", b"y"])
def test_backup_restores_flags(flags, there, value):
    old = Stored(TABLE.path(ALIAS) + b"a", value, 10, there)
    backup = ParsedFile("export", [FileEntry(b"a", b"x", 1, flags)], [], restores=True)
    (change,) = plan.plan(TABLE, ALIAS, backup, [old]).changes
    assert (change.value, change.flags) == (b"x", flags)
    assert plan.plan(TABLE, ALIAS, backup, [old._replace(value=b"x", flags=flags)]).changes == []


def test_flags_survive_a_change_and_come_with_an_export():
    old = Stored(TABLE.path(ALIAS) + b"a", b"x", 10, 42)
    export = ParsedFile("export", [FileEntry(b"a", b"y", 1, 0), FileEntry(b"b", b"y", 2, 7)], [])
    assert [change.flags for change in plan.plan(TABLE, ALIAS, export, [old]).changes] == [42, 7]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (b"a", b"|/bin/sh", "allow_commands"),
        (b"a", b'x, "y', "quote"),
        (b"a", b"x" * 2048, "2048"),
        (b"a", b"two words", "contains white space (is a comma missing?)"),
        (b"a//b", b"x", "no URL"),
        (b"a/../b", b"x", "no URL"),
        (b"/a", b"x", "no URL"),
        (b"a\x01", b"x", "no URL"),
        (b"a\xff", b"x", "no URL"),
        (b"a/", b"x", "no URL"),
        (b"a" * 1024, b"x", "1024 bytes"),
    ],
)
def test_invalid_entry_is_a_problem_with_its_line(key, value, said):
    plan = planned(ALIAS, [(b"root", b"gilles"), (key, value), (b"eric", b"joerg")])
    assert [problem.line for problem in plan.problems] == [2]
    assert said in plan.problems[0].text


def test_new_key_that_modern_consul_refuses_is_skipped_with_its_line():
    plan = planned(STRING, [(b"root", b"gilles"), (b"u%20x", b"eric"), (b"a..b%41", b"eric"), (b"u%zz", b"vera")])
    assert signs(plan, STRING) == [("+", b"root", b"gilles"), ("+", b"u%zz", b"vera")]
    assert [(each.line, each.key) for each in plan.refused] == [(2, b"u%20x"), (3, b"a..b%41")]


def test_key_that_modern_consul_refuses_is_skipped_with_any_value():
    entries = parsed([(b"u%20x", b"|/bin/sh")])
    edited = plan.plan_edits(TABLE, ALIAS, entries, [])  # whose changes --force writes
    assert (edited.changes, [each.line for each in edited.refused]) == ([], [1])
    made = plan.plan(TABLE, ALIAS, entries, [], skip=True)
    assert (made.changes, [each.line for each in made.refused]) == ([], [1])


def test_stored_key_that_modern_consul_refuses_is_changed_and_pruned():
    there = [(b"u%20x", b"gilles"), (b"u%20y", b"gilles")]
    plan = planned(ALIAS, [(b"u%20x", b"eric")], there, prune=True)
    assert (signs(plan), plan.refused) == ([("~", b"u%20x", b"eric"), ("-", b"u%20y", None)], [])


@pytest.mark.parametrize("value", [b"", b'""', b"# nobody"])
def test_export_entry_without_a_needed_value_is_a_problem(value):
    (problem,) = planned(ALIAS, [(b"root", value)], name="export").problems
    assert problem == (1, "missing value: alias requires one", b"root")


def test_list_needs_no_values():
    assert signs(planned(STRING, [(b"a", b"")], name="export"), STRING) == [("+", b"a", b"")]


@pytest.mark.parametrize("name", ["smtp://mx.example.org", "smtps://label@mx.example.org:465"])
def test_relay_url_as_key_suggests_fetch_values(name):
    (problem,) = planned(SERVICES["relayhost"], [(name.encode(), b"")]).problems
    assert 'fetch = "values"' in problem.text


PEOPLE = replace(TABLE, paths=dict.fromkeys(("credentials", "auth", "userinfo"), "people"))


@pytest.mark.parametrize(
    ("service", "there", "new", "lost"),
    [
        (CREDENTIALS, b"1:1:/home/vera", {"password": HASH.decode()}, "userinfo"),
        (USERINFO, HASH, {"uid": 1, "gid": 1, "home": "/h"}, "credentials"),
        (CREDENTIALS, HASH, {"uid": 1, "gid": 1, "home": "/h"}, "credentials"),
        (CREDENTIALS, HASH, {"password": HASH.decode()}, None),
        (CREDENTIALS, b"1:1:/home/vera", {"password": HASH.decode(), "uid": 1, "gid": 1, "home": "/h"}, None),
        (USERINFO, b"", {"uid": 1, "gid": 1, "home": "/h"}, None),
    ],
)
def test_record_does_not_overwrite_a_value_it_lacks(service, there, new, lost):
    plan = planned(
        service, [(b"vera", json.dumps(new).encode())], [(b"vera", there)], name="passwd", table=PEOPLE, records=True
    )
    assert [change.kind for change in plan.changes] == ([] if lost else ["change"])
    assert [f"overwrite the stored {lost} value" in problem.text for problem in plan.problems] == (
        [True] if lost else []
    )


def test_value_too_large_for_a_transaction_is_a_problem():
    (problem,) = planned(STRING, [(b"a", b"x" * (512 << 10))]).problems
    assert "transaction" in problem.text


def test_stored_problems_are_not_reported():
    there = [(b"a", b"|/bin/sh"), (b"b//c", b"x"), (b"d", b"x" * 4000)]
    plan = planned(ALIAS, [*there, (b"e", b"f")], there, name="export")
    assert signs(plan) == [("+", b"e", b"f")]


def test_repeated_entry_is_a_note_and_one_with_another_value_a_problem():
    made = planned(ALIAS, [(b"a", b"x"), (b"b", b"x"), (b"a", b"x"), (b"b", b"y")])
    assert made.notes == [(3, "repeats line 1", b"a")]
    assert made.problems == [(4, "already in line 2 with another value", b"b")]


def test_case_variants_in_an_export_are_a_problem_unless_stored():
    both = [(b"Root", b"x"), (b"root", b"y")]
    assert planned(ALIAS, both, both, name="export").changes == []
    assert planned(ALIAS, both, both, name="export").problems == []
    assert [problem.line for problem in planned(ALIAS, both, name="export").problems] == [1]


def test_backup_restores_each_case_variant_and_notes_unusable_entries():
    both = [(b"Root", b"|/bin/sh"), (b"root", b"y")]
    backup = parsed(both, "export")._replace(restores=True)
    for there in ([], [(b"Root", b"|/bin/sh")], [(b"root", b"z")]):
        made = plan.plan(TABLE, ALIAS, backup, stored(ALIAS, there))
        assert made.problems == []
        after = {**dict(there), **{change.key[len(TABLE.path(ALIAS)) :]: change.value for change in made.changes}}
        assert after == dict(both)
        assert made.notes or there


def test_skipped_entries_are_refused_and_their_stored_values_stay():
    there = [(b"bad", b"gilles"), (b"old", b"x")]
    entries = [(b"ok", b"x"), (b"bad", b"|/bin/sh"), (b"u%20x", b"eric"), (b"ok", b"y")]
    made = planned(ALIAS, entries, there, skip=True, prune=True)
    assert signs(made) == [("+", b"ok", b"x"), ("-", b"old", None)]
    assert [problem.line for problem in made.refused] == [2, 3, 4]


@pytest.mark.parametrize(
    ("exported", "there", "lines"),
    [
        ([(b"RooT", b"x"), (b"Root", b"y")], (b"ROOT", b"old"), [2]),
        ([(b"RooT", b"x"), (b"Root", b"old")], (b"ROOT", b"old"), [2]),
        ([(b"RooT", b"old"), (b"Root", b"y")], (b"ROOT", b"old"), [2]),
        ([(b"ROOT", b"x"), (b"Root", b"y"), (b"Root", b"z")], (b"root", b"old"), [2, 3]),
    ],
)
def test_case_variants_that_differ_from_the_stored_key_are_a_problem(exported, there, lines):
    problems = planned(ALIAS, exported, [there], name="export").problems
    assert [problem.line for problem in problems] == lines
    assert all(problem.text.startswith("already in entry 1 as ") for problem in problems if problem.line == 2)


def test_shared_record_is_not_overwritten_by_one_value():
    there = [
        (b"vera", json.dumps({"password": HASH.decode(), "uid": 1000, "gid": 1000, "home": "/home/vera"}).encode())
    ]
    (problem,) = planned(CREDENTIALS, [(b"vera", HASH[:-1] + b"x")], there).problems
    assert "--record" in problem.text


def test_text_that_starts_like_a_record_is_replaced():
    plan = planned(CREDENTIALS, [(b"vera", HASH)], [(b"vera", b"{CRYPT}x"), (b"eric", b'{"password"')])
    assert signs(plan, CREDENTIALS) == [("~", b"vera", HASH)]


def test_records_are_merged():
    record = {"password": "*", "quota": 5, "uid": 1}
    there = [(b"vera", json.dumps(record).encode())]
    given_ = json.dumps({"password": HASH.decode(), "uid": 1000, "gid": 1000, "home": "/home/vera"}).encode()
    (change,) = planned(USERINFO, [(b"vera", given_)], there, name="passwd", records=True).changes
    assert json.loads(change.value) == {**record, **json.loads(given_)}
    assert (change.old_answer, change.new_answer) == (None, b"1000:1000:/home/vera")
    again = planned(USERINFO, [(b"vera", given_)], [(b"vera", change.value)], name="passwd", records=True)
    assert (again.changes, again.unchanged) == ([], 1)


@pytest.mark.parametrize("uid", [b"1000.0", b"1e3"])
def test_number_that_is_not_an_id_is_changed_in_a_record(uid):
    there = [(b"vera", b'{"uid": %b, "gid": 100, "quota": 5}' % uid)]
    new = b'{"uid":1000,"gid":100}'
    (change,) = planned(USERINFO, [(b"vera", new)], there, name="passwd", records=True).changes
    assert change.value == b'{"uid":1000,"gid":100,"quota":5}'
    assert change.new_answer == b"1000:100:"


def test_prune_keeps_records_without_a_field_of_the_service():
    there = [(b"eric", b'{"password": "*"}'), (b"vera", b"1:1:/home/vera")]
    assert signs(planned(USERINFO, [(b"x", b"2:2:/x")], there, prune=True), USERINFO) == [
        ("-", b"vera", None),
        ("+", b"x", b"2:2:/x"),
    ]


texts = st.text(st.sampled_from('ab"[]{}\\,: |#é1'), max_size=10).map(lambda text: text.strip().encode()).filter(bool)


@given(texts, st.sampled_from(["auto", "text", "json"]), st.sampled_from(["alias", "string", "domain", "mailaddrmap"]))
def test_stored_text_is_parsed_back_unchanged(text, value_format, name):
    service = SERVICES[name]
    meant = Entries(replace(TABLE, value_format="text"), service, [(b"a", text)])
    table = replace(TABLE, value_format=value_format)
    read = Entries(table, service, [(b"a", plan.stored_value(table, service, b"a", text))])
    if meant.values:
        assert read.values == meant.values


values = st.sampled_from(
    [b"", b"gilles", b"gilles, eric\n", b'"gilles"', b'["a", "b"]', b"|x", b"a\nb", b"#c", b"\xff", b'{"uid": 1}']
)
keys = st.text(st.sampled_from("abAB./@*- é"), min_size=1, max_size=4).map(str.encode)


@given(st.dictionaries(keys, values | st.binary(max_size=6), max_size=6), st.sampled_from(sorted(SERVICES)))
def test_import_of_an_export_changes_nothing(entries, name):
    service = SERVICES[name]
    there = stored(service, entries.items())
    exported = [(each.key, each.value, each.flags) for each in there]
    again = formats.entries_of_export(exported, service, TABLE.path(service))
    made = plan.plan(TABLE, service, again, there, prune=True)
    assert (made.changes, made.problems) == ([], [])


@given(st.dictionaries(keys, values | st.binary(max_size=6), max_size=6), st.sampled_from(sorted(SERVICES)))
def test_import_of_a_table_file_changes_nothing(entries, name):
    service = SERVICES[name]
    there = stored(service, entries.items())
    text, _ = formats.table_text(service, sorted(Entries(TABLE, service, entries.items()).values.items()))
    again = import_.parse(text, TABLE, service, "auto")
    assert again.problems == []
    made = plan.plan(TABLE, service, again, there)
    assert (made.changes, made.problems) == ([], [])


def test_change_has_the_answers_before_and_after():
    (change,) = planned(ALIAS, [(b"a", b"x")], [(b"a", b'["y", "z"]')]).changes
    assert change == Change(b"aliases/alias/a", stored(ALIAS, [(b"a", b'["y", "z"]')])[0], b"x", 0, b"y, z", b"x")
