"""``cpe demo`` as a person starts it, at the scale of some megabytes: it proves what it claims, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cpe_daemon.demo.options import SABOTAGE_ENV

DEMO = [sys.executable, "-m", "cpe_daemon", "demo", "--small"]
ENDED_SECONDS = 60


@contextmanager
def demo(temporary: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A demo under way, whose temporary files are in a directory of their own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CPE_")}
    process = subprocess.Popen(
        [*DEMO, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "TMPDIR": str(temporary), **(environ or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(temporary: Path) -> list[list[str]]:
    """The demo's daemon and engines that run, by their command lines, which name its temporary directory."""
    lines = [command_line(process) for process in psutil.process_iter()]
    return [line for line in lines if str(temporary) in " ".join(line)]


def is_daemon(process: psutil.Process, temporary: Path) -> bool:
    line = command_line(process)
    return "serve" in line and str(temporary) in " ".join(line)


def command_line(process: psutil.Process) -> list[str]:
    try:
        line: list[str] = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
    return line


def assert_nothing_left(temporary: Path) -> None:
    assert children(temporary) == []
    assert list(temporary.iterdir()) == []


def test_demo_proves_every_version_bit_by_bit_and_leaves_what_it_was_told_to(runtime_dir: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with demo(runtime_dir, "--versions", "2", "--json", "--keep", str(kept)) as process:
        out, err = process.communicate(timeout=ENDED_SECONDS)
    assert process.returncode == 0, err
    assert err == ""
    result = json.loads(out)
    assert (result["identical"], result["tensors"], result["ranks"]) == (True, 46, 2)
    assert [version["version"] for version in result["versions"]] == [1, 2]
    assert [version["source"] for version in result["versions"]] == ["safetensors", "memory"]
    first, second = result["versions"]
    assert first["changed"] == 46
    assert 23 < second["changed"] < 46
    for version in (first, second):
        assert version["identical"]
        assert version["different"] == []
        assert version["compared"] == 92
        assert 0 < version["pause_seconds"] < ENDED_SECONDS
        assert version["gigabytes_per_second"] > 0
    assert result["passes"] > 2
    assert {path.name for path in kept.iterdir()} == {"checkpoint", "logs"}
    assert "daemon.ready" in (kept / "logs" / "daemon.log").read_text()
    assert_nothing_left(runtime_dir)


def test_demo_fails_over_one_wrong_bit_in_one_rank(runtime_dir: Path) -> None:
    with demo(runtime_dir, "--versions", "1", environ={SABOTAGE_ENV: "1"}) as process:
        out, err = process.communicate(timeout=ENDED_SECONDS)
    assert process.returncode == 7
    assert "NO, 1 of 92 differ" in out
    assert err.splitlines()[-1] == (
        "error: version 1: the engine holds other bytes than the trainer published in"
        " rank 1 model.embed_tokens.weight  [engine]"
    )
    assert_nothing_left(runtime_dir)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_that_is_interrupted_leaves_nothing(runtime_dir: Path, number: int, status: int) -> None:
    with demo(runtime_dir, "--versions", "1000") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "version 1: publish" in line:
                break
        assert len(children(runtime_dir)) == 3
        process.send_signal(number)
        began = time.monotonic()
        process.communicate(timeout=ENDED_SECONDS)
    assert process.returncode == status
    assert time.monotonic() - began < ENDED_SECONDS / 2
    assert_nothing_left(runtime_dir)


def test_demo_whose_daemon_dies_says_so_and_leaves_nothing(runtime_dir: Path) -> None:
    with demo(runtime_dir, "--versions", "1000") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "version 1: publish" in line:
                break
        (daemon,) = [found for found in psutil.process_iter() if is_daemon(found, runtime_dir)]
        daemon.kill()
        _, err = process.communicate(timeout=ENDED_SECONDS)
    assert process.returncode == 4
    assert "error: the daemon ended with status -9" in err
    assert_nothing_left(runtime_dir)
