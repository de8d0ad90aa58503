"""A real Prometheus scrapes real tables in both ways, and evaluates alerts and dashboard queries.

promtool runs the delivered tests of the rules; broken rules show that those tests detect faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.dialogue import Child, write_config
from tests.e2e import table_files
from tests.rig import cache
from tests.rig.consul import free_ports
from tests.rig.opensmtpd import CONFIG
from tests.rig.prometheus import NodeExporter, Prometheus, program, promtool
from tests.rig.root import File
from tests.rig.waiting import wait_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
PROMETHEUS = CONTRIB / "prometheus"
RULES = PROMETHEUS / "table-consul.rules.yml"
DASHBOARD = json.loads((CONTRIB / "grafana" / "table-consul.json").read_text())
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
TIMEOUT_SECONDS = 30.0

LOOKUP = b"table|0.1|0|%b|lookup|alias|1|%b"


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Download the programs before the timeout of the first test starts."""
    try:
        for name in ("prometheus", "promtool", "prometheus-node-exporter"):
            program(name)
    except cache.Unavailable as error:
        pytest.skip(str(error))


def configuration(exporter, listen):
    """The example configuration with the addresses of this test and short intervals."""
    text = (PROMETHEUS / "prometheus.yml.example").read_text()
    for written, used in (
        ("127.0.0.1:9100", exporter),
        ("127.0.0.1:9777", listen),
        ("scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s"),
    ):
        assert text.count(written) >= 1
        text = text.replace(written, used)
    return text


@pytest.fixture
def watched(consul, tmp_path):
    """Two tables that follow Consul, one with a text file and one with a listener, and a Prometheus for both."""
    (port,) = free_ports(1)
    textfiles = tmp_path / "textfiles"
    for folder in ("aliases", "people", "textfiles"):
        (tmp_path / folder).mkdir()
        consul.kv_put(f"{folder}/alias/root", "gilles")
    metrics = {
        "aliases": f'textfile = "{textfiles}/table-consul-{{table}}.prom"',
        "people": f'listen = "127.0.0.1:{port}"',
    }
    with contextlib.ExitStack() as running:
        children = {}
        for table, line in metrics.items():
            more = f"[metrics]\n{line}"
            path = write_config(tmp_path / table, "deadline = 0.3", address=f"http://{consul.address}", more=more)
            children[table] = running.enter_context(Child(str(path)))
            children[table].handshake(table.encode())
        exporter = running.enter_context(NodeExporter(textfiles))
        prometheus = running.enter_context(
            Prometheus(configuration(exporter.address, f"127.0.0.1:{port}"), beside=PROMETHEUS)
        )
        yield SimpleNamespace(
            prometheus=prometheus,
            consul=consul,
            children=children,
            file=textfiles / "table-consul-aliases.prom",
            configs={table: str(tmp_path / table / "table-consul.toml") for table in metrics},
        )


def ask(watched, table, key=b"root", *, times=1):
    for _ in range(times):
        answer = watched.children[table].ask(LOOKUP % (table.encode(), key))
    return answer


def update(watched, table):
    """Update the table, which writes its text file."""
    watched.children[table].ask(b"table|0.1|0|%b|update|1" % table.encode())


def wait_for_value(watched, expression, expected, while_waiting=lambda: None):
    """Return when the value of an expression is ``expected``: a number for each table."""
    said = {}

    def so():
        while_waiting()
        said.clear()
        said.update({labels.get("table"): value for labels, value in watched.prometheus.query(expression)})
        return said == expected

    wait_for(so, TIMEOUT_SECONDS, lambda: f"{expression} is {said}, not {expected}")


def test_prometheus_gets_the_same_numbers_from_a_text_file_and_a_listener(watched):
    wait_for_value(watched, "table_consul_up", {"aliases": 1, "people": 1})
    for table in watched.children:
        assert ask(watched, table, times=5) == b"lookup-result|1|found|gilles"
        assert ask(watched, table, b"nobody", times=3) == b"lookup-result|1|not-found"
    update(watched, "aliases")
    for outcome, count in (("found", 5), ("not-found", 3)):
        expression = f'table_consul_requests_total{{service="alias", op="lookup", outcome="{outcome}"}}'
        wait_for_value(watched, expression, {"aliases": count, "people": count})
    wait_for_value(
        watched, 'sum by (table) (table_consul_request_seconds_count{service="alias"})', {"aliases": 8, "people": 8}
    )
    wait_for_value(watched, "table_consul_snapshot_keys", {"aliases": 1, "people": 1})
    jobs = {labels["table"]: labels["job"] for labels, _ in watched.prometheus.query("table_consul_build_info")}
    assert jobs == {"aliases": "node", "people": "table-consul"}
    assert [value for _, value in watched.prometheus.query("node_textfile_scrape_error")] == [0]
    targets = watched.prometheus.ask("targets")["activeTargets"]
    assert [(target["health"], target["lastError"]) for target in targets] == [("up", ""), ("up", "")]
    watched.consul.kv_put("people/alias/command", "|/bin/sh")
    wait_for_value(watched, 'table_consul_entries_refused{table="people"}', {"people": 1})
    index = watched.consul.request("GET", "/v1/kv/people/alias/command")[0]["ModifyIndex"]
    wait_for_value(watched, 'table_consul_snapshot_index{table="people"}', {"people": index})
    wait_for(
        lambda: "TableConsulEntriesRefused" in watched.prometheus.alerts(), TIMEOUT_SECONDS, lambda: "no alert at all"
    )


