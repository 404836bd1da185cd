"""What installing this package into vLLM's environment changes there: nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.vllm.servers import PYTHON, ROOT


def test_installation_changes_no_other_package(tmp_path: Path) -> None:
    """What pip would install, as it says itself."""
    report = tmp_path / "report.json"
    options = ["--disable-pip-version-check", "--quiet", "--dry-run", "--report", str(report)]
    done = subprocess.run(
        [str(PYTHON), "-m", "pip", "install", *options, str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "No matching distribution found" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("pip cannot reach a registry, to build the package with what it asks for")
    assert done.returncode == 0, done.stderr
    installed = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
    assert installed == ["cpe-daemon"]
