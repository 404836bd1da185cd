"""What a staged version does to older ones of its model that still wait for their push."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import structlog

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import PublishError
from cpe_daemon.wire.messages import Begin
from tests.unit.fake_node import CURRENT, FakeNode, FakeWorker, number

ONE, TWO, THREE = number(1), number(2), number(3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def loaded(worker: FakeWorker) -> list[VersionId]:
    return [command.version for command in worker.commands if isinstance(command, Begin)]


async def push_behind_another(node: FakeNode) -> FakeWorker:
    """Have version 1 being pushed while 2 and 3 are staged, and let it go on then."""
    worker = node.worker("a")
    release: list[Callable[[], None]] = []

    def later(step: object) -> None:
        del worker.script["finish"]
        release.append(lambda: worker.say(worker.do(step)))

    worker.script["finish"] = later
    node.stage(ONE)
    await node.until(lambda: bool(release))
    node.stage(TWO)
    other = node.stage(number(7, "other"))
    node.stage(THREE)
    release[0]()
    await node.until(lambda: other.state == "live")
    await node.idle()
    return worker


@pytest.mark.parametrize("push", [{}, {"newer": "queue"}])
async def test_each_has_its_turn_by_default(push: dict[str, str]) -> None:
    async with FakeNode.running(retain=3, push=push) as node:
        worker = await push_behind_another(node)
        assert loaded(worker) == [ONE, TWO, THREE]


async def test_newer_one_takes_the_place_of_those_that_wait() -> None:
    async with FakeNode.running(retain=3, push={"newer": "supersede"}) as node:
        worker = await push_behind_another(node)
        assert loaded(worker) == [ONE, THREE]
        assert node.states() == {"a": (CURRENT, THREE)}
        superseded = node.catalogue.last(TWO)
        assert superseded is not None
        assert superseded.state == "evicted"
        assert isinstance(superseded.error, PublishError)
        assert "superseded by m@r#3 before its turn came (push.newer: supersede)" in superseded.error.message
        assert not node.metrics.snapshot()['cpe_failures_total{code="publish"}'], "that is no failure"


async def test_version_that_is_superseded_waits_no_more() -> None:
    node = FakeNode(push={"newer": "supersede"})  # its pusher does not run: what waits goes on waiting
    for version in (ONE, TWO, THREE):
        node.stage(version)
    assert node.pusher.waiting == 1
    node.arena.close()
