"""`table-consulctl accept`: the tables that smtpctl updates, and the output."""

from __future__ import annotations

import json

import pytest

from table_consul.ctl import main
from tests.ctl.published import FOLLOWING, configured, publish

HELD = {**FOLLOWING, "deletions_held": 30, "deletions_held_seconds": 600}


@pytest.fixture
def smtpctl(tmp_path, monkeypatch):
    """The file in which a stand-in for smtpctl logs its arguments; its exit status comes from the environment."""
    program, notes = tmp_path / "bin" / "smtpctl", tmp_path / "notes"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{notes}\necho "$SAYS"\nexit ${{STATUS:-0}}\n')
    program.chmod(0o755)
    notes.touch()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return notes


@pytest.fixture
def accept(capsys):
    def run(path, *tables):
        code = main.main(["-c", path, "accept", *tables])
        return (code, *capsys.readouterr())

    return run


def test_named_table_is_updated_without_metrics(tmp_path, smtpctl, accept):
    path = configured(tmp_path, metrics="")
    assert accept(path, "aliases", "domains", "aliases") == (0, "aliases: accepted\ndomains: accepted\n", "")
    assert smtpctl.read_text() == "update table aliases\nupdate table domains\n"


def test_accept_without_names_updates_only_tables_with_held_deletions(tmp_path, smtpctl, accept):
    publish(tmp_path, "aliases", **HELD)
    publish(tmp_path, "domains", **FOLLOWING, deletions_held=0)
    out = "aliases: accepted 30 deletions\ndomains: holds no deletions\n"
    assert accept(configured(tmp_path)) == (0, out, "")
    assert smtpctl.read_text() == "update table aliases\n"


def test_table_whose_metrics_are_missing_is_named(tmp_path, smtpctl, accept):
    publish(tmp_path, "aliases", **HELD)
    code, out, err = accept(configured(tmp_path, more="[tables.domains]"))
    assert (code, out) == (2, "aliases: accepted 30 deletions\n")
    assert err == "domains: no metrics, so held deletions are unknown (name the table)\n"


def test_json_reports_each_table(tmp_path, smtpctl, accept):
    publish(tmp_path, "aliases", **HELD)
    code, out, err = accept(configured(tmp_path, more="[tables.domains]"), "--json")
    assert (code, err.startswith("domains: no metrics")) == (2, True)
    assert json.loads(out) == {
        "tables": [
            {"table": "aliases", "held": 30, "accepted": True},
            {"table": "domains", "held": None, "accepted": False},
        ]
    }


def test_accept_without_names_and_metrics_is_an_error(tmp_path, smtpctl, accept):
    code, _, err = accept(configured(tmp_path, metrics=""))
    assert (code, "missing TABLE: no metrics are configured" in err, smtpctl.read_text()) == (2, True, "")


@pytest.mark.parametrize(
    ("says", "problem"), [("smtpctl: permission denied", "smtpctl: permission denied"), ("", "exit status 1")]
)
def test_refusal_of_smtpctl_is_printed_with_the_command(tmp_path, smtpctl, accept, monkeypatch, says, problem):
    monkeypatch.setenv("SAYS", says)
    monkeypatch.setenv("STATUS", "1")
    hint = "(run as root on the mail host: smtpctl update table aliases)"
    assert accept(configured(tmp_path), "aliases") == (2, "", f"table-consulctl: {problem} {hint}\n")


def test_missing_smtpctl_is_one_line_with_the_command(tmp_path, accept, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    hint = "(run as root on the mail host: smtpctl update table 'my aliases')"
    error = f"table-consulctl: smtpctl: no such file or directory {hint}\n"
    assert accept(configured(tmp_path), "my aliases") == (2, "", error)


def test_invalid_table_name_is_not_passed_to_smtpctl(tmp_path, smtpctl, accept):
    code, _, err = accept(configured(tmp_path), "a/b")
    assert (code, "invalid table name" in err, smtpctl.read_text()) == (2, True, "")
