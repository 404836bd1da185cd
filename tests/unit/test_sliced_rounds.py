"""Rounds by what workers say that they need: who is told what, who is sent what, and what makes it void."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec import structs

from cpe_daemon.core.needs import Needs, describe
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import CpeError
from cpe_daemon.wire.messages import Begin, StepDone
from tests.unit.fake_node import CURRENT, TENSOR_BYTES, TENSORS, FakeNode, FakeWorker, number

VERSION_BYTES = TENSORS * TENSOR_BYTES
HALF = TENSOR_BYTES // 2


def half(rank: int, tensors: int = TENSORS) -> Needs:
    """One half of every tensor."""
    specs = [TensorSpec(f"layers.{index}.w", "uint8", (TENSOR_BYTES,)) for index in range(tensors)]
    needs = describe({spec.name: (spec, [Rectangle(0, rank * HALF, HALF)]) for spec in specs})
    assert needs is not None
    return needs


def answering(worker: FakeWorker, **fields: Any) -> Callable[[Any], StepDone]:
    """Do a step, and say something with the answer."""
    return lambda step: structs.replace(worker.do(step), **fields)


def told(worker: FakeWorker) -> list[str | None]:
    """What it was told of its needs, round by round."""
    return [message.needs for message in worker.commands if isinstance(message, Begin)]


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    async with FakeNode.running(gpus=2) as node:
        yield node


def pair(node: FakeNode) -> list[FakeWorker]:
    """The workers of an engine, each of which needs a half."""
    workers = [node.worker("tp", rank=rank, world_size=2) for rank in range(2)]
    for rank, worker in enumerate(workers):
        worker.script["finish"] = answering(worker, needs=half(rank))
    return workers


async def sent(node: FakeNode, version: int) -> int:
    """Publish a version, and return the bytes that it took to fill slots."""
    traffic = node.pusher.traffic
    before = traffic.fetch.nbytes + traffic.exchange.nbytes
    await node.publish(number(version))
    return traffic.fetch.nbytes + traffic.exchange.nbytes - before


async def test_workers_are_told_by_which_needs_a_round_goes(node: FakeNode) -> None:
    workers = pair(node)
    assert await sent(node, 1) == 2 * VERSION_BYTES
    assert [await sent(node, version) for version in (2, 3)] == [VERSION_BYTES] * 2
    for rank, worker in enumerate(workers):
        assert told(worker) == ["", half(rank).digest, half(rank).digest]
    assert node.states()["tp"] == (CURRENT, number(3))


async def test_worker_that_needs_everything_by_now_gets_everything_in_this_round(node: FakeNode) -> None:
    workers = pair(node)
    await sent(node, 1)
    workers[1].script["begin"] = answering(workers[1], whole=True)
    del workers[1].script["finish"]
    assert await sent(node, 2) > 2 * VERSION_BYTES
    assert workers[1]._loaded == TENSORS
    del workers[1].script["begin"]
    await sent(node, 3)
    assert told(workers[1]) == ["", half(1).digest, ""]


async def test_engine_that_fails_is_restored_with_everything(node: FakeNode) -> None:
    workers = pair(node)
    await sent(node, 1)
    failing = iter([CpeError("no such layer")])
    workers[0].script["load"] = lambda step: next(failing, None) or workers[0].do(step)
    await sent(node, 2)
    assert node.states()["tp"] == (CURRENT, number(1))
    assert [told(worker)[2:] for worker in workers] == [[""], [""]]
    assert await sent(node, 3) == VERSION_BYTES


async def test_worker_that_attaches_anew_has_said_nothing(node: FakeNode) -> None:
    workers = pair(node)
    await sent(node, 1)
    workers[0].die()
    back = node.worker("tp", rank=0, world_size=2)
    await node.idle()
    assert told(back) == [""]


async def test_needs_of_other_tensors_are_not_gone_by(node: FakeNode) -> None:
    workers = pair(node)
    for rank, worker in enumerate(workers):
        worker.script["finish"] = answering(worker, needs=half(rank, TENSORS + 1))
    await sent(node, 1)
    assert await sent(node, 2) == 2 * VERSION_BYTES
    assert [told(worker) for worker in workers] == [["", ""], ["", ""]]


async def test_version_that_workers_verify_is_sent_whole(node: FakeNode) -> None:
    workers = pair(node)
    await sent(node, 1)
    traffic = node.pusher.traffic
    before = traffic.fetch.nbytes + traffic.exchange.nbytes
    node.stage(number(2)).fold = 5
    await node.until(lambda: node.states()["tp"] == (CURRENT, number(2)))
    await node.idle()
    assert traffic.fetch.nbytes + traffic.exchange.nbytes - before == 2 * VERSION_BYTES
    assert [told(worker)[1] for worker in workers] == [None, None]


async def test_engine_beside_it_that_says_nothing_gets_everything(node: FakeNode) -> None:
    pair(node)
    other = [node.worker("other", rank=rank, world_size=2) for rank in range(2)]
    await sent(node, 1)
    assert await sent(node, 2) == 2 * VERSION_BYTES
    assert [told(worker) for worker in other] == [["", ""], ["", ""]]
