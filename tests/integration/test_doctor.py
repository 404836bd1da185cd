"""`cpe doctor` on the machine that runs the tests, with and without a daemon."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cpe_daemon.cli import main
from cpe_daemon.doctor import CHECKS, Verdict
from tests.integration.harness import Daemon, Node
from tests.integration.processes import until


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def examined(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    """What `cpe doctor` finds, by check."""
    ran = CliRunner().invoke(main, ["doctor", "--json", *(str(argument) for argument in arguments)])
    assert ran.exit_code in {0, 1}, ran.output
    return {finding["name"]: finding for finding in json.loads(ran.stdout)}


def examined_daemon(daemon: Daemon, *checks: str) -> dict[str, dict[str, Any]]:
    """The same with the settings of a daemon, and some checks only."""
    only = [word for check in checks for word in ("--only", check)]
    return examined("--config", daemon.log.with_suffix(".yaml"), *only)


def test_doctor_examines_a_machine_without_a_daemon(runtime_dir: Path) -> None:
    command = [sys.executable, "-m", "cpe_daemon", "doctor", "--runtime-dir", str(runtime_dir)]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=90)
    found = json.loads(ran.stdout)
    assert [finding["name"] for finding in found] == [check.name for check in CHECKS]
    verdicts = {finding["name"]: Verdict(finding["verdict"]) for finding in found}
    assert ran.returncode == int(Verdict.FAIL in verdicts.values()), ran.stdout
    assert [finding for finding in found if "the check itself failed" in finding["found"]] == []
    assert ran.stderr == ""
    for name in ("config", "kernel", "python", "zeromq", "runtime-dir"):  # else these tests would not run
        assert verdicts[name] is Verdict.OK, found
    for name in ("daemon", "engines"):
        assert verdicts[name] is Verdict.SKIP
    assert list(runtime_dir.iterdir()) == [], "nothing is changed"


def test_doctor_examines_a_daemon_and_its_engines(node: Node) -> None:
    daemon = node.start_daemon()
    found = examined_daemon(daemon)
    assert [name for name in ("config", "runtime-dir", "memory", "daemon") if found[name]["verdict"] != "ok"] == []
    assert f"held by the daemon (pid {daemon.pid})" in found["runtime-dir"]["found"]
    assert "its arena of 64.0 MiB" in found["memory"]["found"]
    assert f"the daemon (pid {daemon.pid}) may" in found["memlock"]["found"]
    assert found["engines"]["found"] == "no engine is attached"
    assert daemon.status()["daemon"]["pid"] == daemon.pid, "it is unharmed"

    other = examined("--runtime-dir", node.runtime_dir, "--only", "config")["config"]
    assert (other["verdict"], "has one of 64.0 MiB" in other["found"]) == ("warn", True)

    workers = node.engine(world_size=2, recipe={"zoo": 20})
    engines = examined_daemon(daemon, "engines")["engines"]
    assert (engines["verdict"], engines["found"]) == ("ok", "1 attached, with all their ranks: e")
    workers[1].signal(signal.SIGKILL)
    until(lambda: not daemon.engine("e")["workers"][1]["present"], "the daemon misses rank 1")
    engines = examined_daemon(daemon, "engines")["engines"]
    assert (engines["verdict"], "lacks ranks 1 of 2" in engines["found"]) == ("fail", True)


def test_doctor_finds_what_a_killed_daemon_left(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpe_daemon.cli.doctor._ASK_SECONDS", 0.5)
    daemon = node.start_daemon()
    daemon.signal(signal.SIGKILL)
    daemon.wait(10)
    stale = examined_daemon(daemon, "runtime-dir")["runtime-dir"]
    assert (stale["verdict"], "front.sock" in stale["found"]) == ("warn", True)


def test_doctor_finds_a_daemon_that_does_not_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpe_daemon.cli.doctor._ASK_SECONDS", 0.5)
    daemon = node.start_daemon()
    daemon.signal(signal.SIGSTOP)
    found = examined_daemon(daemon, "daemon", "runtime-dir")
    daemon.signal(signal.SIGCONT)
    assert (found["daemon"]["verdict"], f"pid {daemon.pid}" in found["daemon"]["found"]) == ("fail", True)
    assert found["runtime-dir"]["verdict"] == "fail"


def test_doctor_shows_on_a_terminal_that_it_works(runtime_dir: Path) -> None:
    here, there = pty.openpty()
    command = [sys.executable, "-m", "cpe_daemon", "doctor", "--only", "kernel", "--runtime-dir", str(runtime_dir)]
    environment = {**os.environ, "TERM": "xterm"}
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=there, env=environment, check=True, timeout=60)
        os.close(there)
        shown = os.read(here, 1 << 16)
    finally:
        os.close(here)
    assert b"looking" in shown
    assert ran.stdout.splitlines()[0] == b"host", "and what is found is not in it"
