"""A lane: copies of one kind into the slots of one GPU, on a stream and two threads of its own.

One thread issues, the other waits, so that the next copies are in the GPU's queue before the last ones end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from cpe_daemon.devices.cuda.driver import CudaError, Driver


class Copying(NamedTuple):
    """Copies under way: in the GPU's queue, and then there. Both end in the same failure if they cannot be issued."""

    issued: Future[None]
    arrived: Future[None]

    def fail(self, error: Exception) -> None:
        """They cannot be issued."""
        self.issued.set_exception(error)
        self.arrived.set_exception(error)

    async def arrive(self) -> None:
        """Return when they have arrived. Cancelled, it ends only then too: to be told to stop is not to have stopped.

        Raises:
            ResourceError: the GPU failed.
        """
        arrived = asyncio.wrap_future(self.arrived)
        try:
            await asyncio.shield(arrived)
        except asyncio.CancelledError:
            while not arrived.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([arrived])
            if not arrived.cancelled():
                arrived.exception()  # nobody asks any more
            raise


class Lane:
    """Issues copies in the order of the calls and says when each set has arrived.

    Args:
        driver: of this host.
        context: the GPU's.
        name: of the threads.
    """

    def __init__(self, driver: Driver, context: int, name: str) -> None:
        self._driver = driver
        self._issuing = ThreadPoolExecutor(1, f"{name}-issue", initializer=driver.use, initargs=(context,))
        self._waiting = ThreadPoolExecutor(1, f"{name}-wait", initializer=driver.use, initargs=(context,))
        self._begun: deque[float] = deque()
        self._stream = self._issuing.submit(driver.create_stream).result()
        self._events: list[int] = []

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copies that have not arrived; 0.0 if there are none."""
        begun = next(iter(self._begun), None)
        return 0.0 if begun is None else time.monotonic() - begun

    def start(self, issue: Callable[[int], None]) -> Copying:
        """Have ``issue(stream)`` called in the lane's thread; returns at once."""
        copying = Copying(Future(), Future())
        self._issuing.submit(self._issue, issue, copying)
        return copying

    def _issue(self, issue: Callable[[int], None], copying: Copying) -> None:
        try:
            event = self._events.pop() if self._events else self._driver.create_event()
        except CudaError as error:
            copying.fail(error)
            return
        self._begun.append(time.monotonic())
        try:
            issue(self._stream)
            self._driver.record(event, self._stream)
        except Exception as error:  # task boundary: told to whoever waits for the copies
            with contextlib.suppress(CudaError):  # the first failure is the one to tell
                self._driver.record(event, self._stream)  # what was issued before it has to end as well
                self._driver.wait(event)
            self._begun.pop()
            self._events.append(event)
            copying.fail(error)
            return
        copying.issued.set_result(None)
        self._waiting.submit(self._wait, event, copying.arrived)

    def _wait(self, event: int, arrived: Future[None]) -> None:
        failure = None
        try:
            self._driver.wait(event)
        except CudaError as error:
            failure = error
        self._begun.popleft()
        self._events.append(event)
        if failure is None:
            arrived.set_result(None)
        else:
            arrived.set_exception(failure)

    def close(self) -> None:
        """Wait for what was issued, and end the threads. Blocking."""
        self._waiting.shutdown()
        self._issuing.submit(self._destroy).result()
        self._issuing.shutdown()

    def _destroy(self) -> None:
        with contextlib.suppress(CudaError):  # of a GPU that has failed: its context took them with it
            self._driver.destroy_stream(self._stream)
            for event in self._events:
                self._driver.destroy_event(event)
