"""Every state that something lives through, as transition tables, and the one function that applies an event.

Whatever changes a state anywhere in the daemon goes through `advance`; an event that is not in the table raises and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from cpe_daemon.errors import LifecycleError


class VersionState(StrEnum):
    """Where a version is on this node."""

    RECEIVING = "receiving"
    STAGED = "staged"
    PUSHING = "pushing"
    LIVE = "live"
    RETAINED = "retained"
    EVICTED = "evicted"
    FAILED = "failed"


class VersionEvent(StrEnum):
    """What happens to a version."""

    STAGE = "stage"
    PUSH = "push"
    GO_LIVE = "go_live"
    PUT_BACK = "put_back"  # a push that was asked for reached no engine: it may be asked for again
    SUPERSEDE = "supersede"  # a newer one took its place: in the engines, or as the one that waits
    EVICT = "evict"  # for room, if it is retained; or since an operator says so
    FAIL = "fail"


class EngineState(StrEnum):
    """What is known of the weights in an engine."""

    UNKNOWN = "unknown"
    CURRENT = "current"
    UPDATING = "updating"
    QUARANTINED = "quarantined"


class EngineEvent(StrEnum):
    """What happens to an engine's weights."""

    REPORT = "report"  # all its workers say what they hold, and agree
    BEGIN = "begin"  # a round takes it: from here on its content may be mixed
    COMPLETE = "complete"  # the round's version is loaded and verified
    WITHDRAW = "withdraw"  # the round gave up before the engine was touched
    FAULT = "fault"  # the round failed: its content is unknown
    GIVE_UP = "give_up"  # restoring failed as well
    LOSE = "lose"  # a worker is gone


class RoundState(StrEnum):
    """Where one push of one version over the engines of a node is."""

    PREFETCHING = "prefetching"
    PAUSING = "pausing"
    STREAMING = "streaming"
    FINISHING = "finishing"
    RESUMING = "resuming"
    DONE = "done"
    FAILED = "failed"


class RoundEvent(StrEnum):
    """What happens to a round."""

    SLOTS_FULL = "slots_full"
    PAUSED = "paused"
    STREAMED = "streamed"
    FINISHED = "finished"
    RESUMED = "resumed"
    ABANDON = "abandon"  # no engine is left in it


VERSION_TABLE: Final[Mapping[tuple[VersionState, VersionEvent], VersionState]] = {
    (VersionState.RECEIVING, VersionEvent.STAGE): VersionState.STAGED,
    (VersionState.RECEIVING, VersionEvent.FAIL): VersionState.FAILED,
    (VersionState.STAGED, VersionEvent.PUSH): VersionState.PUSHING,
    (VersionState.STAGED, VersionEvent.SUPERSEDE): VersionState.EVICTED,
    (VersionState.STAGED, VersionEvent.FAIL): VersionState.FAILED,
    (VersionState.PUSHING, VersionEvent.GO_LIVE): VersionState.LIVE,
    (VersionState.PUSHING, VersionEvent.PUT_BACK): VersionState.STAGED,
    (VersionState.PUSHING, VersionEvent.FAIL): VersionState.FAILED,
    (VersionState.LIVE, VersionEvent.SUPERSEDE): VersionState.RETAINED,
    (VersionState.LIVE, VersionEvent.EVICT): VersionState.EVICTED,
    (VersionState.RETAINED, VersionEvent.GO_LIVE): VersionState.LIVE,
    (VersionState.RETAINED, VersionEvent.EVICT): VersionState.EVICTED,
}

ENGINE_TABLE: Final[Mapping[tuple[EngineState, EngineEvent], EngineState]] = {
    (EngineState.UNKNOWN, EngineEvent.REPORT): EngineState.CURRENT,
    (EngineState.UNKNOWN, EngineEvent.BEGIN): EngineState.UPDATING,
    (EngineState.UNKNOWN, EngineEvent.GIVE_UP): EngineState.QUARANTINED,
    (EngineState.UNKNOWN, EngineEvent.LOSE): EngineState.UNKNOWN,
    (EngineState.CURRENT, EngineEvent.BEGIN): EngineState.UPDATING,
    (EngineState.CURRENT, EngineEvent.LOSE): EngineState.UNKNOWN,
    (EngineState.UPDATING, EngineEvent.COMPLETE): EngineState.CURRENT,
    (EngineState.UPDATING, EngineEvent.WITHDRAW): EngineState.CURRENT,
    (EngineState.UPDATING, EngineEvent.FAULT): EngineState.UNKNOWN,
    (EngineState.UPDATING, EngineEvent.LOSE): EngineState.UNKNOWN,
    (EngineState.QUARANTINED, EngineEvent.BEGIN): EngineState.UPDATING,
    (EngineState.QUARANTINED, EngineEvent.LOSE): EngineState.UNKNOWN,
}

ROUND_TABLE: Final[Mapping[tuple[RoundState, RoundEvent], RoundState]] = {
    (RoundState.PREFETCHING, RoundEvent.SLOTS_FULL): RoundState.PAUSING,
    (RoundState.PAUSING, RoundEvent.PAUSED): RoundState.STREAMING,
    (RoundState.STREAMING, RoundEvent.STREAMED): RoundState.FINISHING,
    (RoundState.FINISHING, RoundEvent.FINISHED): RoundState.RESUMING,
    (RoundState.RESUMING, RoundEvent.RESUMED): RoundState.DONE,
    (RoundState.PREFETCHING, RoundEvent.ABANDON): RoundState.FAILED,
    (RoundState.PAUSING, RoundEvent.ABANDON): RoundState.FAILED,
    (RoundState.STREAMING, RoundEvent.ABANDON): RoundState.FAILED,
    (RoundState.FINISHING, RoundEvent.ABANDON): RoundState.FAILED,
    (RoundState.RESUMING, RoundEvent.ABANDON): RoundState.FAILED,
}

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


def advance(table: Mapping[tuple[S, E], S], state: S, event: E) -> S:
    """Return the state after ``event``.

    Raises:
        LifecycleError: ``event`` is illegal in ``state``.
    """
    try:
        return table[state, event]
    except KeyError:
        legal = sorted(str(known) for (at, known) in table if at == state)
        raise LifecycleError(
            f"{event} is illegal in state {state} (legal: {', '.join(legal) or 'nothing, it is final'})"
        ) from None
