"""`table-consulctl status --nagios`: one line, performance data, and the exit statuses of a plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.control import control
from tests.ctl.published import FOLLOWING, LOST, READ_DIRECTLY, configured, publish, sample

NO_DATA = {"up": 0, "too_large": 0, "reloads_total": 0, "failures_total": 3}


@pytest.fixture
def nagios(run_status):
    """Runs `status --nagios`; the exit status and the line."""

    def run(path, *arguments):
        code, out, err = run_status(path, "--nagios", *arguments)
        assert (out.count("\n"), err) == (1, "")
        return code, out.rstrip()

    return run


def test_healthy_tables_are_ok_with_performance_data(tmp_path, nagios):
    publish(tmp_path, "aliases", **FOLLOWING)
    publish(tmp_path, "direct", **READ_DIRECTLY)
    data = "'aliases age'=3s;;;0 'aliases keys'=2;;;0 'aliases refused'=0;;;0"
    assert nagios(configured(tmp_path)) == (0, f"TABLE-CONSUL OK: 2 tables ok | {data}")


@pytest.mark.parametrize(
    ("metrics", "code", "text"),
    [
        (LOST, 1, "WARNING: aliases: outage (data 3 s old)"),
        (
            {**FOLLOWING, "deletions_held": 30, "deletions_held_seconds": 600},
            1,
            "WARNING: aliases: held (data 3 s old)",
        ),
        ({"too_large": 1, "up": 1, "failures_total": 0}, 1, "WARNING: aliases: too large; raise max_keys"),
        ({**LOST, "snapshot_age_seconds": 86401}, 2, "CRITICAL: aliases: expired (data 24 h old)"),
        (NO_DATA, 2, "CRITICAL: aliases: no data"),
        ({**NO_DATA, "failures_total": 0}, 1, "WARNING: aliases: loading"),
        ({**READ_DIRECTLY, "up": 0, "failures_total": 1}, 2, "CRITICAL: aliases: outage; Consul cannot be read: every"),
    ],
)
def test_state_of_the_table_is_that_of_the_plugin(tmp_path, nagios, metrics, code, text):
    publish(tmp_path, **metrics)
    assert nagios(configured(tmp_path))[0] == code
    assert nagios(configured(tmp_path))[1].startswith(f"TABLE-CONSUL {text}")


def test_folder_that_the_token_may_not_read_is_a_warning(tmp_path, nagios):
    hidden = sample("service_hidden", 1, table="aliases", prefix="aliases/", service="domain")
    publish(tmp_path, more=hidden, **FOLLOWING)
    code, line = nagios(configured(tmp_path))
    assert (code, "WARNING: aliases: the token may not read domain: lookups there" in line) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "text", "data"),
    [
        (("--age", "3"), 0, "OK: 1 table ok", "'aliases age'=3s;3;;0"),
        (("--age", "2"), 1, "WARNING: aliases: data 3 s old (more than 2 s)", "'aliases age'=3s;2;;0"),
        (("--age", "1,2.5"), 2, "CRITICAL: aliases: data 3 s old (more than 1 s)", "'aliases age'=3s;1;2.5;0"),
        (("--age", ",2"), 2, "CRITICAL: aliases: data 3 s old (more than 2 s)", "'aliases age'=3s;;2;0"),
        (("--keys", "2,1"), 0, "OK: 1 table ok", "'aliases keys'=2;2:;1:;0"),
        (("--keys", "100,1"), 1, "WARNING: aliases: 2 keys (fewer than 100)", "'aliases keys'=2;100:;1:;0"),
        (("--keys", "100,3"), 2, "CRITICAL: aliases: 2 keys (fewer than 100)", "'aliases keys'=2;100:;3:;0"),
    ],
)
def test_threshold_that_is_crossed_sets_the_status(tmp_path, nagios, arguments, code, text, data):
    publish(tmp_path, **FOLLOWING)
    found, line = nagios(configured(tmp_path), *arguments)
    assert (found, line.startswith(f"TABLE-CONSUL {text}"), data in line) == (code, True, True), line


def test_worst_table_comes_first(tmp_path, nagios):
    publish(tmp_path, "a", **LOST)
    publish(tmp_path, "b", **NO_DATA)
    publish(tmp_path, "c", **FOLLOWING)
    code, line = nagios(configured(tmp_path))
    assert (code, line.partition(" | ")[0]) == (
        2,
        "TABLE-CONSUL CRITICAL: b: no data, a: outage (data 3 s old), 1 table ok",
    )


def test_tables_of_smtpd_conf_are_checked_after_a_reboot(host, nagios):
    (host / "smtpd.conf").write_text(
        f"table aliases consul:{host}/table-consul.toml\n"
        f"table domains consul:{host}/table-consul.toml\ntable other consul:/etc/other.toml\n"
    )
    code, line = nagios(configured(host))
    assert (code, re.findall(r"(\w+): not running", line)) == (2, ["aliases", "domains"])
    publish(host, "domains", **FOLLOWING)
    assert re.findall(r"(\w+): not running", nagios(configured(host))[1]) == ["aliases"]


def test_named_metrics_need_no_configuration(tmp_path):
    publish(tmp_path, **FOLLOWING)
    done = control("-c", "/none", "status", "--nagios", "--metrics", f"{tmp_path}/{{table}}.prom", "aliases")
    assert (done.status, done.text.startswith("TABLE-CONSUL OK: 1 table ok")) == (0, True)
    assert control("-c", "/none", "status", "--metrics", f"{tmp_path}/{{table}}.prom", "aliases").status == 0


@pytest.mark.parametrize("metrics", ["", 'textfile = "relative"'])
def test_error_is_unknown(tmp_path, nagios, metrics):
    code, line = nagios(configured(tmp_path, metrics=metrics))
    assert (code, line.startswith("TABLE-CONSUL UNKNOWN: ")) == (3, True)


def test_unreadable_configuration_is_unknown(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("files that another user cannot read need root: sudo make test")
    path = configured(tmp_path)
    os.chmod(path, 0o600)
    code = "import difflib, grp, os, pwd, sys\nfrom table_consul.ctl import main, status\n"
    code += "import prometheus_client.parser\n"
    code += "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nsys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-c", path, "status", "--nagios"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.startswith("TABLE-CONSUL UNKNOWN: "), done.stderr) == (3, True, "")
    assert "use --metrics" in done.stdout


def test_file_without_metrics_is_unknown(tmp_path, nagios):
    (tmp_path / "aliases.prom").write_text("hello\n")
    code, line = nagios(configured(tmp_path), "aliases")
    assert (code, line.startswith("TABLE-CONSUL UNKNOWN: aliases: unknown; ")) == (3, True)


def test_text_contains_no_vertical_bar(tmp_path, nagios):
    code, line = nagios(configured(tmp_path, metrics=f'textfile = "{tmp_path}/{{table}}.pr|m"'), "aliases")
    assert (code, "|" in line) == (2, False)


def test_performance_data_are_left_out_when_the_line_would_be_too_long(tmp_path, nagios):
    for number in range(60):
        publish(tmp_path, f"table-with-a-long-name-{number}", **FOLLOWING)
    code, line = nagios(configured(tmp_path))
    assert (code, line) == (0, "TABLE-CONSUL OK: 60 tables ok")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--age", "5"),
        ("--nagios", "--age", "soon"),
        ("--nagios", "--keys", ""),
        ("--nagios", "--json"),
        ("--metrics", "x"),
    ],
)
def test_meaningless_option_is_a_usage_error(tmp_path, run_status, arguments):
    code, out, err = run_status(configured(tmp_path), *arguments)
    assert (code, out, err.startswith("Usage: ")) == (3 if "--nagios" in arguments else 2, "", True)
