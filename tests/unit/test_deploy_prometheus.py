"""What ships for Prometheus and Grafana is valid, and speaks of metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpe_daemon.observe.inventory import INSTRUMENTS
from tests.programs import program

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
TESTS = DEPLOY / "prometheus" / "alerts.test.yml"


def names(expression: str) -> set[str]:
    """The metrics of ours that an expression asks for, by the names of their instruments."""
    found = set(re.findall(r"\bcpe_\w+", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "cpe-daemon.json").read_text())
    return found


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in dashboard()["panels"] if panel["type"] != "row")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(DEPLOY / "prometheus" / "scrape.yml")],
        ["check", "rules", str(ALERTS)],
        ["test", "rules", str(TESTS)],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_finds_no_fault(arguments: list[str]) -> None:
    ran = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=DEPLOY
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_is_tested_to_fire_and_to_keep_silent() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == silent == set(alerts())


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert {"summary", "description"} == set(rule["annotations"]), name
        assert "$labels.instance" in rule["annotations"]["summary"], name


def test_alerts_ask_for_metrics_that_there_are_and_the_inventory_names_them() -> None:
    asked = {name: names(rule["expr"]) for name, rule in alerts().items()}
    assert set().union(*asked.values()) <= INSTRUMENTS.keys()
    for instrument in INSTRUMENTS.values():
        for alert in instrument.alerts:
            assert instrument.name in asked[alert], (instrument.name, alert)
    named = {alert for instrument in INSTRUMENTS.values() for alert in instrument.alerts}
    assert set(alerts()) - named == {"CpeDaemonDown"}  # which asks whether there are any metrics


def test_dashboard_asks_for_metrics_that_there_are_and_shows_each_where_the_inventory_says() -> None:
    asked = {panel["title"]: names(" ".join(t["expr"] for t in panel["targets"])) for panel in panels()}
    assert set().union(*asked.values()) <= INSTRUMENTS.keys()
    for instrument in INSTRUMENTS.values():
        if instrument.panel:
            assert instrument.name in asked[instrument.panel], instrument.name
        else:
            assert instrument.alerts, f"{instrument.name} is of no use"


def test_dashboard_leaves_the_choice_of_data_to_its_variables() -> None:
    assert [variable["name"] for variable in dashboard()["templating"]["list"]] == [
        "datasource",
        "node",
        "model",
        "window",
    ]
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '=~"$node"' in target["expr"], panel["title"]
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        taken = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= taken
