"""Log events in both forms, and the metrics' names."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from prometheus_client import generate_latest

from cpe_daemon.observe.logs import configure_logging
from cpe_daemon.observe.metrics import Metrics


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


def test_journal_gets_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    entry = os.fstat(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{entry.st_dev}:{entry.st_ino}")
    with os.fdopen(write, "w") as stream:
        configure_logging("info", "json", stream=stream)
        structlog.get_logger("x").warning("engine.lost")
    with os.fdopen(read) as journal:
        assert re.match(r'<4>\{"ts": ', journal.read())


def test_metrics_are_named_as_prometheus_asks() -> None:
    metrics = Metrics()
    metrics.protocol_errors.labels(socket="front").inc()
    metrics.received_bytes.labels(transport="landing").inc(5)
    metrics.observe_phases("m", "e0", {"pause": 0.01, "load": 0.2})
    text = generate_latest(metrics.registry).decode()
    families = re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    assert all(name.startswith("cpe_") for name, _ in families)
    assert all(name.endswith(("_total", "_created")) for name, kind in families if kind == "counter")
    assert 'cpe_update_duration_seconds_bucket{engine="e0",le="0.005",model="m",phase="load"} 0.0' in text
    assert 'le="120.0"' in text


def test_snapshot_is_plain_numbers_by_name_and_labels() -> None:
    metrics = Metrics()
    metrics.count_protocol_error("front")
    metrics.failures.labels(code='odd "\n\\').inc(2)
    metrics.observe_phases("m", "e0", {"pause": 0.25})
    snapshot = metrics.snapshot()
    assert snapshot['cpe_protocol_errors_total{socket="front"}'] == 1
    assert snapshot['cpe_failures_total{code="odd \\"\\n\\\\"}'] == 2
    assert snapshot['cpe_update_duration_seconds_sum{phase="pause",model="m",engine="e0"}'] == 0.25
    assert not [name for name in snapshot if "_bucket" in name or "_created" in name]
    assert json.loads(json.dumps(snapshot)) == snapshot


def test_engines_in_no_state_count_zero() -> None:
    metrics = Metrics()
    metrics.set_engines({"current": 2})
    metrics.set_engines({"updating": 1})
    snapshot = metrics.snapshot()
    assert snapshot['cpe_engines{state="current"}'] == 0
    assert snapshot['cpe_engines{state="updating"}'] == 1


def test_two_daemons_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.trainers.set(3)
    assert second.snapshot()["cpe_trainers"] == 0
