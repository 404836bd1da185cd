"""Which releases of an engine are let in: those that were run with this one, and others if somebody says so."""

from __future__ import annotations

import importlib.metadata
import os
import re

from cpe_daemon.errors import EngineError

Release = tuple[int, ...]


def installed(*distributions: str) -> str:
    """The version of the first of these that is installed; "0" if it cannot be told."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def check_release(engine: str, version: str, oldest: Release, newest: Release, untested: str) -> str:
    """Return ``version`` if it is from ``oldest`` on and before ``newest``, as far as these two go.

    Args:
        engine: what it is a version of.
        version: as its package says.
        oldest: that was tested.
        newest: exclusive.
        untested: the variable that lets others in, if it is 1.

    Raises:
        EngineError: it is none that was tested, and nobody said to try.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[: len(oldest)])
    if not oldest <= found < newest and os.environ.get(untested) != "1":
        raise EngineError(
            f"{engine} {version} is not one that this release was tested with ({_text(oldest)} to before"
            f" {_text(newest)}); set {untested}=1 to try it all the same"
        )
    return version


def _text(release: Release) -> str:
    return ".".join(map(str, release))
