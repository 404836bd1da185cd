"""The slots' life beside the rounds: taken when engines need them, opened by their workers, given back when idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator

import structlog

from cpe_daemon.config import DeadlinesConfig, DeviceConfig
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.registry import Registry
from cpe_daemon.engines.worker import Worker
from cpe_daemon.errors import CpeError, DeadlineError, EngineError
from cpe_daemon.wire.messages import CloseSlots, OpenSlots

log = structlog.get_logger(__name__)


class SlotKeeper:
    """Belongs to the event loop, and to whoever runs the rounds: nothing here may be called while one is under way.

    Args:
        config: how many slots there are to be, and for how long they are kept.
        deadlines: of what workers are asked for.
        device: has the slots.
        registry: knows the workers that may have them open.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: DeviceConfig,
        deadlines: DeadlinesConfig,
        device: Device,
        registry: Registry,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._deadlines = deadlines
        self._device = device
        self._registry = registry
        self._clock = clock
        self._used_at = clock()
        self._messages = 0
        self._wanted: dict[int, int] = {}
        """By GPU, how many slots it was to have when it got what it has: where memory is short it has fewer."""

    @property
    def idle_in_seconds(self) -> float | None:
        """Until `give_back` is due, if nothing happens; None: there is nothing to give back, or it is kept."""
        if not self._config.idle_seconds or not list(self._held()):
            return None
        return max(0.0, self._used_at + self._config.idle_seconds - self._clock())

    async def provide(self, workers: Collection[Worker], buckets: int) -> dict[Worker, CpeError]:
        """Have every worker open slots of its GPU, as many as a version of so many buckets is to have.

        Returns:
            The workers that cannot be loaded through slots, each with the reason.
        """
        self._used_at = self._clock()
        workers = tuple(workers)  # those of an engine may come and go meanwhile
        wanted = self._config.slots_for(buckets)
        gpus = sorted({worker.gpu for worker in workers})
        troubles = dict(zip(gpus, await asyncio.gather(*(self._take(gpu, wanted) for gpu in gpus)), strict=True))
        refused = {worker: trouble for worker in workers if (trouble := troubles[worker.gpu]) is not None}
        opening = [worker for worker in workers if worker not in refused and not worker.has_slots]
        opened = await asyncio.gather(*map(self._open, opening))
        return refused | {
            worker: trouble for worker, trouble in zip(opening, opened, strict=True) if trouble is not None
        }

    async def give_back(self) -> None:
        """Free all slots that their workers let go of; of the others this is tried again later."""
        self._used_at = self._clock()
        for gpu in list(self._held()):
            if await self._vacate(gpu):
                log.info("slots.given_back", gpu=self._device.topology.gpus[gpu].uuid)

    async def give_back_unused(self) -> None:
        """Free the slots of GPUs whose engines are all asleep: the memory is wanted by others."""
        for gpu in list(self._held()):
            workers = [w for engine in self._registry for w in engine.workers.values() if w.gpu == gpu]
            if any(worker.asleep for worker in workers) and not self._lingering(gpu) and await self._release(gpu):
                log.info("slots.given_back", gpu=self._device.topology.gpus[gpu].uuid)

    def _held(self) -> Iterator[int]:
        return (gpu for gpu in range(len(self._device.topology.gpus)) if self._device.slots(gpu))

    async def _take(self, gpu: int, wanted: int) -> CpeError | None:
        """Have a GPU hold ``wanted`` slots, unless it was found before that they do not fit."""
        if gpu in self._device.failures:
            return self._device.failures[gpu]
        if self._device.slots(gpu) and (wanted <= self._wanted[gpu] or not await self._vacate(gpu)):
            return None
        try:
            await self._device.take(gpu, wanted)
        except CpeError as error:
            log.warning("slots.refused", gpu=self._device.topology.gpus[gpu].uuid, error=error.message)
            return error
        self._wanted[gpu] = wanted
        return None

    async def _open(self, worker: Worker) -> CpeError | None:
        if worker.asleep:
            return EngineError(f"{worker.name} is asleep")
        try:
            slots = worker.slots = self._device.export(worker.gpu)
        except CpeError as error:  # short of descriptors, say; it may be tried again
            log.warning("slots.not_offered", worker=worker.name, error=error.message)
            return error
        try:
            await worker.step(OpenSlots(self._number(), slots, self._config.verifies), self._deadlines.begin_seconds)
        except CpeError as error:
            self._device.withdraw(slots)
            if not isinstance(error, DeadlineError):  # one that is late may open them yet
                worker.slots = None
            return error
        worker.has_slots = True
        return None

    async def _vacate(self, gpu: int) -> bool:
        """Have all workers let a GPU's slots go, and free them; False if a worker does not."""
        users = self._lingering(gpu)
        closed = await asyncio.gather(*map(self._close, users))
        if not all(closed):
            log.warning(
                "slots.kept",
                gpu=self._device.topology.gpus[gpu].uuid,
                workers=[worker.name for worker, done in zip(users, closed, strict=True) if not done],
            )
            return False
        return not self._device.slots(gpu) or await self._release(gpu)

    async def _release(self, gpu: int) -> bool:
        """Free a GPU's slots; False if that failed, as with a GPU that is lost: that concerns no other."""
        try:
            await self._device.release(gpu)
        except CpeError as error:
            log.warning("slots.not_freed", gpu=self._device.topology.gpus[gpu].uuid, error=error.message)
            return False
        return True

    async def _close(self, worker: Worker) -> bool:
        """Have a worker let its slots go; True if it did, or is no more."""
        worker.has_slots = False
        try:
            await worker.step(CloseSlots(self._number()), self._deadlines.begin_seconds)
        except CpeError as error:
            log.warning("slots.not_closed", worker=worker.name, error=error.message)
            return worker.gone is not None
        worker.slots = None
        return True

    def _lingering(self, gpu: int) -> list[Worker]:
        """The workers that have a GPU's slots open, or may have."""
        workers = (worker for engine in self._registry for worker in engine.workers.values())
        return [worker for worker in workers if worker.gpu == gpu and worker.slots is not None]

    def _number(self) -> int:
        self._messages += 1
        return self._messages
