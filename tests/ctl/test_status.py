"""`table-consulctl status`: each table's state, and how it is printed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from table_consul import __version__
from table_consul.ctl import main
from tests.ctl.published import FOLLOWING, LOST, READ_DIRECTLY, configured, only_table, publish, sample

# ---- states ----


@pytest.mark.parametrize(
    ("metrics", "state", "code"),
    [
        (FOLLOWING, "following", 0),
        ({**FOLLOWING, "deletions_held": 0}, "following", 0),
        ({**FOLLOWING, "deletions_held": 30, "deletions_held_seconds": 600}, "held", 1),
        ({**LOST, "deletions_held": 30, "deletions_held_seconds": 0}, "outage", 1),
        (LOST, "outage", 1),
        ({**LOST, "snapshot_index": 0}, "outage", 1),
        ({**LOST, "snapshot_age_seconds": 86401}, "expired", 1),
        ({"up": 0, "too_large": 0, "reloads_total": 0, "failures_total": 3}, "no data", 1),
        ({"up": 0, "too_large": 0, "reloads_total": 0, "failures_total": 0}, "loading", 1),
        ({**FOLLOWING, "up": 0, "snapshot_index": 0}, "loading", 1),
        ({"too_large": 1, "up": 1, "failures_total": 0}, "too large", 1),
        (READ_DIRECTLY, "direct", 0),
        ({**READ_DIRECTLY, "up": 0, "failures_total": 1}, "outage", 1),
        ({}, "direct", 0),
    ],
)
def test_published_metrics_determine_state_and_exit_status(tmp_path, run_status, metrics, state, code):
    publish(tmp_path, **metrics)
    path = configured(tmp_path)
    outcome = run_status(path, "--offline", "--json")
    assert (only_table(outcome)["state"], outcome[0], outcome[2]) == (state, code, "")
    assert run_status(path, "--offline")[1].startswith(f"aliases: {state}\n")


def test_forbidden_folder_is_named_and_not_healthy(tmp_path, run_status):
    hidden = [
        sample("service_hidden", int(s == "domain"), table="aliases", prefix="aliases/", service=s)
        for s in ("alias", "domain")
    ]
    publish(tmp_path, more="".join(hidden), **FOLLOWING)
    code, out, _ = run_status(configured(tmp_path), "--offline")
    assert (code, "the token may not read domain: lookups" in " ".join(out.split())) == (1, True)


def test_held_deletions_are_shown_with_the_time_left_and_how_to_accept_them(tmp_path, run_status):
    publish(tmp_path, **FOLLOWING, deletions_held=30, deletions_held_seconds=600)
    path = configured(tmp_path)
    _, out, _ = run_status(path, "--offline")
    text = "held 30 deleted entries, for another 10 min (to accept: table-consulctl accept aliases)"
    assert text in " ".join(out.split())
    (prefix,) = only_table(run_status(path, "--offline", "--json"))["prefixes"]
    assert (prefix["held"], prefix["held_seconds"]) == (30, 600.0)


def test_state_of_a_table_is_that_of_its_worst_folder(tmp_path, run_status):
    other = "".join(sample(n, v, table="aliases", prefix="people/") for n, v in LOST.items())
    publish(tmp_path, more=other, **FOLLOWING)
    table = only_table(run_status(configured(tmp_path), "--offline", "--json"))
    assert (table["state"], [p["state"] for p in table["prefixes"]]) == ("outage", ["following", "outage"])


def test_report_shows_every_published_metric(tmp_path, run_status):
    error = sample(
        "last_error_timestamp_seconds", time.time() - 300, table="aliases", prefix="aliases/", error="unreachable"
    )
    for owner, prefix in (("aliases", "aliases/"), ("other", "aliases/"), ("aliases", "other/")):
        error += f'# table_consul_last_error ["{owner}","{prefix}","no leader for {owner} {prefix}"]\n'
    error += "# table_consul_last_error [1]\n# table_consul_last_error\n"
    publish(tmp_path, more=error, **{**FOLLOWING, "entries_refused": 1, "snapshot_age_seconds": 130})
    _, out, _ = run_status(configured(tmp_path), "--offline")
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - 7200))
    for line in (
        "aliases: following",
        "  prefix     aliases/",
        "  keys       2, 1 refused (see lint)",
        "  index      12",
        "  age        2 min",
        "  last error 5 min ago: no leader for aliases aliases/",
        f"  runs since {since[:-1]}",
    ):
        assert f"\n{line}" in "\n" + out
    assert __version__ in out


def test_table_from_a_file_is_healthy_when_its_process_runs(tmp_path, run_status):
    publish(tmp_path)
    outcome = run_status(configured(tmp_path, address=f"file://{tmp_path}/export.json"), "--json")
    assert (outcome[0], only_table(outcome)["state"]) == (0, "file")


def test_table_from_a_file_stays_in_state_file_after_an_error(tmp_path, run_status):
    error = sample("last_error_timestamp_seconds", 1, table="aliases", prefix="aliases/", error="not found")
    publish(tmp_path, more=error)
    outcome = run_status(configured(tmp_path, address=f"file://{tmp_path}/export.json"), "--json")
    assert (outcome[0], only_table(outcome)["state"], only_table(outcome)["prefixes"][0]["state"]) == (
        0,
        "file",
        "file",
    )


# ---- text output ----


def test_output_fits_a_terminal_of_40_columns(tmp_path, run_status, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    error = sample(
        "last_error_timestamp_seconds", time.time(), table="aliases", prefix="aliases/", error="no " * 60 + "leader"
    )
    publish(tmp_path, more=error, **{**LOST, "entries_refused": 2, "snapshot_index": 10**12})
    _, out, _ = run_status(configured(tmp_path), "aliases", "consul", "--offline")
    assert [line for line in out.splitlines() if len(line) > 40 and str(tmp_path) not in line] == []
    monkeypatch.setenv("COLUMNS", "100")
    assert len(run_status(configured(tmp_path), "aliases", "consul", "--offline")[1]) < len(out)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 d"), (10**7, "116 d")],
)
def test_duration_uses_the_largest_unit_with_a_count_of_2_or_more(seconds, shown):
    assert main.duration(seconds) == shown


def test_control_characters_in_a_label_are_not_printed(tmp_path, run_status):
    error = sample("last_error_timestamp_seconds", 1, table="aliases", prefix="aliases/", error="\x1b[2J\nforged")
    publish(tmp_path, more=error.replace("\\u001b", "\x1b"), **FOLLOWING)
    _, out, _ = run_status(configured(tmp_path), "--offline")
    assert ("\x1b" in out, "\nforged" in out, "forged" in out) == (False, False, True)


def test_missing_library_is_one_line_that_names_the_package(tmp_path):
    library = tmp_path / "without" / "prometheus_client"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise ModuleNotFoundError('blocked', name='prometheus_client')")
    code = "from table_consul.ctl.main import main; raise SystemExit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "-c", configured(tmp_path), "status"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(library.parent)},
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "install table-consul[metrics]" in run.stderr
