"""Whatever a driver does when it is called, there is an end to it, and an error that names its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import structlog
from structlog.typing import EventDict

from cpe_daemon.errors import CpeError, DeadlineError, EngineError, PeerLostError
from cpe_daemon.push import driving
from cpe_daemon.push.driving import drive
from tests.unit.fake_node import FakeNode


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[EventDict]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


async def outcome(work: Callable[[], Awaitable[object]], seconds: float = 10.0) -> CpeError | None:
    async with FakeNode.running() as node:
        node.worker("a")
        return await drive(node.engine("a"), "take a bow", work, seconds)


def raising(error: BaseException) -> Callable[[], Awaitable[object]]:
    async def work() -> None:
        raise error

    return work


async def test_what_is_done_is_no_error() -> None:
    async def work() -> int:
        return 1

    assert await outcome(work) is None


@pytest.mark.parametrize("error", [PeerLostError("rank 1 is gone"), DeadlineError("rank 1 was late")])
async def test_error_that_knows_more_is_passed_on(error: CpeError) -> None:
    assert await outcome(raising(error)) is error


async def test_driver_without_an_end_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "MARGIN_SECONDS", 0.01)
    error = await outcome(asyncio.Event().wait, 0.01)
    assert isinstance(error, DeadlineError)
    assert error.message == "engine 'a' did not take a bow within 0.01 s"


async def test_bug_is_the_engine_s_error_and_in_the_log(logs: list[EventDict]) -> None:
    error = await outcome(raising(KeyError("no such route")))
    assert type(error) is EngineError
    assert error.message == "engine 'a' could not take a bow: KeyError: 'no such route'"
    (said,) = [entry for entry in logs if entry["event"] == "engine.driver_failed"]
    assert (said["engine"], said["phase"], said["exc_info"]) == ("a", "take a bow", True)


async def test_daemon_that_ends_is_not_kept() -> None:
    with pytest.raises(asyncio.CancelledError):
        await outcome(raising(asyncio.CancelledError()))
