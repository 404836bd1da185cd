"""The transition tables: every pair of state and event either moves as written here, or raises."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import pytest

from cpe_daemon.core.lifecycle import (
    ENGINE_TABLE,
    ROUND_TABLE,
    VERSION_TABLE,
    EngineEvent,
    EngineState,
    RoundEvent,
    RoundState,
    VersionEvent,
    VersionState,
    advance,
)
from cpe_daemon.errors import LifecycleError

Table = Mapping[tuple[StrEnum, StrEnum], StrEnum]

TABLES: list[tuple[str, Table, type[StrEnum], type[StrEnum]]] = [
    ("version", VERSION_TABLE, VersionState, VersionEvent),  # type: ignore[list-item]
    ("engine", ENGINE_TABLE, EngineState, EngineEvent),  # type: ignore[list-item]
    ("round", ROUND_TABLE, RoundState, RoundEvent),  # type: ignore[list-item]
]

LEGAL = {
    "version": """
        receiving stage staged
        receiving fail failed
        staged push pushing
        staged supersede evicted
        staged fail failed
        pushing go_live live
        pushing put_back staged
        pushing fail failed
        live supersede retained
        live evict evicted
        retained go_live live
        retained evict evicted
    """,
    "engine": """
        unknown report current
        unknown begin updating
        unknown give_up quarantined
        unknown lose unknown
        current begin updating
        current lose unknown
        updating complete current
        updating withdraw current
        updating fault unknown
        updating lose unknown
        quarantined begin updating
        quarantined lose unknown
    """,
    "round": """
        prefetching slots_full pausing
        pausing paused streaming
        streaming streamed finishing
        finishing finished resuming
        resuming resumed done
        prefetching abandon failed
        pausing abandon failed
        streaming abandon failed
        finishing abandon failed
        resuming abandon failed
    """,
}
"""state, event, state after: written out a second time, since a table that is wrong agrees with itself."""

PAIRS = [
    pytest.param(name, table, state, event, id=f"{name}-{state}-{event}")
    for name, table, states, events in TABLES
    for state in states
    for event in events
]


@pytest.mark.parametrize(("name", "table", "state", "event"), PAIRS)
def test_advance_moves_as_the_table_says_or_raises(name: str, table: Table, state: StrEnum, event: StrEnum) -> None:
    legal = {(at, on): after for at, on, after in map(str.split, LEGAL[name].strip().splitlines())}
    expected = legal.get((str(state), str(event)))
    if expected is not None:
        assert advance(table, state, event) == expected
        return
    with pytest.raises(LifecycleError) as caught:
        advance(table, state, event)
    assert f"{event} is illegal in state {state}" in caught.value.message
    for on in (on for at, on in legal if at == str(state)):
        assert on in caught.value.message


@pytest.mark.parametrize(("name", "table", "states", "events"), TABLES, ids=[row[0] for row in TABLES])
def test_every_state_is_reached_and_every_event_used(
    name: str, table: Table, states: type[StrEnum], events: type[StrEnum]
) -> None:
    first = next(iter(states))
    assert set(states) == {first} | {after for (at, _), after in table.items() if at != after}
    assert {event for _, event in table} == set(events)


@pytest.mark.parametrize(
    ("name", "final"),
    [("version", {"evicted", "failed"}), ("engine", set()), ("round", {"done", "failed"})],
)
def test_final_states_take_no_event(name: str, final: set[str]) -> None:
    _, table, states, _ = next(row for row in TABLES if row[0] == name)
    assert {str(state) for state in states} - {str(at) for at, _ in table} == final


def test_advance_says_that_a_state_is_final() -> None:
    with pytest.raises(LifecycleError, match="nothing, it is final"):
        advance(VERSION_TABLE, VersionState.EVICTED, VersionEvent.PUSH)


def test_engine_content_is_trusted_only_after_a_report_a_completed_round_or_an_untouched_one() -> None:
    """Goal 1: nothing else makes an engine current."""
    makers = {str(event) for (_, event), after in ENGINE_TABLE.items() if after is EngineState.CURRENT}
    assert makers == {"report", "complete", "withdraw"}


def test_version_is_live_only_after_a_push() -> None:
    """Goal 1: what nobody pushed is never taken for what is served. What was live once was pushed, too."""
    ways = {(str(at), str(on)) for (at, on), after in VERSION_TABLE.items() if after is VersionState.LIVE}
    assert ways == {("pushing", "go_live"), ("retained", "go_live")}
    assert {str(at) for (at, _), after in VERSION_TABLE.items() if after is VersionState.RETAINED} == {"live"}


def test_engine_fault_is_never_the_old_version() -> None:
    assert advance(ENGINE_TABLE, EngineState.UPDATING, EngineEvent.FAULT) is EngineState.UNKNOWN


@pytest.mark.parametrize("state", EngineState)
def test_engine_may_lose_a_worker_at_any_time(state: EngineState) -> None:
    assert advance(ENGINE_TABLE, state, EngineEvent.LOSE) is EngineState.UNKNOWN


@pytest.mark.parametrize("state", [state for state in RoundState if state not in ("done", "failed")])
def test_round_may_be_abandoned_until_it_ends(state: RoundState) -> None:
    assert advance(ROUND_TABLE, state, RoundEvent.ABANDON) is RoundState.FAILED
