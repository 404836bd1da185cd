"""Servers whose API is not up yet when a version is published: a server's workers are there some time before it is.

They hold what they were given while they started, and can be given nothing more before the server takes calls. A
version that only such servers would take waits for the first of them. Where another engine takes it, nothing waits: a
server that is late is given the live version afterwards (`cpe_daemon.push.retries`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.driver import Arriving
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.push.driving import drive

log = structlog.get_logger(__name__)

_LOOK_AGAIN_SECONDS: Final = 0.5


class Arrivals:
    """Says which version waits, and looks at the servers meanwhile. Belongs to the event loop.

    Args:
        registry: of the engines.
        deadlines: ``arrive_seconds`` and ``check_seconds``.
        wake: is called when servers were looked at: `waits` may say something else then.
    """

    def __init__(self, registry: Registry, deadlines: DeadlinesConfig, wake: Callable[[], None]) -> None:
        self._registry = registry
        self._deadlines = deadlines
        self._wake = wake
        self._version: VersionId | None = None
        """That waits, or waited last."""
        self._until = 0.0
        self._tasks: asyncio.TaskGroup | None = None
        self._looking: asyncio.Task[None] | None = None

    def look_in(self, tasks: asyncio.TaskGroup) -> None:
        """Have ``tasks`` own what looks at servers: before the first version is due."""
        self._tasks = tasks

    def waits(self, version: VersionId) -> bool:
        """Whether a version that is due waits now."""
        late = [engine for engine in self._registry if engine.takes(version.model) and engine.complete]
        late = [engine for engine in late if not engine.asleep]
        if not late or not all(starts(engine) for engine in late):
            return False
        now, first = asyncio.get_running_loop().time(), version != self._version
        if first:
            self._version, self._until = version, now + self._deadlines.arrive_seconds
        if now >= self._until:
            return False
        if self._looking is None and self._tasks is not None:
            self._looking = self._tasks.create_task(self._look(late, 0.0 if first else _LOOK_AGAIN_SECONDS))
        return True

    def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self, engines: Sequence[Engine], pause: float) -> None:
        """See which servers take calls by now. One that cannot be asked is not waited for: its round says why."""
        await asyncio.sleep(pause)
        seconds = min(self._deadlines.check_seconds, self._deadlines.arrive_seconds)
        errors = await asyncio.gather(*(drive(e, "answer", partial(_ask, e), seconds) for e in engines))
        if any(error is not None for error in errors):
            self._until = 0.0
        elif pause == 0.0 and all(starts(engine) for engine in engines):
            names = [engine.name for engine in engines]
            log.info("version.waits_for_servers", version=str(self._version), engines=names)
        self._looking = None
        self._wake()


def starts(engine: Engine) -> bool:
    """Whether an engine's server has not answered yet since its workers were let serve."""
    return isinstance(engine.driver, Arriving) and not engine.driver.arrived


async def _ask(engine: Engine) -> None:
    if isinstance(engine.driver, Arriving):
        await engine.driver.answers()
