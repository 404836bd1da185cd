"""One daemon's life as a process: owns the runtime directory, runs until it is told to stop, and then drains."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Final

import structlog

from cpe_daemon.config import Config
from cpe_daemon.daemon.daemon import Daemon
from cpe_daemon.daemon.drain import describe, holdings, longest_stop_seconds, unless
from cpe_daemon.daemon.supervision import Supervision
from cpe_daemon.errors import ConfigError
from cpe_daemon.observe.notify import Notifier
from cpe_daemon.push.trace import Trace
from cpe_daemon.runtime import RuntimeDirectory

log = structlog.get_logger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_STUCK_STATUS: Final = 1


async def serve(config: Config, trace: Trace | None = None) -> None:
    """Run a daemon until SIGTERM or SIGINT; the second one has a push in flight undone rather than awaited.

    Args:
        config: its settings.
        trace: records what its pushes do.

    Raises:
        ConfigError: it cannot start with these settings; says why. Nothing is left behind.
    """
    notifier = Notifier()
    try:
        with RuntimeDirectory(config.runtime_dir):
            async with asyncio.TaskGroup() as tasks:
                daemon = Daemon(config, tasks)
                daemon.pusher.traffic.trace = trace
                life = _Life(config, notifier, daemon)
                try:
                    await life.run(tasks)
                finally:
                    await life.end()
    except* ConfigError as group:
        raise group.exceptions[0] from None
    finally:
        notifier.close()


class _Life:
    """From the start of a daemon's parts until they are closed, with the signals that part its chapters."""

    def __init__(self, config: Config, notifier: Notifier, daemon: Daemon) -> None:
        self._deadlines = config.deadlines
        self._daemon = daemon
        self._supervision = Supervision(notifier)
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._last_resort: asyncio.TimerHandle | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal)

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Start, serve and drain; a daemon that is told to stop while it starts is not started."""
        daemon = self._daemon
        if not await unless(self._stopping, daemon.start(self._supervision.starting)):
            log.info("daemon.not_started")
            return
        serving = self._supervision.serving(daemon.health, daemon.catalogue, daemon.registry)
        self._supervising = tasks.create_task(serving)
        await self._stopping.wait()
        await daemon.drain(self._hurried, self._supervision.tell)

    async def end(self) -> None:
        """Close everything."""
        await self._daemon.close()
        if self._supervising is not None:
            self._supervising.cancel()
        if self._last_resort is not None:
            self._last_resort.cancel()
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurried.set()
            return
        seconds = longest_stop_seconds(self._deadlines)
        self._supervision.stopping(seconds)
        self._stopping.set()
        self._last_resort = self._loop.call_later(seconds, self._give_up, seconds)

    def _give_up(self, seconds: float) -> None:
        """End the process: a thread is stuck in a copy, and nothing would end it. The kernel takes the memory back."""
        held, doubtful = holdings(self._daemon.registry)
        log.critical(
            "daemon.stop_timed_out",
            seconds=round(seconds, 3),
            copies=self._daemon.health.ages(),
            engines=held,
            in_doubt=doubtful,
        )
        self._supervision.tell(f"did not stop within {seconds:g} s: {describe(held, doubtful)}")
        sys.stderr.flush()
        os._exit(_STUCK_STATUS)
