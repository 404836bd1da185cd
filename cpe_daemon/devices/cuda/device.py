"""The device of a GPU host: slots in GPU memory, filled from the pinned arena and completed by peer copies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Final

import structlog

from cpe_daemon.core.plan import Copy, Costs, PeerCopy, Topology
from cpe_daemon.devices.cuda.driver import CudaError, Driver, driver
from cpe_daemon.devices.cuda.gpus import Found, exchanges, find
from cpe_daemon.devices.cuda.lane import Copying, Lane
from cpe_daemon.errors import CpeError, ResourceError
from cpe_daemon.wire.messages import SlotSet

log = structlog.get_logger(__name__)

KIND: Final = "cuda"
_COSTS: Final = Costs(fetch_bytes=256 << 10, exchange_bytes=1 << 20, exchange_speed=6.0)
"""About 4 µs to issue a copy, over links of 55 and of 330 GB/s: estimates, by which nothing is decided closely."""
_ISSUE_SECONDS: Final = 60.0
PIN_BYTES: Final = 4 << 30
"""Pinned at a time, so that progress can be told. No copy may reach from one such range into the next."""


class CudaDevice:
    """Slots on every GPU that this process sees. Four threads a GPU: two kinds of copies, each issued and awaited.

    Args:
        uuids: of the GPUs to take; empty: all.
        slot_bytes: size of a slot.
        source: address of the arena's first byte.
        source_bytes: size of the arena.
        on_lost: called on the loop when CUDA takes no calls of this process any more, for no GPU.

    Raises:
        ConfigError: no GPU could ever have a name that was given.
        ResourceError: there is no driver, no GPU, or not one that was named, now.
    """

    kind = KIND

    def __init__(
        self,
        *,
        uuids: Sequence[str],
        slot_bytes: int,
        source: int,
        source_bytes: int,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._driver = driver()
        self._found = find(self._driver, uuids)
        self.topology = Topology(
            gpus=tuple(found.gpu for found in self._found),
            peer_access=exchanges(self._driver, self._found),
            costs=_COSTS,
        )
        self.slot_bytes = slot_bytes
        self.failures: dict[int, CpeError] = {}
        self._on_lost = on_lost
        self._source = source
        self._source_bytes = source_bytes
        self._pinned: list[int] = []
        self._gpus: list[_Gpu] = []
        self._fetches: dict[tuple[int, int], Future[None]] = {}
        """By GPU and slot, when the last fetch was in the GPU's queue."""

    @property
    def slot_count(self) -> int:
        """Slots that each GPU has which has any; 0 if none has."""
        return min((gpu.slot_count for gpu in self._gpus if gpu.slot_count), default=0)

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copies in flight; 0.0 if there are none."""
        return max((lane.stuck_seconds for gpu in self._gpus for lane in gpu.lanes), default=0.0)

    async def open(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Make a context on every GPU, and pin the arena.

        Args:
            progress: called on the loop with (bytes pinned, bytes in all).

        Raises:
            ResourceError: a GPU cannot be used, or the arena cannot be pinned, now; says what to do.
        """
        try:
            for found in self._found:
                self._gpus.append(await asyncio.to_thread(_Gpu, self._driver, found))
            if self.topology.peer_access:
                await asyncio.to_thread(self._link)
        except CudaError as error:
            raise ResourceError(f"a GPU cannot be used: {error}; see nvidia-smi, and device.uuids") from None
        for start in range(0, self._source_bytes, PIN_BYTES):
            nbytes = min(PIN_BYTES, self._source_bytes - start)
            await asyncio.to_thread(self._pin, self._source + start, nbytes)
            progress(start + nbytes, self._source_bytes)

    def slots(self, gpu: int) -> int:
        """How many slots a GPU has."""
        return self._gpus[gpu].slot_count

    async def take(self, gpu: int, count: int) -> None:
        """Take slots, or as many as there is room for.

        Raises:
            ResourceError: there is no room for one, or the GPU has failed.
        """
        taken = self._gpus[gpu]
        try:
            await asyncio.to_thread(taken.take, count, self.slot_bytes)
        except CudaError as error:
            if not error.out_of_memory:
                await self._judge(error)
                raise
            raise ResourceError(
                f"{taken.uuid} has no room for a slot of {self.slot_bytes} bytes ({error}); lower device.slot_bytes, or"
                " the memory that the engine takes"
            ) from None

    def export(self, gpu: int) -> SlotSet:
        """Return the handle of a GPU's slots."""
        taken = self._gpus[gpu]
        return SlotSet(KIND, taken.uuid, taken.slot_count, self.slot_bytes, [taken.handle])

    def withdraw(self, slots: SlotSet) -> None:
        """Nothing is kept for a worker that does not open them."""

    async def release(self, gpu: int) -> None:
        """Free a GPU's slots."""
        try:
            await asyncio.to_thread(self._gpus[gpu].give_back)
        except CudaError as error:
            await self._judge(error)
            raise

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        """Copy from the arena into a slot, over the GPU's own PCIe link."""
        base = self._slot(gpu, slot)

        def issue(stream: int) -> None:
            for item in copies:
                if item.origin:
                    raise ResourceError(f"bytes of {item.origin} are not on this node")
                for start, nbytes in _within_pins(item.address, item.nbytes):
                    self._driver.copy_to_device(
                        base + item.slot_offset + start - item.address, self._source + start, nbytes, stream
                    )
            self._driver.record(self._gpus[gpu].fetched[slot], stream)

        copying = self._gpus[gpu].fetching.start(issue)
        self._fetches[gpu, slot] = copying.issued
        await self._arrive(gpu, copying)

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Copy from the other GPUs' same slot; their fetches are waited for by the GPU, and not here."""
        base, context = self._slot(gpu, slot), self._gpus[gpu].context
        sources = {item.gpu for item in copies}
        fetches = [fetch for source in sources if (fetch := self._fetches.get((source, slot))) is not None]

        def issue(stream: int) -> None:
            try:
                for fetch in fetches:
                    fetch.result(_ISSUE_SECONDS)
            except TimeoutError:
                raise ResourceError(f"copies of other GPUs were not issued within {_ISSUE_SECONDS:g} s") from None
            for source in sources:
                self._driver.await_event(stream, self._gpus[source].fetched[slot])
            for item in copies:
                self._driver.copy_from_peer(
                    base + item.slot_offset,
                    context,
                    self._slot(item.gpu, slot) + item.slot_offset,
                    self._gpus[item.gpu].context,
                    item.nbytes,
                    stream,
                )

        await self._arrive(gpu, self._gpus[gpu].exchanging.start(issue))

    async def close(self) -> None:
        """Unpin the arena and free the slots, when what is in flight has ended."""
        for gpu in self._gpus:
            await asyncio.to_thread(gpu.stop)
        await asyncio.to_thread(self._unpin)
        for gpu in self._gpus:
            await asyncio.to_thread(gpu.free)
        self._gpus.clear()

    async def _arrive(self, gpu: int, copying: Copying) -> None:
        try:
            await copying.arrive()
        except CudaError as error:
            await self._judge(error)
            raise ResourceError(f"copies to {self._gpus[gpu].uuid} failed: {error}") from None

    async def _judge(self, error: CudaError) -> None:
        """After a failure: GPUs whose contexts take no calls any more are given up, for this process has no others.

        With one context the driver may give up all of a process, where nothing but another process mends that.
        """
        well = await asyncio.to_thread(lambda: [gpu.works() for gpu in self._gpus])
        lost = [index for index, works in enumerate(well) if not works and index not in self.failures]
        for index in lost:
            uuid = self._gpus[index].uuid
            self.failures[index] = ResourceError(
                f"{uuid} has failed this process ({error}); its engines get no versions until this daemon was restarted"
            )
            log.error("gpu.failed", gpu=uuid, error=error.message)
        if lost and len(self.failures) == len(self._gpus):
            self._on_lost()

    def _slot(self, gpu: int, slot: int) -> int:
        return self._gpus[gpu].address + slot * self.slot_bytes

    def _link(self) -> None:
        for one in self._gpus:
            self._driver.use(one.context)
            for other in self._gpus:
                if other is not one:
                    self._driver.enable_peer(other.context)

    def _pin(self, address: int, nbytes: int) -> None:
        self._driver.use(self._gpus[0].context)
        try:
            self._driver.register(address, nbytes)
        except CudaError as error:
            raise ResourceError(
                f"cannot pin the arena: {error}; is the memlock limit high enough (LimitMEMLOCK=infinity), and is"
                " arena.size_bytes well below the host's memory?"
            ) from None
        self._pinned.append(address)

    def _unpin(self) -> None:
        while self._pinned:
            address = self._pinned.pop()
            with contextlib.suppress(CudaError):  # of a GPU that has failed: its context took the pins with it
                self._driver.use(self._gpus[0].context)
                self._driver.unregister(address)


