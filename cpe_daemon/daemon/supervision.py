"""What the init system is told of the daemon, while it starts, serves and stops: readiness, one line, the watchdog."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.daemon.health import Health
from cpe_daemon.engines.registry import Registry
from cpe_daemon.observe.notify import Notifier
from cpe_daemon.versions import Catalogue

log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 1.0
_FEEDS_A_PERIOD: Final = 4
"""Twice what is asked for: one that comes late does no harm."""

_PROGRESS_SECONDS: Final = 1.0
_EXTEND_SECONDS: Final = 60.0
"""While memory is provided, this much time is asked for again and again; it ends when no more of it comes."""


class Supervision:
    """Tells the init system. Belongs to the event loop.

    Args:
        notifier: the way there.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._stopping = False
        self._percent = 0
        self._told_at = 0.0

    def starting(self, what: str, done: int, total: int) -> None:
        """So many bytes of a step are done: said every tenth of the way in the log, each second to the system."""
        percent = done * 100 // max(total, 1)
        if percent // 10 > self._percent // 10:
            log.info("daemon.starting", what=what, percent=percent // 10 * 10, done_bytes=done, size_bytes=total)
        self._percent = percent
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_SECONDS or done == total:
            self._told_at = now
            self._notifier.extend_timeout(_EXTEND_SECONDS)
            self._notifier.status(f"starting: {what}, {percent}%")

    async def serving(self, health: Health, catalogue: Catalogue, registry: Registry) -> None:
        """The doors are open: say so, and from now on what is served; feed the watchdog while all is well.

        To be cancelled at the very end: a daemon that stops takes longer than the watchdog waits.
        """
        self._notifier.ready(state_line(catalogue, registry))
        period = self._notifier.watchdog_seconds
        pause = min(_LOOK_SECONDS, period / _FEEDS_A_PERIOD) if period else _LOOK_SECONDS
        while True:
            reasons = health.reasons()
            if not reasons:
                self._notifier.feed_watchdog()
            if not self._stopping:  # then it is told how far that is
                self._notifier.status("; ".join(["NOT WELL", *reasons]) if reasons else state_line(catalogue, registry))
            await asyncio.sleep(pause)

    def stopping(self, seconds: float) -> None:
        """The daemon begins to stop, and takes ``seconds`` at most."""
        self._stopping = True
        self._notifier.stopping("stopping")
        self._notifier.extend_timeout(seconds)

    def beginning_anew(self, seconds: float) -> None:
        """The daemon begins to stop, which takes ``seconds`` at most, and starts again."""
        self._stopping = True
        self._notifier.beginning_anew("beginning anew")
        self._notifier.extend_timeout(seconds)

    def ending(self, seconds: float) -> None:
        """Nothing more is said until the program has begun anew: what is left to the kernel takes so long at most."""
        self._notifier.extend_timeout(seconds + _EXTEND_SECONDS)

    def tell(self, text: str) -> None:
        """Say in a line how the daemon is."""
        self._notifier.status(text)


def state_line(catalogue: Catalogue, registry: Registry) -> str:
    """What is served, in a line: "serving 2 engines, policy@run-7#12 live"."""
    engines = [engine for engine in registry if engine.workers]
    ready = sum(engine.serving for engine in engines)
    count = str(ready) if ready == len(engines) else f"{ready} of {len(engines)}"
    live = [f"{version.id} live" for version in catalogue if version.state is VersionState.LIVE]
    before = registry.adoption.before
    live += [f"{before.live(model)} live, not here" for model in before.models]
    pushing = [f"{version.id} being pushed" for version in catalogue if version.state is VersionState.PUSHING]
    plural = "" if count == "1" else "s"
    return ", ".join([f"serving {count} engine{plural}", *(live or ["nothing live"]), *pushing])
