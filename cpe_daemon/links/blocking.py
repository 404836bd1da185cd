"""Blocking work that may hang for ever, as a read from a network file system does whose server is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Does one kind of blocking work, and leaves it behind when it takes too long. Belongs to the event loop.

    Each work gets a thread of its own, for whose end nobody waits, not even the process when it ends: in the loop's own
    pool, a few that hang would keep everybody else from it.

    Args:
        seconds: that a work may take.
        most: works that may hang at a time; while they do, no more are begun.
        name: of the threads.
    """

    def __init__(self, seconds: float, *, most: int, name: str) -> None:
        self.seconds = seconds
        self._most = most
        self._name = name
        self._hanging: list[threading.Thread] = []

    async def do(self, work: Callable[[], T]) -> T:
        """Do it.

        Raises:
            TimeoutError: it takes too long, or too many others still hang; what it comes to is nobody's business then.
        """
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= self._most:
            raise TimeoutError
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # it cannot be cancelled, only left behind
        thread = threading.Thread(target=_settle, args=(done, work), name=self._name, daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(self.seconds):
                return await asyncio.wrap_future(done)
        except TimeoutError:
            self._hanging.append(thread)
            raise


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except Exception as error:  # task boundary: whoever waits for the work gets it
        done.set_exception(error)
