"""The threads that blocking work of the daemon is handed to, all of which are there from the start.

A thread that is started when it is needed costs milliseconds in the midst of a push, and one that nobody needed before
looks like a leak.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

_THREADS: Final = 8
"""More than wait at once: for a plan, the journal, the disk's other files, a name, a scrape."""
_START_SECONDS: Final = 10.0


def start_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have `asyncio.to_thread` use threads that run already. Blocks until they do, some milliseconds."""
    executor = ThreadPoolExecutor(_THREADS, "cpe-blocking")
    start_all(executor, _THREADS)
    loop.set_default_executor(executor)


def start_all(executor: ThreadPoolExecutor, count: int) -> None:
    """Start the ``count`` threads of a pool that does nothing yet, which would start them one by one. Blocking."""
    together = threading.Barrier(count)  # each takes one thread, and keeps it until all have one
    started = [executor.submit(together.wait, _START_SECONDS) for _ in range(count)]
    for thread in started:
        thread.result(_START_SECONDS)
