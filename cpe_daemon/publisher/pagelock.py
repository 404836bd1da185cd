"""A landing ring that GPUs copy to directly: page-locked once, and until nobody copies to it any more."""

from __future__ import annotations

import contextlib
import threading

from cpe_daemon.devices.cuda.driver import CudaError
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.publisher.gpus import Gpus


class PageLock:
    """Holds memory locked until it is closed and nobody uses it. Thread-safe.

    Making one takes about 50 ms a GiB, and changes the thread's current context: not for a trainer's own threads.

    Args:
        gpus: of this process.
        device: one of them that this process uses already; all may copy then.
        memory: what to lock; stays mapped until it is unlocked.

    Raises:
        CudaError: the driver refuses.
    """

    def __init__(self, gpus: Gpus, device: int, memory: SharedMemory) -> None:
        self._driver = gpus.driver()
        self._device = device
        self._address = memory.address
        self._view = memory.view[:]
        self._lock = threading.Lock()
        self._users = 0
        self._closing = False
        self._context = self._driver.retain(device)
        try:
            self._driver.use(self._context)
            self._driver.register(self._address, memory.nbytes)
        except CudaError:
            self._view.release()
            self._driver.release(device)
            raise

    def hold(self) -> bool:
        """Keep it locked until `let_go`; False if it is not, or not for long."""
        with self._lock:
            self._users += not self._closing
            return not self._closing

    def let_go(self) -> None:
        """One `hold` is over."""
        with self._lock:
            self._users -= 1
            last = self._closing and not self._users
        if last:
            self._unlock()

    def close(self) -> None:
        """Unlock it, as soon as nobody uses it."""
        with self._lock:
            last = not self._closing and not self._users
            self._closing = True
        if last:
            self._unlock()

    def _unlock(self) -> None:
        """In a thread of its own: the caller's may be the trainer's, whose current context is not ours to change."""
        thread = threading.Thread(target=self._unlock_here, name="cpe-unlock")
        thread.start()
        thread.join()

    def _unlock_here(self) -> None:
        with contextlib.suppress(CudaError):  # the GPU has failed: the memory is unlocked with the process
            self._driver.use(self._context)
            self._driver.unregister(self._address)
            self._driver.release(self._device)
        self._view.release()
