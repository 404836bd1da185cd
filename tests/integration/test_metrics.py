"""What a real daemon tells over HTTP, what Prometheus makes of it, and what the dashboard shows of it."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cpe_daemon.observe.inventory import INSTRUMENTS
from cpe_daemon.observe.labels import PHASES, STAGES
from tests.integration.harness import Daemon, Node
from tests.integration.processes import until
from tests.integration.prometheus import DEPLOY, Prometheus
from tests.programs import program

RECIPE = {"plain": 12, "nbytes": 512 << 10}
VERSION_BYTES = 12 * (512 << 10)
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class Page(NamedTuple):
    """An answer over HTTP."""

    status: int
    kind: str
    text: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found


def url_of(daemon: Daemon) -> str:
    return next(str(e) for e in daemon.status()["daemon"]["endpoints"] if str(e).startswith("http"))


def get(daemon: Daemon, path: str, accept: str = "*/*", url: str = "") -> Page:
    request = Request((url or url_of(daemon)) + path, headers={"Accept": accept})
    try:
        with urlopen(request, timeout=10) as answer:
            return Page(answer.status, answer.headers["Content-Type"], answer.read().decode())
    except HTTPError as error:
        with error:
            return Page(error.code, error.headers["Content-Type"], error.read().decode())


def values(daemon: Daemon) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families: list[Metric] = list(parse_text(get(daemon, "/metrics").text))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(daemon: Daemon, name: str, **labels: str) -> float | None:
    return values(daemon).get((name, frozenset(labels.items())))


def pushed(node: Node, versions: int, **settings: Any) -> Daemon:
    """A daemon whose two engines hold the last of some versions."""
    daemon = node.start_daemon(device__gpus=2, **settings)
    trainer = node.trainer()
    node.engine("a", world_size=2, recipe=RECIPE, slicing=True)
    node.engine("b", recipe=RECIPE)
    for version in range(1, versions + 1):
        trainer.ask("build", recipe=RECIPE, seed=version)
        trainer.publish_live(version)
    return daemon


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_tell_what_was_pushed(node: Node) -> None:
    daemon = pushed(node, 2)
    seen = values(daemon)

    def at(name: str, **labels: str) -> float:
        return seen[name, frozenset(labels.items())]

    assert at("cpe_live_version", model="policy") == at("cpe_staged_version", model="policy") == 2
    assert at("cpe_received_version", model="policy") == 2
    assert at("cpe_retained_versions", model="policy") == 1
    assert at("cpe_versions_total", model="policy", outcome="live") == 2
    assert at("cpe_rounds_total", outcome="updated") == 4
    assert at("cpe_engines", state="current") == 2
    assert at("cpe_workers") == 3
    assert at("cpe_trainers") == 1
    assert at("cpe_ready") == 1
    for engine in "ab":
        assert at("cpe_engine_version", engine=engine, model="policy") == 2
        assert at("cpe_engine_lag_versions", engine=engine, model="policy") == 0
        assert at("cpe_engine_state", engine=engine, state="current") == 1
        assert at("cpe_engine_missing_workers", engine=engine) == 0
    for phase in PHASES:
        engine = "" if phase in ("publish", "stage") else "b"
        times = 1 if phase == "check" else 2  # of tensors as it has loaded before, it is not asked again
        assert at("cpe_update_duration_seconds_count", phase=phase, model="policy", engine=engine) == times
    moved = {"receive": 2, "fetch": 2, "exchange": 2, "load": 4}
    assert moved.keys() == STAGES.keys()
    for stage, times in moved.items():
        assert at("cpe_stage_bytes_total", stage=stage) == times * VERSION_BYTES, stage
        assert at("cpe_stage_seconds_total", stage=stage) > 0
    assert at("cpe_received_bytes_total", transport="landing") == 2 * VERSION_BYTES
    assert at("cpe_arena_size_bytes") == at("cpe_arena_prefaulted_bytes") == 64 << 20
    assert at("cpe_arena_free_bytes") == (64 << 20) - 2 * VERSION_BYTES
    assert at("cpe_arena_leased_bytes") == at("cpe_credits_in_use") == at("cpe_push_in_progress") == 0
    assert at("cpe_slots", gpu="1", uuid="shm-1") == 3
    assert at("cpe_handoff_claims_total") == 7, "a ring, and a tether and slots for each of three workers"
    assert at("process_open_fds") > 10


def test_everything_in_the_inventory_is_shown_and_prometheus_finds_no_fault(node: Node) -> None:
    daemon = pushed(node, 1)
    text = get(daemon, "/metrics")
    assert text.kind.startswith("text/plain")
    shown = {family.name for family in parse_text(text.text)}
    assert {name.removesuffix("_total") for name in INSTRUMENTS} <= shown
    openmetrics = get(daemon, "/metrics", OPENMETRICS)
    assert openmetrics.kind.startswith("application/openmetrics-text")
    parsed: list[Metric] = list(parse_openmetrics(openmetrics.text))  # type: ignore[no-untyped-call]
    assert {family.name for family in parsed} == shown
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text.text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_series_of_an_engine_that_detached_are_gone(node: Node) -> None:
    daemon = node.start_daemon()
    trainer = node.trainer()
    stays, leaves = node.engine("stays", recipe=RECIPE)[0], node.engine("leaves", recipe=RECIPE)[0]
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.publish_live(1)
    for worker in (stays, leaves):
        worker.await_serving(1)
    assert 'engine="leaves"' in get(daemon, "/metrics").text
    leaves.ask("close")
    until(lambda: 'engine="leaves"' not in get(daemon, "/metrics").text, "its series are gone")
    assert 'engine="stays"' in get(daemon, "/metrics").text


def test_engine_that_is_behind_or_in_doubt_is_told_of(node: Node) -> None:
    daemon = node.start_daemon()
    trainer = node.trainer()
    good, bad = node.engine("good", recipe=RECIPE)[0], node.engine("bad", target="callback", recipe=RECIPE)[0]
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.publish_live(1)
    bad.ask("arm", at=3)
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("publish", version=2)
    bad.event("reached")
    bad.kill()
    trainer.ask("live", version=2, timeout=15)
    good.await_serving(2)
    until(lambda: value(daemon, "cpe_engine_missing_workers", engine="bad") == 1, "its worker is missed")
    assert value(daemon, "cpe_engine_lag_versions", engine="bad", model="policy") == 1
    assert value(daemon, "cpe_engine_state", engine="bad", state="unknown") == 1
    assert value(daemon, "cpe_engine_version", engine="bad", model="policy") is None
    assert value(daemon, "cpe_rounds_total", outcome="failed") == 1
    assert value(daemon, "cpe_engine_failures_total", code="peer_lost") == 1
    assert value(daemon, "cpe_engine_lag_versions", engine="good", model="policy") == 0


# --- probes and state ------------------------------------------------------------------------------------------------


def test_probes_follow_the_life_of_a_node(node: Node) -> None:
    daemon = node.start_daemon()
    assert get(daemon, "/readyz").json == {"ready": True, "reasons": [], "warnings": []}
    assert get(daemon, "/healthz").json == {"healthy": True, "reasons": []}
    first = node.worker("pair", 0, 2, recipe=RECIPE)
    first.ask("attach")
    answer = get(daemon, "/readyz")
    (reason,) = answer.json["reasons"]
    assert (answer.status, reason["code"], reason["engine"]) == (503, "engine_incomplete", "pair")
    assert "lacks ranks [1]" in reason["message"]
    assert daemon.status()["readiness"]["ready"] is False
    assert get(daemon, "/healthz").status == 200
    node.worker("pair", 1, 2, recipe=RECIPE).ask("attach")
    until(lambda: get(daemon, "/readyz").status == 200, "the node is ready")


def test_draining_node_is_alive_and_not_ready(node: Node) -> None:
    daemon = node.start_daemon()
    url = url_of(daemon)
    trainer = node.trainer()
    worker = node.engine(target="callback", recipe=RECIPE)[0]
    worker.ask("arm", at=3)
    trainer.ask("build", recipe=RECIPE, seed=1)
    trainer.ask("publish", version=1)
    worker.event("reached")
    assert value(daemon, "cpe_push_in_progress") == 1
    daemon.signal(signal.SIGTERM)
    until(lambda: get(daemon, "/readyz", url=url).status == 503, "the node is not ready")
    assert [reason["code"] for reason in get(daemon, "/readyz", url=url).json["reasons"]] == ["draining"]
    assert get(daemon, "/healthz", url=url).status == 200
    worker.ask("go")
    daemon.wait()
    assert daemon.exit_status == 0


def test_status_is_the_one_of_the_command(node: Node) -> None:
    daemon = pushed(node, 1)
    over_http, over_zeromq = get(daemon, "/status").json, daemon.status()
    for status in (over_http, over_zeromq):
        del status["daemon"]["uptime_seconds"], status["counters"], status["journal"]["written_at"]
        for version in status["versions"]:
            del version["age_seconds"]
    assert over_http == over_zeromq
    assert get(daemon, "/").text.count("<a href=") == 4


def test_second_daemon_is_refused_a_port_that_is_taken(node: Node, tmp_path: Path) -> None:
    first = node.start_daemon()
    taken = url_of(first).removeprefix("http://")
    second = node.launch_daemon(tmp_path / "second", http__listen=taken)
    second.wait()
    assert second.exit_status not in (0, None)
    assert f"cannot listen on {taken} (http.listen)" in second.said
    assert get(first, "/healthz").status == 200


def test_nobody_listens_where_nothing_is_to_be_listened_on(node: Node) -> None:
    daemon = node.start_daemon(http__listen="")
    assert not [endpoint for endpoint in daemon.status()["daemon"]["endpoints"] if str(endpoint).startswith("http")]


def test_listener_that_strangers_reach_is_said_loudly(node: Node) -> None:
    daemon = node.start_daemon(http__listen="0.0.0.0:0")
    assert '"event": "http.exposed"' in daemon.said
    url = url_of(daemon).replace("0.0.0.0", "127.0.0.1")
    verdict = get(daemon, "/readyz", url=url).json
    assert verdict["ready"] is True
    assert [warning["code"] for warning in verdict["warnings"]] == ["insecure"]


# --- Prometheus ------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(node: Node, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that has seen one version go live, and then another."""
    program("prometheus")  # skip before anything is started
    daemon = node.start_daemon(device__gpus=2)
    trainer = node.trainer()
    node.engine("a", world_size=2, recipe=RECIPE, slicing=True)
    with Prometheus(url_of(daemon).removeprefix("http://"), tmp_path / "prometheus") as prometheus:
        for version in (1, 2):
            trainer.ask("build", recipe=RECIPE, seed=version)
            trainer.publish_live(version)
            prometheus.await_value('cpe_versions_total{outcome="live"}', version)
        prometheus.await_rise("cpe_loop_lag_seconds_count")  # of the passing of time alone, twice a second
        prometheus.await_rise("process_cpu_seconds_total")
        yield prometheus


