"""Whether a node is ready for work, and what keeps it from that. A decision: reads nothing by itself.

Not ready does not mean not alive: a node that is starting, draining, or that has an engine in doubt is best left alone
by whoever routes requests, and restarted by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cpe_daemon.core.lifecycle import EngineState
from cpe_daemon.engines.engine import Engine

_NAMED: Final = 16


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that keeps a node from being ready, or that an operator should know.

    Attributes:
        code: stable, for machines.
        message: one line for a person.
        engine: which one it is about, or "".
    """

    code: str
    message: str
    engine: str = ""

    def plain(self) -> dict[str, str]:
        """As plain values."""
        named = {"engine": self.engine} if self.engine else {}
        return {"code": self.code, **named, "message": self.message}


@dataclass(frozen=True, slots=True)
class Readiness:
    """The verdict: ready if there are no ``reasons``; ``warnings`` keep nobody from work."""

    reasons: tuple[Reason, ...] = ()
    warnings: tuple[Reason, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the node is ready for work."""
        return not self.reasons

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "ready": self.ready,
            "reasons": [reason.plain() for reason in self.reasons],
            "warnings": [reason.plain() for reason in self.warnings],
        }


def judge(
    *,
    starting: str = "",
    draining: bool = False,
    engines: Iterable[Engine] = (),
    absent: Iterable[str] = (),
    failed_gpus: Iterable[str] = (),
    insecure: Iterable[str] = (),
    reasons: Iterable[Reason] = (),
    warnings: Iterable[Reason] = (),
) -> Readiness:
    """Decide.

    An engine that is being updated is no reason against readiness: that is what the node is for. One that is expected
    and has not come is, and so is one that starts, and may wait for a version: whoever sends it requests gets errors.

    Args:
        starting: what the start still waits for, or "".
        draining: whether the daemon stops.
        engines: those that are known.
        absent: names of those that are expected and not known.
        failed_gpus: what became of GPUs that are of no use any more, each in a line.
        insecure: listeners that strangers could reach, each in a line for a person.
        reasons: what else keeps the node from being ready: what it waits for after its start.
        warnings: what else an operator should know.
    """
    engines, against = list(engines), []
    if starting:
        against.append(Reason("starting", starting))
    if draining:
        against.append(Reason("draining", "the daemon stops"))
    against += reasons
    against += [Reason("gpu_failed", line) for line in failed_gpus]
    against += [reason for engine in engines if (reason := _against(engine)) is not None]
    against += [Reason("engine_absent", f"engine {name!r} is expected and has not attached", name) for name in absent]
    notes = [Reason("insecure", line) for line in insecure]
    notes += [Reason("engine_asleep", f"engine {e.name!r} is asleep", e.name) for e in engines if e.asleep]
    return Readiness(tuple(against), (*notes, *warnings))


def _against(engine: Engine) -> Reason | None:
    """What keeps an engine from work."""
    name = engine.name
    why = f": {engine.error.message}" if engine.error is not None else ""
    if engine.complete and engine.asleep:
        return None  # nobody sends it requests, and it has to be given a version before it serves
    if missing := engine.missing_ranks:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return Reason("engine_incomplete", f"engine {name!r} lacks ranks {missing[:_NAMED]}{more}{why}", name)
    if engine.state is EngineState.QUARANTINED:
        return Reason("engine_quarantined", f"engine {name!r} stays paused{why}", name)
    if engine.state is EngineState.UNKNOWN:
        return Reason("engine_unknown", f"what engine {name!r} holds is not known{why}", name)
    if engine.starting:
        return Reason("engine_starting", f"engine {name!r} starts, and serves nothing yet{why}", name)
    return None
