"""One daemon's life as a process: owns the runtime directory, runs until it is told to stop, and then drains."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Final

import structlog

from cpe_daemon.config import Config
from cpe_daemon.daemon.daemon import Daemon
from cpe_daemon.daemon.drain import describe, holdings, longest_close_seconds, longest_stop_seconds, unless
from cpe_daemon.daemon.last_resort import LastResort
from cpe_daemon.daemon.supervision import Supervision
from cpe_daemon.daemon.threads import start_threads
from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.observe.notify import Notifier
from cpe_daemon.push.trace import Trace
from cpe_daemon.runtime import RuntimeDirectory

log = structlog.get_logger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_SWITCH_SECONDS: Final = 0.0005
"""For how long a thread may keep the interpreter from another one, which has a copy's end to tell: a tenth of what
Python has by default."""


async def serve(config: Config, trace: Trace | None = None) -> bool:
    """Run a daemon until SIGTERM or SIGINT; the second one has a push in flight undone rather than awaited.

    Args:
        config: its settings.
        trace: records what its pushes do.

    Returns:
        Whether the program is to be begun anew: nobody asked for this end, but CUDA takes no more calls of the process.

    Raises:
        ConfigError: it cannot start with these settings; says why. Nothing is left behind.
        ResourceError: it cannot start now: memory, an address or the runtime directory is taken.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    start_threads(asyncio.get_running_loop())
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
                return life.begins_anew
    except* (ConfigError, ResourceError) as group:
        raise group.exceptions[0] from None
    finally:
        notifier.close()


class _Life:
    """From the start of a daemon's parts until they are closed, with the signals that part its chapters."""

    def __init__(self, config: Config, notifier: Notifier, daemon: Daemon) -> None:
        self._config = config
        self._daemon = daemon
        self._pinned = config.device.kind == "cuda"
        self._notifier = notifier
        self._supervision = Supervision(notifier)
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self.begins_anew = False
        """Whether another life is to follow."""
        self._last_resort = LastResort(self._say_that_it_is_stuck)
        self._supervising: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # what has come since the life before this one

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Start, serve and drain; a daemon that is told to stop while it starts is not started.

        Raises:
            ResourceError: no GPU takes calls of this process any more, and beginning anew is no use.
        """
        daemon = self._daemon
        if not await unless(self._stopping, daemon.start(self._supervision.starting)):
            log.info("daemon.not_started")
            return
        serving = self._supervision.serving(daemon.health, daemon.catalogue, daemon.registry)
        self._supervising = tasks.create_task(serving)
        lost = await unless(self._stopping, daemon.lost.wait()) and not self._stopping.is_set()
        useful = daemon.pusher.traffic.load.nbytes > 0  # or it might begin anew for ever, which nobody would notice
        if lost:
            self._part(begins_anew=useful)
        await daemon.drain(self._hurried, self._supervision.tell)
        if lost and not useful:
            raise ResourceError(
                "no GPU takes calls of this process any more, and none has served an engine since it began; see"
                " nvidia-smi, and the kernel's log for Xid"
            )

    async def end(self) -> None:
        """Close everything, also where nobody asked for it, but some part of the daemon has failed."""
        seconds = longest_close_seconds(self._config.arena.size_bytes, pinned=self._pinned)
        self._last_resort.arm(seconds)
        self._notifier.extend_timeout(seconds)
        await self._daemon.close()
        if self._supervising is not None:
            self._supervising.cancel()
        if self.begins_anew:
            self._supervision.ending(seconds)
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they wait for whoever handles them next
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping.is_set() and not self.begins_anew:
            self._hurried.set()
            return
        self.begins_anew = False
        seconds = self._arm()
        log.info("daemon.stopping", at_most_seconds=round(seconds, 3))
        self._supervision.stopping(seconds)
        self._stopping.set()

    def _part(self, *, begins_anew: bool) -> None:
        """No GPU can be used by this process any more: end it in order."""
        self.begins_anew = begins_anew
        seconds = self._arm()
        log.error("daemon.lost_all_gpus", begins_anew=begins_anew, at_most_seconds=round(seconds, 3))
        (self._supervision.beginning_anew if begins_anew else self._supervision.stopping)(seconds)
        self._stopping.set()

    def _arm(self) -> float:
        """Have the process end whatever happens; return the seconds after which it does."""
        seconds = longest_stop_seconds(self._config.deadlines, self._config.arena.size_bytes, pinned=self._pinned)
        self._last_resort.arm(seconds)
        return seconds

    def _say_that_it_is_stuck(self, seconds: float) -> None:
        """Called by the thread that is about to end the process."""
        held, doubtful = holdings(self._daemon.registry)
        log.critical(
            "daemon.stop_timed_out",
            seconds=round(seconds, 3),
            copies=self._daemon.health.ages(),
            engines=held,
            in_doubt=doubtful,
        )
        self._supervision.tell(f"did not stop within {seconds:g} s: {describe(held, doubtful)}")
