"""A version that is published while a server starts, whose workers are there before its API is. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.driver import Arriving
from cpe_daemon.errors import PeerLostError
from inference_plugins.torch.driver import TorchDriver
from inference_plugins.vllm.driver import VllmDriver
from tests.unit.fake_node import CURRENT, FakeNode, FakeWorker, number

ONE, TWO = number(1), number(2)
DEFAULTS = DeadlinesConfig()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class ServerDriver(TorchDriver):
    """Of a server that takes no calls until ``up_at``."""

    up_at = 0.0
    looks = 0
    fails = False
    arrived = False

    async def answers(self) -> bool:
        ServerDriver.looks += 1
        if ServerDriver.fails:
            raise RuntimeError("a bug")
        self.arrived = asyncio.get_running_loop().time() >= ServerDriver.up_at
        return self.arrived

    async def pause(self, round: int, seconds: float) -> None:
        self.arrived = asyncio.get_running_loop().time() >= ServerDriver.up_at
        if not self.arrived:
            raise PeerLostError("connection refused")
        await super().pause(round, seconds)


@pytest.fixture(autouse=True)
def fresh() -> None:
    ServerDriver.up_at, ServerDriver.looks, ServerDriver.fails = 0.0, 0, False


def server(node: FakeNode, up_in: float) -> FakeWorker:
    """Its worker, which is there already."""
    node.drivers["torch"] = ServerDriver
    worker = node.worker("server")
    node.drivers["torch"] = TorchDriver
    ServerDriver.up_at = asyncio.get_running_loop().time() + up_in
    return worker


def test_vllm_s_driver_knows_of_arrival_and_torch_s_has_nothing_to_wait_for() -> None:
    class Workers:
        starting = False

    assert isinstance(VllmDriver("v", Workers()), Arriving)  # type: ignore[arg-type]
    assert not isinstance(TorchDriver("t", Workers()), Arriving)  # type: ignore[arg-type]


async def test_version_waits_for_the_only_server() -> None:
    async with FakeNode.running() as node:
        worker = server(node, up_in=100.0)
        version = node.stage(ONE)
        await asyncio.sleep(99.0)
        assert version.state == "staged"
        assert not worker.paused
        await asyncio.sleep(10.0)
        assert version.state == "live"
        assert node.states()["server"] == (CURRENT, ONE)


async def test_server_that_never_takes_calls_costs_a_deadline() -> None:
    async with FakeNode.running() as node:
        worker = server(node, up_in=10_000.0)
        version = node.stage(ONE)
        await asyncio.sleep(DEFAULTS.arrive_seconds - 1.0)
        assert version.state == "staged"
        await asyncio.sleep(3.0)
        assert version.state == "failed"
        assert "connection refused" in str(version.error)
        assert not worker.paused


async def test_others_do_not_wait_for_a_server_that_starts_and_it_gets_the_live_version_soon_after() -> None:
    async with FakeNode.running() as node:
        node.worker("other")
        worker = server(node, up_in=60.0)
        version = node.stage(ONE)
        await asyncio.sleep(1.0)
        assert version.state == "live"
        assert version.report is not None
        report = version.report.engines["server"]
        assert report.outcome == "kept"
        assert report.error is not None
        assert "connection refused" in report.error.message
        await asyncio.sleep(66.0)
        assert worker.content == ONE
        assert ServerDriver.looks == 0, "tried again, and not looked at"


async def test_next_version_finds_a_server_that_has_arrived() -> None:
    async with FakeNode.running() as node:
        server(node, up_in=0.0)
        node.stage(ONE)
        await asyncio.sleep(1.0)
        node.stage(TWO)
        await asyncio.sleep(1.0)
        assert node.states()["server"] == (CURRENT, TWO)
        assert ServerDriver.looks == 1


async def test_version_that_waits_is_superseded_by_the_next() -> None:
    async with FakeNode.running(push={"newer": "supersede"}) as node:
        worker = server(node, up_in=60.0)
        one = node.stage(ONE)
        await asyncio.sleep(10.0)
        two = node.stage(TWO)
        await asyncio.sleep(60.0)
        assert two.state == "live"
        assert one.state != "live"
        assert [command.version for command in worker.commands if hasattr(command, "version")] == [TWO]


async def test_server_that_ends_while_it_is_awaited_is_waited_for_no_more() -> None:
    """As if it had never been there: the next to attach gets the version."""
    async with FakeNode.running() as node:
        worker = server(node, up_in=10_000.0)
        version = node.stage(ONE)
        await asyncio.sleep(10.0)
        assert version.state == "staged"
        worker.die()
        await asyncio.sleep(2.0)
        assert version.state == "live"


async def test_engine_that_attaches_meanwhile_is_brought_up_and_takes_the_version() -> None:
    async with FakeNode.running() as node:
        server(node, up_in=10_000.0)
        version = node.stage(ONE)
        await asyncio.sleep(10.0)
        other = node.worker("other")
        await asyncio.sleep(2.0)
        assert version.state == "live"
        assert other.content == ONE


async def test_server_that_cannot_be_asked_is_not_waited_for() -> None:
    async with FakeNode.running() as node:
        server(node, up_in=10_000.0)
        ServerDriver.fails = True
        version = node.stage(ONE)
        await asyncio.sleep(1.0)
        assert version.state == "failed"


async def test_daemon_that_stops_does_not_wait_for_a_server() -> None:
    async with FakeNode.running() as node:
        server(node, up_in=10_000.0)
        version = node.stage(ONE)
        await asyncio.sleep(10.0)
        async with asyncio.timeout(1.0):
            await node.pusher.drain()
        assert version.state == "failed"
        assert "the daemon stops" in str(version.error)
        looks = ServerDriver.looks
        await asyncio.sleep(10.0)
        assert ServerDriver.looks == looks
