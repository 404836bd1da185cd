"""The life of slots beside the rounds: who gets how many, when, and what becomes of engines that cannot have them."""

from __future__ import annotations

import asyncio

import pytest

from cpe_daemon.errors import ResourceError
from cpe_daemon.push.slots import SlotKeeper
from cpe_daemon.wire.messages import OpenSlots, SlotSet
from tests.unit.fake_node import CURRENT, SLOTS, FakeNode, FakeWorker, number

IDLE_SECONDS = 600.0
"""The default of ``device.idle_seconds``."""


def keeper(node: FakeNode) -> SlotKeeper:
    return node.pusher._rounds.slots


def openings(worker: FakeWorker) -> int:
    return sum(isinstance(command, OpenSlots) for command in worker.commands)


def shares_gpu(node: FakeNode, *engines: str, gpu: int = 0) -> list[FakeWorker]:
    return [node.worker(engine, gpu=f"gpu-{gpu}") for engine in engines]


async def test_engine_has_slots_before_a_version_comes() -> None:
    async with FakeNode.running(gpus=2) as node:
        worker = node.worker("a", gpu="gpu-1")
        await node.until(lambda: worker.slots is not None)
        assert (node.device.slots(0), node.device.slots(1)) == (0, SLOTS), "only a GPU with an engine has any"


async def test_slots_are_opened_once_for_many_versions() -> None:
    async with FakeNode.running() as node:
        workers = shares_gpu(node, "a", "b")
        for version in (1, 2, 3):
            await node.publish(number(version))
        assert [openings(worker) for worker in workers] == [1, 1]
        assert node.device.freed == []


async def test_idle_slots_are_given_back_and_taken_again() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(number(1))
        assert keeper(node).idle_in_seconds == IDLE_SECONDS
        node.clock.now += IDLE_SECONDS
        assert keeper(node).idle_in_seconds == 0.0
        await keeper(node).give_back()
        assert (worker.slots, node.device.slots(0), keeper(node).idle_in_seconds) == (None, 0, None)
        await node.publish(number(2))
        assert node.states() == {"a": (CURRENT, number(2))}
        assert openings(worker) == 2


async def test_slots_that_a_worker_does_not_let_go_of_are_kept() -> None:
    async with FakeNode.running(deadlines={"begin_seconds": 0.02}) as node:
        polite, stubborn = shares_gpu(node, "a", "b")
        await node.publish(number(1))
        stubborn.hang("close_slots")
        await keeper(node).give_back()
        assert (node.device.freed, node.device.slots(0)) == ([], SLOTS)
        assert polite.slots is None
        del stubborn.script["close_slots"]
        await keeper(node).give_back()
        assert (node.device.freed, node.device.slots(0)) == ([0], 0)


async def test_dead_worker_keeps_no_slots() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(number(1))
        worker.die()
        await keeper(node).give_back()
        assert node.device.freed == [0]


async def test_gpu_with_little_memory_has_fewer_slots_and_is_not_asked_again_and_again() -> None:
    async with FakeNode.running() as node:
        node.device.room[0] = 1
        worker = node.worker("a")
        for version in (1, 2, 3):
            await node.publish(number(version))
        assert node.device.slots(0) == 1
        assert openings(worker) == 1
        assert node.states() == {"a": (CURRENT, number(3))}


async def test_gpu_without_room_costs_its_own_engines_the_version_only() -> None:
    async with FakeNode.running(gpus=2) as node:
        node.device.room[1] = 0
        fine, poor = node.worker("fine", gpu="gpu-0"), node.worker("poor", gpu="gpu-1")
        version = await node.publish(number(1))
        assert version.state == "live"
        assert node.states()["fine"] == (CURRENT, number(1))
        assert isinstance(node.engine("poor").error, ResourceError)
        assert "load" in fine.steps
        assert "load" not in poor.steps
        node.device.room[1] = 5
        await node.publish(number(2))
        assert node.states() == {"fine": (CURRENT, number(2)), "poor": (CURRENT, number(2))}


async def test_version_fails_if_no_gpu_has_room_and_the_next_one_works() -> None:
    async with FakeNode.running() as node:
        node.device.room[0] = 0
        node.worker("a")
        version = await node.publish(number(1))
        assert version.state == "failed"
        assert "no room for a slot" in str(version.error)
        node.device.room[0] = 2
        assert (await node.publish(number(2))).state == "live"


