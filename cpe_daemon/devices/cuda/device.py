"""The device of a GPU host: slots in GPU memory, filled from the pinned arena and completed by peer copies."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import structlog

from cpe_daemon.core.plan import Copy, PeerCopy, Topology
from cpe_daemon.devices.cuda.driver import CudaError, Driver, driver
from cpe_daemon.devices.cuda.gpus import Found, exchanges, find
from cpe_daemon.devices.cuda.lane import Lane
from cpe_daemon.errors import ConfigError, ResourceError
from cpe_daemon.wire.messages import SlotSet

log = structlog.get_logger(__name__)

KIND: Final = "cuda"
PIN_BYTES: Final = 4 << 30
"""Pinned at a time, so that progress can be told. No copy may reach from one such range into the next."""


class Handoff(Protocol):
    """What is needed of `cpe_daemon.links.handoff.HandoffServer`."""

    def offer(self, fd: int, on_gone: Callable[[], None]) -> bytes:
        """Offer a descriptor once, under the token returned; call ``on_gone`` when its taker lets go or dies."""
        ...

    def withdraw(self, token: bytes) -> None:
        """Take an offer back, if nobody took it."""
        ...


class CudaDevice:
    """Slots on every GPU that this process sees. Four threads a GPU: two kinds of copies, each issued and awaited.

    Args:
        uuids: of the GPUs to take; empty: all.
        slot_count: slots a GPU; fewer are taken where memory is short.
        slot_bytes: size of a slot.
        source: address of the arena's first byte.
        source_bytes: size of the arena.
        handoff: ties workers' lives to what they were given.

    Raises:
        ConfigError: there is no driver, no GPU, or not one that was named.
    """

    kind = KIND

    def __init__(
        self,
        *,
        uuids: Sequence[str],
        slot_count: int,
        slot_bytes: int,
        source: int,
        source_bytes: int,
        handoff: Handoff,
    ) -> None:
        try:
            self._driver = driver()
        except ResourceError as error:
            raise ConfigError(str(error)) from None
        self._found = find(self._driver, uuids)
        self.topology = Topology(
            gpus=tuple(found.gpu for found in self._found), peer_access=exchanges(self._driver, self._found)
        )
        self.slot_count = slot_count
        self.slot_bytes = slot_bytes
        self._source = source
        self._source_bytes = source_bytes
        self._handoff = handoff
        self._pinned: list[int] = []
        self._gpus: list[_Gpu] = []
        self._token_fd = os.memfd_create("cpe-slots", os.MFD_CLOEXEC)
        """Nothing is in it: a worker fetches it for the connection, which ends with the worker."""

    @property
    def stuck_seconds(self) -> float:
        """Age of the oldest copies in flight; 0.0 if there are none."""
        return max((lane.stuck_seconds for gpu in self._gpus for lane in gpu.lanes), default=0.0)

    async def open(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Take the slots, and pin the arena.

        Args:
            progress: called on the loop with (bytes pinned, bytes in all).

        Raises:
            ConfigError: a GPU has no room for one slot, or the arena cannot be pinned; says what to do.
        """
        for found in self._found:
            self._gpus.append(await asyncio.to_thread(_Gpu, self._driver, found, self.slot_count, self.slot_bytes))
        self.slot_count = min(gpu.slot_count for gpu in self._gpus)
        if self.topology.peer_access:
            await asyncio.to_thread(self._link)
        for start in range(0, self._source_bytes, PIN_BYTES):
            nbytes = min(PIN_BYTES, self._source_bytes - start)
            await asyncio.to_thread(self._pin, self._source + start, nbytes)
            progress(start + nbytes, self._source_bytes)

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

        await self._gpus[gpu].fetching.run(issue)

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """Copy from the other GPUs' same slot."""
        base, context = self._slot(gpu, slot), self._gpus[gpu].context

        def issue(stream: int) -> None:
            for item in copies:
                self._driver.copy_from_peer(
                    base + item.slot_offset,
                    context,
                    self._slot(item.gpu, slot) + item.slot_offset,
                    self._gpus[item.gpu].context,
                    item.nbytes,
                    stream,
                )

        await self._gpus[gpu].exchanging.run(issue)

    def export(self, gpu: int, on_gone: Callable[[], None]) -> SlotSet:
        """Return the handle of a GPU's slots, and the token that ties a worker's life to them."""
        token = self._handoff.offer(self._token_fd, on_gone)
        uuid = self.topology.gpus[gpu].uuid
        return SlotSet(KIND, uuid, self.slot_count, self.slot_bytes, [token, self._gpus[gpu].handle])

    def withdraw(self, slots: SlotSet) -> None:
        """Take an offer back that no worker has claimed."""
        self._handoff.withdraw(slots.handles[0])

    async def close(self) -> None:
        """Unpin the arena and free the slots, when what is in flight has ended."""
        for gpu in self._gpus:
            await asyncio.to_thread(gpu.stop)
        await asyncio.to_thread(self._unpin)
        for gpu in self._gpus:
            await asyncio.to_thread(gpu.free)
        self._gpus.clear()
        os.close(self._token_fd)

    def _slot(self, gpu: int, slot: int) -> int:
        return self._gpus[gpu].slots + slot * self.slot_bytes

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
            raise ConfigError(
                f"cannot pin the arena: {error}; is the memlock limit high enough (LimitMEMLOCK=infinity), and is"
                " arena.size_bytes well below the host's memory?"
            ) from None
        self._pinned.append(address)

    def _unpin(self) -> None:
        if self._gpus:
            self._driver.use(self._gpus[0].context)
        while self._pinned:
            with contextlib.suppress(CudaError):  # of a GPU that has failed: its context took the pins with it
                self._driver.unregister(self._pinned.pop())


