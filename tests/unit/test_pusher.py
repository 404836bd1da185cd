"""Which round comes next, and what becomes of versions and engines after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.wire.messages import Begin, Resume
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, QUARANTINED, UNKNOWN, FakeNode, FakeWorker, number

ONE, TWO, THREE = number(1), number(2), number(3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def rounds(worker: FakeWorker) -> list[tuple[int, VersionId]]:
    """The rounds that a worker began."""
    return [(command.round, command.version) for command in worker.commands if isinstance(command, Begin)]


def fail_once(worker: FakeWorker, step: str) -> None:
    """Fail a step the next time, and carry it out from then on."""

    def failing(message: Any) -> CpeError:
        del worker.script[step]
        return CpeError("out of memory")

    worker.script[step] = failing


# --- a staged version ------------------------------------------------------------------------------------------------


async def test_staged_version_goes_live_on_every_engine() -> None:
    async with FakeNode.running(gpus=2) as node:
        workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)] + [node.worker("b")]
        version = await node.publish(ONE)
        assert version.state == "live"
        assert node.states() == {"a": (CURRENT, ONE), "b": (CURRENT, ONE)}
        assert all(worker.content == ONE for worker in workers)
        assert version.report is not None
        assert {name: report.outcome for name, report in version.report.engines.items()} == {
            "a": "updated",
            "b": "updated",
        }
        assert (version.report.nbytes, version.report.tensors) == (6 * 512, 6)
        assert version.leases == 0
        assert node.metrics.snapshot()['cpe_rounds_total{outcome="updated"}'] == 2


async def test_versions_are_pushed_in_the_order_in_which_they_were_staged() -> None:
    async with FakeNode.running(retain=5) as node:
        worker = node.worker("a")
        versions = [node.stage(number(n)) for n in (1, 2, 3)]
        await node.until(lambda: versions[-1].state == "live")
        assert rounds(worker) == [(1, ONE), (2, TWO), (3, THREE)]
        assert [version.state for version in versions] == ["retained", "retained", "live"]


async def test_version_without_engines_goes_live() -> None:
    async with FakeNode.running() as node:
        version = await node.publish(ONE)
        assert version.state == "live"
        assert version.report is not None
        assert version.report.engines == {}


async def test_bytes_are_leased_while_they_are_pushed() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        leases: list[int] = []

        def look(step: Any) -> Any:
            leases.append(version.leases)
            return worker.do(step)

        for step in ("pause", "load", "finish", "resume"):
            worker.script[step] = look
        version = node.stage(ONE)
        await node.until(lambda: version.state == "live")
        assert len(leases) == 6
        assert all(leases)
        assert version.leases == 0


async def test_incomplete_engine_is_left_out() -> None:
    async with FakeNode.running() as node:
        alone = node.worker("half", rank=0, world_size=2)
        whole = node.worker("whole")
        version = await node.publish(ONE)
        assert version.state == "live"
        assert (alone.steps, whole.content) == ([], ONE)


async def test_engine_of_another_model_is_left_out() -> None:
    async with FakeNode.running() as node:
        other, mine, any_model = node.worker("o", model="other"), node.worker("mine", model="m"), node.worker("any")
        await node.publish(ONE)
        assert (rounds(other), mine.content, any_model.content) == ([], ONE, ONE)
        await node.publish(number(1, "other"))
        assert (other.content, mine.content, any_model.content) == (number(1, "other"), ONE, ONE)


# --- an engine that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["load", "finish", "resume"])
async def test_touched_engine_gets_back_what_it_held(step: str) -> None:
    async with FakeNode.running() as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_once(bad, step)
        version = await node.publish(TWO)
        assert version.state == "live"
        assert node.states() == {"bad": (CURRENT, ONE), "good": (CURRENT, TWO)}
        assert not bad.paused
        assert bad.content == ONE
        assert [v for _, v in rounds(bad)] == [ONE, TWO, ONE]
        assert [v for _, v in rounds(good)] == [ONE, TWO]
        assert version.report is not None
        assert version.report.engines["bad"].outcome == "failed"
        assert version.report.engines["bad"].error is not None
        assert "out of memory" in version.report.engines["bad"].error.message


async def test_untouched_engine_is_not_restored_by_a_round() -> None:
    async with FakeNode.running() as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_once(bad, "begin")
        version = await node.publish(TWO)
        assert node.states() == {"bad": (CURRENT, ONE), "good": (CURRENT, TWO)}
        assert [v for _, v in rounds(bad)] == [ONE, TWO]
        assert good.content == TWO
        assert version.report is not None
        assert version.report.engines["bad"].outcome == "kept"


async def test_others_serve_the_new_version_before_the_failed_one_is_restored() -> None:
    async with FakeNode.running() as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        seen: list[tuple[str, bool]] = []

        def restored(step: Begin) -> Any:
            if step.version == ONE:
                live = node.catalogue.live("m")
                seen.append((str(live.id) if live else "", good.paused))
            return bad.do(step)

        fail_once(bad, "finish")
        bad.script["begin"] = restored
        await node.publish(TWO)
        assert seen == [(str(TWO), False)]


async def test_engine_that_cannot_be_restored_stays_paused() -> None:
    async with FakeNode.running() as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        bad.fail("finish", "half a layer is missing")
        version = await node.publish(TWO)
        assert version.state == "live"
        assert node.states() == {"bad": (QUARANTINED, None), "good": (CURRENT, TWO)}
        assert bad.paused
        assert [v for _, v in rounds(bad)] == [ONE, TWO, ONE]
        error = node.engine("bad").error
        assert error is not None
        assert "half a layer is missing" in error.message
        assert good.content == TWO


@pytest.mark.parametrize("attempts", [1, 3])
async def test_restoring_is_tried_as_often_as_it_is_configured(attempts: int) -> None:
    async with FakeNode.running(deadlines={"restore_attempts": attempts}) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        bad.fail("finish")
        await node.publish(TWO)
        assert [v for _, v in rounds(bad)] == [ONE, TWO] + [ONE] * attempts
        assert node.states()["bad"] == (QUARANTINED, None)


async def test_second_attempt_may_succeed() -> None:
    async with FakeNode.running(deadlines={"restore_attempts": 3}) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        failures = iter([True, True, False])
        bad.script["finish"] = lambda step: CpeError("no") if next(failures) else bad.do(step)
        await node.publish(TWO)
        assert node.states()["bad"] == (CURRENT, ONE)


async def test_quarantined_engine_returns_with_the_next_version() -> None:
    async with FakeNode.running() as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        bad.fail("finish")
        await node.publish(TWO)
        assert node.states()["bad"] == (QUARANTINED, None)
        bad.script.clear()
        await node.publish(THREE)
        assert node.states() == {"bad": (CURRENT, THREE), "good": (CURRENT, THREE)}
        assert not bad.paused


async def test_version_that_no_engine_took_has_failed_and_all_are_restored() -> None:
    async with FakeNode.running() as node:
        workers = {name: node.worker(name) for name in "ab"}
        live = await node.publish(ONE)
        for worker in workers.values():
            fail_once(worker, "finish")
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert isinstance(version.error, EngineError)
        assert "no engine took m@r#2: engine 'a' rank 0" in version.error.message
        assert "engine 'b' rank 0" in version.error.message
        assert live.state == "live"
        assert node.states() == {"a": (CURRENT, ONE), "b": (CURRENT, ONE)}
        assert node.metrics.snapshot()['cpe_failures_total{code="engine"}'] == 1


async def test_first_version_that_fails_leaves_nothing_to_restore_from() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        worker.fail("load")
        version = await node.publish(ONE)
        assert version.state == "failed"
        assert node.states() == {"a": (CURRENT, None)}  # nothing was written: it serves what it started with
        worker.script["load"] = lambda step: worker.do(step) if step.seq == 0 else CpeError("no such layer")
        version = await node.publish(TWO)
        assert node.states() == {"a": (QUARANTINED, None)}
        assert worker.paused


async def test_engine_whose_version_is_gone_gets_the_live_one() -> None:
    """Without retention the version that it held is evicted when the others go live."""
    async with FakeNode.running(retain=0) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_once(bad, "finish")
        await node.publish(TWO)
        assert node.states() == {"bad": (CURRENT, TWO), "good": (CURRENT, TWO)}


async def test_engine_that_lost_a_worker_is_not_restored_until_it_is_back() -> None:
    async with FakeNode.running() as node:
        dying, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        dying.script["load"] = lambda _: dying.die()
        version = await node.publish(TWO)
        assert version.state == "live"
        assert version.report is not None
        assert version.report.engines["bad"].outcome == "lost"
        assert node.states() == {"bad": (UNKNOWN, None), "good": (CURRENT, TWO)}
        assert good.content == TWO
        back = node.worker("bad", incarnation="bad/0/again")
        await node.idle()
        assert back.content == TWO
        assert node.states()["bad"] == (CURRENT, TWO)


# --- engines that come -----------------------------------------------------------------------------------------------


async def test_engine_that_joins_gets_the_live_version_before_it_serves() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = node.worker("late")
        assert worker.welcome is not None
        assert worker.welcome.hold
        assert worker.paused
        await node.idle()
        assert node.states() == {"late": (CURRENT, ONE)}
        assert not worker.paused


async def test_engine_that_holds_the_live_version_is_let_serve() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = node.worker("back", content=ONE)
        await node.idle()
        assert worker.steps == ["resume"]
        assert worker.commands[-1] == Resume(0, ONE)
        assert node.states() == {"back": (CURRENT, ONE)}


async def test_engine_that_joins_before_the_first_version_is_let_serve_what_it_has() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("early")
        await node.idle()
        assert worker.steps == ["resume"]
        assert node.states() == {"early": (CURRENT, None)}


async def test_engine_that_holds_an_old_version_gets_the_live_one() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        await node.publish(TWO)
        worker = node.worker("stale", content=ONE)
        await node.idle()
        assert node.states() == {"stale": (CURRENT, TWO)}
        assert not worker.paused


async def test_engine_of_mixed_workers_gets_the_live_version() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        workers = [node.worker("mixed", rank=rank, world_size=2, content=(ONE, None)[rank]) for rank in range(2)]
        await node.idle()
        assert node.states() == {"mixed": (CURRENT, ONE)}
        assert [worker.content for worker in workers] == [ONE, ONE]


async def test_engine_of_mixed_workers_without_a_live_version_stays_paused() -> None:
    async with FakeNode.running() as node:
        held = [node.worker("mixed", rank=rank, world_size=2, content=(ONE, None)[rank]) for rank in range(2)]
        await node.idle()
        assert node.states() == {"mixed": (UNKNOWN, None)}
        assert held[1].paused


async def test_engine_that_joins_and_fails_is_quarantined() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = FakeWorker(node, "late")
        worker.fail("finish")
        worker.attach()
        await node.idle()
        assert node.states() == {"late": (QUARANTINED, None)}
        assert worker.paused
        assert [v for _, v in rounds(worker)] == [ONE, ONE]


async def test_engine_that_joins_during_a_push_gets_that_version_next() -> None:
    async with FakeNode.running() as node:
        first = node.worker("first")
        await node.publish(ONE)
        late: list[FakeWorker] = []

        def meanwhile(step: Any) -> Any:
            late.append(node.worker("late"))
            return first.do(step)

        first.script["finish"] = meanwhile
        await node.publish(TWO)
        assert late[0].content == TWO
        assert node.states() == {"first": (CURRENT, TWO), "late": (CURRENT, TWO)}
        assert [v for _, v in rounds(late[0])] == [TWO]


async def test_engine_that_joins_and_leaves_again_is_nobody_s_concern() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = node.worker("late")
        node.bye(worker)
        await node.idle()
        assert node.states() == {}
        assert worker.steps == []


async def test_driver_that_never_lets_serve_is_given_up() -> None:
    class Hanging(TorchDriver):
        async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
            await asyncio.Event().wait()

    async with FakeNode.running(deadlines={"resume_seconds": 0.01}) as node:
        node.drivers["torch"] = Hanging
        node.worker("hanging")
        await node.until(lambda: not node.pusher._joined and node.pusher._idle.is_set())
        node.drivers["torch"] = TorchDriver
        node.worker("fine")
        await node.idle()
        assert node.states()["fine"] == (CURRENT, None)


async def test_bug_in_a_driver_that_lets_serve_ends_nothing() -> None:
    class Broken(TorchDriver):
        async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
            raise ZeroDivisionError

    async with FakeNode.running() as node:
        node.drivers["broken"] = Broken
        node.worker("bad", kind="broken")
        good = node.worker("good")
        await node.publish(ONE)
        assert good.content == ONE


# --- several GPUs ----------------------------------------------------------------------------------------------------


async def test_round_uses_the_gpus_of_its_engines_alone() -> None:
    async with FakeNode.running(gpus=4) as node:
        used: set[int] = set()
        fetch = node.device.fetch

        async def noting(gpu: int, slot: int, copies: Any) -> None:
            used.add(gpu)
            await fetch(gpu, slot, copies)

        node.device.fetch = noting  # type: ignore[method-assign]
        for rank, gpu in enumerate(("gpu-3", "gpu-1")):
            node.worker("a", rank=rank, world_size=2, gpu=gpu)
        await node.publish(ONE)
        assert used == {1, 3}
        assert node.states() == {"a": (CURRENT, ONE)}


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_drain_waits_for_the_round_in_flight_and_begins_no_other() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        release: list[Callable[[], None]] = []

        def later(step: Any) -> None:
            release.append(lambda: worker.say(worker.do(step)))

        worker.script["finish"] = later
        first, second = node.stage(ONE), node.stage(TWO)
        await node.until(lambda: bool(release))
        draining = asyncio.create_task(node.pusher.drain())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not draining.done()
        release[0]()
        async with asyncio.timeout(20):
            await draining
        assert first.state == "live"
        assert second.state == "failed"
        assert str(second.error) == "the daemon stops, and did not push m@r#2"


async def test_drain_without_anything_to_do_returns() -> None:
    async with FakeNode.running() as node, asyncio.timeout(20):
        await node.pusher.drain()


async def drained(node: FakeNode) -> None:
    """Undo the push in flight, and wait for all that follows."""
    async with asyncio.timeout(20):
        node.pusher.undo("the daemon stops")
        await node.pusher.drain()


async def test_undone_push_leaves_every_engine_with_what_it_held() -> None:
    async with FakeNode.running() as node:
        hung, loaded = node.worker("hung"), node.worker("loaded")
        live = await node.publish(ONE)
        hung.hang("finish")
        version = node.stage(TWO)
        await node.until(lambda: "finish" in hung.steps[5:] and loaded.content == TWO)
        hung.script.clear()
        await drained(node)
        assert node.states() == {"hung": (CURRENT, ONE), "loaded": (CURRENT, ONE)}
        assert (hung.content, loaded.content) == (ONE, ONE)
        assert not hung.paused
        assert not loaded.paused
        assert rounds(hung) == rounds(loaded) == [(1, ONE), (2, TWO), (3, ONE)]  # restored together
        assert (version.state, str(version.error)) == ("failed", "the daemon stops")
        assert live.state == "live"


async def test_undone_push_does_not_have_the_others_wait_for_one_that_hangs() -> None:
    async with FakeNode.running(deadlines={"abort_seconds": 0.05, "pause_seconds": 0.05}) as node:
        hung, loaded = node.worker("hung"), node.worker("loaded")
        await node.publish(ONE)
        hung.hang("finish", "abort", "pause")
        hung.script["pause"] = lambda step: hung.do(step) if step.round == 2 else None
        node.stage(TWO)
        await node.until(lambda: loaded.content == TWO)
        await drained(node)
        assert node.states() == {"hung": (QUARANTINED, None), "loaded": (CURRENT, ONE)}
        assert rounds(loaded) == [(1, ONE), (2, TWO), (3, ONE)]
        assert hung.steps[-1] == "abort"
        assert hung.paused


async def test_undone_push_that_paused_and_no_more_touches_nothing() -> None:
    async with FakeNode.running() as node:
        slow, quick = node.worker("slow"), node.worker("quick")
        await node.publish(ONE)
        slow.hang("begin")
        version = node.stage(TWO)
        await node.until(lambda: slow.steps[-1] == "begin")
        await drained(node)
        assert node.states() == {"slow": (CURRENT, ONE), "quick": (CURRENT, ONE)}
        assert rounds(quick) == [(1, ONE), (2, TWO)]
        assert not slow.paused
        assert not quick.paused
        assert version.state == "failed"


async def test_undone_push_that_some_serve_already_is_live_for_them() -> None:
    async with FakeNode.running() as node:
        slow, _ = node.worker("slow"), node.worker("quick")
        await node.publish(ONE)
        slow.hang("resume")
        version = node.stage(TWO)
        await node.until(lambda: slow.steps[-1] == "resume" and node.engine("quick").content == TWO)
        slow.script.clear()
        await drained(node)
        assert version.state == "live"
        assert version.report is not None
        assert {name: report.outcome for name, report in version.report.engines.items()} == {
            "slow": "failed",
            "quick": "updated",
        }
        assert node.states() == {"slow": (CURRENT, ONE), "quick": (CURRENT, TWO)}
        assert not slow.paused


async def test_push_that_is_undone_before_its_round_begins_is_not_begun() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        version = node.stage(TWO)
        await node.until(lambda: version.state == "pushing")
        await drained(node)
        assert version.state == "failed"
        assert rounds(worker) == [(1, ONE)]
        assert node.states() == {"a": (CURRENT, ONE)}


async def test_undoing_leaves_the_round_alone_that_gives_an_engine_the_live_version() -> None:
    async with FakeNode.running() as node:
        node.worker("first")
        await node.publish(ONE)
        late = node.worker("late")
        release: list[Callable[[], None]] = []
        late.script["finish"] = lambda step: release.append(lambda: late.say(late.do(step)))
        await node.until(lambda: bool(release))
        undone = asyncio.create_task(drained(node))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not undone.done()
        release[0]()
        await undone
        assert node.states() == {"first": (CURRENT, ONE), "late": (CURRENT, ONE)}
        assert rounds(late) == [(2, ONE)]
