"""The trainer's GPUs, simulated: tensors in what `FakeDriver` calls device memory, and copies out of it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from cpe_daemon.core.fold import ROW_BYTES, WEIGHTS, key, mix, modulo
from cpe_daemon.devices.cuda.driver import CudaError
from cpe_daemon.devices.cuda.fold import Stretch
from cpe_daemon.devices.memory import copy
from cpe_daemon.publisher.gpus import Gpus
from tests.unit.fake_cuda import INVALID_VALUE, OUT_OF_MEMORY, FakeDriver


class TrainerDriver(FakeDriver):
    """With copies to the host: behind the call to page-locked memory, before it returns to any other.

    Attributes:
        active: GPUs that the process uses.
        locks: whether host memory can be page-locked.
        direct: bytes that were copied straight to page-locked memory.
        pageable: bytes that were copied to other memory.
    """

    def __init__(self, gpus: int = 1, total: int = 1 << 26) -> None:
        super().__init__(gpus, total)
        self.active: set[int] = set()
        self.locks = True
        self.direct = self.pageable = 0
        self.contexts: dict[int, int] = {}
        """The context of each stream and event."""
        self.streams: set[int] = set()
        self.settled: list[int] = []

    def is_active(self, device: int) -> bool:
        return device in self.active

    def register(self, address: int, nbytes: int) -> None:
        if not self.locks:
            raise CudaError("cuMemHostRegister_v2", OUT_OF_MEMORY, "out of memory (2)")
        super().register(address, nbytes)

    def unregister(self, address: int) -> None:
        assert self.device >= 0  # needs a context
        super().unregister(address)

    def create_stream(self) -> int:
        stream = super().create_stream()
        self.streams.add(stream)
        self.contexts[stream] = self.device
        return stream

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)
        super().destroy_stream(stream)

    def create_event(self) -> int:
        event = super().create_event()
        self.contexts[event] = self.device
        return event

    def record(self, event: int, stream: int) -> None:
        assert self.contexts[event] == self.contexts[stream]
        super().record(event, stream)

    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        assert self.contexts[stream] == self.device
        if any(at <= destination and destination + nbytes <= at + size for at, size in self.pins.copy().items()):
            self.direct += nbytes
            self._streams[stream].issue(lambda: copy(destination, source, nbytes))
            return
        if any(at < destination + nbytes and destination < at + size for at, size in self.pins.copy().items()):
            raise CudaError("cuMemcpyDtoHAsync", INVALID_VALUE, "invalid argument (1)")
        self.pageable += nbytes
        done = threading.Event()
        self._streams[stream].issue(lambda: copy(destination, source, nbytes))
        self._streams[stream].issue(done.set)
        done.wait()

    def put(self, tensor: Tensor, device: int = 0) -> Tensor:
        """Move a tensor to a GPU."""
        if not tensor.numel():
            return tensor
        self.use(device + 1)
        address = self.allocate(tensor.nbytes)
        self.active.add(device)
        memory = (ctypes.c_char * tensor.nbytes).from_address(address)
        moved = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
        moved.copy_(tensor)
        return moved

    def gpu_of(self, address: int) -> int:
        """Which GPU an allocation is in."""
        return self._memory[address][1]

    def at_rest(self) -> bool:
        """Whether all that was made is gone."""
        return not (self.pins or self.streams or self.events or self.retained)


class FakeGpus(Gpus):
    """The GPUs of a trainer, by a simulated driver.

    Attributes:
        without_kernels: GPUs that cannot fold.
    """

    def __init__(self, fake: TrainerDriver, without_kernels: Sequence[int] = ()) -> None:
        super().__init__()
        self.fake = fake
        self.without_kernels = without_kernels

    def ready(self) -> bool:
        return bool(self.fake.active)

    def device_of(self, tensor: Tensor) -> int | None:
        address = tensor.data_ptr()
        held = self.fake.allocated.copy().items()
        return next((self.fake.gpu_of(at) for at, nbytes in held if at <= address < at + nbytes), None)

    def settle(self, device: int) -> None:
        self.fake.settled.append(device)

    def folds(self, device: int) -> bool:
        return device not in self.without_kernels

    def fold(self, device: int, stretches: Sequence[Stretch]) -> int:
        assert self.folds(device)
        return modulo(sum(map(fold_slowly, stretches)))

    def driver(self) -> TrainerDriver:
        return self.fake


def fold_slowly(stretch: Stretch) -> int:
    """As the documents have it, in plain integers."""
    assert stretch.address % 16 == 0
    data, total = ctypes.string_at(stretch.address, stretch.nbytes), 0
    for row, begin in enumerate(range(0, stretch.nbytes, ROW_BYTES)):
        filled = data[begin : begin + ROW_BYTES].ljust(ROW_BYTES, b"\0")
        words = [int.from_bytes(filled[at : at + 8], "little") for at in range(0, ROW_BYTES, 8)]
        value = sum(word * weight for word, weight in zip(words, WEIGHTS, strict=True))
        total += mix(modulo(value + key(stretch.name, stretch.first_row + row)))
    return total
