"""Log events in both forms, and the metrics: their names, their bounds, and how they are written."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from cpe_daemon.errors import CODES
from cpe_daemon.observe.inventory import INSTRUMENTS
from cpe_daemon.observe.labels import PHASES
from cpe_daemon.observe.logs import configure_logging
from cpe_daemon.observe.metrics import MAX_ENGINES, MAX_MODELS, OTHER, Metrics, Readings


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Give the process its logging back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_event_has_the_common_fields_first() -> None:
    stream = io.StringIO()
    configure_logging("info", "auto", stream=stream)
    structlog.get_logger("cpe_daemon.versions").info("version.staged", version="m@r#1", nbytes=3)
    (event,) = events(stream)
    assert list(event) == ["ts", "level", "event", "logger", "version", "nbytes"]
    assert (event["level"], event["event"], event["logger"]) == (
        "info",
        "version.staged",
        "cpe_daemon.versions",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event["ts"])


def test_logger_made_before_the_configuration_follows_it() -> None:
    log = structlog.get_logger("early", engine="e0")
    stream = io.StringIO()
    configure_logging("warning", "json", stream=stream)
    log.info("engine.seen")
    log.warning("engine.lost")
    assert [(event["event"], event["engine"]) for event in events(stream)] == [("engine.lost", "e0")]


def test_standard_logging_takes_the_same_way() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    logging.getLogger("asyncio").warning("slow %s", "callback")
    logging.getLogger("asyncio").debug("unseen")
    (event,) = events(stream)
    assert (event["event"], event["logger"], event["level"]) == ("slow callback", "asyncio", "warning")


def test_traceback_is_a_field_of_one_line() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        structlog.get_logger("x").exception("round.crashed")
    (event,) = events(stream)
    assert "ZeroDivisionError" in event["exception"]


def test_terminal_gets_the_console_form() -> None:
    stream = Terminal()
    configure_logging("info", "auto", stream=stream)
    structlog.get_logger("x").info("version.staged", model="m\x1b[31m\nfake.event")
    assert "version.staged" in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_configuring_twice_writes_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", "json", stream=first)
    configure_logging("info", "json", stream=second)
    structlog.get_logger("x").info("a.b")
    assert (len(events(first)), len(events(second))) == (0, 1)


def test_line_that_cannot_be_written_is_lost_and_nothing_else() -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as stream:  # at its end, of what it still holds
        configure_logging("info", "json", stream=stream)
        structlog.get_logger("x").info("a.b")
    structlog.get_logger("x").info("to a file that is closed")


def test_context_and_arguments_of_an_event_are_in_its_line() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    with structlog.contextvars.bound_contextvars(round=7):
        structlog.get_logger("x", engine="e").info("%s of %d", "one", 2)
    (event,) = events(stream)
    assert (event["event"], event["round"], event["engine"], event["logger"]) == ("one of 2", 7, "e", "x")


def test_journal_gets_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    entry = os.fstat(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{entry.st_dev}:{entry.st_ino}")
    with os.fdopen(write, "w") as stream:
        configure_logging("info", "json", stream=stream)
        structlog.get_logger("x").warning("engine.lost")
    with os.fdopen(read) as journal:
        assert re.match(r'<4>\{"ts": ', journal.read())


# --- metrics ---------------------------------------------------------------------------------------------------------


def everything(metrics: Metrics) -> str:
    """The text with something in every instrument."""
    readings = Readings()
    for name, instrument in INSTRUMENTS.items():
        if name not in KEPT:
            readings.add(name, 1, *instrument.labels)
    metrics.observe_phases("m", "e0", dict.fromkeys(PHASES, 0.01))
    metrics.count_version("m", "live")
    return metrics.encode(readings, "")[0].decode()


KEPT = {
    "cpe_update_duration_seconds",
    "cpe_versions_total",
    "cpe_failures_total",
    "cpe_engine_failures_total",
    "cpe_rounds_total",
    "cpe_live_version_timestamp_seconds",
    "cpe_loop_lag_seconds",
    "cpe_protocol_errors_total",
}
"""What is counted as it happens; everything else is read."""


def samples(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """What the registry keeps under a name, by labels."""
    return {
        tuple(sample.labels.items()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_inventory_keeps_the_rules_for_names() -> None:
    for name, instrument in INSTRUMENTS.items():
        assert re.fullmatch(r"cpe(_[a-z]+)+", name)
        assert name.endswith("_total") == (instrument.kind == "counter")
        assert "version" not in instrument.labels or name == "cpe_build_info"
        assert all(re.fullmatch("[a-z]+", label) for label in instrument.labels)
        assert instrument.text.endswith(".")
    assert INSTRUMENTS["cpe_stage_bytes_total"].unit == "bytes"
    assert INSTRUMENTS["cpe_live_version"].unit == ""


def test_shown_is_what_the_inventory_says_and_nothing_else_of_ours() -> None:
    families = {family.name: family for family in text_string_to_metric_families(everything(Metrics()))}
    ours = {name: family for name, family in families.items() if not name.startswith(("process_", "python_"))}
    assert {name.removesuffix("_total") for name in INSTRUMENTS} == ours.keys()
    for name, instrument in INSTRUMENTS.items():
        family = ours[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (instrument.kind, instrument.text)
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels == {frozenset(instrument.labels)}, name
    assert "process_open_fds" in families


def test_update_durations_are_told_apart_from_5_ms_to_2_minutes() -> None:
    text = everything(Metrics())
    for bound in ("0.005", "0.01", "120.0"):
        assert f'cpe_update_duration_seconds_bucket{{engine="e0",le="{bound}",model="m",phase="stopped"}}' in text


def test_openmetrics_is_for_who_asks_for_it() -> None:
    metrics = Metrics()
    text, kind = metrics.encode(Readings(), "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    plain, kind = metrics.encode(Readings(), "text/html, */*")
    assert kind.startswith("text/plain")
    assert b"_created" not in plain + text


def test_counters_begin_at_zero_for_every_known_label() -> None:
    snapshot = Metrics().snapshot()
    for code in CODES:
        assert snapshot[f'cpe_failures_total{{code="{code}"}}'] == 0
    for socket in ("front", "engines", "handoff", "http"):
        assert snapshot[f'cpe_protocol_errors_total{{socket="{socket}"}}'] == 0


def test_snapshot_is_counters_by_name_and_labels() -> None:
    metrics = Metrics()
    metrics.count_protocol_error("front")
    metrics.failures.labels(code='odd "\n\\').inc(2)
    metrics.observe_phases("m", "e0", {"pause": 0.25})
    readings = Readings()
    readings.add("cpe_received_bytes_total", 5, "landing")
    readings.add("cpe_arena_free_bytes", 7)
    snapshot = metrics.snapshot(readings)
    assert snapshot['cpe_protocol_errors_total{socket="front"}'] == 1
    assert snapshot['cpe_failures_total{code="odd \\"\\n\\\\"}'] == 2
    assert snapshot['cpe_update_duration_seconds_sum{phase="pause",model="m",engine="e0"}'] == 0.25
    assert snapshot['cpe_received_bytes_total{transport="landing"}'] == 5
    assert not [name for name in snapshot if "_bucket" in name or not name.startswith("cpe_") or "cpe_arena" in name]
    assert json.loads(json.dumps(snapshot)) == snapshot


def test_reading_that_the_inventory_does_not_know_is_refused() -> None:
    with pytest.raises(KeyError):
        Readings().add("cpe_moods", 1)
    with pytest.raises(ValueError, match="has labels"):
        Readings().add("cpe_live_version", 1)


def test_engine_that_is_removed_takes_its_series_along() -> None:
    metrics = Metrics()
    for engine in ("", "e0", "e1"):
        metrics.observe_phases("m", engine, {"pause": 0.1, "push": 0.2})
    metrics.keep_engines(["e1", "e2"])
    counts = samples(metrics, "cpe_update_duration_seconds_count")
    assert {dict(labels)["engine"] for labels in counts} == {"", "e1"}
    metrics.observe_phases("m", "e0", {"pause": 0.1})
    assert (
        samples(metrics, "cpe_update_duration_seconds_count")[("phase", "pause"), ("model", "m"), ("engine", "e0")] == 1
    )


def test_models_and_engines_are_bounded_whatever_peers_call_them() -> None:
    metrics = Metrics()
    for number in range(MAX_MODELS + 5):
        metrics.observe_phases(f"m{number}", "", {"publish": 1.0})
        metrics.count_version(f"m{number}", "live")
    for number in range(MAX_ENGINES + 5):
        metrics.observe_phases(f"m{MAX_MODELS}", f"e{number}", {"push": 1.0})
    kept = {dict(labels)["model"] for labels in samples(metrics, "cpe_versions_total")}
    assert kept == {f"m{number}" for number in range(5, MAX_MODELS + 5)}
    assert len(samples(metrics, "cpe_live_version_timestamp_seconds")) == MAX_MODELS
    assert len(samples(metrics, "cpe_update_duration_seconds_count")) == MAX_MODELS + MAX_ENGINES


def test_versions_of_models_that_never_had_one_are_counted_together() -> None:
    metrics = Metrics()
    metrics.observe_phases("known", "", {"publish": 1.0})
    for model in ("known", "x", "y"):
        metrics.count_version(model, "failed")
    snapshot = metrics.snapshot()
    assert snapshot['cpe_versions_total{model="known",outcome="failed"}'] == 1
    assert snapshot[f'cpe_versions_total{{model="{OTHER}",outcome="failed"}}'] == 2


def test_two_daemons_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.count_protocol_error("front")
    assert second.snapshot()['cpe_protocol_errors_total{socket="front"}'] == 0
