"""The state of the daemon as plain values: what `cpe status` shows. Reads every room and changes none."""

from __future__ import annotations

from typing import Any

from cpe_daemon.arena import Arena
from cpe_daemon.core.lifecycle import EngineState, VersionState
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import CpeError
from cpe_daemon.ingest.session import Session
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.push.rollback import rollback_target
from cpe_daemon.push.round import Round
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import EngineSpec
from cpe_daemon.wire.reports import LoadingReport


def arena_status(arena: Arena) -> dict[str, Any]:
    """Sizes in bytes."""
    return {
        "size_bytes": arena.nbytes,
        "free_bytes": arena.free_bytes,
        "largest_free_bytes": arena.largest_free_bytes,
        "prefaulted": arena.prefaulted_bytes == arena.nbytes,
        "numa": {
            "node_bytes": {str(node): nbytes for node, nbytes in sorted(arena.node_bytes.items())},
            "reason": arena.unplaced,
        },
    }


def device_status(device: Device) -> dict[str, Any]:
    """The GPUs and their slots; ``error``: why one gets no versions any more."""
    gpus = [
        {
            "uuid": gpu.uuid,
            "slots": device.slots(index),
            "slot_bytes": device.slot_bytes,
            "error": _text(device.failures.get(index)),
        }
        for index, gpu in enumerate(device.topology.gpus)
    ]
    return {"kind": device.kind, "gpus": gpus}


def version_status(version: Version, now: float) -> dict[str, Any]:
    """One version; ``now`` is of the clock that it was opened by."""
    return {
        "model": version.id.model,
        "run": version.id.run,
        "number": version.id.number,
        "state": str(version.state),
        "nbytes": version.nbytes,
        "tensors": len(version.manifest.tensors) if version.manifest else 0,
        "ranks_sealed": sum(part.sealed for part in version.contributions.values()),
        "world_size": version.world_size,
        "age_seconds": now - version.opened_at,
        "stage_seconds": version.stage_seconds,
        "error": _text(version.error),
    }


def models_status(catalogue: Catalogue) -> list[dict[str, Any]]:
    """By model, what it takes of the arena and may take (0: no quota), and how many versions are retained of it."""
    return [
        {
            "model": model,
            "used_bytes": catalogue.used_bytes(model),
            "quota_bytes": catalogue.keeping(model).quota_bytes,
            "versions": catalogue.keeping(model).versions,
        }
        for model in catalogue.models()
    ]


def rollback_status(catalogue: Catalogue) -> list[dict[str, Any]]:
    """By model, what is live and which version a rollback would bring back; None where there is none."""
    live = [version for version in catalogue if version.state is VersionState.LIVE]
    targets = {version.id.model: rollback_target(catalogue, version.id.model) for version in live}
    return [
        {"model": version.id.model, "live": str(version.id), "to": str(target.id) if target is not None else None}
        for version in live
        for target in [targets[version.id.model]]
    ]


def engines_status(registry: Registry) -> list[dict[str, Any]]:
    """Every engine that is known, and every one that is expected."""
    known = [_engine_status(engine, registry.expected.get(engine.name)) for engine in registry]
    return known + [_absent_status(spec, registry.expected.why_absent(spec)) for spec in registry.absent]


def push_status(pusher: Pusher, now: float, *, automatic: bool) -> dict[str, Any]:
    """The round in flight, and what waits for its turn; ``now`` is of the pusher's clock."""
    return {
        "automatic": automatic,
        "waiting": pusher.waiting,
        "round": _round_status(pusher.current, now) if pusher.current is not None else None,
    }


def trainer_status(session: Session) -> dict[str, Any]:
    """One trainer rank's link; ``version`` is what it is sending, and of how many bytes how many have come."""
    streams = list(session.streams.values())
    sending = streams[-1] if streams else None
    return {
        "model": session.hello.model,
        "run": session.hello.run,
        "rank": session.hello.rank,
        "world_size": session.hello.world_size,
        "transport": session.transport,
        "version": str(sending.version.id) if sending is not None else None,
        "received_bytes": sending.received_bytes if sending is not None else 0,
        "total_bytes": sending.nbytes if sending is not None else 0,
    }


def states(registry: Registry) -> dict[str, int]:
    """How many engines are in each state; of one that is expected and not here, nothing is known."""
    counts: dict[str, int] = {EngineState.UNKNOWN: len(registry.absent)}
    for engine in registry:
        counts[engine.condition] = counts.get(engine.condition, 0) + 1
    return counts


def _engine_status(engine: Engine, spec: EngineSpec | None) -> dict[str, Any]:
    """One engine and its workers, those that are missing included."""
    return {
        "engine": engine.name,
        "model": engine.serves,
        "kind": engine.kind,
        "state": engine.condition,
        "ready": engine.serving,
        "expected": spec is not None,
        "url": spec.url if spec is not None else "",
        "content": str(engine.content) if engine.content else None,
        "world_size": engine.world_size,
        "workers": [_worker_status(engine, rank) for rank in range(engine.world_size)],
        "error": _text(engine.error),
        "last_push_seconds": engine.last_push_seconds,
        "loading": _loading_status(engine.loading) if engine.loading is not None else None,
    }


def _loading_status(loading: LoadingReport) -> dict[str, Any]:
    """How an engine's tensors are loaded."""
    return {
        "learned": loading.learned,
        "unproven": loading.unproven,
        "kept": dict(loading.kept),
        "digest": loading.digest,
    }


def _absent_status(spec: EngineSpec, why: str) -> dict[str, Any]:
    """An engine that is expected, and of which nothing else is known."""
    return {
        "engine": spec.name,
        "model": spec.model,
        "kind": spec.kind,
        "state": str(EngineState.UNKNOWN),
        "ready": False,
        "expected": True,
        "url": spec.url,
        "content": None,
        "world_size": spec.world_size,
        "workers": [_missing_status(rank) for rank in range(spec.world_size)],
        "error": why,
        "last_push_seconds": 0.0,
        "loading": None,
    }


def _worker_status(engine: Engine, rank: int) -> dict[str, Any]:
    worker = engine.workers.get(rank)
    if worker is None:
        return _missing_status(rank)
    hello = worker.hello
    return {"rank": rank, "pid": hello.pid, "node": hello.node, "gpu": worker.gpu_name, "present": True}


def _round_status(current: Round, now: float) -> dict[str, Any]:
    return {
        "number": current.number,
        "version": str(current.version),
        "phase": str(current.state),
        "seconds": now - current.began_at,
        "nbytes": current.nbytes,
        "loaded_bytes": current.loaded_bytes,
        "engines": [participant.engine.name for participant in current.alive],
        "dropped": [participant.engine.name for participant in current.participants if not participant.alive],
    }


def _missing_status(rank: int) -> dict[str, Any]:
    return {"rank": rank, "pid": None, "node": None, "gpu": None, "present": False}


def _text(error: CpeError | None) -> str | None:
    return error.message if error else None
