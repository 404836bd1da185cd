"""Tensors in GPUs, copied to the host by the driver: on streams of our own, several chunks at once.

Nothing here begins to use CUDA in a trainer that does not, and nothing changes which device is current in the trainer's
own threads: all of it runs in threads of the publisher's.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cpe_daemon.devices.cuda.driver import CudaError, Driver, driver
from cpe_daemon.devices.cuda.fold import ScatteredSum, Stretch
from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.errors import ResourceError
from cpe_daemon.publisher.window import Window

log = logging.getLogger(__name__)

BOUNCE_BYTES: Final = 4 << 20
"""Page-locked memory of a thread whose chunks lie in memory that is not: as fast as larger ones, and in the cache."""


class Gpus:
    """The GPUs that this process uses. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False
        self._sums: dict[int, ScatteredSum | None] = {}
        """By GPU; None where there can be none."""

    def ready(self) -> bool:
        """Whether this process has begun to use CUDA."""
        return torch.version.cuda is not None and torch.cuda.is_initialized()

    def device_of(self, tensor: Tensor) -> int | None:
        """The GPU that a tensor is in; None if its bytes are not reached by NVIDIA's driver."""
        return tensor.get_device() if tensor.is_cuda and torch.version.cuda is not None else None

    def settle(self, device: int) -> None:
        """Wait until the GPU has done what was issued on this thread's current stream."""
        torch.cuda.current_stream(device).synchronize()

    def folds(self, device: int) -> bool:
        """Whether a GPU can fold; the first time this takes some tenths of a second."""
        if device not in self._sums:
            self._sums[device] = _sum_on(device)
        return self._sums[device] is not None

    def fold(self, device: int, stretches: Sequence[Stretch]) -> int:
        """Fold what lies in a GPU, once all is done that was issued on this thread's current stream.

        Only where `folds` said so, and by one thread at a time.

        Raises:
            CudaError: the GPU failed.
        """
        adding = self._sums[device]
        if adding is None:
            raise ValueError(f"GPU {device} does not fold")
        with torch.cuda.device(device):
            return adding.fold(stretches)

    def driver(self) -> Driver:
        """The driver.

        Raises:
            ResourceError: there is none.
        """
        return driver()

    def active(self) -> int | None:
        """A GPU that this process uses already, as the driver names it; None if it uses none yet."""
        if not self.ready():
            return None
        calls = self.driver()
        return next((device for device in calls.devices() if calls.is_active(device)), None)

    def warn_unlocked(self, nbytes: int, error: ResourceError) -> None:
        """Say, once, that copies will be slow."""
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning(
                "cannot page-lock %d bytes, so tensors leave the GPU at a fraction of its speed: %s; raise the limit of"
                " locked memory (ulimit -l unlimited, LimitMEMLOCK=infinity, or --ulimit memlock=-1 of a container)",
                nbytes,
                error.message,
            )


def _sum_on(device: int) -> ScatteredSum | None:
    try:
        with torch.cuda.device(device):
            torch.zeros(1, device="cuda")  # so that the device's context is the thread's
            return ScatteredSum(torch.device("cuda", device))
    except ResourceError as error:
        log.warning("the daemon has to fold what this trainer publishes, and takes longer: %s", error.message)
        return None


class _Way(NamedTuple):
    """A thread's way out of one GPU."""

    device: int
    context: int
    stream: int
    event: int


class Fetcher:
    """Copies to the host, for one thread, which owns it from its making to `close`."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._driver = gpus.driver()
        self._ways: dict[int, _Way] = {}
        self._pending: dict[int, _Way] = {}
        self._bounce: Bounce | None = None
        self._no_bounce = False

    @property
    def pending(self) -> bool:
        """Whether something was issued that has not arrived."""
        return bool(self._pending)

    def fetch(self, device: int, source: int, window: Window, at: int, nbytes: int) -> None:
        """Copy ``nbytes`` to position ``at`` of a window: issued only, if the window is page-locked.

        Raises:
            CudaError: the GPU failed.
        """
        way = self._way(device)
        self._driver.use(way.context)
        if window.locked or (bounce := self._bounced()) is None:
            self._driver.copy_to_host(window.address + at, source, nbytes, way.stream)
            self._pending[device] = way
            return
        for start in range(0, nbytes, BOUNCE_BYTES):
            step = min(BOUNCE_BYTES, nbytes - start)
            self._driver.copy_to_host(bounce.address, source + start, step, way.stream)
            self._await(way)
            copy(window.address + at + start, bounce.address, step)

    def arrive(self) -> None:
        """Wait for what was issued.

        Raises:
            CudaError: the GPU failed.
        """
        while self._pending:
            self._await(self._pending.popitem()[1])

    def close(self) -> None:
        """Wait for what was issued, whatever becomes of it: its places may be used again then. Blocking."""
        while self._pending:
            with contextlib.suppress(CudaError):
                self.arrive()
        for way in self._ways.values():
            with contextlib.suppress(CudaError):  # the GPU has failed, and that was said
                self._driver.use(way.context)
                self._driver.destroy_stream(way.stream)
            with contextlib.suppress(CudaError):
                self._driver.destroy_event(way.event)
        if self._bounce is not None:
            self._bounce.close()
        for way in self._ways.values():
            with contextlib.suppress(CudaError):
                self._driver.release(self._handle(way.device))
        self._ways.clear()

    def _way(self, device: int) -> _Way:
        way = self._ways.get(device)
        if way is None:
            context = self._driver.retain(self._handle(device))
            self._driver.use(context)
            way = self._ways[device] = _Way(device, context, self._driver.create_stream(), self._driver.create_event())
        return way

    def _handle(self, device: int) -> int:
        """The driver's name of torch's device: both count what CUDA_VISIBLE_DEVICES leaves."""
        return self._driver.devices()[device]

    def _await(self, way: _Way) -> None:
        self._driver.use(way.context)
        self._driver.record(way.event, way.stream)
        self._driver.wait(way.event)

    def _bounced(self) -> Bounce | None:
        """Page-locked memory on the way to what is not; None if there can be none: the driver has some of its own."""
        if self._bounce is None and not self._no_bounce:
            try:
                self._bounce = Bounce(self._driver, BOUNCE_BYTES)
            except CudaError as error:
                self._no_bounce = True
                self._gpus.warn_unlocked(BOUNCE_BYTES, error)
        return self._bounce


class Bounce:
    """Page-locked memory; belongs to a thread with a current context."""

    def __init__(self, calls: Driver, nbytes: int) -> None:
        self._driver = calls
        self._view = memoryview(mmap.mmap(-1, nbytes))
        self.address = address_of(self._view)
        calls.register(self.address, nbytes)

    def close(self) -> None:
        """Unlock and let go of it."""
        with contextlib.suppress(CudaError):
            self._driver.unregister(self.address)
        self._view.release()
