"""Text files with metrics: how `table-consulctl status` finds them, and which it rejects."""

from __future__ import annotations

import json
import os
import re
import string
import time
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_consul import config
from table_consul.config import Config, MetricsConfig
from table_consul.ctl import scrape
from tests.ctl.published import FOLLOWING, LOST, configured, numbers, only_table, publish, sample
from tests.dialogue import write_config


def test_missing_metrics_configuration_prints_lines_that_work(tmp_path, run_status):
    path = write_config(tmp_path, address="http://127.0.0.1:9")
    code, out, err = run_status(str(path))
    assert (code, out) == (2, "")
    added = [re.search(rf"^ *({start}.*)$", err, re.MULTILINE)[1] for start in (r"\[metrics\]", "textfile", "listen")]
    path.write_text(path.read_text() + "\n".join(added))
    metrics = config.load(str(path), {}).metrics
    assert tomllib.loads("\n".join(added))["metrics"] == {"textfile": metrics.textfile, "listen": metrics.listen}


def test_table_without_metrics_is_not_running(tmp_path, run_status):
    outcome = run_status(configured(tmp_path), "--json")
    assert (outcome[0], only_table(outcome)["table"], only_table(outcome)["state"]) == (1, "consul", "not running")


def test_stale_file_means_not_running(tmp_path, run_status):
    path = publish(tmp_path, **FOLLOWING)
    fresh = run_status(configured(tmp_path), "--offline", "--json")
    os.utime(path, (time.time() - 100,) * 2)
    stale = run_status(configured(tmp_path), "--offline", "--json")
    assert [(only_table(each)["state"], each[0]) for each in (fresh, stale)] == [("following", 0), ("not running", 1)]
    assert "last written 100 s ago" in only_table(stale)["remarks"][0]


def test_file_from_the_future_does_not_prove_that_the_process_runs(tmp_path, run_status):
    path = publish(tmp_path, **FOLLOWING)
    os.utime(path, (time.time() + 100,) * 2)
    outcome = run_status(configured(tmp_path), "--offline", "--json")
    assert (outcome[0], only_table(outcome)["state"], only_table(outcome)["healthy"]) == (2, "unknown", None)
    assert "dated in the future" in only_table(outcome)["remarks"][0]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"hello\n", b"\xff\n", b"a{b=\n", b"node_load1 1\n", b'table_consul_up{table="x"} 1\n'),
        sample("up", 1, table="aliases", prefix="aliases/").encode(),
        *(
            numbers(up=1, snapshot_index=number, snapshot_keys=1, reloads_total=1).encode()
            for number in ("NaN", "+Inf", "-Inf")
        ),
        sample("build_info", 1, table="aliases").encode()
        + sample("start_time_seconds", 1e300, table="aliases").encode(),
    ],
)
def test_file_without_metrics_of_the_table_is_unknown(tmp_path, run_status, content):
    (tmp_path / "aliases.prom").write_bytes(content)
    outcome = run_status(configured(tmp_path), "aliases", "--json")
    assert (outcome[0], only_table(outcome)["state"], only_table(outcome)["healthy"]) == (2, "unknown", None)


def test_pipe_or_folder_instead_of_a_file_is_unknown_and_does_not_block(tmp_path, run_status):
    os.mkfifo(tmp_path / "pipe.prom")
    (tmp_path / "folder.prom").mkdir()
    code, out, _ = run_status(configured(tmp_path), "--json")
    assert (code, [each["state"] for each in json.loads(out)["tables"]]) == (2, ["unknown", "unknown"])


def test_unhealthy_table_outweighs_unknown_ones(tmp_path, run_status):
    publish(tmp_path, **LOST)
    (tmp_path / "broken.prom").write_text("x")
    assert run_status(configured(tmp_path), "--offline")[0] == 1


def test_all_configured_and_published_tables_are_listed_by_default(tmp_path, run_status):
    publish(tmp_path, "aliases", **FOLLOWING)
    publish(tmp_path, "domains", **FOLLOWING)
    path = configured(tmp_path, more="[tables.senders]\ndeadline = 1")
    _, out, _ = run_status(path, "--offline", "--json")
    assert [each["table"] for each in json.loads(out)["tables"]] == ["aliases", "domains", "senders"]
    _, out, _ = run_status(path, "--offline", "--json", "domains", "aliases", "domains")
    assert [each["table"] for each in json.loads(out)["tables"]] == ["domains", "aliases"]


def test_file_with_an_invalid_table_name_is_ignored(tmp_path, run_status):
    publish(tmp_path, "aliases", **FOLLOWING)
    for name in ("a\nb", "\x1b[2J", "a\udcffb"):
        (tmp_path / f"{name}.prom").touch()
    code, out, _ = run_status(configured(tmp_path), "--offline", "--json")
    assert (code, [each["table"] for each in json.loads(out)["tables"]]) == (0, ["aliases"])


def test_invalid_table_name_is_a_usage_error(tmp_path, run_status):
    code, out, err = run_status(configured(tmp_path), "a/b")
    assert (code, out, "invalid table name" in err) == (2, "", True)


@given(st.binary(max_size=300))
def test_any_bytes_in_a_file_are_unknown(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.prom"
    path.write_bytes(data)
    found = scrape.status_of(Config(None, metrics=MetricsConfig(textfile=str(path))), "aliases")
    assert (found.state, found.healthy, found.prefixes) == ("unknown", None, [])


@given(
    st.text(string.ascii_letters + "-_.*?[]{} ä", min_size=1, max_size=20).filter(lambda name: name not in {".", ".."}),
    st.sampled_from(["{table}.prom", "table-consul-{table}.prom", "{table}/{table}.prom", "[a]*?{table}"]),
)
def test_table_name_is_found_in_the_name_of_its_file(tmp_path_factory, name, pattern):
    folder = tmp_path_factory.mktemp("names")
    path = folder / pattern.replace("{table}", name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    # As in a shell, a leading wildcard does not match a dot.
    expected = set() if name.startswith(".") and pattern.startswith("{") else {name}
    assert scrape.published_tables(Config(None, metrics=MetricsConfig(textfile=f"{folder}/{pattern}"))) == expected
