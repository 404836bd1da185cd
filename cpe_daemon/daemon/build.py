"""Which releases this daemon is made of, for the metric that tells them."""

from __future__ import annotations

import importlib.metadata
import platform

from cpe_daemon import __version__
from cpe_daemon.wire.messages import PROTOCOL


def build() -> tuple[str, str, str, str]:
    """Releases of cpe-daemon, Python and torch ("" if it is not installed here), and the protocol."""
    return __version__, platform.python_version(), _release("torch"), str(PROTOCOL)


def _release(package: str) -> str:
    """A package's release, without importing it: torch takes longer than the daemon's whole start."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
