"""The state of the rooms as values of metrics. Reads every room and changes none; belongs to the event loop.

What peers name is bounded here where no room bounds it: a trainer may open versions of as many models as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cpe_daemon.arena import Arena
from cpe_daemon.core.lifecycle import EngineState, VersionState
from cpe_daemon.core.tally import Tally
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import ASLEEP, STARTING, Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.ingest.session import Session
from cpe_daemon.observe.labels import COPIES
from cpe_daemon.observe.metrics import MAX_ENGINES, MAX_MODELS, Readings
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.versions import Catalogue, Version

_RECEIVED: Final = "cpe_received_bytes_total"


@dataclass(slots=True)
class _Model:
    """The newest versions of a model."""

    live: VersionId | None = None
    staged: Version | None = None
    received: Version | None = None
    retained: int = 0

    def add(self, version: Version) -> None:
        """Take one of its versions into account."""
        if self.received is None or version.opened_at >= self.received.opened_at:
            self.received = version
        if version.staged_at and (self.staged is None or version.staged_at >= self.staged.staged_at):
            self.staged = version
        if version.state is VersionState.LIVE:
            self.live = version.id
        self.retained += version.state is VersionState.RETAINED


def read_arena(readings: Readings, arena: Arena, versions: Iterable[Version]) -> None:
    """The memory for versions."""
    readings.add("cpe_arena_size_bytes", arena.nbytes)
    readings.add("cpe_arena_prefaulted_bytes", arena.prefaulted_bytes)
    readings.add("cpe_arena_free_bytes", arena.free_bytes)
    readings.add("cpe_arena_largest_free_bytes", arena.largest_free_bytes)
    readings.add("cpe_arena_leased_bytes", sum(version.nbytes for version in versions if version.leases))


def read_models(readings: Readings, catalogue: Catalogue) -> None:
    """What each model takes of the arena, and may take."""
    for model in catalogue.models()[:MAX_MODELS]:
        readings.add("cpe_model_bytes", catalogue.used_bytes(model), model)
        readings.add("cpe_model_quota_bytes", catalogue.keeping(model).quota_bytes, model)


def read_versions(
    readings: Readings, versions: Iterable[Version], engines: Iterable[Engine], before: Iterable[VersionId] = ()
) -> None:
    """The newest versions of each model, and how far behind them the engines are.

    ``before``: versions that are live, and have not been here since the daemon's start.
    """
    models: dict[str, _Model] = {}
    for version in versions:
        models.setdefault(version.id.model, _Model()).add(version)
    by_age = sorted(models.items(), key=lambda item: item[1].staged.staged_at if item[1].staged else 0.0, reverse=True)
    for name, model in by_age[:MAX_MODELS]:
        if model.received is not None:
            readings.add("cpe_received_version", model.received.id.number, name)
        if model.staged is not None:
            readings.add("cpe_staged_version", model.staged.id.number, name)
        if model.live is not None:
            readings.add("cpe_live_version", model.live.number, name)
        readings.add("cpe_retained_versions", model.retained, name)
    for gone in list(before)[:MAX_MODELS]:
        readings.add("cpe_live_version", gone.number, gone.model)
    staged = {gone.model: gone for gone in before}
    staged |= {name: model.staged.id for name, model in models.items() if model.staged is not None}
    for engine in list(engines)[:MAX_ENGINES]:
        if engine.content is not None:
            readings.add("cpe_engine_version", engine.content.number, engine.name, engine.content.model)
        if engine.serves in staged and not engine.asleep:
            newest = staged[engine.serves]
            readings.add("cpe_engine_lag_versions", _lag(engine.content, newest), engine.name, engine.serves)


def _lag(held: VersionId | None, newest: VersionId) -> int:
    """By how many numbers an engine is behind; numbers of different runs, or none, tell no more than that it is."""
    if held == newest:
        return 0
    if held is None:
        return 1
    behind = newest.number - held.number
    return behind if held.run == newest.run else max(behind, 1)


def read_engines(readings: Readings, registry: Registry, counts: Mapping[str, int]) -> None:
    """The engines by state, and those that lack workers."""
    engines = list(registry)
    for state in (*(state.value for state in EngineState), ASLEEP, STARTING):
        readings.add("cpe_engines", counts.get(state, 0), state)
        for engine in engines[:MAX_ENGINES]:
            readings.add("cpe_engine_state", engine.condition == state, engine.name, state)
    for engine in engines[:MAX_ENGINES]:
        readings.add("cpe_engine_missing_workers", len(engine.missing_ranks), engine.name)
    for spec in registry.absent:
        readings.add("cpe_engine_missing_workers", spec.world_size or 1, spec.name)
    readings.add("cpe_workers", sum(len(engine.workers) for engine in engines))


def read_trainers(readings: Readings, sessions: Iterable[Session]) -> None:
    """The trainers' links."""
    links = list(sessions)
    readings.add("cpe_trainers", len(links))
    readings.add("cpe_credits_granted", sum(link.credits for link in links))
    readings.add("cpe_credits_in_use", sum(link.in_flight for link in links))


def read_push(readings: Readings, device: Device, pusher: Pusher) -> None:
    """The slots, and whether a round has them."""
    current = pusher.current
    readings.add("cpe_push_in_progress", current is not None)
    readings.add("cpe_slot_size_bytes", device.slot_bytes)
    for index, gpu in enumerate(device.topology.gpus):
        taken = current.slots_in_use if current is not None and index in current.gpus else 0
        readings.add("cpe_slots", device.slots(index), str(index), gpu.uuid)
        readings.add("cpe_slots_in_use", taken, str(index), gpu.uuid)


def read_copies(readings: Readings, ages: Mapping[str, float]) -> None:
    """How long the oldest copy in flight has been; ``ages`` by `COPIES`."""
    for copies in COPIES:
        readings.add("cpe_copy_stuck_seconds", ages[copies], copies)


def read_traffic(readings: Readings, pusher: Pusher, received: Mapping[str, Tally]) -> None:
    """What each stage has moved; ``received`` by transport, which count together as the stage of receiving."""
    for transport, tally in received.items():
        readings.add(_RECEIVED, tally.nbytes, transport)
    stages = {
        "receive": received.values(),
        "fetch": (pusher.traffic.fetch,),
        "exchange": (pusher.traffic.exchange,),
        "load": (pusher.traffic.load,),
    }
    for stage, tallies in stages.items():
        readings.add("cpe_stage_bytes_total", sum(tally.nbytes for tally in tallies), stage)
        readings.add("cpe_stage_seconds_total", sum(tally.seconds for tally in tallies), stage)
