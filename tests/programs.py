"""Programs that are no part of the project, and that some tests run: found in PATH, or where `make tools` puts them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

_FETCHED = Path(__file__).parent.parent / ".venv" / "tools" / "bin"
_FETCHABLE = ("prometheus", "promtool", "systemd-analyze")


def program(name: str) -> str:
    """Where a program is; skips the test if it is nowhere."""
    found = shutil.which(name) or shutil.which(name, path=str(_FETCHED))
    if found is None:
        hint = ": `make tools` fetches it where it can" if name in _FETCHABLE else ""
        pytest.skip(f"needs {name}, which is not in PATH{hint}")
    return found