# ---- the dashboard ----


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


def substituted(expression, **chosen):
    variables = {"instance": ".*", "table": ".*", "__range": "1m", "__rate_interval": "10s", **chosen}
    text = re.sub(r"\$(\w+)", lambda match: variables[match[1]], expression)
    assert "$" not in text
    return text


def test_every_query_of_the_dashboard_returns_numbers_for_its_variables(watched):
    watched.consul.kill()  # to have a last error

    def talk():
        ask(watched, "people", times=20)

    wait_for_value(watched, 'table_consul_up{table="people"}', {"people": 0}, talk)
    watched.consul.start()
    wait_for_value(watched, 'table_consul_up{table="people"}', {"people": 1}, talk)
    update(watched, "aliases")
    empty = {param.values[0]: param.id for param in queries()}
    assert len(empty) > 20

    def all_have_come():
        talk()
        for expression in list(empty):
            samples = watched.prometheus.query(substituted(expression))
            if samples and all(value == value for _, value in samples):  # noqa: PLR0124 - a number that is none is unequal
                del empty[expression]
        return not empty

    wait_for(all_have_come, TIMEOUT_SECONDS, lambda: f"without a number: {empty}")
    nobody = {"table": "nobody", "instance": "nowhere"}
    for param in queries():
        expression = substituted(param.values[0], **nobody)
        assert watched.prometheus.query(expression) == [], f"{param.id} ignores the chosen variables"
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            offered[variable["name"]] = watched.prometheus.ask(
                f"label/{label}/values", **{"match[]": substituted(series)}
            )
    assert (offered["table"], len(offered["instance"])) == (["aliases", "people"], 2)


# ---- alerts ----


def test_prometheus_loads_all_rules_and_a_healthy_system_has_no_alert(watched):
    wait_for_value(watched, "table_consul_up", {"aliases": 1, "people": 1})

    def evaluated():
        groups = watched.prometheus.ask("rules")["groups"]
        health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        return health == dict.fromkeys(ALERTS, "ok")

    wait_for(evaluated, TIMEOUT_SECONDS, lambda: str(watched.prometheus.ask("rules")))
    settled = time.monotonic() + 2
    wait_for(
        lambda: time.monotonic() > settled and not watched.prometheus.alerts(),
        15,
        lambda: str(watched.prometheus.alerts()),
    )


def expect_alerts(watched, wanted, while_waiting=lambda: None):
    """Return when exactly these alerts are pending or firing for these tables, hosts or files."""
    seen = {}

    def so():
        while_waiting()
        alerts = watched.prometheus.alerts()
        seen.clear()
        seen.update(
            {name: {alert["labels"].get("table") for alert in alerts[name]} for name in alerts if name in wanted}
        )
        return seen == wanted

    wait_for(so, TIMEOUT_SECONDS, lambda: f"{seen}, not {wanted}: {watched.prometheus.alerts()}")


def test_outages_errors_late_answers_and_ended_processes_raise_alerts(watched):
    wait_for_value(watched, "table_consul_up", {"aliases": 1, "people": 1})
    watched.consul.pause()
    watched.children["people"].ask(b"table|0.1|0|people|lookup|nonsense|1|root")

    expect_alerts(watched, {"TableConsulErrors": {"people"}})
    watched.consul.kill()
    wait_for_value(watched, 'table_consul_up{table="people"}', {"people": 0})
    update(watched, "aliases")
    expect_alerts(watched, {"TableConsulLostConsul": {"aliases", "people"}}, lambda: update(watched, "aliases"))
    (alert,) = [a for a in watched.prometheus.alerts()["TableConsulLostConsul"] if a["labels"]["table"] == "people"]
    instance = alert["labels"]["instance"]
    assert alert["annotations"]["summary"] == f"Table people on {instance} cannot read people/ from Consul."
    assert "TableConsulAnswersNothing" not in watched.prometheus.alerts()  # snapshots exist

    for child in watched.children.values():
        assert child.end() == 0
    os.utime(watched.file, (time.time() - 300,) * 2)
    expect_alerts(watched, {"TableConsulDoesNotAnswer": {None}, "TableConsulFileStale": {None}})
    (alert,) = watched.prometheus.alerts()["TableConsulFileStale"]
    assert alert["labels"]["file"] == str(watched.file)
    assert re.search(r" it is 5m \d+\S*s old\.$", alert["annotations"]["summary"]), alert


