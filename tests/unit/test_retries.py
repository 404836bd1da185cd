"""An engine that could not be reached for a push is given the live version as soon as it can. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from cpe_daemon.errors import EngineError, PeerLostError
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, FakeNode, number

ONE, TWO = number(1), number(2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class StartingDriver(TorchDriver):
    """Of a server whose API is not there until ``up_at``."""

    up_at = 0.0
    error: Exception = PeerLostError("connection refused")
    tries = 0

    async def check(self, round: int, seconds: float) -> None:
        StartingDriver.tries += 1
        if asyncio.get_running_loop().time() < StartingDriver.up_at:
            raise StartingDriver.error
        await super().check(round, seconds)


@pytest.fixture
def starting() -> type[StartingDriver]:
    StartingDriver.tries, StartingDriver.error = 0, PeerLostError("connection refused")
    return StartingDriver


async def node_with_two(node: FakeNode, driver: type[StartingDriver], up_in: float) -> Any:
    node.drivers["torch"] = driver
    late = node.worker("late")
    node.drivers["torch"] = TorchDriver
    node.worker("other")
    await asyncio.sleep(1.0)
    driver.up_at = asyncio.get_running_loop().time() + up_in
    version = node.stage(ONE)
    await asyncio.sleep(1.0)
    assert version.state == "live"
    assert (late.content, node.states()["late"]) == (None, (CURRENT, None))
    return late


async def test_server_that_starts_takes_what_went_live_meanwhile(starting: type[StartingDriver]) -> None:
    async with FakeNode.running() as node:
        late = await node_with_two(node, starting, up_in=60.0)
        await asyncio.sleep(120.0)
        assert (late.content, node.states()["late"]) == (ONE, (CURRENT, ONE))
        tries = starting.tries
        assert 4 <= tries <= 7, "later each time"
        await asyncio.sleep(3600.0)
        assert starting.tries == tries, "nobody is asked any more"


async def test_newer_version_takes_the_place_of_what_was_to_be_tried_again(starting: type[StartingDriver]) -> None:
    async with FakeNode.running() as node:
        late = await node_with_two(node, starting, up_in=4.0)
        await asyncio.sleep(3.5)
        node.stage(TWO)
        await asyncio.sleep(60.0)
        assert late.content == TWO
        assert [command.version for command in late.commands if hasattr(command, "version")] == [TWO]


async def test_engine_that_says_no_is_not_asked_again(starting: type[StartingDriver]) -> None:
    async with FakeNode.running() as node:
        starting.error = EngineError("it takes no weights")
        await node_with_two(node, starting, up_in=4.0)
        await asyncio.sleep(3600.0)
        assert starting.tries == 1


async def test_nothing_is_tried_again_once_the_daemon_stops(starting: type[StartingDriver]) -> None:
    async with FakeNode.running() as node:
        late = await node_with_two(node, starting, up_in=4.0)
        await node.pusher.drain()
        await asyncio.sleep(3600.0)
        assert (starting.tries, late.content) == (1, None)


async def test_engine_that_cannot_be_reached_for_a_version_s_return_gives_it_back_later() -> None:
    """Else it would serve a version that has failed, until another goes live."""

    class AwayDriver(TorchDriver):
        away = False

        async def pause(self, round: int, seconds: float) -> None:
            if AwayDriver.away:
                raise PeerLostError("connection refused")
            await super().pause(round, seconds)

    async with FakeNode.running(push={"partial": "rollback"}) as node:
        bad = node.worker("bad")
        node.drivers["torch"] = AwayDriver
        far = node.worker("far")
        await asyncio.sleep(1.0)
        node.stage(ONE)
        await asyncio.sleep(1.0)

        def fail(_: Any) -> EngineError:
            del bad.script["finish"]
            AwayDriver.away = True
            return EngineError("out of memory")

        bad.script["finish"] = fail
        version = node.stage(TWO)
        await asyncio.sleep(1.0)
        assert version.state == "failed"
        assert node.states() == {"bad": (CURRENT, ONE), "far": (CURRENT, TWO)}
        AwayDriver.away = False
        await asyncio.sleep(10.0)
        assert node.states() == {"bad": (CURRENT, ONE), "far": (CURRENT, ONE)}
        assert not far.paused
