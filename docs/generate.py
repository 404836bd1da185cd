"""Writes what documents show of the code, out of the code.

The state diagrams of ARCHITECTURE.md are drawn out of the transition tables that decide, METRICS.md is made of the
inventory of metrics and of the alerts that ship, and configs/default.yaml of the settings. `make docs` runs this; tests
fail when a document is behind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cpe_daemon.config import annotated_default
from cpe_daemon.config.units import format_seconds
from cpe_daemon.config.waits import WAITS, Wait, seconds_of
from cpe_daemon.core.lifecycle import (
    ENGINE_TABLE,
    ROUND_TABLE,
    VERSION_TABLE,
    EngineState,
    RoundState,
    VersionState,
)
from cpe_daemon.observe.instrument import Instrument
from cpe_daemon.observe.inventory import THEMES
from cpe_daemon.observe.labels import COPIES, PHASES, ROLLBACKS, SOCKETS, STAGES

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
METRICS = ROOT / "docs" / "METRICS.md"
SETTINGS = ROOT / "configs" / "default.yaml"
DEADLINES = ROOT / "docs" / "DEADLINES.md"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"

_METRICS_HEAD = """\
# Metrics

<!-- Written by `make docs` out of cpe_daemon/observe/inventory.py and deploy/prometheus/alerts.yml: change those. -->

A daemon shows these at `/metrics` of its HTTP listener (`http.listen`, 127.0.0.1:9845 unless told otherwise), in
Prometheus's text or in OpenMetrics, as the scraper asks. [scrape.yml](../deploy/prometheus/scrape.yml) is a
configuration to begin with, [alerts.yml](../deploy/prometheus/alerts.yml) what to be told of, and
[cpe-daemon.json](../deploy/grafana/cpe-daemon.json) a dashboard for Grafana. Beside `/metrics` there are `/healthz`
(503 if a copy is stuck), `/readyz` (503 with reasons, unless the node is ready for work), and `/status`, which is what
`cpe status --json` prints.

Bytes and seconds are meant where a name says so; everything else counts things. A version is a value and never a label.
Labels that peers choose are bounded: the 64 models that were used last, and engines that the daemon knows; series of an
engine that has detached are gone with it. Nothing is counted per chunk or bucket but in plain numbers, which are read
when somebody asks.
"""
_METRICS_TAIL = """\
`process_*` (processor time, resident and virtual memory, open descriptors, start) and `python_gc_*` are those that
Prometheus's client for Python shows of any process. The arena is shared memory, and part of the resident memory.
"""


_DEADLINES_HEAD = """\
# Deadlines

<!-- Written by `make docs` out of cpe_daemon/config/waits.py, where the test of each is named as well: change that. -->

Nothing waits for ever. What takes longer than its deadline fails, and says which peer, phase and version it waited for.
A driver of an engine gets a second more than its workers, so that the error that arrives is the one that names the
worker. Errors are the codes of `--json` and of the label `code`; a command's own `--timeout` comes on top.
"""


def diagram(table: Mapping[tuple[S, E], S], initial: S) -> str:
    """Draw a transition table as a Mermaid state diagram; events between the same two states share an arrow."""
    arrows: dict[tuple[S, S], list[str]] = {}
    for (state, event), after in table.items():
        arrows.setdefault((state, after), []).append(str(event))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {initial}"]
    lines += [f"    {state} --> {after}: {' / '.join(events)}" for (state, after), events in arrows.items()]
    final = {after for _, after in arrows} - {state for state, _ in arrows}
    lines += [f"    {state} --> [*]" for state in sorted(final)]
    return "\n".join([*lines, "```"])


DIAGRAMS = {
    "version": diagram(VERSION_TABLE, VersionState.RECEIVING),
    "engine": diagram(ENGINE_TABLE, EngineState.UNKNOWN),
    "round": diagram(ROUND_TABLE, RoundState.PREFETCHING),
}


def generated(text: str) -> str:
    """Return a document with every generated part made anew.

    Raises:
        ValueError: a part has no place in it.
    """
    for name, drawn in DIAGRAMS.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- /generated -->"
        place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for the {name} diagram: {begin} ... {end}")
        text = place.sub(f"{begin}\n{drawn}\n{end}", text)
    return text


def metrics() -> str:
    """The document of the metrics."""
    parts = [_METRICS_HEAD]
    for theme, instruments in THEMES.items():
        rows = [_metric(instrument) for instrument in instruments]
        parts += [f"## {theme}\n", _table(("metric", "type", "labels", "unit", "meaning", "used for"), rows)]
        if theme == "Updates":
            parts += [_values("phase", PHASES), _values("stage", STAGES)]
    parts += [_values("cause", ROLLBACKS), _values("copies", COPIES), _values("socket", SOCKETS)]
    alerts = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    parts += [
        "## Of the process\n",
        _METRICS_TAIL,
        "## Alerts\n",
        _table(("alert", "severity", "after", "condition"), [_alert(alert) for alert in alerts]),
    ]
    return "\n".join(parts)


def _metric(metric: Instrument) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    panel = f"Panel “{metric.panel}”." if metric.panel else ""
    alerts = f"Alert {', '.join(metric.alerts)}." if metric.alerts else ""
    use = " ".join(part for part in (panel, alerts, metric.hint) if part)
    return f"`{metric.name}`", metric.kind, labels, metric.unit, metric.text, use


def _values(label: str, meanings: Mapping[str, str]) -> str:
    """The values of a label."""
    rows = [(f"`{value}`", text) for value, text in meanings.items()]
    return f"A `{label}` is one of:\n\n{_table((label, 'what it is'), rows)}"


def _alert(rule: Mapping[str, Any]) -> tuple[str, ...]:
    return rule["alert"], rule["labels"]["severity"], rule.get("for", "at once"), f"`{rule['expr']}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def deadlines() -> str:
    """The document of the waits."""
    rows = [_wait(wait) for wait in WAITS]
    return _DEADLINES_HEAD + "\n" + _table(("waits for", "by default", "setting", "then", "error", "counted by"), rows)


def _wait(wait: Wait) -> tuple[str, ...]:
    setting = f"`{wait.where}`" if wait.where.startswith("deadlines.") else "fixed"
    error, metric = (f"`{name}`" if name != "-" else "-" for name in (wait.error, wait.metric))
    return wait.what, format_seconds(seconds_of(wait)), setting, wait.then, error, metric


DOCUMENTS: Mapping[Path, Callable[[], str]] = {
    ARCHITECTURE: lambda: generated(ARCHITECTURE.read_text()),
    METRICS: metrics,
    DEADLINES: deadlines,
    SETTINGS: annotated_default,
}
"""Every document that is made of the code, or of itself and the code."""


if __name__ == "__main__":
    for path, make in DOCUMENTS.items():
        before = path.read_text() if path.exists() else ""
        after = make()
        if after != before:
            path.write_text(after)
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'written' if after != before else 'current'}\n")