def test_table_without_consul_and_without_a_snapshot_raises_an_alert(consul, watched, tmp_path):
    update(watched, "aliases")
    wait_for_value(watched, "table_consul_snapshot_keys", {"aliases": 1, "people": 1})
    consul.kill()
    (tmp_path / "new").mkdir()
    more = f'[metrics]\ntextfile = "{watched.file.parent}/table-consul-{{table}}.prom"'
    path = write_config(tmp_path / "new", "deadline = 0.3", address=f"http://{consul.address}", more=more)
    with Child(str(path)) as child:
        child.handshake(b"new")
        expect_alerts(watched, {"TableConsulAnswersNothing": {"new"}})
        assert child.end() == 0


def test_promtool_accepts_the_example_configuration_and_the_rules(tmp_path):
    shutil.copy(PROMETHEUS / "prometheus.yml.example", tmp_path / "prometheus.yml")
    shutil.copy(RULES, tmp_path)
    for arguments in (("check", "config", "prometheus.yml"), ("check", "rules", "--lint-fatal", RULES.name)):
        checked = promtool(*arguments, cwd=tmp_path)
        assert (checked.returncode, "SUCCESS" in checked.stdout) == (0, True), checked.stdout + checked.stderr


def judged(rules, folder, name=""):
    """The result of the delivered tests that name this alert with these rules, and the output of promtool."""
    (folder / RULES.name).write_text(rules)
    delivered = (PROMETHEUS / "table-consul.rules_test.yml").read_text()
    head, *tests = re.split(r"\n(?=  - name: )", delivered)
    named = [each for each in tests if name in each]
    assert named
    (folder / "table-consul.rules_test.yml").write_text("\n".join([head, *named]))
    done = promtool("test", "rules", "table-consul.rules_test.yml", cwd=folder)
    return done.returncode == 0, done.stdout + done.stderr


def broken_rules(name):
    """The rules with this alert broken in several ways, each with its description."""
    before, rest = RULES.read_text().split(f"- alert: {name}\n")
    rule, separator, after = rest.partition("\n      - alert: ")
    expression = re.search(r"expr: (.*)", rule)[1]
    changes = {"never": "vector(0) > 1", "always": "vector(1)"}
    # Each number outside selectors, much larger: another threshold, window or offset.
    for match in re.finditer(r"(?<![\w.\"])([1-9]\d*|0\.\d+)(?=[mh\]]|\b)", expression):
        larger = str(round(float(match[1]) * 1.25 + 0.01, 2)) if "." in match[1] else str(int(int(match[1]) * 1.25) + 1)
        changes[f"{match[1]} -> {larger}"] = expression[: match.start()] + larger + expression[match.end() :]
    for what, changed in changes.items():
        yield what, before + f"- alert: {name}\n" + rule.replace(expression, changed) + separator + after
    if "for: " in rule:
        yield "at once", before + f"- alert: {name}\n" + re.sub(r" +for: .*\n", "", rule) + separator + after


def test_delivered_tests_of_the_rules_pass(tmp_path):
    assert judged(RULES.read_text(), tmp_path)[0], judged(RULES.read_text(), tmp_path)[1]


@pytest.mark.parametrize("name", ALERTS)
def test_delivered_tests_of_the_rules_detect_a_broken_alert(tmp_path, name):
    unnoticed = [what for what, rules in broken_rules(name) if judged(rules, tmp_path, name)[0]]
    assert unnoticed == []


# ---- under smtpd ----


def test_node_exporter_can_read_the_text_file_of_a_table_under_smtpd(consul, smtpd):
    consul.kv_put("consul/alias/root", "gilles")
    files = table_files(consul)
    textfile = '[metrics]\ntextfile = "/tmp/table-consul-{table}.prom"\n'
    files[CONFIG] = File(files[CONFIG].content + textfile, 0o640, "root", "opensmtpd")
    server = smtpd(
        """
        table consul consul:/etc/mail/table-consul.toml
        listen on 127.0.0.1 port $smtp_port
        action "local" mbox alias <consul>
        match from any for local action "local"
        """,
        files,
    )
    assert server.send("root@localhost")["root@localhost"][0] == 250
    path = server._running_tree / "tmp" / "table-consul-consul.prom"
    wait_for(lambda: path.exists() and "snapshot_keys{" in path.read_text(), TIMEOUT_SECONDS, lambda: server.log)
    assert path.stat().st_mode & 0o777 == 0o644
    with NodeExporter(path.parent) as exporter:
        text = exporter.read("/metrics").decode()
    assert 'table_consul_snapshot_keys{prefix="consul/",table="consul"} 1\n' in text
    assert "node_textfile_scrape_error 0\n" in text
