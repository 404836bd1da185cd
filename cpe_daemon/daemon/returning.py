"""The engines that the daemon before this one had: waited for, so that nobody hears too early that all is well.

Engines serve on while their daemon is away, and find the next one by themselves. Until they have said what they hold,
this node does not know whom it serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from cpe_daemon.core.journal import EngineEntry, RoundEntry, State
from cpe_daemon.engines.registry import Registry

log = structlog.get_logger(__name__)


class Returning:
    """Who has yet to come back. Belongs to the event loop.

    Args:
        found: what the journal says.
        registry: whom they come back to; one that is expected is missed by it even when its time is over.
        seconds: that they are waited for, from `begin` on.
        clock: seconds, monotonic.
    """

    def __init__(self, found: State, registry: Registry, *, seconds: float, clock: Callable[[], float]) -> None:
        self._missing = dict(found.engines)
        self._round: RoundEntry | None = found.round
        self._registry = registry
        self._seconds = seconds
        self._clock = clock
        self._began_at: float | None = None
        self._over = asyncio.Event()
        self.settled = False
        """Whether all that time has passed."""
        self.changed: Callable[[], None] = lambda: None
        """Called when the time is over, and some are given up."""

    @property
    def missing(self) -> Mapping[str, EngineEntry]:
        """Those that have not come back, and are still waited for."""
        here = {engine.name for engine in self._registry if engine.workers}
        return {name: entry for name, entry in self._missing.items() if name not in here}

    @property
    def reasons(self) -> dict[str, str]:
        """Why each of them keeps the node from being ready, by name."""
        told = f"was attached to the daemon before this one, and is waited for, up to {self._seconds:g} s"
        return {name: f"engine {name!r} {told}" for name in self.missing}

    def begin(self) -> None:
        """The doors are open: from now on they can come back."""
        self._began_at = self._clock()
        if self._missing:
            log.info("engines.awaited", engines=sorted(self._missing), seconds=self._seconds)
        if self._round is not None:
            log.warning(
                "round.cut_short",
                version=str(self._round.version),
                held={name: str(held) if held else None for name, held in self._round.held.items()},
                consequence="engines that it had touched stay paused until they are given a version",
            )
        self.look()

    def look(self) -> None:
        """Note who has come back, and give up those whose time is over."""
        if self._began_at is None:
            return
        before, self.settled = self.settled, self.settled or self._clock() - self._began_at >= self._seconds
        if not self._over.is_set():
            self._missing = dict(self.missing)
            if self.settled:
                self._give_up()
            if not self._missing:
                self._over.set()
        if self.settled is not before:
            self.changed()

    def _give_up(self) -> None:
        for name, entry in self._missing.items():
            expected = self._registry.expected.get(name) is not None
            log.warning("engine.not_returned", engine=name, held=str(entry.held), expected=expected)
        self._missing = {}

    async def over(self) -> None:
        """Wait until all are back, or given up."""
        await self._over.wait()
