"""Alerts, dashboard and documentation agree with the published metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

from table_consul.metrics import Exporter
from tests.smtpd.metrics import fake_tables

CONTRIB = Path(__file__).parents[2] / "contrib"
RULES = (CONTRIB / "prometheus" / "table-consul.rules.yml").read_text()
DASHBOARD = json.loads((CONTRIB / "grafana" / "table-consul.json").read_text())
NAMES = re.compile(r"\btable_consul_[a-z_]+")


def published():
    """The names of all metrics, as Prometheus stores them."""
    names = set()
    for family in Exporter("aliases", fake_tables()).collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def grid_cells(panel):
    return {
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    }


def test_alerts_and_dashboard_use_only_published_metrics():
    named = {*NAMES.findall(RULES), *NAMES.findall(json.dumps(DASHBOARD))}
    assert sorted(named - published()) == []


def test_dashboard_shows_every_metric():
    assert sorted(published() - {*NAMES.findall(json.dumps(DASHBOARD))}) == []


def test_dashboard_panel_has_position_description_and_chosen_datasource():
    panels = DASHBOARD["panels"]
    cells = [cell for panel in panels for cell in grid_cells(panel)]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        for query in (panel, *panel["targets"]):
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_alert_has_summary_runbook_and_severity():
    for alert in RULES.split("- alert: ")[1:]:
        name = alert.partition("\n")[0]
        for key in ("summary: ", "runbook: ", "severity: "):
            assert alert.count(f"\n          {key}") == 1, f"{name} has no {key}"


DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"


def test_documented_metrics_are_the_published_ones():
    documented = {*re.findall(r"^\| `(table_consul_\w+)`", DOCUMENT.read_text(), re.MULTILINE)}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in published()}
    assert documented == names
