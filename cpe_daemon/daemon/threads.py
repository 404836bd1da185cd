"""The threads that blocking work of the daemon is handed to, all of which are there from the start."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from cpe_daemon.devices.copypool import start_all

_THREADS: Final = 8
"""More than wait at once: for a plan, the journal, the disk's other files, a name, a scrape."""


def start_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have `asyncio.to_thread` use threads that run already."""
    executor = ThreadPoolExecutor(_THREADS, "cpe-blocking")
    start_all(executor, _THREADS)
    loop.set_default_executor(executor)
