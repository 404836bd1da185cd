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

from cpe_daemon.devices.cuda.driver import CudaError, Driver


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

    async def run(self, issue: Callable[[int], None]) -> None:
        """Call ``issue(stream)`` in the lane's thread, and return when what it issued has arrived.

        Cancelled, it ends only then too: to be told to stop is not to have stopped.

        Raises:
            ResourceError: the GPU failed.
        """
        issued = self._issuing.submit(self._issue, issue)
        arrived = asyncio.ensure_future(self._arrival(issued))
        try:
            await asyncio.shield(arrived)
        except asyncio.CancelledError:
            while not arrived.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([arrived])
            if not arrived.cancelled():
                arrived.exception()  # nobody asks any more
            raise

    async def _arrival(self, issued: Future[int]) -> None:
        event = await asyncio.wrap_future(issued)
        await asyncio.wrap_future(self._waiting.submit(self._wait, event))

    def _issue(self, issue: Callable[[int], None]) -> int:
        event = self._events.pop() if self._events else self._driver.create_event()
        self._begun.append(time.monotonic())
        try:
            issue(self._stream)
            self._driver.record(event, self._stream)
        except CudaError:
            with contextlib.suppress(CudaError):  # the first failure is the one to tell
                self._driver.record(event, self._stream)  # what was issued before it has to end as well
                self._driver.wait(event)
            self._begun.pop()
            self._events.append(event)
            raise
        return event

    def _wait(self, event: int) -> None:
        try:
            self._driver.wait(event)
        finally:
            self._begun.popleft()
            self._events.append(event)

    def close(self) -> None:
        """Wait for what was issued, and end the threads. Blocking."""
        self._waiting.shutdown()
        self._issuing.submit(self._destroy).result()
        self._issuing.shutdown()

    def _destroy(self) -> None:
        for event in self._events:
            self._driver.destroy_event(event)
        self._driver.destroy_stream(self._stream)
