"""One daemon's life as a process: owns the runtime directory, runs until it is told to stop, and then drains."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from cpe_daemon.config import Config
from cpe_daemon.daemon.daemon import Daemon
from cpe_daemon.errors import ConfigError
from cpe_daemon.runtime import RuntimeDirectory


async def serve(config: Config, *, ready: Callable[[], None] | None = None) -> None:
    """Run a daemon until SIGTERM or SIGINT.

    Args:
        config: its settings.
        ready: called when sockets are bound and the arena stands.

    Raises:
        ConfigError: it cannot start with these settings; says why. Nothing is left behind.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with RuntimeDirectory(config.runtime_dir):
            async with asyncio.TaskGroup() as tasks:
                daemon = Daemon(config, tasks)
                try:
                    await daemon.start()
                    if ready is not None:
                        ready()
                    await stop.wait()
                    await daemon.drain()
                finally:
                    await daemon.close()
    except* ConfigError as group:
        raise group.exceptions[0] from None
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
