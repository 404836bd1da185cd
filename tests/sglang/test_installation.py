"""What installing this package into SGLang's environment changes there: nothing that is there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.sglang.servers import PYTHON
from tests.vllm.servers import ROOT

PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]


def test_installation_changes_no_other_package(tmp_path: Path) -> None:
    """What pip would install, as it says itself, is not installed yet."""
    report = tmp_path / "report.json"
    done = run("install", "--quiet", "--dry-run", "--report", str(report), str(ROOT))
    if "No matching distribution found" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("pip cannot reach a registry, to build the package with what it asks for")
    assert done.returncode == 0, done.stderr
    wanted = {named(entry["metadata"]["name"]) for entry in json.loads(report.read_text())["install"]}
    there = {named(entry["name"]) for entry in json.loads(run("list", "--format", "json").stdout)}
    assert {"torch", "sglang"} <= there
    assert wanted & there == {"cpe-daemon"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIP, *arguments], capture_output=True, text=True, timeout=300, check=False)


def named(name: str) -> str:
    """As pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