def test_every_panel_of_the_dashboard_shows_data_of_a_real_run(watched: Prometheus) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "cpe-daemon.json").read_text())
    meant = {"datasource": "", "node": ".*", "model": ".*", "window": "5m"}
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables.keys() == meant.keys()
    for variable in variables.values():
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            assert watched.ask(f"label/{label}/values", **{"match[]": filled(metric, meant)})

    def shows(expression: str) -> bool:
        return any(math.isfinite(float(sample["value"][1])) for sample in watched.query(expression))

    shown = 0
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = filled(target["expr"], meant)
            # Not at once: after a scrape that took too long there is nothing for a moment.
            until(lambda expression=expression: shows(expression), f"{panel['title']!r} shows {expression}")  # type: ignore[misc]
            shown += 1
    assert shown > 30


def test_alerts_are_evaluated_and_none_fires_for_a_node_that_is_well(watched: Prometheus) -> None:
    (group,) = watched.ask("rules")["groups"]
    until(lambda: all(r["health"] == "ok" for r in watched.ask("rules")["groups"][0]["rules"]), "rules are evaluated")
    assert {rule["lastError"] for rule in group["rules"] if "lastError" in rule} == set()
    until(lambda: not watched.ask("alerts")["alerts"], "what was behind for the time of a push is not any more")


def filled(expression: str, meant: dict[str, str]) -> str:
    """An expression with the dashboard's variables replaced, as Grafana does."""
    replaced = re.sub(r"\$\{?(\w+)\}?", lambda found: meant[found[1]], expression)
    assert "$" not in replaced
    return replaced
