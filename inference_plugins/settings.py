"""What a server's worker is told by its environment: all processes of a server have the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from cpe_daemon.errors import ConfigError
from inference_plugins.endpoint import engines_endpoint

_STARTS: Final = ("version", "disk", "any")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Of one server; ``*`` in a variable's name stands for the engine's, as in ``CPE_VLLM_START``.

    Attributes:
        socket: the daemon's socket for engines (``CPE_ENGINES_SOCKET``, as `engines_endpoint` reads it).
        engine: its name on this node (``CPE_ENGINE``); "" makes one up.
        model: whose versions it takes (``CPE_MODEL``); "" takes those of the only model there is.
        url: where the daemon reaches its API (``CPE_ENGINE_URL``); "" leaves that to the daemon's settings.
        start: ``version`` starts only with a version of the daemon's; ``disk`` serves what it loaded from disk where
            the daemon holds none; ``any`` does so where there is no daemon, too (``CPE_*_START``).
        start_seconds: how long the start may wait for that (``CPE_*_START_SECONDS``).
        update_seconds: how long an update may take at the most (``CPE_*_UPDATE_SECONDS``).
    """

    socket: str
    engine: str
    model: str
    url: str
    start: str
    start_seconds: float
    update_seconds: float

    @classmethod
    def of(cls, kind: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Read them.

        Args:
            kind: of engine; its variables begin with ``CPE_`` and this, in capitals.
            environ: the variables.

        Raises:
            ConfigError: one makes no sense; says which.
        """
        prefix = f"CPE_{kind.upper()}"
        start = environ.get(f"{prefix}_START") or _STARTS[0]
        if start not in _STARTS:
            raise ConfigError(f"{prefix}_START is {start!r}; it may be version, disk or any")
        return cls(
            socket=engines_endpoint(environ=environ),
            engine=environ.get("CPE_ENGINE", ""),
            model=environ.get("CPE_MODEL", ""),
            url=environ.get("CPE_ENGINE_URL", ""),
            start=start,
            start_seconds=_seconds(environ, f"{prefix}_START_SECONDS", 600.0),
            update_seconds=_seconds(environ, f"{prefix}_UPDATE_SECONDS", 600.0),
        )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    given = environ.get(name)
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name} is {given!r}; it is a number of seconds")
    return seconds
