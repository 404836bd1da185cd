"""Threads that copy, and how long the copy that has run longest runs by now: a stuck one is seen from outside."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, ParamSpec, TypeVar

_START_SECONDS: Final = 10.0

P = ParamSpec("P")
T = TypeVar("T")


class CopyPool(ThreadPoolExecutor):
    """A pool whose work is copies: each of them is over within moments, or something is wrong.

    Its threads start at once.

    Args:
        threads: how many.
        name: their names begin so.
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name)
        self._began: dict[int, float] = {}
        """Since when each thread that copies now does; a thread writes its own entry only."""
        self._waiting = 0
        self._count_lock = threading.Lock()
        start_all(self, threads)

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copy that a thread has begun and not ended; 0.0 if there is none. Any thread."""
        began = self._began.copy().values()
        return time.monotonic() - min(began) if began else 0.0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread copy; what waits for one is not counted as being copied."""
        self._count(1)
        future = super().submit(self._timed, functools.partial(fn, *args, **kwargs))
        future.add_done_callback(self._ended)
        return future

    def go_on(self) -> bool:
        """Whether the calling thread may begin another copy in the same work: nothing else waits for a thread."""
        if self._waiting:
            return False
        self._began[threading.get_ident()] = time.monotonic()
        return True

    def _ended(self, future: Future[T]) -> None:
        """What was cancelled waits no longer; whatever else has ended was begun before."""
        if future.cancelled():
            self._count(-1)

    def _count(self, step: int) -> None:
        with self._count_lock:
            self._waiting += step

    def _timed(self, copy: Callable[[], T]) -> T:
        self._count(-1)
        me = threading.get_ident()
        self._began[me] = time.monotonic()
        try:
            return copy()
        finally:
            del self._began[me]


def start_all(executor: ThreadPoolExecutor, count: int) -> None:
    """Start the ``count`` threads of a pool that has done nothing yet. Blocks until they run, some milliseconds.

    A thread that is started when it is needed costs milliseconds in the midst of a push, and one that nobody needed
    before looks like a leak. On a host that is too busy for it some are left to be started when they are needed.
    """
    together = threading.Barrier(count)  # each takes one thread, and keeps it until all have one
    wait([ThreadPoolExecutor.submit(executor, together.wait, _START_SECONDS) for _ in range(count)], _START_SECONDS)


def longest(pools: Iterable[CopyPool]) -> float:
    """Age of the oldest copy in any of several pools, as `CopyPool.stuck_seconds`."""
    return max((pool.stuck_seconds for pool in pools), default=0.0)
