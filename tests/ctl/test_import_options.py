"""`table-consulctl import` with --skip-refused, --max-removals and --dry-run, against a real Consul."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from table_consul.ctl import writing
from tests.control import at_terminal, control
from tests.ctl.importing import alias_lines, entries, file, importer
from tests.ctl.test_export import exported
from tests.ctl.test_export import keys as exported_keys

BAD = b"root: gilles\nbad: |/bin/sh\nnone:\nu%20x: eric\nvera: eric\n"

# --skip-refused.


def test_refused_entries_are_reported_and_the_others_written(consul, tmp_path):
    consul.kv_put("aliases/alias/bad", "by hand")
    path = file(tmp_path, BAD)
    assert importer(consul, "aliases", "alias", path).status == 2
    done = importer(consul, "aliases", "alias", path, "--skip-refused")
    assert (done.status, done.text.splitlines()[-2:]) == (
        1,
        ["2 to add, 0 to change, 0 to remove, 0 unchanged, 3 refused", "2 written"],
    )
    assert [line.removeprefix(f"{path}:")[:2] for line in done.said.splitlines()] == ["2:", "3:", "4:"]
    assert entries(consul) == {"root": b"gilles", "vera": b"eric", "bad": b"by hand"}
    again = importer(consul, "aliases", "alias", path, "--skip-refused", "--json")
    report = json.loads(again.text)
    assert (again.status, report["unchanged"], report["changes"]) == (1, 2, [])
    assert [(each["line"], each["key"]) for each in report["refused"]] == [(2, "bad"), (3, ""), (4, "u%20x")]


def test_skip_refused_changes_nothing_for_a_good_file(consul):
    done = importer(consul, "aliases", "alias", "-", "--skip-refused", stdin=b"root: gilles\n")
    assert (done.status, done.said, entries(consul)) == (0, "", {"root": b"gilles"})


def test_prune_keeps_the_stored_entry_of_a_refused_one(consul):
    for key in ("bad", "old"):
        consul.kv_put(f"aliases/alias/{key}", "x")
    text = b"root: gilles\nbad: |/bin/sh\n"
    done = importer(consul, "aliases", "alias", "-", "--prune", "--skip-refused", stdin=text)
    assert (done.status, entries(consul)) == (1, {"root": b"gilles", "bad": b"x"})


def test_prune_keeps_and_reports_a_key_that_is_not_utf8(consul):
    consul.request("PUT", "/v1/kv/aliases/alias/a%80", b"x")
    consul.kv_put("aliases/alias/old", "x")
    done = importer(consul, "aliases", "alias", "-", "--prune", "--skip-refused", stdin=b"root: x\n")
    assert (done.status, entries(consul)) == (1, {"root": b"x", "a\ufffd": None})
    assert "a\ufffd: the key may have other bytes than Consul lists" in done.said


def test_prune_rejects_a_file_with_unreadable_lines(consul):
    consul.kv_put("aliases/alias/none", "x")
    done = importer(consul, "aliases", "alias", "-", "--prune", "--skip-refused", stdin=b"root: x\nnone:\n")
    assert (done.status, entries(consul), "--prune requires readable lines" in done.said) == (2, {"none": b"x"}, True)


def test_conflict_exits_with_2_with_skip_refused(consul, monkeypatch):
    from table_consul.ctl import txn

    transact = txn.Store.transact

    def edited(self, changes, **options):
        consul.kv_put("aliases/alias/root", "by hand")
        return transact(self, changes, **options)

    monkeypatch.setattr(txn.Store, "transact", edited)
    done = importer(consul, "aliases", "alias", "-", "--skip-refused", stdin=BAD)
    assert (done.status, entries(consul)) == (2, {"root": b"by hand", "vera": b"eric"})


# Duplicates.


def test_exact_duplicates_are_noted(consul):
    text = b"root: gilles\nRoot: gilles\nvera: eric\nroot: gilles\n"
    done = importer(consul, "aliases", "alias", "-", stdin=text)
    assert (done.status, entries(consul)) == (0, {"root": b"gilles", "vera": b"eric"})
    assert done.said == "note: standard input:2: root: repeats line 1; also in line 4\n"


# --max-removals.


def fill(consul, count):
    assert importer(consul, "aliases", "alias", "-", stdin=alias_lines(count)).status == 0


@pytest.mark.parametrize(
    ("there", "left", "more", "status"),
    [
        (12, 2, [], 0),
        (12, 1, [], 2),
        (300, 270, [], 0),
        (300, 269, [], 2),
        (300, 1, ["--max-removals", "299"], 0),
        (300, 1, ["--max-removals", "298"], 2),
        (10, 9, ["--max-removals", "0"], 2),
        (10, 4, ["--max-removals", "60%"], 0),
        (10, 3, ["--max-removals", "60%"], 2),
    ],
)
def test_import_that_removes_too_many_entries_is_refused(consul, there, left, more, status):
    fill(consul, there)
    consul.kv_put("aliases/alias/folder/", "")
    done = importer(consul, "aliases", "alias", "-", "--prune", *more, stdin=alias_lines(left))
    assert (done.status, len(entries(consul)) - 1) == (status, left if status == 0 else there), done.said
    if status:
        assert f"removes {there - left} of {there} entries; nothing was written" in done.said
        assert "--max-removals" in done.said


def test_dry_run_warns_of_too_many_removals(consul):
    fill(consul, 30)
    done = importer(consul, "aliases", "alias", "-", "--prune", "--dry-run", stdin=alias_lines(2))
    assert (done.status, "warning: removes 28 of 30 entries, which requires" in done.said) == (1, True)


@pytest.mark.parametrize(("answer", "left"), [(b"y\n", 2), (b"n\n", 30), (b"\n", 30)])
def test_import_asks_before_it_removes_many_entries(consul, tmp_path, answer, left):
    fill(consul, 30)
    path = file(tmp_path, alias_lines(2))
    status, shown = at_terminal(
        *("import", "aliases", "alias", path, "--prune"),
        typed=answer,
        wanted=b"Continue? [y/N]",
        CONSUL_HTTP_ADDR=consul.address,
    )
    assert (status, len(entries(consul))) == (0 if left == 2 else 2, left), shown
    assert "This removes 28 of 30 entries. Continue?" in shown
    assert ("nothing was written" in shown) == (left == 30)


@pytest.mark.parametrize("number", ["-1", "x", "10 %", "1.5", "%"])
def test_invalid_limit_of_removals_is_a_usage_error(number):
    done = control("import", "t", "alias", "-", f"--max-removals={number}")
    assert (done.status, "must be a number, such as 100" in done.said) == (2, True)


# --dry-run.


def test_dry_run_shows_every_problem_and_every_change(consul):
    count = writing.PROBLEMS_SHOWN + 5
    text = b"".join(b"u%d: a%s\n" % (number, b" " * number + b"b") for number in range(1, 3))
    text += b"".join(b"x%d:\n" % number for number in range(count)) + alias_lines(writing.CHANGES_SHOWN + 5)
    done = importer(consul, "aliases", "alias", "-", "--dry-run", stdin=text)
    assert (done.status, entries(consul)) == (2, {})
    assert done.said.splitlines()[1].startswith("standard input:3: has no value; also in lines 4, ")
    assert "more" not in done.said
    assert len(done.text.splitlines()) == writing.CHANGES_SHOWN + 5 + 2 + 1
    done = importer(consul, "aliases", "alias", "-", "--dry-run", "--skip-refused", stdin=text)
    assert (done.status, len(done.text.splitlines())) == (1, writing.CHANGES_SHOWN + 5 + 1)


def test_dry_run_warns_if_the_token_may_not_write(consul_with_acl):
    rules = 'key_prefix "aliases/" { policy = "read" }'
    for more, warned in (("", True), ('key_prefix "aliases/alias/" { policy = "write" }', False)):
        token = consul_with_acl.token(rules + more)
        text = b"root: gilles\nvera: eric\n"
        done = importer(consul_with_acl, "aliases", "alias", "-", "--dry-run", stdin=text, token=token)
        warning = "warning: the token may not write aliases/alias/root" in done.said
        assert (done.status, warning, done.text.count("+ ")) == (1, warned, 2), done.said


def test_dry_run_reports_a_token_that_may_write_only_some_keys(consul_with_acl):
    rules = 'key_prefix "aliases/" { policy = "write" } key_prefix "aliases/alias/user002" { policy = "read" }'
    token = consul_with_acl.token(rules)
    done = importer(consul_with_acl, "aliases", "alias", "-", "--dry-run", stdin=alias_lines(1000), token=token)
    assert (done.status, "warning: the token may not write aliases/alias/user002" in done.said) == (1, True), done.said


# Backup and restore.

VALUES = [b"", b"gilles", b"|/bin/sh", b"two words", b'"', b"[", b"\xff\0", b"a\nb:", b"1:1:/home/x", b'{"uid": 1}']


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        exported_keys.filter(lambda key: key == key.strip() and not key.endswith("/")),
        st.sampled_from(VALUES) | st.binary(max_size=10),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["alias", "string", "domain", "netaddr", "userinfo", "credentials", "relayhost"]),
)
def test_export_of_any_entries_is_restored_byte_by_byte(consul, kept, service):
    consul.kv_delete("", recurse=True)
    path = f"t/{service}/"
    consul.kv_txn({path + key: value for key, value in kept.items()})
    text = exported(consul, "t", service, "--format", "export").out
    consul.kv_delete("", recurse=True)
    done = control("import", "t", service, "-", stdin=text, CONSUL_HTTP_ADDR=consul.address)
    assert (done.status, entries(consul, path)) == (0, kept), done.said
    assert exported(consul, "t", service, "--format", "export").out == text


def test_restored_entry_that_smtpd_cannot_use_is_noted(consul):
    consul.kv_put("aliases/alias/bad", "|/bin/sh")
    text = exported(consul, "aliases", "alias", "--format", "export").out
    consul.kv_delete("", recurse=True)
    done = importer(consul, "aliases", "alias", "-", stdin=text)
    assert (done.status, entries(consul)) == (0, {"bad": b"|/bin/sh"})
    assert done.said.startswith("note: standard input: entry 1: bad: the value contains a |command")
    done = importer(consul, "other", "alias", "-", stdin=text)
    assert (done.status, entries(consul, "other/alias/")) == (2, {})
