"""The device of a CPU host: slots in shared memory, which engine processes map read-only.

A "GPU" here is a set of slots; a host may have several, which makes every path of a multi-GPU node run on a laptop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final, Protocol

from cpe_daemon.core.plan import Copy, Gpu, PeerCopy, Topology
from cpe_daemon.devices.capacity import require_bytes
from cpe_daemon.devices.copypool import CopyPool, longest
from cpe_daemon.devices.memory import PREFAULT_BYTES, SharedMemory, copy
from cpe_daemon.errors import ResourceError
from cpe_daemon.wire.messages import SlotSet

KIND: Final = "shm"


class Handoff(Protocol):
    """What is needed of `cpe_daemon.links.handoff.HandoffServer`."""

    def offer(self, fd: int, on_gone: Callable[[], None]) -> bytes:
        """Offer a descriptor once, under the token returned; call ``on_gone`` when its taker lets go or dies."""
        ...

    def withdraw(self, token: bytes) -> None:
        """Take an offer back, if nobody took it."""
        ...


class ShmDevice:
    """Slots in memfds. Two threads a GPU: one fetches, one exchanges.

    Args:
        gpus: how many sets of slots.
        slot_count: slots a set.
        slot_bytes: size of a slot.
        source: address of the arena's first byte.
        handoff: hands descriptors to other processes.
    """

    kind = KIND

    def __init__(
        self,
        *,
        gpus: int,
        slot_count: int,
        slot_bytes: int,
        source: int,
        handoff: Handoff,
    ) -> None:
        self.topology = Topology(gpus=tuple(Gpu(f"shm-{index}") for index in range(gpus)), peer_access=True)
        self.slot_count = slot_count
        self.slot_bytes = slot_bytes
        self._source = source
        self._handoff = handoff
        self._sets: list[SharedMemory] = []
        self._fetchers = [CopyPool(1, f"cpe-fetch-{index}") for index in range(gpus)]
        self._exchangers = [CopyPool(1, f"cpe-peer-{index}") for index in range(gpus)]

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copy in flight; 0.0 if there is none."""
        return longest((*self._fetchers, *self._exchangers))

    async def open(self) -> None:
        """Allocate and prefault all slots, sealed so that workers can only read them.

        Raises:
            ConfigError: the host has not enough memory, or its kernel is too old.
        """
        set_bytes = self.slot_count * self.slot_bytes
        require_bytes(len(self.topology.gpus) * set_bytes, "slots (device.gpus × device.slots × device.slot_bytes)")
        loop = asyncio.get_running_loop()
        for gpu, fetcher in zip(self.topology.gpus, self._fetchers, strict=True):
            memory = SharedMemory.create(f"cpe-slots-{gpu.uuid}", set_bytes)
            memory.seal_writes()
            self._sets.append(memory)
            for offset in range(0, set_bytes, PREFAULT_BYTES):
                nbytes = min(PREFAULT_BYTES, set_bytes - offset)
                await loop.run_in_executor(fetcher, memory.prefault, offset, nbytes)

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        """Copy from the arena into a slot, on the GPU's fetching thread."""
        await _run(self._fetchers[gpu], self._fetch, gpu, slot, copies)

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Copy from the other sets' same slot, on the GPU's exchanging thread."""
        await _run(self._exchangers[gpu], self._exchange, gpu, slot, copies)

    def export(self, gpu: int, on_gone: Callable[[], None]) -> SlotSet:
        """Offer a set of slots to one worker."""
        token = self._handoff.offer(self._sets[gpu].fd, on_gone)
        return SlotSet(KIND, self.topology.gpus[gpu].uuid, self.slot_count, self.slot_bytes, [token])

    def withdraw(self, slots: SlotSet) -> None:
        """Take an offer back that no worker has claimed."""
        for token in slots.handles:
            self._handoff.withdraw(token)

    async def close(self) -> None:
        """Stop the threads and unmap the slots; workers' mappings live on until they let go."""
        for executor in (*self._fetchers, *self._exchangers):
            await asyncio.to_thread(executor.shutdown)
        for memory in self._sets:
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


async def _run(executor: Executor, work: Callable[..., None], *arguments: object) -> None:
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
