"""The rounds of a node, one at a time: their plans, their slots, the engines in them, and what they moved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

from cpe_daemon.config import Config
from cpe_daemon.core.journal import Identity, RoundEntry
from cpe_daemon.core.plan import Plan
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.engines.worker import Worker
from cpe_daemon.errors import CpeError, PeerLostError
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.planner import FEW_TENSORS, Planner
from cpe_daemon.push.round import Round
from cpe_daemon.push.slots import SlotKeeper
from cpe_daemon.push.traffic import Traffic
from cpe_daemon.push.waking import rouse
from cpe_daemon.versions import Catalogue, Version


class Decisions(Protocol):
    """Where a round is written down before it is carried out, so that the next daemon knows of it after a crash."""

    def identity(self, version: VersionId | None) -> Identity | None:
        """A version with its digest."""
        ...

    async def decide(self, entry: RoundEntry) -> None:
        """Write a round down. Never raises, and returns within a deadline."""
        ...

    def over(self) -> None:
        """The round is over, however it ended."""
        ...


class _Planned(NamedTuple):
    """What is pushed, how, to which GPUs of the device, and by which needs of their workers, if those may count."""

    gpus: Sequence[int]
    specs: Sequence[TensorSpec]
    plan: Plan
    needs: Mapping[Worker, str] | None


class Rounds:
    """Makes rounds and runs them. Belongs to the event loop; the caller runs one at a time.

    Args:
        config: the daemon's settings.
        catalogue: leases versions.
        registry: of the engines.
        device: whose slots are used.
        metrics: counters.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        config: Config,
        catalogue: Catalogue,
        registry: Registry,
        device: Device,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._device = device
        self._planner = Planner(device.slot_bytes)
        self.slots = SlotKeeper(config.device, config.deadlines, device, registry, clock)
        self.traffic = Traffic(clock)
        """What all rounds have moved."""
        self.current: Round | None = None
        """The round in flight."""
        self.number = 0
        """Of the last round."""
        self.decisions: Decisions | None = None
        self.undoing: CpeError | None = None
        """Why what is undoable is given up from now on."""
        self._undoable = False
        self._metrics = metrics
        self._clock = clock

    def undo(self, error: CpeError) -> None:
        """Give up the round in flight if it is undoable, and every such round to come."""
        self.undoing = error
        if self.current is not None and self._undoable:
            self.current.abandon(error)

    async def run(self, version: Version, engines: Sequence[Engine], *, undoable: bool = False) -> list[Participant]:
        """Push a version, staged or later, into engines; the participants tell what became of each.

        An engine that has lost a worker meanwhile has no part. ``undoable``: `undo` gives the round up.
        """
        if not engines:
            return []
        self.number += 1
        wake_seconds = self._config.deadlines.wake_seconds if self._config.push.asleep == "wake" else None
        with self._catalogue.lease(version):  # before anything is awaited: a retained one may be evicted else
            asleep = await rouse(engines, wake_seconds)
            planned = await self._plan(version, engines)
            workers = [w for engine in engines if engine not in asleep for w in engine.workers.values()]
            refused = await self.slots.provide(workers, len(planned.plan.buckets))
            refused |= {worker: error for engine, error in asleep.items() for worker in engine.workers.values()}
            fit = [engine for engine in engines if not refused.keys() & {*engine.workers.values()}]
            if refused and fit:
                planned = await self._plan(version, fit)
            participants = self._participants(engines, planned, refused)
            began = self._clock()
            if any(participant.alive for participant in participants):
                await self._run(version, planned, participants, undoable=undoable)
            else:
                await asyncio.gather(*(participant.leave() for participant in participants))
        for participant in participants:
            self._observe(version, participant, self._clock() - began)
            if version.digest:
                participant.engine.learn(version.id, version.digest)  # it may have become known meanwhile
            if not participant.alive:
                for worker in participant.workers:  # whatever failed, what comes next has to mend it
                    worker.needs = None
        return participants

    async def _plan(self, version: Version, engines: Sequence[Engine]) -> _Planned:
        """Plan a version for the GPUs of some engines."""
        gpus = sorted({worker.gpu for engine in engines for worker in engine.workers.values()})
        full = self._device.topology
        topology = replace(full, gpus=tuple(full.gpus[gpu] for gpu in gpus))
        asked = version.fold is None  # a fold is of all bytes: who is to find it has to be sent them
        workers = [worker for engine in engines for worker in engine.workers.values()] if asked else []
        said = {worker: worker.needs for worker in workers}
        needs = [[said[worker] for worker in workers if worker.gpu == gpu] for gpu in gpus]
        tensors, bases = version.located()
        planning = partial(self._planner.plan, version.id.model, tensors, bases, topology, needs)
        few = len(tensors) <= FEW_TENSORS  # to hand these to a thread and back takes as long as to plan
        specs, plan, schema = planning() if few else await asyncio.to_thread(planning)
        digests = {worker: one.digest if one and one.schema == schema else "" for worker, one in said.items()}
        return _Planned(gpus, specs, plan, digests if asked else None)

    def _participants(
        self, engines: Sequence[Engine], planned: _Planned, refused: Mapping[Worker, CpeError]
    ) -> list[Participant]:
        """The engines that are still complete; out of the round at once if a worker cannot be loaded."""
        complete = [engine for engine in engines if engine.complete]
        participants = [Participant(engine, self.number, self._config.deadlines, self._clock) for engine in complete]
        for participant in participants:
            for worker in participant.workers:
                if worker in refused:
                    participant.drop(refused[worker])
                elif worker.gpu not in planned.gpus or not worker.has_slots:
                    participant.drop(PeerLostError(f"{worker.name} attached anew while the push was made ready"))
        return participants

    async def _run(
        self, version: Version, planned: _Planned, participants: Sequence[Participant], *, undoable: bool
    ) -> None:
        self.current = Round(
            number=self.number,
            version=version.id,
            specs=planned.specs,
            plan=planned.plan,
            gpus=planned.gpus,
            device=self._device,
            participants=participants,
            deadlines=self._config.deadlines,
            clock=self._clock,
            traffic=self.traffic,
            fold=version.fold,
            digest=version.digest,
            needs=planned.needs,
            write_down=partial(self._write_down, version, participants),
        )
        self._undoable = undoable
        if undoable and self.undoing is not None:
            self.current.abandon(self.undoing)
        try:
            await self.current.run()
        finally:
            self.current = None
            if self.decisions is not None:
                self.decisions.over()

    async def _write_down(self, version: Version, participants: Sequence[Participant]) -> None:
        if self.decisions is not None:
            held = {p.engine.name: self.decisions.identity(p.held) for p in participants}
            await self.decisions.decide(RoundEntry(Identity(version.id, version.digest), held))

    def _observe(self, version: Version, participant: Participant, seconds: float) -> None:
        participant.engine.last_push_seconds = seconds
        self.traffic.load.nbytes += participant.loaded_bytes
        self._metrics.rounds.labels(outcome="updated" if participant.alive else "failed").inc()
        if participant.error is not None:
            self._metrics.engine_failures.labels(code=participant.error.code).inc()
        phases = {**participant.phases, "total": seconds}
        if participant.stopped_seconds is not None:
            phases["stopped"] = participant.stopped_seconds
        self._metrics.observe_phases(version.id.model, participant.engine.name, phases)