class _Gpu:
    """One GPU while the device is open: its context, lanes and slots. Made, used and freed off the event loop.

    Raises:
        CudaError: it cannot be used.
    """

    def __init__(self, driver: Driver, found: Found) -> None:
        self._driver = driver
        self._found = found
        self.uuid = found.gpu.uuid
        self.address = self.slot_count = 0
        self.handle = b""
        self.fetched: list[int] = []
        """By slot, the event that its last fetch has arrived."""
        self.context = driver.retain(found.device)
        self.fetching = Lane(driver, self.context, f"cpe-fetch-{found.device}")
        self.exchanging = Lane(driver, self.context, f"cpe-peer-{found.device}")

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        return self.fetching, self.exchanging

    def take(self, count: int, slot_bytes: int) -> None:
        """Take as many slots as there is room for, in one piece."""
        self._driver.use(self.context)
        for fewer in range(count, 0, -1):
            try:
                self.address = self._driver.allocate(fewer * slot_bytes)
            except CudaError as error:
                if fewer == 1 or not error.out_of_memory:
                    raise
                continue
            if fewer < count:
                log.warning("slots.reduced", gpu=self.uuid, slots=fewer, wanted=count)
            self.handle = self._driver.export(self.address)
            self.fetched = [self._driver.create_event() for _ in range(fewer)]
            self.slot_count = fewer
            return

    def give_back(self) -> None:
        """Free the slots, if there are any."""
        self._driver.use(self.context)
        if self.slot_count:
            self.slot_count = 0
            self._driver.free(self.address)
            while self.fetched:
                self._driver.destroy_event(self.fetched.pop())

    def works(self) -> bool:
        """Whether its context still takes calls."""
        try:
            self._driver.use(self.context)
            self._driver.free_bytes()
        except CudaError:
            return False
        return True

    def stop(self) -> None:
        """Wait for what is in flight, and end the threads."""
        for lane in self.lanes:
            lane.close()

    def free(self) -> None:
        """Give everything back."""
        with contextlib.suppress(CudaError):  # of a GPU that has failed: its context took the memory with it
            self.give_back()
        with contextlib.suppress(CudaError):
            self._driver.release(self._found.device)


def _within_pins(address: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut an arena range where one pinned range ends and the next begins: (address, bytes)."""
    while nbytes:
        fits = min(nbytes, PIN_BYTES - address % PIN_BYTES)
        yield address, fits
        address, nbytes = address + fits, nbytes - fits
