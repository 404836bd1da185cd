"""The end of a daemon's work, in order and in bounded time: nothing is begun, a push ends or is undone, all are told.

Afterwards it is known, and said, what every engine of the node holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.lifecycle import EngineState
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.journal import Journal
from cpe_daemon.push.pusher import Pusher

log = structlog.get_logger(__name__)

FAREWELL_SECONDS: Final = 2.0
"""For everybody to read what is said last, and to let go. Only one that hangs takes so long."""

CLOSE_SECONDS: Final = 8.0
"""For threads to end their copies, and for all that is closed but the arena."""

_RELEASED_BYTES_PER_SECOND: Final = 2 << 30
"""So much of the arena the kernel takes back in a second at least: half of what it did in a virtual machine."""

_UNPINNED_BYTES_PER_SECOND: Final = 4 << 30
"""So much of an arena that GPUs copy from is unpinned in a second at least, before the kernel takes it back."""

_REASON: Final = "the daemon stops"

_WITHOUT_ERROR: Final = {
    EngineState.UNKNOWN: "it waited for the live version",
    EngineState.UPDATING: "an update of it was interrupted",
    EngineState.QUARANTINED: "it could not be restored",
}
"""Why nobody knows what an engine holds, where no error tells."""


def longest_close_seconds(arena_bytes: int, *, pinned: bool) -> float:
    """How long it takes at most to close everything and to give the memory back, which may be ``pinned`` for GPUs."""
    unpinning = arena_bytes / _UNPINNED_BYTES_PER_SECOND if pinned else 0.0
    return CLOSE_SECONDS + unpinning + arena_bytes / _RELEASED_BYTES_PER_SECOND


def longest_stop_seconds(deadlines: DeadlinesConfig, arena_bytes: int, *, pinned: bool) -> float:
    """How long it takes a daemon to stop at most; whoever runs it gives it somewhat more."""
    drained = deadlines.drain_seconds + deadlines.undo_seconds + FAREWELL_SECONDS
    return drained + longest_close_seconds(arena_bytes, pinned=pinned)


async def unless(stopped: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Do ``work``, or give it up when ``stopped`` is set; return whether it was done.

    What the work raises is raised. Given up, it is over when this returns.
    """
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
    if working.cancelled():
        return False
    working.result()
    return True


class Drain:
    """One daemon's drain. Belongs to the event loop.

    Args:
        deadlines: `drain_seconds` and `undo_seconds`.
        ingest: takes no new versions from now on.
        pusher: begins no new push.
        trainers: are told, and let go.
        registry: its engines are told, and let go.
        journal: is written for the last time when it is known what engines hold.
        tell: says in a line how far it is.
    """

    def __init__(
        self,
        *,
        deadlines: DeadlinesConfig,
        ingest: Ingest,
        pusher: Pusher,
        trainers: Trainers,
        registry: Registry,
        journal: Journal,
        tell: Callable[[str], None],
    ) -> None:
        self._deadlines = deadlines
        self._ingest = ingest
        self._pusher = pusher
        self._trainers = trainers
        self._registry = registry
        self._journal = journal
        self._tell = tell

    async def run(self, hurried: asyncio.Event) -> None:
        """Drain. ``hurried``: do not wait for the push in flight, but undo it."""
        log.info("daemon.draining")
        began = time.monotonic()
        self._ingest.stop(_REASON)
        self._trainers.turn_away(_REASON)
        self._registry.turn_away(_REASON)
        if not await self._ends_by_itself(hurried):
            await self._undo()
        await self._learn_digests(hurried, self._deadlines.drain_seconds - (time.monotonic() - began))
        self._say_what_engines_hold(time.monotonic() - began)
        self._journal.freeze()
        await self._take_leave()

    async def _ends_by_itself(self, hurried: asyncio.Event) -> bool:
        """Wait for the push in flight; False if it did not end in time."""
        seconds = self._deadlines.drain_seconds
        self._tell(f"stopping: waiting up to {seconds:g} s for the push in flight")
        try:
            async with asyncio.timeout(seconds):
                if await unless(hurried, self._pusher.drain()):
                    return True
            log.warning("daemon.drain_hurried")
        except TimeoutError:
            log.warning("daemon.drain_timed_out", seconds=seconds)
        return False

    async def _undo(self) -> None:
        """Have engines hold again what they held before the push in flight; one that hangs stays in doubt."""
        seconds = self._deadlines.undo_seconds
        self._tell(f"stopping: undoing the push in flight, for up to {seconds:g} s")
        self._pusher.undo(f"{_REASON}; the push was undone")
        try:
            async with asyncio.timeout(seconds):
                await self._pusher.drain()
        except TimeoutError:
            log.error("daemon.undo_timed_out", seconds=seconds)

    async def _learn_digests(self, hurried: asyncio.Event, seconds: float) -> None:
        """Have versions digested that are not, for so long at most: the next daemon can only take those again."""
        digesting = self._ingest.digesting
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await unless(hurried, digesting.finish())
        if digesting.due:
            log.warning("daemon.versions_not_digested", versions=[str(version) for version in digesting.due])

    def _say_what_engines_hold(self, seconds: float) -> None:
        held, doubtful = holdings(self._registry)
        say = log.error if doubtful else log.info
        say("daemon.drained", seconds=round(seconds, 3), engines=held, in_doubt=doubtful)
        self._tell(f"stopped: {describe(held, doubtful)}")

    async def _take_leave(self) -> None:
        """Have trainers and workers know, and let them go first: what they were told before, they have read then."""
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await asyncio.gather(self._trainers.take_leave(), self._registry.take_leave(), self._journal.close())
        except TimeoutError:
            log.info(
                "daemon.farewell_unanswered", trainers=len(list(self._trainers)), engines=len(list(self._registry))
            )


def holdings(engines: Iterable[Engine]) -> tuple[dict[str, str], dict[str, str]]:
    """What each engine holds whole, and of which engines nobody knows, with the reason. By name."""
    held: dict[str, str] = {}
    doubtful: dict[str, str] = {}
    for engine in engines:
        if engine.state is EngineState.CURRENT:
            content = str(engine.content) if engine.content else "what it started with"
            held[engine.name] = f"{content}, asleep" if engine.asleep else content
        elif engine.workers:
            doubtful[engine.name] = engine.error.message if engine.error else _WITHOUT_ERROR[engine.state]
    return held, doubtful


def describe(held: dict[str, str], doubtful: dict[str, str]) -> str:
    """`holdings` in a line."""
    parts = [f"{name} holds {version}" for name, version in held.items()]
    parts += [f"{name} IS IN DOUBT" for name in doubtful]
    return "; ".join(parts) or "no engine was attached"
