"""The device of a CPU host: slots in shared memory, which engine processes map read-only.

A "GPU" here is a set of slots; a host may have several, which makes every path of a multi-GPU node run on a laptop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final, Protocol

import structlog

from cpe_daemon.core.plan import Copy, Costs, Gpu, PeerCopy, Topology
from cpe_daemon.devices.capacity import available_bytes
from cpe_daemon.devices.copypool import CopyPool, longest
from cpe_daemon.devices.memory import PREFAULT_BYTES, SharedMemory, copy
from cpe_daemon.errors import ConfigError, CpeError, ResourceError
from cpe_daemon.wire.messages import SlotSet

log = structlog.get_logger(__name__)

KIND: Final = "shm"
_COSTS: Final = Costs(fetch_bytes=16 << 10, exchange_bytes=16 << 10)
"""A call of memmove takes about as long as that many bytes; both kinds of copies are made by the same processors."""


class Handoff(Protocol):
    """What is needed of `cpe_daemon.links.handoff.HandoffServer`."""

    def offer(self, fd: int) -> bytes:
        """Offer a descriptor once, under the token returned."""
        ...

    def withdraw(self, token: bytes) -> None:
        """Take an offer back, if nobody took it."""
        ...


class ShmDevice:
    """Slots in memfds. Two threads a GPU: one fetches, one exchanges.

    Args:
        gpus: how many sets of slots there may be.
        slot_bytes: size of a slot.
        source: address of the arena's first byte.
        handoff: hands descriptors to other processes.
    """

    kind = KIND

    def __init__(self, *, gpus: int, slot_bytes: int, source: int, handoff: Handoff) -> None:
        self.topology = Topology(
            gpus=tuple(Gpu(f"shm-{index}") for index in range(gpus)), peer_access=True, costs=_COSTS
        )
        self.slot_bytes = slot_bytes
        self.failures: Mapping[int, CpeError] = {}
        self._source = source
        self._handoff = handoff
        self._sets: dict[int, SharedMemory] = {}
        self._fetches: dict[tuple[int, int], asyncio.Event] = {}
        """By GPU and slot, whether the last fetch has ended."""
        self._fetchers = [CopyPool(1, f"cpe-fetch-{index}") for index in range(gpus)]
        self._exchangers = [CopyPool(1, f"cpe-peer-{index}") for index in range(gpus)]

    @property
    def slot_count(self) -> int:
        """Slots that each GPU has which has any; 0 if none has."""
        return min(map(self.slots, self._sets), default=0)

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copy in flight; 0.0 if there is none."""
        return longest((*self._fetchers, *self._exchangers))

    async def open(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Nothing is to be done: a host's processors reach all of its memory."""

    def slots(self, gpu: int) -> int:
        """How many slots a GPU has."""
        return self._sets[gpu].nbytes // self.slot_bytes if gpu in self._sets else 0

    async def take(self, gpu: int, count: int) -> None:
        """Allocate and prefault slots, sealed so that workers can only read them.

        Raises:
            ResourceError: the host has not enough memory for one, or its kernel is too old.
        """
        fits = min(count, available_bytes() // self.slot_bytes)
        if not fits:
            raise ResourceError(
                f"no memory for a slot of {self.slot_bytes} bytes: this host can give {available_bytes()}; lower"
                " device.slot_bytes or arena.size_bytes"
            )
        if fits < count:
            log.warning("slots.reduced", gpu=self.topology.gpus[gpu].uuid, slots=fits, wanted=count)
        try:
            memory = SharedMemory.create(f"cpe-slots-{self.topology.gpus[gpu].uuid}", fits * self.slot_bytes)
            self._sets[gpu] = memory
            memory.seal_writes()
            for offset in range(0, memory.nbytes, PREFAULT_BYTES):
                nbytes = min(PREFAULT_BYTES, memory.nbytes - offset)
                await _run(self._fetchers[gpu], memory.prefault, offset, nbytes)
        except BaseException as error:  # task boundary: what is not whole is not kept, whatever ended it
            if gpu in self._sets:
                self._sets.pop(gpu).close()
            if isinstance(error, ConfigError):
                raise ResourceError(error.message) from None
            raise

    def export(self, gpu: int) -> SlotSet:
        """Offer a set of slots to one worker."""
        token = self._handoff.offer(self._sets[gpu].fd)
        return SlotSet(KIND, self.topology.gpus[gpu].uuid, self.slots(gpu), self.slot_bytes, [token])

    def withdraw(self, slots: SlotSet) -> None:
        """Take an offer back that no worker has claimed."""
        for token in slots.handles:
            self._handoff.withdraw(token)

    async def release(self, gpu: int) -> None:
        """Unmap a set of slots."""
        self._sets.pop(gpu).close()

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        """Copy from the arena into a slot, on the GPU's fetching thread."""
        fetched = self._fetches[gpu, slot] = asyncio.Event()
        try:
            await _run(self._fetchers[gpu], self._fetch, gpu, slot, copies)
        finally:
            fetched.set()

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Copy from the other sets' same slot, on the GPU's exchanging thread."""
        for source in {item.gpu for item in copies}:
            if (source, slot) in self._fetches:
                await self._fetches[source, slot].wait()
        await _run(self._exchangers[gpu], self._exchange, gpu, slot, copies)

    async def close(self) -> None:
        """Stop the threads and unmap the slots; workers' mappings live on until they let go."""
        for executor in (*self._fetchers, *self._exchangers):
            await asyncio.to_thread(executor.shutdown)
        for memory in self._sets.values():
            memory.close()
        self._sets.clear()

    def _slot(self, gpu: int, slot: int) -> int:
        return self._sets[gpu].address + slot * self.slot_bytes

    def _fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        base = self._slot(gpu, slot)
        for item in copies:
            if item.origin:
                raise ResourceError(f"bytes of {item.origin} are not on this node")
            copy(base + item.slot_offset, self._source + item.address, item.nbytes)

    def _exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        base = self._slot(gpu, slot)
        for item in copies:
            copy(base + item.slot_offset, self._slot(item.gpu, slot) + item.slot_offset, item.nbytes)


async def _run(executor: Executor, work: Callable[..., object], *arguments: object) -> None:
    """Run copies in a thread. When cancelled, end only once they have: their slot may be filled anew after that."""
    copying = executor.submit(work, *arguments)
    copied = asyncio.wrap_future(copying)
    try:
        await asyncio.shield(copied)
    except asyncio.CancelledError:
        copying.cancel()
        while not copied.done():
            with contextlib.suppress(asyncio.CancelledError):  # being told again changes nothing
                await asyncio.wait([copied])
        if not copied.cancelled():
            copied.exception()  # nobody asks any more
        raise
