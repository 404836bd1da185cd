"""One push of one version over engines of this node: prefetch, pause, stream, finish, resume, with its undo.

The slots fill while the engines serve, and say whether the version fits them; then all pause together, load together,
and resume. An engine that fails is dropped and the others go on. A round owns the slots of its GPUs: the pusher runs
one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial

import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.driver import Update
from cpe_daemon.core.lifecycle import ROUND_TABLE, RoundEvent, RoundState, advance
from cpe_daemon.core.pace import Pace, slowest
from cpe_daemon.core.plan import Bucket, Plan
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.worker import Worker
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.push.compatibility import announced
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.pipeline import Pipeline
from cpe_daemon.push.traffic import Traffic
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import Load, TensorPart

log = structlog.get_logger(__name__)


class Round:
    """One round. `run` never raises for a failing engine; look at the participants afterwards.

    Args:
        number: of the round, growing within the daemon's process.
        version: what is pushed.
        specs: its tensors, as planned; the same object as long as they are the same.
        plan: its buckets.
        gpus: indices at the device, in the plan's order.
        device: whose slots are used.
        participants: the engines.
        deadlines: of each phase.
        clock: seconds, monotonic.
        traffic: is told what each stage moves; None if nobody wants to know.
        fold: of the version's bytes, that every worker is to find; None if none is to look.
        digest: of the version (`cpe_daemon.core.identity`), for the workers to keep beside its name.
        needs: by worker, the digest of the needs that the plan goes by; "" for who is sent everything. Who is not named
            may need more than is planned. None: nobody's needs were asked for.
        write_down: awaited before any engine is given a bucket, while engines stop; never raises. None: nobody writes
            down.
    """

    def __init__(
        self,
        *,
        number: int,
        version: VersionId,
        specs: Sequence[TensorSpec],
        plan: Plan,
        gpus: Sequence[int],
        device: Device,
        participants: Sequence[Participant],
        deadlines: DeadlinesConfig,
        clock: Callable[[], float],
        traffic: Traffic | None = None,
        fold: int | None = None,
        digest: bytes = b"",
        needs: Mapping[Worker, str] | None = None,
        write_down: Callable[[], Coroutine[None, None, None]] | None = None,
    ) -> None:
        self.state = RoundState.PREFETCHING
        self.participants = participants
        self.gpus = gpus
        self.number = number
        self.version = version
        self._fold = fold
        self._digest = digest
        self._needs = needs
        self._write_down = write_down
        self._specs = specs
        self.nbytes = plan.nbytes
        self.began_at = clock()
        self._deadlines = deadlines
        self._clock = clock
        paces = [participant.engine.pace for participant in participants]
        prefill = slowest(paces).prefill(device.slot_count, len(plan.buckets)) if paces else None
        self._trace = traffic.trace if traffic is not None else None
        self._pipeline = Pipeline(device, gpus, plan.buckets, self._deliver, traffic, prefill, clock)
        self._abandoned: CpeError | None = None
        self._updating: asyncio.Timeout | None = None

    @property
    def alive(self) -> list[Participant]:
        """The engines still in the round."""
        return [participant for participant in self.participants if participant.alive]

    @property
    def loaded_bytes(self) -> int:
        """Bytes that every engine still in the round has loaded."""
        return min((participant.loaded_bytes for participant in self.alive), default=0)

    @property
    def slots_in_use(self) -> int:
        """Slots of each GPU that hold a bucket, or are about to."""
        return self._pipeline.slots_in_use

    def abandon(self, error: CpeError) -> None:
        """Give the update up now: whoever has not taken the version whole is dropped, and this is why."""
        self._abandoned = error
        if self._updating is not None:
            self._updating.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Take every engine through the push, and every dropped one out of it."""
        log.info("round.started", round=self.number, version=str(self.version), engines=self._names())
        try:
            await self._update_unless_abandoned()
        except* CpeError as group:  # nobody is left; or, beside that or alone, a copy failed; or it was given up
            for participant in self.alive:
                if not participant.updated:
                    participant.drop(_first(group))
            self._change(RoundEvent.ABANDON)
        await asyncio.gather(*(p.leave() for p in self.participants if not p.alive))
        log.info("round.ended", round=self.number, state=str(self.state), dropped=self._names(alive=False))

    async def _update_unless_abandoned(self) -> None:
        limit = asyncio.timeout(None)
        try:
            async with limit:
                if self._abandoned is not None:
                    raise self._abandoned
                self._updating = limit
                await self._update()
        except TimeoutError:
            if self._abandoned is None or not limit.expired():
                raise
            raise self._abandoned from None
        finally:
            self._updating = None

    async def _update(self) -> None:
        began = self._clock()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pipeline.run())
            checked = tasks.create_task(self._ask_whether_it_fits())
            written = tasks.create_task(self._write_down()) if self._write_down is not None else None
            await self._pipeline.primed()
            prefetched = self._clock() - began
            await checked
            self._change(RoundEvent.SLOTS_FULL)
            limits = self._deadlines
            await self._each(
                "pause",
                lambda p: p.engine.driver.pause(self.number, limits.pause_seconds),
                limits.pause_seconds,
            )
            self._name_needs()
            update = Update(self.number, self.version, len(self._specs), self.nbytes, self._fold, self._digest)
            await self._each(
                "begin", lambda p: p.engine.driver.begin(update, limits.begin_seconds), limits.begin_seconds
            )
            if written is not None:
                await written  # weights change from now on; after a crash before that engines are as they were
            self._change(RoundEvent.PAUSED)
            opened = self._clock()
            self._pipeline.open(whole=not self._as_planned())
        pushed = self._clock() - opened
        for participant in self.participants:
            participant.phases |= {"prefetch": prefetched, "push": pushed}
            participant.engine.pace = self._pace(participant)
        self._change(RoundEvent.STREAMED)
        await self._each(
            "finish",
            lambda p: p.engine.driver.finish(self.number, limits.finish_seconds),
            limits.finish_seconds,
        )
        for participant in self.alive:
            participant.verified = self._fold is not None
        self._change(RoundEvent.FINISHED)
        await asyncio.gather(*(participant.resume(self.version, self._specs) for participant in self.alive))
        self._change(RoundEvent.RESUMED if self.alive else RoundEvent.ABANDON)

    def _name_needs(self) -> None:
        """Have every worker be told, when it begins, of which of its bytes the plan is sure."""
        for participant in self.alive:
            for worker in participant.workers:
                worker.planned = None if self._needs is None else self._needs.get(worker, "")

    def _as_planned(self) -> bool:
        """Whether all workers still need what the plan goes by; else slots must hold all that they can hold."""
        if self._needs is None:
            return True
        workers = [worker for participant in self.alive for worker in participant.workers]
        return all(
            (digest := self._needs.get(worker)) is not None
            and (not digest or (worker.needs is not None and worker.needs.digest == digest))
            for worker in workers
        )

    async def _ask_whether_it_fits(self) -> None:
        """Drop the engines that cannot take such a version, while they serve; those that loaded one are not asked."""
        asked = [participant for participant in self.alive if not participant.knows(self._specs)]
        if not asked:
            return
        seconds = self._deadlines.check_seconds
        for header in announced(self.number, self._specs):
            for participant in asked:
                participant.tell(header)
        await asyncio.gather(
            *(p.step("check", partial(p.engine.driver.check, self.number, seconds), seconds) for p in asked),
        )
        self._check()

    async def _each(self, phase: str, work: Callable[[Participant], Awaitable[object]], seconds: float) -> None:
        """One phase for all engines at once; the next begins when the last has done it or was dropped."""
        await asyncio.gather(*(p.step(phase, partial(work, p), seconds) for p in self.alive))
        self._check()

    async def _gathered(self, loads: Sequence[Awaitable[None]]) -> None:
        await asyncio.gather(*loads)
        self._check()

    def _deliver(self, bucket: Bucket, slot: int) -> Awaitable[None]:
        """Stage 3: tell every worker what lies in a slot."""
        parts = [
            TensorPart(spec.name, spec.dtype, spec.shape, part.tensor_offset, part.nbytes, part.slot_offset)
            for part, spec in ((part, self._specs[part.tensor]) for part in bucket.parts)
        ]
        load = Load(self.number, bucket.index, slot, parts)
        header = encode(load)
        return self._gathered([participant.post(load, header, self._trace) for participant in self.alive])

    def _pace(self, participant: Participant) -> Pace:
        """What this round showed of an engine, now that everything was delivered."""
        before, starved = participant.engine.pace, self._pipeline.starved
        stop = participant.phases.get("pause", 0.0) + participant.phases.get("begin", 0.0)
        stop += self._pipeline.first_load_seconds
        return Pace(before.starved if starved is None else starved, stop, self._pipeline.fill_seconds)

    def _check(self) -> None:
        if not self.alive:
            raise EngineError(f"no engine is left in round {self.number}")

    def _change(self, event: RoundEvent) -> None:
        if self._trace is not None:
            named = {"round": self.number, "version": str(self.version)}
            self._trace.add("rounds", str(self.state), self.began_at, **named)
        self.state = advance(ROUND_TABLE, self.state, event)

    def _names(self, *, alive: bool = True) -> list[str]:
        return [participant.engine.name for participant in self.participants if participant.alive == alive]


def _first(group: BaseExceptionGroup[CpeError]) -> CpeError:
    """A group's first error."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, CpeError) else CpeError(str(error))
