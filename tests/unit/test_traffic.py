"""Tallies, and what a push says that it moved."""

from __future__ import annotations

import pytest

from cpe_daemon.core.tally import Tally
from cpe_daemon.errors import ResourceError
from tests.unit.fake_node import TENSOR_BYTES, TENSORS, Clock, FakeNode, number

VERSION_BYTES = TENSORS * TENSOR_BYTES


def test_transfers_that_overlap_count_their_time_once() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin()
    clock.now += 1.0
    tally.begin()
    clock.now += 2.0
    tally.end(10)
    clock.now += 4.0
    tally.end(20)
    clock.now += 8.0
    assert (tally.nbytes, tally.seconds) == (30, 7.0)
    with tally.moving(5):
        clock.now += 16.0
    assert (tally.nbytes, tally.seconds) == (35, 23.0)


def test_transfer_in_flight_counts_until_now_and_has_moved_nothing() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin()
    clock.now += 3.0
    assert (tally.nbytes, tally.seconds) == (0, 3.0)


def test_transfer_that_fails_has_moved_nothing() -> None:
    clock = Clock()
    tally = Tally(clock)

    def fail() -> None:
        with tally.moving(5):
            clock.now += 1.0
            raise ResourceError("gone")

    with pytest.raises(ResourceError):
        fail()
    assert (tally.nbytes, tally.seconds) == (0, 1.0)


@pytest.mark.parametrize(("gpus", "engines"), [(1, 1), (1, 2), (3, 1)])
async def test_push_counts_what_each_stage_moved(gpus: int, engines: int) -> None:
    async with FakeNode.running(gpus=gpus) as node:
        for name in range(engines):
            for rank in range(gpus):
                node.worker(str(name), rank=rank, world_size=gpus)
        await node.publish(number(1))
        traffic = node.pusher.traffic
        assert traffic.fetch.nbytes == VERSION_BYTES
        assert traffic.exchange.nbytes == (gpus - 1) * VERSION_BYTES
        assert traffic.load.nbytes == engines * VERSION_BYTES
        assert node.pusher.current is None


async def test_push_that_an_engine_refuses_is_told_by_the_error_that_dropped_it() -> None:
    async with FakeNode.running() as node:
        good, bad = node.worker("good"), node.worker("bad")
        bad.fail("begin")
        await node.publish(number(1))
        snapshot = node.metrics.snapshot()
        assert good.content == number(1)
        assert snapshot['cpe_engine_failures_total{code="engine"}'] == 2  # and once more, alone
        assert 'cpe_update_duration_seconds_count{phase="stopped",model="m",engine="good"}' in snapshot
        assert 'cpe_update_duration_seconds_count{phase="stopped",model="m",engine="bad"}' not in snapshot
