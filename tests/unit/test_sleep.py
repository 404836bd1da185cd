"""Engines that lend their memory to others: what the daemon does about them, and what it leaves alone meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.observe.metrics import Readings
from cpe_daemon.readiness import judge
from cpe_daemon.readings import read_versions
from cpe_daemon.status import engines_status, states
from cpe_daemon.wire.messages import PushRequest, Wake, WorkerState
from cpe_daemon.wire.reports import EngineReport
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, UNKNOWN, FakeNode, FakeWorker, number

ONE, TWO = number(1), number(2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def outcomes(engines: dict[str, EngineReport]) -> dict[str, str]:
    return {name: report.outcome for name, report in engines.items()}


async def sleeping(node: FakeNode, name: str = "a") -> FakeWorker:
    """An engine that has the first version, and has gone to sleep."""
    worker = node.worker(name)
    await node.publish(ONE)
    worker.sleep()
    await node.idle()
    worker.steps.clear()
    return worker


# --- passed over -----------------------------------------------------------------------------------------------------


async def test_engine_that_is_asleep_is_passed_over_and_told_nothing() -> None:
    async with FakeNode.running() as node:
        worker = await sleeping(node)
        told, other = len(worker.commands), node.worker("b")
        version = await node.publish(TWO)
        assert version.report is not None
        assert outcomes(version.report.engines) == {"a": "asleep", "b": "updated"}
        error = version.report.engines["a"].error
        assert error is not None
        assert error.message == "engine 'a' is asleep; it gets the live version when it wakes up"
        assert worker.commands[told:] == []
        assert (worker.content, other.content) == (ONE, TWO)


async def test_version_goes_live_though_all_engines_are_asleep() -> None:
    async with FakeNode.running() as node:
        worker = await sleeping(node)
        version = await node.publish(TWO)
        assert version.state == "live"
        assert worker.steps == []


@pytest.mark.parametrize("kept", [True, False])
async def test_engine_that_wakes_up_gets_the_live_version_before_it_serves(kept: bool) -> None:
    async with FakeNode.running() as node:
        worker = await sleeping(node)
        await node.publish(TWO)
        worker.wake_up(kept=kept)
        assert worker.paused
        await node.idle()
        assert worker.steps == ["pause", "begin", "load", "load", "load", "finish", "resume"]
        assert (worker.content, worker.paused) == (TWO, False)
        assert node.states() == {"a": (CURRENT, TWO)}


async def test_engine_that_kept_the_live_version_is_resumed_with_it() -> None:
    async with FakeNode.running() as node:
        worker = await sleeping(node)
        worker.wake_up(kept=True)
        await node.idle()
        assert worker.steps == ["resume"]
        assert not worker.paused
        assert node.states() == {"a": (CURRENT, ONE)}


async def test_engine_that_lost_its_weights_and_for_which_there_is_no_version_stays_paused() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a", model="m")
        worker.sleep()
        worker.wake_up(kept=False)
        await node.idle()
        assert worker.paused
        assert node.states() == {"a": (UNKNOWN, None)}
        await node.publish(ONE)
        assert node.states() == {"a": (CURRENT, ONE)}


async def test_engine_serves_when_the_last_of_its_workers_is_awake() -> None:
    async with FakeNode.running(gpus=2) as node:
        workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]
        await node.publish(ONE)
        for worker in workers:
            worker.sleep()
        workers[0].wake_up()
        await node.idle()
        assert node.engine("a").asleep
        assert all(worker.paused for worker in workers)
        workers[1].wake_up()
        await node.idle()
        assert not any(worker.paused for worker in workers)
        assert node.states() == {"a": (CURRENT, ONE)}


async def test_engine_that_attaches_asleep_is_left_alone_until_it_wakes_up() -> None:
    async with FakeNode.running() as node:
        await node.publish(ONE)
        worker = node.worker("a", asleep=True, content=number(0))
        await node.idle()
        assert len(worker.commands) == 1  # the welcome
        worker.wake_up()
        await node.idle()
        assert node.states() == {"a": (CURRENT, ONE)}


async def test_push_that_names_an_engine_that_is_asleep_says_so() -> None:
    async with FakeNode.running() as node:
        worker = await sleeping(node)
        with pytest.raises(EngineError, match="engine 'a' is asleep"):
            await node.pusher.request(PushRequest("m", engines=("a",)))
        assert worker.steps == []


# --- refused ---------------------------------------------------------------------------------------------------------


async def test_version_is_refused_for_an_engine_that_is_asleep() -> None:
    async with FakeNode.running(push={"asleep": "refuse"}) as node:
        worker = await sleeping(node)
        node.worker("b")
        version = await node.publish(TWO)
        assert version.report is not None
        assert outcomes(version.report.engines) == {"a": "failed", "b": "updated"}
        assert worker.steps == []
        worker.wake_up(kept=True)
        await node.idle()
        assert node.states()["a"] == (CURRENT, TWO)


async def test_version_fails_if_all_engines_are_asleep_and_that_counts() -> None:
    async with FakeNode.running(push={"asleep": "refuse"}) as node:
        worker = await sleeping(node)
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert str(version.error) == "no engine took m@r#2: engine 'a' is asleep"
        assert worker.steps == []
        assert node.states() == {"a": (CURRENT, ONE)}


# --- woken up --------------------------------------------------------------------------------------------------------


async def test_engine_is_woken_up_for_a_version() -> None:
    async with FakeNode.running(push={"asleep": "wake"}, deadlines={"wake_seconds": 7}) as node:
        worker = await sleeping(node)
        version = await node.publish(TWO)
        assert version.report is not None
        assert outcomes(version.report.engines) == {"a": "updated"}
        assert [command for command in worker.commands if isinstance(command, Wake)] == [Wake(1, 7.0)]
        assert (worker.content, worker.paused) == (TWO, False)
        assert node.states() == {"a": (CURRENT, TWO)}


@pytest.mark.parametrize("how", ["fail", "hang"])
async def test_engine_that_does_not_wake_up_is_reported(how: str) -> None:
    async with FakeNode.running(push={"asleep": "wake"}, deadlines={"wake_seconds": 0.02}) as node:
        worker = await sleeping(node)
        getattr(worker, how)("wake")
        version = await node.publish(TWO)
        assert version.state == "failed"
        did = {"fail": "could not wake: no such layer", "hang": "did not wake within 0.52 s"}[how]
        assert str(version.error) == f"no engine took m@r#2: engine 'a' rank 0 (pid 0, GPU gpu-0) {did}"
        assert worker.steps == []


async def test_engine_that_says_it_woke_up_and_did_not_is_left_alone() -> None:
    async with FakeNode.running(push={"asleep": "wake"}) as node:
        worker = await sleeping(node)
        worker.script["wake"] = worker.do
        version = await node.publish(TWO)
        assert str(version.error) == "no engine took m@r#2: engine 'a' is asleep still"


async def test_bug_in_a_driver_that_wakes_up_concerns_its_engine_alone() -> None:
    class Broken(TorchDriver):
        async def wake(self, seconds: float) -> None:
            raise KeyError("no such route")

    async with FakeNode.running(push={"asleep": "wake"}) as node:
        node.drivers["broken"] = Broken
        worker = node.worker("a", kind="broken")
        good = node.worker("good")
        worker.sleep()
        version = await node.publish(ONE)
        assert version.report is not None
        assert outcomes(version.report.engines) == {"a": "failed", "good": "updated"}
        assert good.content == ONE


async def test_engine_that_fails_after_it_was_woken_up_is_restored() -> None:
    async with FakeNode.running(push={"asleep": "wake"}) as node:
        worker = await sleeping(node)

        def fail_once(step: Any) -> CpeError:
            del worker.script["finish"]
            return CpeError("out of memory")

        worker.script["finish"] = fail_once
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert node.states() == {"a": (CURRENT, ONE)}
        assert not worker.paused


async def test_worker_that_says_nothing_new_of_its_sleep_changes_nothing() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        told, events = len(worker.commands), node.states()
        worker.say(WorkerState(False, number(7)))
        await node.idle()
        assert (len(worker.commands), node.states()) == (told, events)
        worker.sleep()
        await node.idle()
        withdrawn = len(node.device.withdrawn)
        worker.say(WorkerState(True))
        assert (node.engine("a").workers[0].naps, len(node.device.withdrawn)) == (1, withdrawn)


# --- its slots -------------------------------------------------------------------------------------------------------


async def test_slots_of_a_gpu_whose_engines_are_all_asleep_are_given_back() -> None:
    async with FakeNode.running() as node:
        a, b = node.worker("a"), node.worker("b")
        await node.publish(ONE)
        a.sleep()
        await node.idle()
        assert node.device.freed == []
        assert node.device.slots(0) == 2
        b.sleep()
        await node.idle()
        assert node.device.freed == [0]
        assert len(node.device.withdrawn) == 2
        a.wake_up()
        await node.idle()
        assert node.device.slots(0) == 2
        assert node.states()["a"] == (CURRENT, ONE)


# --- what people are told --------------------------------------------------------------------------------------------


async def test_engine_that_is_asleep_is_named_and_keeps_nobody_from_work() -> None:
    async with FakeNode.running() as node:
        await sleeping(node)
        verdict = judge(engines=node.registry)
        assert verdict.ready
        assert [warning.plain() for warning in verdict.warnings] == [
            {"code": "engine_asleep", "engine": "a", "message": "engine 'a' is asleep"}
        ]
        (status,) = engines_status(node.registry)
        assert (status["state"], status["ready"], status["content"]) == ("asleep", False, "m@r#1")
        assert states(node.registry) == {"asleep": 1, "unknown": 0}


async def test_engine_that_is_asleep_is_not_behind() -> None:
    """It would be complained of for as long as a training step takes."""
    async with FakeNode.running() as node:
        await sleeping(node)
        await node.publish(TWO)
        readings = Readings()
        read_versions(readings, list(node.catalogue), node.registry)
        assert "cpe_engine_lag_versions" not in readings.values


async def test_engine_that_lacks_a_worker_is_missed_though_another_is_asleep() -> None:
    async with FakeNode.running(gpus=2) as node:
        node.worker("a", rank=0, world_size=2).sleep()
        assert [reason.code for reason in judge(engines=node.registry).reasons] == ["engine_incomplete"]


def nap_while_undone(worker: FakeWorker, *, kept: bool) -> None:
    """Have it fall asleep before it can pause, and wake up as soon as it has forgotten the round."""

    def nod_off(_: Any) -> CpeError:
        del worker.script["pause"]
        worker.sleep()
        return CpeError("it is asleep")

    def forget(step: Any) -> Any:
        del worker.script["abort"]
        asyncio.get_running_loop().call_soon(lambda: worker.wake_up(kept=kept))
        return worker.do(step)

    worker.script |= {"pause": nod_off, "abort": forget}


@pytest.mark.parametrize("kept", [True, False])
async def test_engine_that_naps_while_its_round_is_undone_is_not_told_to_serve_what_it_held(kept: bool) -> None:
    """Its worker says that it had forgotten the round when it still slept, and has woken up since."""
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)

        nap_while_undone(worker, kept=kept)
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert node.states() == {"a": (CURRENT, ONE)}
        assert (worker.content, worker.touched, worker.paused) == (ONE, False, False)


async def test_engine_that_napped_while_its_first_round_was_undone_serves_what_it_started_with() -> None:
    """Nothing is live that could be given to it instead."""
    async with FakeNode.running() as node:
        worker, other = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]

        nap_while_undone(worker, kept=True)
        version = await node.publish(ONE)
        assert version.state == "failed"
        assert node.states() == {"a": (CURRENT, None)}
        assert not any(one.paused for one in (worker, other))


@pytest.mark.parametrize("kept", [True, False])
async def test_worker_that_woke_up_before_its_sibling_is_believed_whatever_round_passes_meanwhile(kept: bool) -> None:
    """The round is refused, and leaves the engine as it was: with the weights of one of its workers lost."""
    async with FakeNode.running(push={"asleep": "refuse"}) as node:
        workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]
        await node.publish(ONE)
        for worker in workers:
            worker.sleep()
        await node.idle()
        workers[1].wake_up(kept=kept)
        await node.publish(TWO)
        assert node.states() == {"a": (CURRENT, ONE) if kept else (UNKNOWN, None)}
        begun = workers[1].steps.count("begin")
        workers[0].wake_up(kept=True)
        await node.idle()
        assert node.states() == {"a": (CURRENT, ONE)}
        assert not any(worker.touched or worker.paused for worker in workers)
        assert workers[1].steps.count("begin") == begun + (not kept)


# --- at any moment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", ["defer", "refuse", "wake"])
@pytest.mark.parametrize("seed", range(12))
async def test_engine_that_sleeps_at_any_moment_ends_up_with_the_live_version(seed: int, asleep: str) -> None:
    """Two ranks nod off whenever no round has paused them, and wake up with their weights or without."""
    luck = random.Random(seed)
    async with FakeNode.running(gpus=2, push={"asleep": asleep}) as node:
        workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)] + [node.worker("b")]
        await node.publish(number(1))
        for n in range(2, 12):
            version = node.stage(number(n))
            while version.state in ("staged", "pushing") or luck.random() < 0.8:
                worker = luck.choice(workers)
                if worker.asleep and luck.random() < 0.5:
                    worker.wake_up(kept=luck.random() < 0.5)
                elif not worker.asleep and not worker.paused and luck.random() < 0.2:
                    worker.sleep()
                for _ in range(luck.randrange(6)):
                    await asyncio.sleep(0)
        for worker in workers:
            if worker.asleep:
                worker.wake_up(kept=False)
        await node.idle()
        live = node.catalogue.live("m")
        assert live is not None
        assert node.states() == {"a": (CURRENT, live.id), "b": (CURRENT, live.id)}
        assert not any(worker.paused or worker.content != live.id for worker in workers)
