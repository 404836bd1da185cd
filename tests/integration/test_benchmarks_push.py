"""``python -m benchmarks.push --quick``: it measures what it says; its last line is for programs. No timing counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import push
from cpe_daemon.demo.architecture import SMALL
from tests.integration.processes import ROOT


def benchmark(temporary: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Its last line, and what it printed before that. It leaves nothing behind."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.push", "--quick", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(temporary.iterdir()) == []
    table, _, last = ran.stdout.rstrip("\n").rpartition("\n")
    result: dict[str, Any] = json.loads(last)
    return result, table


@pytest.mark.slow
def test_push_is_measured_beside_its_floor(runtime_dir: Path) -> None:
    result, table = benchmark(runtime_dir)
    assert (result["bench"], result["device"], result["bytes"]) == ("push", "shm", SMALL.nbytes)
    assert len(result["seconds"]) == len(result["floor_seconds"]) == 2
    assert all(seconds > 0 for seconds in (*result["seconds"], *result["floor_seconds"]))
    middle, floor = sum(result["seconds"]) / 2, sum(result["floor_seconds"]) / 2
    assert abs(result["ratio"] - middle / floor) < 0.01
    assert result["buckets"] > result["slots"]
    assert set(result["phases"]) >= {"prefetch", "pause", "begin", "push", "finish", "resume"}
    assert "staged to live" in table


@pytest.mark.slow
def test_push_is_measured_with_and_without_metrics_and_logs(runtime_dir: Path) -> None:
    result, table = benchmark(runtime_dir, "--observability")
    assert (result["bench"], result["bytes"]) == ("push-observability", SMALL.nbytes)
    assert len(result["seconds"]) == len(result["without_seconds"]) == 2
    assert result["metrics_share"] > 0
    assert result["logs_share"] > 0
    assert result["scrape_seconds"] > 0
    assert "scraped every second" in table
    assert "every 15 s" in table


@pytest.mark.slow
def test_rollback_is_measured_beside_the_push(runtime_dir: Path) -> None:
    result, table = benchmark(runtime_dir, "--rollback")
    assert (result["bench"], result["bytes"]) == ("push-rollback", SMALL.nbytes)
    assert len(result["seconds"]) == len(result["rollback_seconds"]) == 2
    assert all(seconds > 0 for seconds in (*result["seconds"], *result["rollback_seconds"]))
    assert abs(result["rollback_ratio"] - sum(result["rollback_seconds"]) / sum(result["seconds"])) < 0.01
    assert "rollback, to live again" in table


def test_slots_that_are_too_small_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        push.main(["--slot-mib", "0.0001"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith("error: argument --slot-mib: a slot has 4 KiB at least")