async def test_engines_of_a_failed_gpu_are_left_out() -> None:
    async with FakeNode.running(gpus=2) as node:
        for index, engine in enumerate(("well", "ill")):
            node.worker(engine, gpu=f"gpu-{index}")
        await node.publish(number(1))
        node.device.failures[1] = ResourceError("GPU-1 has failed")
        version = await node.publish(number(2))
        assert version.state == "live"
        assert node.states()["well"] == (CURRENT, number(2))
        assert node.states()["ill"] != (CURRENT, number(2))
        assert "GPU-1 has failed" in str(node.engine("ill").error)


async def test_worker_that_cannot_open_its_slots_is_left_out_and_tried_again() -> None:
    async with FakeNode.running() as node:
        good, bad = shares_gpu(node, "good", "bad")
        bad.fail("open_slots", "not visible to this process")
        await node.publish(number(1))
        assert node.states()["good"] == (CURRENT, number(1))
        assert "not visible" in str(node.engine("bad").error)
        assert good.steps
        del bad.script["open_slots"]
        await node.publish(number(2))
        assert node.states() == {"good": (CURRENT, number(2)), "bad": (CURRENT, number(2))}


async def test_left_to_the_daemon_slots_grow_with_the_version_within_bounds() -> None:
    async with FakeNode.running(slots="auto") as node:
        worker = node.worker("a")
        await node.until(lambda: worker.slots is not None)
        assert node.device.slots(0) == 3, "as few as let stages overlap"
        before = openings(worker)
        await node.publish(number(1))
        assert node.device.slots(0) == 3, "the version has three buckets"
        assert openings(worker) == before


async def test_worker_on_a_failed_gpu_is_refused_with_the_reason() -> None:
    async with FakeNode.running() as node:
        node.device.failures[0] = ResourceError("GPU-0 has failed")
        with pytest.raises(ResourceError, match="GPU-0 has failed"):
            node.worker("a", gpu="gpu-0")
        assert node.states() == {}


async def test_worker_that_attaches_while_slots_are_provided_is_provided_for_later() -> None:
    """The engine was complete when its turn was asked for, and is not when it comes, and is again a moment later."""
    async with FakeNode.running(gpus=2) as node:
        ranks = [node.worker("a", rank=rank, world_size=2, gpu=f"gpu-{rank}") for rank in (0, 1)]
        await node.publish(number(1))
        await keeper(node).give_back()
        taking, going_on = asyncio.Event(), asyncio.Event()
        take = node.device.take

        async def slow(gpu: int, count: int) -> None:
            taking.set()
            await going_on.wait()
            await take(gpu, count)

        node.device.take = slow  # type: ignore[method-assign]
        node.bye(ranks[1])
        again = node.worker("a", rank=1, world_size=2, gpu="gpu-1", content=number(1))
        node.bye(again)
        await taking.wait()
        node.worker("a", rank=1, world_size=2, gpu="gpu-1", content=number(1))
        going_on.set()
        await node.idle()
        assert node.states() == {"a": (CURRENT, number(1))}
        assert all(worker.has_slots for worker in node.engine("a").workers.values())


async def test_slots_that_cannot_be_handed_over_cost_their_engine_the_version_and_nobody_else() -> None:
    """Of no descriptor left, say: it concerns one worker, and is tried again with the next version."""
    async with FakeNode.running() as node:
        export, full = node.device.export, True

        def scarce(gpu: int) -> SlotSet:
            if full:
                raise ResourceError("memory cannot be handed over: too many open files")
            return export(gpu)

        node.device.export = scarce  # type: ignore[method-assign]
        node.worker("a")
        await node.idle()
        version = await node.publish(number(1))
        assert version.state == "failed"
        assert "too many open files" in str(version.error)
        full = False
        await node.publish(number(2))
        assert node.states() == {"a": (CURRENT, number(2))}


async def test_slots_of_a_gpu_that_is_lost_are_no_end_of_the_daemon_when_they_are_given_back() -> None:
    async with FakeNode.running(gpus=2) as node:
        for gpu, engine in enumerate(("lost", "well")):
            node.worker(engine, gpu=f"gpu-{gpu}")
        await node.publish(number(1))
        release = node.device.release

        async def fail(gpu: int) -> None:
            if gpu == 0:
                raise ResourceError("GPU-0: cuMemFree_v2 failed")
            await release(gpu)

        node.device.release = fail  # type: ignore[method-assign]
        await keeper(node).give_back()
        assert node.device.freed == [1]
        node.device.failures[0] = ResourceError("GPU-0 has failed")
        await node.publish(number(2))
        assert node.states()["well"] == (CURRENT, number(2))
