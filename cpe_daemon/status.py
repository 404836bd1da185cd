"""The state of the daemon as plain values: what `cpe status` shows. Reads every room and changes none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cpe_daemon.arena import Arena
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import CpeError
from cpe_daemon.ingest.session import Session
from cpe_daemon.versions import Version


def arena_status(arena: Arena) -> dict[str, Any]:
    """Sizes in bytes."""
    return {
        "size_bytes": arena.nbytes,
        "free_bytes": arena.free_bytes,
        "largest_free_bytes": arena.largest_free_bytes,
        "prefaulted": arena.prefaulted_bytes == arena.nbytes,
    }


def device_status(device: Device) -> dict[str, Any]:
    """The GPUs and their slots."""
    gpus = [
        {"uuid": gpu.uuid, "slots": device.slot_count, "slot_bytes": device.slot_bytes} for gpu in device.topology.gpus
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
        "ranks_sealed": sum(part.digests is not None for part in version.contributions.values()),
        "world_size": version.world_size,
        "age_seconds": now - version.opened_at,
        "error": _text(version.error),
    }


def engine_status(engine: Engine) -> dict[str, Any]:
    """One engine and its workers, those that are missing included."""
    return {
        "engine": engine.name,
        "model": engine.model,
        "kind": engine.kind,
        "state": str(engine.state),
        "ready": engine.ready,
        "content": str(engine.content) if engine.content else None,
        "world_size": engine.world_size,
        "workers": [_worker_status(engine, rank) for rank in range(engine.world_size)],
        "error": _text(engine.error),
        "last_push_seconds": engine.last_push_seconds,
    }


def trainer_status(session: Session) -> dict[str, Any]:
    """One trainer rank's link; ``version`` is what it is sending."""
    sending = [str(stream.version.id) for stream in session.streams.values()]
    return {
        "model": session.hello.model,
        "run": session.hello.run,
        "rank": session.hello.rank,
        "world_size": session.hello.world_size,
        "transport": session.transport,
        "version": sending[-1] if sending else None,
    }


def states(engines: Iterable[Engine]) -> dict[str, int]:
    """How many engines are in each state."""
    counts: dict[str, int] = {}
    for engine in engines:
        counts[engine.state] = counts.get(engine.state, 0) + 1
    return counts


def _worker_status(engine: Engine, rank: int) -> dict[str, Any]:
    worker = engine.workers.get(rank)
    if worker is None:
        return {"rank": rank, "pid": None, "node": None, "gpu": None, "present": False}
    hello = worker.hello
    return {"rank": rank, "pid": hello.pid, "node": hello.node, "gpu": worker.gpu_name, "present": True}


def _text(error: CpeError | None) -> str | None:
    return error.message if error else None
