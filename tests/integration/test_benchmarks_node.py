"""The benchmarks of a whole node, over shared memory: they measure and compare what they say. No timing counts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import churn
from benchmarks.gpu import push
from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.demo.architecture import SMALL


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.rstrip("\n").rpartition("\n")[2])
    return result


@pytest.mark.slow
def test_churn_ends_with_what_it_began_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert churn.main(["--pushes", "6", "--seed", "1"]) == 0
    result = last_line(capsys)
    assert result["kills"] > 0
    assert len(result["seconds"]) == 6
    assert max(result["seconds"]) < DeadlinesConfig().pause_seconds / 2, "a pause waited for a pass that nobody begins"
    assert result["before"]["threads"] >= result["after"]["threads"]


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["tp", "each"])
def test_push_of_a_node_is_measured_and_traced(
    engines: str, runtime_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    asked = argparse.Namespace(device="shm", model="small", gpus=2, engines=engines, slots=3, slot_bytes=1 << 20)
    asked.updates, asked.source, asked.table, asked.trace = 2, "host", None, trace
    asked.settings = ["push.automatic=true"]
    push.run(asked, runtime_dir)
    result = last_line(capsys)
    assert (result["bench"], result["bytes"], result["gpus"]) == ("push", SMALL.nbytes, 2)
    assert len(result["seconds"]) == len(result["floor_seconds"]) == len(result["published_seconds"]) == 2
    assert result["vram_bytes"] == 3 << 20
    assert result["stages"]["exchange"] > 0
    assert 0 < result["paused_seconds"] < result["first_seconds"] * 100
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("bucket 0") == 3 * 3 * 2  # pushes, stages, GPUs
