"""Pushes that an operator asks for: which version goes into which engines, and what is said when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import BusyError, CpeError, EngineError, MisuseError, PeerLostError
from cpe_daemon.wire.messages import Begin, EngineSpec, PushRequest
from cpe_daemon.wire.reports import VersionReport
from tests.unit.fake_node import CURRENT, QUARANTINED, FakeNode, FakeWorker, number

ONE, TWO, THREE = number(1), number(2), number(3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def push(node: FakeNode, model: str = "m", *engines: str, run: str = "", n: int = -1) -> VersionReport:
    """Ask for a push, and wait until it and all that follows is done."""
    async with asyncio.timeout(20):
        report = await node.pusher.request(PushRequest(model, run, n, engines))
    await node.idle()
    return report


def outcomes(report: VersionReport) -> dict[str, str]:
    return {name: engine.outcome for name, engine in report.engines.items()}


def loaded(worker: FakeWorker) -> list[VersionId]:
    """The versions of the rounds that a worker began."""
    return [command.version for command in worker.commands if isinstance(command, Begin)]


# --- a version that waits --------------------------------------------------------------------------------------------


async def test_version_waits_until_its_push_is_asked_for() -> None:
    async with FakeNode.running(automatic=False) as node:
        workers = [node.worker("a"), node.worker("b")]
        version = node.stage(ONE)
        await node.idle()
        assert (version.state, loaded(workers[0])) == ("staged", [])
        report = await push(node)
        assert (report.version, report.nbytes, report.tensors) == (ONE, 6 * 512, 6)
        assert outcomes(report) == {"a": "updated", "b": "updated"}
        assert node.states() == {"a": (CURRENT, ONE), "b": (CURRENT, ONE)}
        assert (version.state, version.report) == ("live", report)


async def test_newest_that_waits_is_pushed_before_the_live_one_again() -> None:
    async with FakeNode.running(automatic=False) as node:
        worker = node.worker("a")
        node.stage(ONE)
        await push(node)
        node.stage(TWO)
        node.stage(THREE)
        assert (await push(node)).version == THREE
        assert loaded(worker) == [ONE, THREE]


async def test_version_without_engines_goes_live_when_it_is_asked_for() -> None:
    async with FakeNode.running(automatic=False) as node:
        version = node.stage(ONE)
        assert outcomes(await push(node)) == {}
        assert version.state == "live"
        assert node.worker("late").paused
        await node.idle()
        assert node.states() == {"late": (CURRENT, ONE)}


async def test_version_may_be_tried_in_one_engine_before_the_others() -> None:
    async with FakeNode.running(automatic=False) as node:
        first, second = node.worker("first"), node.worker("second")
        node.stage(ONE)
        await push(node)
        version = node.stage(TWO)
        assert outcomes(await push(node, "m", "first")) == {"first": "updated"}
        assert version.state == "live"
        assert node.states() == {"first": (CURRENT, TWO), "second": (CURRENT, ONE)}
        assert outcomes(await push(node)) == {"first": "current", "second": "updated"}
        assert (loaded(first), loaded(second)) == ([ONE, TWO], [ONE, TWO])


async def test_version_that_no_engine_took_waits_again() -> None:
    async with FakeNode.running(automatic=False) as node:
        worker = node.worker("a")
        node.stage(ONE)
        await push(node)
        version = node.stage(TWO)
        worker.fail("begin", "the pass does not end")
        report = await push(node)
        assert outcomes(report) == {"a": "kept"}
        assert report.engines["a"].error is not None
        assert "the pass does not end" in report.engines["a"].error.message
        assert (version.state, version.error) == ("staged", None)
        assert node.states() == {"a": (CURRENT, ONE)}
        worker.script.clear()
        assert outcomes(await push(node)) == {"a": "updated"}
        assert version.state == "live"
        assert not node.metrics.snapshot().get('cpe_failures_total{code="engine"}'), "no version has failed"


async def test_push_that_is_undone_because_the_daemon_stops_fails_its_version() -> None:
    async with FakeNode.running(automatic=False) as node:
        worker = node.worker("a")
        node.stage(ONE)
        await push(node)
        version = node.stage(TWO)
        begun = asyncio.Event()

        def stuck(_: Any) -> None:
            begun.set()

        worker.script["pause"] = stuck
        asking = asyncio.create_task(node.pusher.request(PushRequest("m")))
        await begun.wait()
        node.pusher.undo("the daemon stops")
        async with asyncio.timeout(20):
            await node.pusher.drain()
            report = await asking
        assert outcomes(report) == {"a": "kept"}
        assert isinstance(version.error, PeerLostError)
        assert version.state == "failed"


# --- the live version ------------------------------------------------------------------------------------------------


async def test_engine_in_quarantine_is_repaired() -> None:
    async with FakeNode.running() as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        bad.fail("finish")
        await node.publish(TWO)
        assert node.states()["bad"] == (QUARANTINED, None)
        bad.script.clear()
        report = await push(node)
        assert outcomes(report) == {"bad": "updated", "good": "current"}
        assert node.states() == {"bad": (CURRENT, TWO), "good": (CURRENT, TWO)}
        assert not bad.paused
        assert loaded(good) == [ONE, TWO]


async def test_repair_that_fails_leaves_the_engine_in_quarantine_and_the_version_live() -> None:
    async with FakeNode.running() as node:
        bad, _ = node.worker("bad"), node.worker("good")
        version = await node.publish(ONE)
        bad.fail("finish", "half a layer is missing")
        report = await push(node, "m", "bad")
        assert outcomes(report) == {"bad": "failed"}
        assert node.states() == {"bad": (QUARANTINED, None), "good": (CURRENT, ONE)}
        assert version.state == "live"
        assert bad.paused


async def test_engine_that_is_named_is_pushed_even_if_it_holds_the_version() -> None:
    async with FakeNode.running() as node:
        named, other = node.worker("named"), node.worker("other")
        await node.publish(ONE)
        assert outcomes(await push(node, "m", "named", "named")) == {"named": "updated"}
        assert (loaded(named), loaded(other)) == ([ONE, ONE], [ONE])


async def test_nothing_is_pushed_where_all_hold_the_live_version() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        assert outcomes(await push(node)) == {"a": "current"}
        assert loaded(worker) == [ONE]


# --- which version ---------------------------------------------------------------------------------------------------


async def test_model_need_not_be_said_where_there_is_one() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        with pytest.raises(MisuseError, match="this node holds no version"):
            await push(node, "")
        await node.publish(ONE)
        assert (await push(node, "")).version == ONE
        await node.publish(number(1, "other"))
        with pytest.raises(MisuseError, match="this node holds versions of m, other: say which model is meant"):
            await push(node, "")


@pytest.mark.parametrize(("run", "n"), [("r", 2), ("", 2), ("r", -1)])
async def test_version_may_be_named_in_part(run: str, n: int) -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await node.publish(ONE)
        await node.publish(TWO)
        assert (await push(node, "m", run=run, n=n)).version == TWO


async def test_version_that_cannot_be_pushed_is_refused_with_the_reason() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        await node.publish(TWO)
        with pytest.raises(MisuseError, match=r"m@r#1 is retained: `cpe rollback m@r --to 1` brings it back into all"):
            await push(node, n=1)
        with pytest.raises(MisuseError, match=r"no m#9 is here; there is: m@r#1 \(retained\)"):
            await push(node, n=9)
        with pytest.raises(MisuseError, match="no version of unheard-of is staged or live"):
            await push(node, "unheard-of")
        node.catalogue.open(THREE, 1)
        with pytest.raises(BusyError, match="m@r#3 is being received"):
            await push(node, n=3)
        node.catalogue.fail(node.catalogue.open(THREE, 1), PeerLostError("the trainer died"))
        with pytest.raises(MisuseError, match="m@r#3 is failed: the trainer died; this node has its bytes no more"):
            await push(node, n=3)
        assert loaded(worker) == [ONE, TWO]


# --- which engines ---------------------------------------------------------------------------------------------------


async def test_engine_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    async with FakeNode.running(automatic=False, state_dir=tmp_path) as node:
        node.worker("a")
        await node.expected.add(EngineSpec("later", "torch"))
        version = node.stage(ONE)
        with pytest.raises(MisuseError, match="no engine 'b' is known here; there is: a, later"):
            await push(node, "m", "a", "b")
        assert version.state == "staged"


async def test_engine_of_another_model_is_refused(tmp_path: Path) -> None:
    async with FakeNode.running(automatic=False, state_dir=tmp_path) as node:
        node.worker("other", model="x")
        await node.expected.add(EngineSpec("later", "torch", "x"))
        node.worker("a")
        node.stage(ONE)
        for name in ("other", "later"):
            with pytest.raises(MisuseError, match=f"engine '{name}' serves x, and m@r#1 is of m"):
                await push(node, "m", name)
        assert outcomes(await push(node)) == {"a": "updated"}


async def test_engine_that_is_not_whole_is_reported_and_never_pushed(tmp_path: Path) -> None:
    async with FakeNode.running(automatic=False, state_dir=tmp_path) as node:
        half = node.worker("half", rank=0, world_size=2)
        await node.expected.add(EngineSpec("later", "torch"))
        await node.expected.add(EngineSpec("dead", "torch"))
        node.worker("dead").die()
        node.worker("unexpected").die()
        node.worker("whole")
        version = node.stage(ONE)
        for names in (("half",), ("later", "half"), ("dead",)):
            with pytest.raises(EngineError, match=r"m@r#1 was pushed to no engine: .*attached"):
                await push(node, "m", *names)
        assert version.state == "staged"
        report = await push(node)
        assert outcomes(report) == {"half": "absent", "later": "absent", "dead": "absent", "whole": "updated"}
        said = {name: engine.error.message for name, engine in report.engines.items() if engine.error}
        assert said["later"] == "expected, but none of its workers has attached to this daemon"
        assert said["dead"] == "ranks [0] of 1 are not attached; it gets the live version when they are"
        assert half.steps == []


async def test_trainer_hears_of_an_expected_engine_that_is_not_there(tmp_path: Path) -> None:
    async with FakeNode.running(state_dir=tmp_path) as node:
        await node.expected.add(EngineSpec("later", "torch"))
        await node.expected.add(EngineSpec("other", "torch", "x"))
        version = await node.publish(ONE)
        assert version.report is not None
        assert outcomes(version.report) == {"later": "absent"}


# --- in turn ---------------------------------------------------------------------------------------------------------


async def test_request_comes_after_what_was_staged_and_after_the_round_in_flight() -> None:
    async with FakeNode.running(retain=3) as node:
        worker = node.worker("a")
        release: list[Callable[[], None]] = []

        def later(step: Any) -> None:
            del worker.script["finish"]
            release.append(lambda: worker.say(worker.do(step)))

        worker.script["finish"] = later
        node.stage(ONE)
        await node.until(lambda: bool(release))
        asking = asyncio.create_task(node.pusher.request(PushRequest("m", engines=("a",))))
        await node.until(lambda: node.pusher.waiting == 1)
        node.stage(TWO)
        assert node.pusher.waiting == 2
        release[0]()
        async with asyncio.timeout(20):
            report = await asking
        assert report.version == TWO
        assert loaded(worker) == [ONE, TWO, TWO]
        assert node.pusher.waiting == 0


async def test_request_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        release: list[Callable[[], None]] = []
        worker.script["finish"] = lambda step: release.append(lambda: worker.say(worker.do(step)))
        node.stage(ONE)
        await node.until(lambda: bool(release))
        asking = asyncio.create_task(node.pusher.request(PushRequest("m", engines=("a",))))
        await node.until(lambda: node.pusher.waiting == 1)
        asking.cancel()
        release[0]()
        await node.idle()
        assert loaded(worker) == [ONE]


async def test_daemon_that_stops_takes_no_requests_and_answers_those_that_wait() -> None:
    node = FakeNode()  # its pusher does not run: what waits goes on waiting
    asking = asyncio.create_task(node.pusher.request(PushRequest("m")))
    await node.until(lambda: node.pusher.waiting == 1)
    await node.pusher.drain()
    with pytest.raises(BusyError, match="this daemon stops; nothing was pushed"):
        await asking
    with pytest.raises(BusyError, match="this daemon stops"):
        await node.pusher.request(PushRequest("m"))
    node.arena.close()


async def test_error_in_one_request_ends_no_other() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await node.publish(ONE)
        answers = await asyncio.gather(
            *(node.pusher.request(PushRequest("m", engines=(name,))) for name in "xa"), return_exceptions=True
        )
        assert isinstance(answers[0], CpeError)
        assert isinstance(answers[1], VersionReport)
