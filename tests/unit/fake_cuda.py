"""A simulated NVIDIA driver: GPUs in host memory, streams that run behind the calls, and failures on demand.

It holds to what the real one promises and no more: a copy happens some time after it was issued, in its stream's
order, and only `Driver.wait` says that it has; host memory has to be pinned, and no copy may reach over two pins.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.devices.cuda import driver as real
from cpe_daemon.devices.cuda.driver import HANDLE_BYTES, CudaError
from cpe_daemon.devices.memory import copy
from cpe_daemon.devices.rows import copying
from cpe_daemon.devices.slots import Mark, Reached, Replay
from cpe_daemon.errors import PeerError
from cpe_daemon.wire.messages import SlotSet

OUT_OF_MEMORY = 2
INVALID_VALUE = 1
LOST = 719


class FakeDriver(real.Driver):
    """So many GPUs, of ``total`` bytes each, all linked.

    Attributes:
        lost: GPUs that have failed: whatever is waited for there fails.
        go_on: while clear, nothing that was issued happens.
        awaited: set once somebody waits for what has not happened.
        pins: pinned host ranges, bytes by address.
        allocated: device memory, bytes by address.
    """

    total = 1 << 20

    def __init__(self, gpus: int, total: int | None = None, *, nvlink: bool = True) -> None:
        self.gpus, self.nvlink = gpus, nvlink
        if total is not None:
            self.total = total
        self.lost: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self.awaited = threading.Event()
        self.pins: dict[int, int] = {}
        self.allocated: dict[int, int] = {}
        self.retained: list[int] = []
        self.opened: list[int] = []
        self.events: set[int] = set()
        self.peers: set[tuple[int, int]] = set()
        self._memory: dict[int, tuple[ctypes.Array[ctypes.c_char], int]] = {}
        self._streams: dict[int, _Stream] = {}
        self._happened: dict[int, tuple[threading.Event, int]] = {}
        self._handles: dict[bytes, int] = {}
        self._thread = threading.local()
        self._numbers = iter(range(1, 1 << 30))

    # --- devices

    def version(self) -> tuple[int, int]:
        return 13, 0

    def devices(self) -> list[int]:
        return list(range(self.gpus))

    def uuid(self, device: int) -> str:
        return f"GPU-{device:08d}"

    def name(self, device: int) -> str:
        return "Simulated GPU"

    def pci_bus_id(self, device: int) -> str:
        return f"0000:{device:02x}:00.0"

    def total_bytes(self, device: int) -> int:
        return self.total

    def can_access(self, device: int, peer: int) -> bool:
        return True

    def linked(self, device: int, peer: int) -> bool:
        return self.nvlink

    # --- contexts and memory; a context is the device's number + 1

    def retain(self, device: int) -> int:
        self.retained.append(device)
        return device + 1

    def release(self, device: int) -> None:
        self.retained.remove(device)

    def use(self, context: int) -> None:
        self._thread.context = context

    @property
    def device(self) -> int:
        """The calling thread's."""
        return int(self._thread.context) - 1

    def enable_peer(self, context: int) -> None:
        self.peers.add((self.device, context - 1))

    def allocate(self, nbytes: int) -> int:
        used = sum(self.allocated[at] for at, (_, device) in self._memory.items() if device == self.device)
        if used + nbytes > self.total:
            raise CudaError("cuMemAlloc_v2", OUT_OF_MEMORY, "out of memory (2)")
        memory = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(memory)
        self._memory[address] = (memory, self.device)
        self.allocated[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.allocated[address]
        del self._memory[address]
        self._check("cuMemFree_v2")

    def free_bytes(self) -> int:
        self._check("cuMemGetInfo_v2")
        return self.total

    def _check(self, call: str) -> None:
        """Raise if the thread's GPU has failed, which any call may be the one to say."""
        if self.device in self.lost:
            raise CudaError(call, LOST, "unspecified launch failure (719)")

    def register(self, address: int, nbytes: int) -> None:
        self.pins[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.pins[address]
        self._check("cuMemHostUnregister")

    def export(self, address: int) -> bytes:
        handle = os.urandom(HANDLE_BYTES)
        self._handles[handle] = address
        return handle

    def open(self, handle: bytes) -> int:
        if handle not in self._handles:
            raise CudaError("cuIpcOpenMemHandle_v2", INVALID_VALUE, "invalid argument (1)")
        self.opened.append(self._handles[handle])
        return self._handles[handle]

    def close(self, address: int) -> None:
        self.opened.remove(address)

    # --- streams and copies

    def create_stream(self) -> int:
        number = next(self._numbers)
        self._streams[number] = _Stream(self.go_on)
        return number

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream).close()
        self._check("cuStreamDestroy_v2")

    def create_event(self) -> int:
        event = next(self._numbers)
        self.events.add(event)
        return event

    def record(self, event: int, stream: int) -> None:
        happened = threading.Event()
        self._happened[event] = (happened, self.device)
        self._streams[stream].issue(happened.set)

    def wait(self, event: int) -> None:
        happened, device = self._happened[event]
        if not happened.is_set():
            self.awaited.set()
        happened.wait()
        if device in self.lost:
            raise CudaError("cuEventSynchronize", LOST, "unspecified launch failure (719)")

    def await_event(self, stream: int, event: int) -> None:
        if event in self._happened:
            happened, _ = self._happened[event]

            def wait() -> None:
                happened.wait()

            self._streams[stream].issue(wait)

    def destroy_event(self, event: int) -> None:
        self.events.remove(event)
        self._check("cuEventDestroy_v2")

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        if not any(at <= source and source + nbytes <= at + size for at, size in self.pins.items()):
            raise CudaError("cuMemcpyHtoDAsync", INVALID_VALUE, "invalid argument (1)")
        self._streams[stream].issue(lambda: copy(destination, source, nbytes))

    def copy_from_peer(
        self, destination: int, context: int, source: int, peer_context: int, nbytes: int, stream: int
    ) -> None:
        self._streams[stream].issue(lambda: copy(destination, source, nbytes))


class _Stream:
    """What was issued happens in its order, on a thread of the GPU's, while ``go_on`` is set.

    As with a real GPU, a process may end without destroying its streams.
    """

    def __init__(self, go_on: threading.Event) -> None:
        self._go_on = go_on
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-stream", daemon=True)
        self._thread.start()

    def issue(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._go_on.wait()
            work()


class FakeCudaSlots:
    """A worker's slots, by the simulated driver."""

    device = torch.device("cpu")

    def __init__(self, driver: FakeDriver, slots: SlotSet) -> None:
        (handle,) = slots.handles
        self._driver, self._slots = driver, slots
        try:
            self._address = driver.open(handle)
        except CudaError as error:
            raise PeerError(str(error)) from None
        view = (ctypes.c_char * (slots.count * slots.slot_bytes)).from_address(self._address)
        self._bytes = torch.frombuffer(view, dtype=torch.uint8)

    def slot(self, index: int) -> torch.Tensor:
        return self._bytes.narrow(0, index * self._slots.slot_bytes, self._slots.slot_bytes)

    def loading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return Reached()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        copy(destination, source, nbytes)

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        return copying(rectangles)

    def close(self) -> None:
        self._driver.close(self._address)
