"""The digest of what an engine holds: where it comes from, and that weights by another's name are not served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import Begin, Digested, Finish, PushRequest, StepDone
from tests.unit.fake_node import CURRENT, FakeNode, FakeWorker, number

ONE, TWO = number(1), number(2)
DIGEST, OTHER = bytes([1]) * 16, bytes([2]) * 16


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def publish(node: FakeNode, version: VersionId, digest: bytes) -> Version:
    record = node.stage(version, digest)
    await node.until(lambda: record.state not in ("staged", "pushing"))
    await node.idle()
    return record


def begun(worker: FakeWorker) -> list[tuple[VersionId, bytes]]:
    """What a worker was told to load."""
    return [(command.version, command.digest) for command in worker.commands if isinstance(command, Begin)]


async def test_engine_is_told_the_digest_of_what_it_loads_and_is_known_by_it() -> None:
    async with FakeNode.running() as node:
        workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]
        await node.idle()
        await publish(node, ONE, DIGEST)
        assert [begun(worker) for worker in workers] == [[(ONE, DIGEST)]] * 2
        engine = node.engine("a")
        assert engine.digest == DIGEST
        assert engine.holds(ONE, DIGEST)
        assert not engine.holds(ONE, OTHER)
        assert not engine.holds(TWO, DIGEST)
        assert engine.holds(ONE, b"")


async def test_version_without_a_digest_is_not_pushed_again_for_that_nor_when_it_is_known() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.idle()
        record = await publish(node, ONE, b"")
        for _ in range(2):
            report = await node.pusher.request(PushRequest("m"))
            assert report.engines["a"].outcome == "current"
            node.catalogue.learn(record, DIGEST)
        await node.idle()
        assert begun(worker) == [(ONE, b"")]
        assert node.engine("a").holds(ONE, DIGEST)


@pytest.mark.parametrize(("says", "pushed"), [(b"", []), (DIGEST, []), (OTHER, [(ONE, DIGEST)])])
async def test_engine_that_joins_is_compared_with_a_digest_that_came_after_the_version_was_live(
    says: bytes, pushed: list[tuple[VersionId, bytes]]
) -> None:
    async with FakeNode.running() as node:
        record = await publish(node, ONE, b"")
        node.catalogue.learn(record, DIGEST)
        worker = node.worker("back", content=ONE, digest=says)
        await node.idle()
        assert begun(worker) == pushed
        assert node.states() == {"back": (CURRENT, ONE)}


async def test_workers_that_were_given_a_version_without_a_digest_are_told_it_and_no_others() -> None:
    async with FakeNode.running() as node:
        given, asleep = node.worker("given"), node.worker("asleep")
        await node.idle()
        await publish(node, ONE, b"")
        asleep.sleep()
        came, other = node.worker("came", content=ONE), node.worker("other", content=TWO, model="n")
        await node.idle()
        for name in ("given", "asleep", "came", "other"):
            node.engine(name).learn(ONE, DIGEST)
            node.engine(name).learn(ONE, OTHER)
        told = {
            worker: [c for c in worker.commands if isinstance(c, Digested)] for worker in (given, asleep, came, other)
        }
        assert told == {given: [Digested(ONE, DIGEST)], asleep: [], came: [], other: []}
        assert (node.engine("given").digest, node.engine("came").digest) == (DIGEST, b"")


async def test_digest_that_becomes_known_while_a_version_is_loaded_is_told_afterwards() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.idle()

        def learn(step: Finish) -> StepDone:
            node.catalogue.learn(record, DIGEST)
            return worker.do(step)

        worker.script["finish"] = learn
        record = node.stage(ONE, b"")
        await node.until(lambda: record.state == "live")
        await node.idle()
        assert begun(worker) == [(ONE, b"")]
        assert [c for c in worker.commands if isinstance(c, Digested)] == [Digested(ONE, DIGEST)]
        assert node.engine("a").digest == DIGEST


async def test_engine_that_a_round_left_in_doubt_gets_back_what_it_held_without_a_digest() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.idle()
        record = await publish(node, ONE, b"")

        def fail_once(_: object) -> CpeError:
            del worker.script["finish"]
            return EngineError("lost it")

        worker.script["finish"] = fail_once
        node.catalogue.learn(record, DIGEST)  # the worker was never told
        failed = await publish(node, TWO, b"")
        assert failed.state == "failed"
        assert node.states() == {"a": (CURRENT, ONE)}
        assert begun(worker) == [(ONE, b""), (TWO, b""), (ONE, DIGEST)]
        assert node.engine("a").digest == DIGEST


async def test_engine_that_gives_a_round_up_untouched_keeps_its_digest() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.idle()
        await publish(node, ONE, DIGEST)
        worker.fail("begin")
        failed = await publish(node, TWO, OTHER)
        assert failed.state == "failed"
        assert node.states() == {"a": (CURRENT, ONE)}
        assert node.engine("a").holds(ONE, DIGEST)
        assert not node.engine("a").holds(ONE, OTHER)


@pytest.mark.parametrize(("says", "pushed"), [(DIGEST, []), (b"", []), (OTHER, [(ONE, DIGEST)])])
async def test_engine_that_joins_with_the_live_version_s_name_is_given_it_unless_its_digest_is_that_one_s(
    says: bytes, pushed: list[tuple[VersionId, bytes]]
) -> None:
    async with FakeNode.running() as node:
        await publish(node, ONE, DIGEST)
        worker = node.worker("back", content=ONE, digest=says)
        await node.idle()
        assert begun(worker) == pushed
        assert node.states() == {"back": (CURRENT, ONE)}
        assert not worker.paused
        assert node.engine("back").holds(ONE, DIGEST)


async def test_engine_that_came_while_nothing_was_live_is_not_taken_for_current_by_its_name_alone() -> None:
    """As after a restart of the daemon: the name is used again, for other weights, while the engine attaches."""
    async with FakeNode.running() as node:
        first = node.worker("first")
        await node.idle()
        late: list[FakeWorker] = []

        def meanwhile(step: Begin) -> object:
            late.append(node.worker("late", content=ONE, digest=OTHER))
            return first.do(step)

        first.script["begin"] = meanwhile  # type: ignore[assignment]
        await publish(node, ONE, DIGEST)
        assert node.states() == {"first": (CURRENT, ONE), "late": (CURRENT, ONE)}
        assert begun(late[0]) == [(ONE, DIGEST)]
        assert node.engine("late").digest == DIGEST
