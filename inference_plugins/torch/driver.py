"""The daemon's half for torch engines: their workers persist and do every step themselves."""

from __future__ import annotations

from cpe_daemon.core.driver import Update, Workers
from cpe_daemon.core.types import VersionId


class TorchDriver:
    """Passes every step on to the workers (see `cpe_daemon.core.driver.Driver`)."""

    def __init__(self, engine: str, workers: Workers) -> None:
        self.engine = engine
        self._workers = workers

    async def check(self, round: int, seconds: float) -> None:
        """Have every worker compare a version's tensors with its own."""
        await self._workers.check(round, seconds)

    async def pause(self, round: int, seconds: float) -> None:
        """Have every worker close its serving lock, all after the same forward pass.

        One that stopped a pass before the others would leave them waiting in that pass, for its part of what they
        compute together.
        """
        passes = await self._workers.halt(round, seconds) if self._workers.world_size > 1 else None
        await self._workers.pause(round, seconds, passes)

    async def begin(self, update: Update, seconds: float) -> None:
        """Have every worker make ready."""
        await self._workers.begin(update, seconds)

    async def finish(self, round: int, seconds: float) -> None:
        """Have every worker check that all its tensors came."""
        await self._workers.finish(round, seconds)

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Have every worker forget the round; True if any may hold other weights than before it."""
        return await self._workers.abort(round, reason, seconds)

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Have every worker open its serving lock."""
        await self._workers.resume(round, content, seconds)

    async def wake(self, seconds: float) -> None:
        """Have every worker call what was given to `attach` for that."""
        await self._workers.wake(seconds)
