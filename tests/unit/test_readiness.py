"""The verdict on a node's readiness, the metrics that mirror its state, and the pages that tell both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from cpe_daemon.core.lifecycle import EngineEvent
from cpe_daemon.daemon.supervision import state_line
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import EngineError, PeerLostError, ResourceError
from cpe_daemon.observe.metrics import MAX_MODELS, Readings
from cpe_daemon.observe.pages import OPENMETRICS, make_pages
from cpe_daemon.readiness import Readiness, Reason, judge
from cpe_daemon.readings import read_arena, read_engines, read_push, read_versions
from cpe_daemon.status import device_status, engines_status, states
from tests.unit.fake_node import TENSOR_BYTES, TENSORS, FakeNode, FakeWorker, StillDevice, number


def codes(verdict: Readiness) -> list[tuple[str, str]]:
    return [(reason.code, reason.engine) for reason in verdict.reasons]


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_node_without_engines_is_ready() -> None:
    assert judge() == Readiness()
    assert judge().ready


def test_start_and_end_are_no_time_for_work() -> None:
    verdict = judge(starting="the host has provided 1 of 2 bytes", draining=True)
    assert codes(verdict) == [("starting", ""), ("draining", "")]
    assert verdict.plain()["reasons"][0] == {"code": "starting", "message": "the host has provided 1 of 2 bytes"}


def test_listener_that_strangers_reach_is_a_warning_and_no_reason() -> None:
    verdict = judge(insecure=["0.0.0.0:9845 is open"])
    assert verdict.plain() == {
        "ready": True,
        "reasons": [],
        "warnings": [{"code": "insecure", "message": "0.0.0.0:9845 is open"}],
    }


def test_expected_engine_that_is_absent_is_a_reason() -> None:
    assert codes(judge(absent=["e0"])) == [("engine_absent", "e0")]


def test_gpu_that_has_failed_is_a_reason() -> None:
    """For its engines get no versions any more."""
    assert judge(failed_gpus=["GPU-1 has failed"]).reasons == (Reason("gpu_failed", "GPU-1 has failed"),)
    device = StillDevice(2)
    device.failures[1] = ResourceError("GPU-1 has failed")
    assert [gpu["error"] for gpu in device_status(device)["gpus"]] == [None, "GPU-1 has failed"]


async def test_engines_by_what_is_known_of_them() -> None:
    async with FakeNode.running() as node:
        node.worker("good")
        node.worker("half", world_size=2)
        for name in ("updating", "quarantined", "unknown"):
            node.worker(name)
        await node.idle()
        changes: list[tuple[str, EngineEvent]] = [
            ("updating", EngineEvent.BEGIN),
            ("unknown", EngineEvent.BEGIN),
            ("unknown", EngineEvent.FAULT),
            ("quarantined", EngineEvent.BEGIN),
            ("quarantined", EngineEvent.FAULT),
        ]
        for name, event in changes:
            node.engine(name).change(event)
        node.engine("quarantined").change(EngineEvent.GIVE_UP, error=EngineError("no such layer"))
        verdict = judge(engines=node.registry)
        assert codes(verdict) == [
            ("engine_incomplete", "half"),
            ("engine_quarantined", "quarantined"),
            ("engine_unknown", "unknown"),
        ]
        assert [reason.message for reason in verdict.reasons] == [
            "engine 'half' lacks ranks [1]",
            "engine 'quarantined' stays paused: no such layer",
            "what engine 'unknown' holds is not known",
        ]


async def test_server_that_waits_for_a_version_is_not_reported_ready() -> None:
    """It may have dummy weights, and nobody can reach it."""
    async with FakeNode.running() as node:
        late = FakeWorker(node, "late", starting=True)
        late.fail("resume", "it starts, and waits for a version")
        late.attach()
        await node.idle()
        assert "resume" in late.steps
        assert codes(judge(engines=node.registry)) == [("engine_starting", "late")]
        (status,) = engines_status(node.registry)
        assert (status["state"], status["ready"]) == ("starting", False)
        assert state_line(node.catalogue, node.registry).startswith("serving 0 of 1 engines")
        assert states(node.registry)["starting"] == 1
        del late.script["resume"]
        await node.publish(number(1))
        assert judge(engines=node.registry).ready
        (status,) = engines_status(node.registry)
        assert (status["state"], status["ready"], status["content"]) == ("current", True, "m@r#1")


async def test_server_that_may_start_with_what_it_has_is_ready_when_it_was_let_go() -> None:
    async with FakeNode.running() as node:
        node.worker("disk", starting=True)
        await node.idle()
        assert judge(engines=node.registry).ready


async def test_engine_that_lacks_many_ranks_does_not_name_them_all() -> None:
    async with FakeNode.running() as node:
        node.worker("wide", world_size=100)
        engine: Engine = node.engine("wide")
        engine.error = PeerLostError("gone")
        (reason,) = judge(engines=[engine]).reasons
        assert reason == Reason(
            "engine_incomplete", f"engine 'wide' lacks ranks {list(range(1, 17))} and 83 more: gone", "wide"
        )


# --- readings --------------------------------------------------------------------------------------------------------


def read(*parts: Callable[[Readings], None]) -> dict[str, dict[tuple[str, ...], float]]:
    readings = Readings()
    for part in parts:
        part(readings)
    return readings.values


async def test_lag_is_told_by_engine_and_grows_with_what_is_staged() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await node.publish(number(3))
        slow = node.worker("b")
        await node.idle()
        slow.fail("begin")
        node.clock.now += 1
        await node.publish(number(7))
        node.worker("other", model="x")
        values = read(lambda r: read_versions(r, node.catalogue, node.registry))
        assert values["cpe_live_version"] == values["cpe_staged_version"] == {("m",): 7}
        assert values["cpe_engine_version"] == {("a", "m"): 7, ("b", "m"): 3}
        assert values["cpe_engine_lag_versions"] == {("a", "m"): 0, ("b", "m"): 4}
        assert values["cpe_retained_versions"] == {("m",): 1}


async def test_engine_that_holds_nothing_or_of_another_run_lags_by_one_at_least() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await node.publish(number(30))
        lost = node.worker("b")
        await node.idle()
        lost.die()
        other = type(number(1))("m", "second-run", 2)
        node.workers[next(iter(node.workers))].fail("begin")
        node.clock.now += 1
        await node.publish(other)
        values = read(lambda r: read_versions(r, node.catalogue, node.registry))
        assert values["cpe_staged_version"] == {("m",): 2}
        assert values["cpe_engine_lag_versions"] == {("a", "m"): 1, ("b", "m"): 1}
        assert values["cpe_engine_version"] == {("a", "m"): 30}


async def test_version_that_failed_or_is_on_its_way_shows_in_what_was_received() -> None:
    async with FakeNode.running() as node:
        await node.publish(number(1))
        node.clock.now += 1
        version = node.catalogue.open(number(2), 1)
        values = read(lambda r: read_versions(r, node.catalogue, ()))
        assert (values["cpe_received_version"], values["cpe_live_version"]) == ({("m",): 2}, {("m",): 1})
        node.catalogue.fail(version, PeerLostError("gone"))
        values = read(lambda r: read_versions(r, node.catalogue, ()))
        assert (values["cpe_received_version"], values["cpe_staged_version"]) == ({("m",): 2}, {("m",): 1})


async def test_models_that_are_only_being_received_do_not_crowd_out_the_others() -> None:
    async with FakeNode.running() as node:
        await node.publish(number(1, model="served"))
        for index in range(2 * MAX_MODELS):
            node.catalogue.open(number(1, model=f"m{index}"), 1)
        values = read(lambda r: read_versions(r, node.catalogue, ()))
        assert len(values["cpe_received_version"]) == MAX_MODELS
        assert values["cpe_live_version"] == {("served",): 1}


async def test_engines_are_counted_by_state_and_by_what_they_lack() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        node.worker("b", world_size=3)
        values = read(lambda r: read_engines(r, node.registry, states(node.registry)))
        assert values["cpe_engines"] == {
            ("unknown",): 1,
            ("current",): 1,
            ("updating",): 0,
            ("quarantined",): 0,
            ("asleep",): 0,
            ("starting",): 0,
        }
        assert values["cpe_engine_missing_workers"] == {("a",): 0, ("b",): 2}
        assert values["cpe_workers"] == {(): 2}
        assert values["cpe_engine_state"]["a", "current"] == 1
        assert values["cpe_engine_state"]["a", "unknown"] == 0


async def test_round_in_flight_shows_in_slots_and_leases() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        worker.hang("pause")
        node.stage(number(1))
        await node.until(lambda: "pause" in worker.steps)

        def values() -> dict[str, dict[tuple[str, ...], float]]:
            return read(
                lambda r: read_push(r, node.device, node.pusher), lambda r: read_arena(r, node.arena, node.catalogue)
            )

        during = values()
        assert during["cpe_push_in_progress"] == {(): 1}
        assert during["cpe_slots_in_use"] == {("0", "gpu-0"): node.device.slot_count}
        assert during["cpe_arena_leased_bytes"] == {(): TENSORS * TENSOR_BYTES}
        worker.die()
        await node.idle()
        after = values()
        assert after["cpe_push_in_progress"] == after["cpe_arena_leased_bytes"] == {(): 0}
        assert after["cpe_slots_in_use"] == {("0", "gpu-0"): 0}


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "answer", "status"),
    [
        ("/healthz", {"healthy": True, "reasons": []}, 200),
        ("/readyz", {"ready": True}, 200),
        ("/status", {"daemon": {"pid": 1}}, 200),
    ],
)
async def test_page_tells_what_its_room_says(page: str, answer: dict[str, Any], status: int) -> None:
    made = await pages(health=[], ready=True)[page]("")
    assert (json.loads(made.body), made.status) == (answer, status)


@pytest.mark.parametrize(
    ("page", "answer"),
    [("/healthz", {"healthy": False, "reasons": ["a copy is stuck"]}), ("/readyz", {"ready": False})],
)
async def test_probe_fails_by_its_status(page: str, answer: dict[str, Any]) -> None:
    made = await pages(health=["a copy is stuck"], ready=False)[page]("")
    assert (json.loads(made.body), made.status) == (answer, 503)


async def test_metrics_are_made_as_they_are_asked_for() -> None:
    """As OpenMetrics or not: what else is accepted makes no difference, for each kind is kept."""
    page = pages(health=[], ready=True)["/metrics"]
    made = await asyncio.gather(*(page(accept) for accept in (f"text/html,{OPENMETRICS};version=1.0.0;q=0.8", "b")))
    assert [answer.body for answer in made] == [f"metrics as {OPENMETRICS}".encode(), b"metrics as "]


def pages(*, health: list[str], ready: bool) -> Any:
    async def metrics(accept: str) -> tuple[bytes, str]:
        return f"metrics as {accept}".encode(), accept

    return make_pages(
        metrics=metrics,
        health=lambda: health,
        readiness=lambda: {"ready": ready},
        status=lambda: {"daemon": {"pid": 1}},
    )
