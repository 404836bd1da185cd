"""The command against a real daemon: serve, publish, status, stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from cpe_daemon.cli import main

SERVE = [
    sys.executable,
    "-m",
    "cpe_daemon",
    "serve",
    "--set",
    "arena.size_bytes=8MiB",
    "--set",
    "device.slot_bytes=1MiB",
    "--set",
    "http.listen=127.0.0.1:0",
]


def cpe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def events(stream: IO[str]) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in stream)


@pytest.fixture
def daemon(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A daemon in `runtime_dir` that is ready."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CPE_STATE_DIR", str(runtime_dir / "state"))
    command = [*SERVE, "--runtime-dir", str(runtime_dir)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert any(event["event"] == "daemon.ready" for event in events(process.stderr)), "it ended"
            yield process
        finally:
            process.kill()


def test_daemon_is_served_published_to_asked_and_stopped(
    daemon: subprocess.Popen[str], runtime_dir: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file({"w": torch.arange(1000.0), "b": torch.ones(3)}, checkpoint / "model.safetensors")
    here = ("--runtime-dir", runtime_dir)

    published = cpe("publish", checkpoint, "--model", "m", "--version", "7", "--json", "--timeout", "20", *here)
    assert published.exit_code == 0, published.output
    report = json.loads(published.stdout)
    assert (report["state"], report["version"]["number"]) == ("live", 7)

    status = json.loads(cpe("status", "--json", *here).stdout)
    (version,) = status["versions"]
    assert (version["model"], version["number"], version["state"], version["tensors"]) == ("m", 7, "live", 2)
    assert status["daemon"]["pid"] == daemon.pid
    shown = cpe("status", *here)
    assert "m@manual#7" in shown.stdout

    again = cpe("publish", checkpoint, "--model", "m", "--version", "7", "--timeout", "20", *here)
    assert again.exit_code == 0, again.output
    assert "front.sock held m@manual#7 already, with the same bytes: nothing was sent" in again.stderr
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.arange(1000.0), "b": torch.zeros(3)}, other)
    refused = cpe("publish", other, "--model", "m", "--version", "7", "--timeout", "20", *here)
    assert refused.exit_code == 3
    assert "m@manual#7 is held here (live) with other weights: of rank 0 it has other digests of b (" in refused.stderr

    refused = cpe("publish", checkpoint, "--model", "m", "--version", "6", "--timeout", "20", *here)
    assert refused.exit_code == 3
    assert refused.stderr.endswith("[version_refused]\n")

    second = subprocess.run(
        [*SERVE, "--runtime-dir", str(runtime_dir)], capture_output=True, text=True, check=False, timeout=60
    )
    assert second.returncode == 6
    assert f"another daemon (pid {daemon.pid}) runs on {runtime_dir}" in second.stderr
    assert cpe("status", *here).exit_code == 0, "the first is unharmed"

    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert cpe("status", *here).exit_code == 4
