"""The unit that ships: what systemd's own checks say of it, and whether it fits what the daemon does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cpe_daemon.config import ArenaConfig, DeadlinesConfig
from cpe_daemon.config.model import settings
from cpe_daemon.config.sources import ENV_PREFIX, env_name
from cpe_daemon.daemon.drain import longest_stop_seconds
from tests.programs import program

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "systemd"
UNIT = FOLDER / "cpe-daemon.service"
EXPOSURE = 2.0
"""At most, of 10."""

UNITS = {"": 1, "s": 1, "min": 60, "h": 3600}


def directives() -> dict[str, list[str]]:
    """What the unit sets, by name: every line of it."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if (name := line.partition("=")[0]) != line and not line.startswith(("#", "[")):
            found.setdefault(name, []).append(line.partition("=")[2])
    return found


def seconds(name: str) -> float:
    """A directive's time span."""
    (value,) = directives()[name]
    matched = re.fullmatch(r"(\d+)(\w*)", value)
    assert matched, value
    return int(matched[1]) * UNITS[matched[2]]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, but for the program, which is not installed here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/cpe-daemon/bin/cpe", "/bin/true"))
    return copy


def test_systemd_has_nothing_to_say_of_the_unit(unit: Path) -> None:
    verified = run(program("systemd-analyze"), "verify", "--man=no", str(unit))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_systemd_would_say_what_is_wrong_with_it(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert "gently" in run(program("systemd-analyze"), "verify", "--man=no", str(unit)).stderr


def test_sandbox_leaves_little_open(unit: Path) -> None:
    rated = run(program("systemd-analyze"), "security", "--offline=true", "--no-pager", str(unit))
    overall = re.search(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert overall, rated.stderr
    assert float(overall[1]) <= EXPOSURE, rated.stdout


@pytest.mark.parametrize(
    "breaking",
    [
        "PrivateDevices",
        "MemoryDenyWriteExecute",
        "PrivateIPC",
        "PrivateUsers",
        "PrivateNetwork",
        "ProcSubset",
        "RemoveIPC",
    ],
)
def test_sandbox_keeps_gpus_rdma_and_shared_memory(breaking: str) -> None:
    assert breaking not in directives()
    assert f"#   {breaking}" in UNIT.read_text() or f", {breaking} " in UNIT.read_text()  # and says why


def test_devices_that_are_let_through_are_those_of_gpus_and_rdma() -> None:
    assert directives()["DeviceAllow"] == ["char-nvidia* rw", "char-infiniband* rw", "/dev/infiniband/rdma_cm rw"]


def test_daemon_stops_sooner_than_it_is_killed() -> None:
    longest, with_gpus = (
        longest_stop_seconds(DeadlinesConfig(), ArenaConfig().size_bytes, pinned=pinned) for pinned in (False, True)
    )
    assert seconds("TimeoutStopSec") >= with_gpus + 10 > longest + 10
    assert f"by default {longest:g} s" in UNIT.read_text()
    assert f"{longest:g} s by default" in (FOLDER / "README.md").read_text()


def test_stuck_copy_is_seen_before_the_watchdog_bites_twice() -> None:
    """Unfed from ``stuck_seconds`` on, the watchdog ends the daemon a period later."""
    assert 0 < seconds("WatchdogSec") <= DeadlinesConfig().stuck_seconds


def test_environment_file_names_settings_that_there_are() -> None:
    known = {env_name(path) for path in settings()} | {"SERVE_OPTIONS"}
    named = re.findall(r"^#?([A-Z_]+)=", (FOLDER / "cpe-daemon.default").read_text(), re.MULTILINE)
    assert len(named) == 3
    assert any(name.startswith(ENV_PREFIX) for name in named)
    assert set(named) <= known


def test_user_of_the_unit_is_the_one_that_is_made(tmp_path: Path) -> None:
    made = run(
        program("systemd-sysusers"), f"--root={tmp_path}", "--dry-run", str((FOLDER / "cpe-daemon.sysusers").resolve())
    )
    assert made.returncode == 0, made.stderr
    (user,), (group,) = directives()["User"], directives()["Group"]
    assert f"Creating user '{user}'" in made.stderr
    assert f"Creating group '{group}'" in made.stderr