class _Gpu:
    """One GPU while the device is open: its context, slots and lanes. Made, stopped and freed off the event loop.

    Raises:
        ConfigError: there is no room for one slot.
    """

    def __init__(self, driver: Driver, found: Found, slot_count: int, slot_bytes: int) -> None:
        self._driver = driver
        self._found = found
        self.context = driver.retain(found.device)
        driver.use(self.context)
        try:
            self.slots, self.slot_count = self._allocate(slot_count, slot_bytes)
        except CudaError as error:
            driver.release(found.device)
            raise ConfigError(
                f"{found.gpu.uuid} has no room for a slot of {slot_bytes} bytes: {error}; lower device.slot_bytes,"
                " or start the daemon before the engines take the memory"
            ) from None
        self.handle = driver.export(self.slots)
        self.fetching = Lane(driver, self.context, f"cpe-fetch-{found.device}")
        self.exchanging = Lane(driver, self.context, f"cpe-peer-{found.device}")

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        return self.fetching, self.exchanging

    def _allocate(self, slot_count: int, slot_bytes: int) -> tuple[int, int]:
        """Take as many of the slots as there is room for: (address, how many)."""
        for count in range(slot_count, 1, -1):
            try:
                return self._driver.allocate(count * slot_bytes), count
            except CudaError as error:
                if not error.out_of_memory:
                    raise
                log.warning("slots.reduced", gpu=self._found.gpu.uuid, slots=count - 1, slot_bytes=slot_bytes)
        return self._driver.allocate(slot_bytes), 1

    def stop(self) -> None:
        """Wait for what is in flight, and end the threads."""
        for lane in self.lanes:
            lane.close()

    def free(self) -> None:
        """Give the memory back."""
        self._driver.use(self.context)
        with contextlib.suppress(CudaError):  # of a GPU that has failed: its context took the memory with it
            self._driver.free(self.slots)
        self._driver.release(self._found.device)


def _within_pins(address: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut an arena range where one pinned range ends and the next begins: (address, bytes)."""
    while nbytes:
        fits = min(nbytes, PIN_BYTES - address % PIN_BYTES)
        yield address, fits
        address, nbytes = address + fits, nbytes - fits
