"""The three stages of a push over K slots: fetch from the arena, exchange between GPUs, load by the engines.

Every bucket is carried by a task of its own, from the moment a slot is free until every engine has let it go; so the
stages of different buckets overlap by themselves, and with one slot the same code is the serial fallback. Buckets
reach the engines in their order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from cpe_daemon.core.pace import Prefill
from cpe_daemon.core.plan import Bucket, PeerCopy, Transfers
from cpe_daemon.devices.device import Device
from cpe_daemon.push.traffic import Traffic

Deliver = Callable[[Bucket, int], Awaitable[None]]
"""Sends a bucket that lies in a slot to the engines, at once; what it returns ends when all have let the slot go."""

Carried: TypeAlias = Coroutine[Any, Any, None]


class Pipeline:
    """One pass over a version's buckets.

    Args:
        device: whose slots they go through.
        gpus: indices at the device of the GPUs that take part, in the plan's order.
        buckets: the plan's.
        deliver: stage 3.
        traffic: is told what each stage moves; None if nobody wants to know.
        prefill: how full slots are to be before the engines pause; None: as full as can be.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        device: Device,
        gpus: Sequence[int],
        buckets: Sequence[Bucket],
        deliver: Deliver,
        traffic: Traffic | None = None,
        prefill: Prefill | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._gpus = gpus
        self._buckets = buckets
        self._deliver = deliver
        self._traffic = traffic or Traffic(clock)
        self._clock = clock
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(device.slot_count):
            self._free.put_nowait(slot)
        wanted, self._prefill_seconds = prefill or Prefill(device.slot_count)
        self._prefill = min(wanted, device.slot_count, len(buckets))
        self._filled = 0
        self._filled_at: list[float] = []
        """When the first buckets were in slots, as many as there are slots."""
        self._loading = 0
        self._hungry = 0
        """Buckets that came when the engines had nothing left to load, the first ones aside."""
        self.first_load_seconds = 0.0
        """From the first bucket's being sent to the engines until all had loaded it."""
        self._primed = asyncio.Event()
        self._opened = asyncio.Event()
        self._whole = False
        """Whether every slot has to hold all of a bucket, and not what is needed there."""
        self._turn = 0
        self._next_turn = asyncio.Condition()

    @property
    def slots_in_use(self) -> int:
        """Slots of each GPU that hold a bucket, or are about to."""
        return self._device.slot_count - self._free.qsize()

    @property
    def starved(self) -> bool | None:
        """Whether the engines waited for buckets more often than buckets for the engines; None: too few to tell."""
        later = len(self._buckets) - self._prefill
        return 2 * self._hungry > later if later else None

    @property
    def fill_seconds(self) -> float:
        """From one slot that was filled to the next, as long as none had to be waited for; 0.0: too few to tell."""
        at = self._filled_at
        return (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else 0.0

    async def primed(self) -> None:
        """Wait until as many slots are full as are to be before the engines pause, or hold all there is."""
        await self._primed.wait()

    def open(self, *, whole: bool = False) -> None:
        """Let the engines load from now on; ``whole``: some need more than was planned, so all get everything."""
        self._whole = whole
        self._opened.set()

    async def run(self) -> None:
        """Carry every bucket; returns when the last has been loaded everywhere."""
        if not self._prefill:
            self._prime()
        async with asyncio.TaskGroup() as tasks:
            for bucket in self._buckets:
                slot = await self._free.get()
                tasks.create_task(self._carry(bucket, slot))

    async def _carry(self, bucket: Bucket, slot: int) -> None:
        transfers = bucket.sliced if bucket.sliced is not None and not self._whole else bucket.whole
        await self._fill(bucket, transfers, slot)
        self._count_filled()
        await self._opened.wait()
        if self._whole and transfers is bucket.sliced:
            await self._fill(bucket, bucket.whole, slot)
        async with self._next_turn:
            await self._next_turn.wait_for(lambda: self._turn == bucket.index)
            self._hungry += not self._loading and bucket.index >= self._prefill
            loaded = self._deliver(bucket, slot)
            self._loading += 1
            self._turn += 1
            self._next_turn.notify_all()
        sent = self._clock()
        with self._traffic.load.moving(0):
            await loaded
        if not bucket.index:
            self.first_load_seconds = self._clock() - sent
        self._loading -= 1
        self._free.put_nowait(slot)

    async def _fill(self, bucket: Bucket, transfers: Transfers, slot: int) -> None:
        """Stages 1 and 2, asked for at once. One group, for if one GPU's copy fails the others' have to end too."""
        async with asyncio.TaskGroup() as filling:
            fetches = [
                filling.create_task(self._traced(self._device.fetch(gpu, slot, copies), "fetch", gpu, bucket, slot))
                for gpu, copies in zip(self._gpus, transfers.pulls, strict=True)
            ]
            exchanges = []
            for gpu, peer_copies in zip(self._gpus, transfers.exchanges, strict=True):
                if peer_copies:
                    exchange = self._device.exchange(gpu, slot, self._named_by_device(peer_copies))
                    exchanges.append(filling.create_task(self._traced(exchange, "exchange", gpu, bucket, slot)))
            with self._traffic.fetch.moving(self._traffic.fetching(bucket, transfers)):
                await asyncio.wait(fetches)
            if exchanges:
                with self._traffic.exchange.moving(self._traffic.exchanging(transfers)):
                    await asyncio.wait(exchanges)

    def _traced(self, work: Carried, stage: str, gpu: int, bucket: Bucket, slot: int) -> Carried:
        """The same work, recorded if somebody asked for that."""
        trace = self._traffic.trace
        if trace is None:
            return work
        return trace.during(work, f"GPU {gpu}: {stage}", f"bucket {bucket.index}", bytes=bucket.nbytes, slot=slot)

    def _named_by_device(self, copies: Sequence[PeerCopy]) -> Sequence[PeerCopy]:
        """The plan counts the GPUs that take part, the device all it has."""
        return [PeerCopy(self._gpus[copy.gpu], copy.slot_offset, copy.nbytes) for copy in copies]

    def _count_filled(self) -> None:
        self._filled += 1
        if self._filled <= self._device.slot_count:
            self._filled_at.append(self._clock())
        if self._filled == self._prefill:
            self._prime()

    def _prime(self) -> None:
        """As many slots are full as are to be, but for what fills meanwhile."""
        if self._prefill_seconds:
            asyncio.get_running_loop().call_later(self._prefill_seconds, self._primed.set)
        else:
            self._primed.set()
