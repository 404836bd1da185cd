"""Versions that are taken back: because somebody asks for the one before, or because not all engines took them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import structlog

from cpe_daemon.core.lifecycle import EngineEvent
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import (
    ArenaFullError,
    BusyError,
    CpeError,
    EngineError,
    MisuseError,
    PeerLostError,
    VerificationError,
    VersionRefusedError,
)
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.rollback import Rollback, rollback_target
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import Begin, PushRequest
from cpe_daemon.wire.reports import VersionReport
from tests.unit.fake_node import CURRENT, QUARANTINED, FakeNode, FakeWorker, number

ONE, TWO, THREE = number(1), number(2), number(3)
ALL_OR_NONE = {"partial": "rollback"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def roll_back(
    node: FakeNode, model: str = "m", run: str = "", n: int = -1, cause: str = "operator"
) -> VersionReport:
    """Ask for a rollback, and wait until it and all that follows is done."""
    async with asyncio.timeout(20):
        report = await node.pusher.request(Rollback(model, run, n, cause))
    await node.idle()
    return report


def outcomes(report: VersionReport | None) -> dict[str, str]:
    assert report is not None
    return {name: engine.outcome for name, engine in report.engines.items()}


def loaded(worker: FakeWorker) -> list[VersionId]:
    """The versions of the rounds that a worker began."""
    return [command.version for command in worker.commands if isinstance(command, Begin)]


def rollbacks(node: FakeNode) -> dict[str, float]:
    """How many are counted, by their cause."""
    counted = node.metrics.snapshot()
    causes = {cause: counted[f'cpe_rollbacks_total{{cause="{cause}"}}'] for cause in ("operator", "trainer", "partial")}
    return {cause: count for cause, count in causes.items() if count}


def fail_for(worker: FakeWorker, step: str, version: VersionId, error: CpeError | None = None) -> None:
    """Fail a step of every round of one version, and carry it out in those of others."""

    def script(message: Any) -> Any:
        begun = next(command for command in reversed(worker.commands) if isinstance(command, Begin))
        return (error or CpeError("out of memory")) if begun.version == version else worker.do(message)

    worker.script[step] = script


async def two_live(node: FakeNode) -> tuple[Version, Version]:
    """Version 1 was live, and 2 is."""
    return await node.publish(ONE), await node.publish(TWO)


# --- a rollback that is asked for ------------------------------------------------------------------------------------


async def test_rollback_brings_the_version_before_back_into_all_engines() -> None:
    async with FakeNode.running() as node:
        workers = [node.worker("a"), node.worker("b")]
        one, two = await two_live(node)
        assert rollback_target(node.catalogue, "m") is one
        report = await roll_back(node)
        assert (report.version, outcomes(report)) == (ONE, {"a": "updated", "b": "updated"})
        assert (one.state, two.state) == ("live", "retained")
        assert node.states() == {"a": (CURRENT, ONE), "b": (CURRENT, ONE)}
        assert all(loaded(worker) == [ONE, TWO, ONE] for worker in workers)
        assert rollbacks(node) == {"operator": 1}


async def test_second_rollback_takes_the_first_one_back() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        one, two = await two_live(node)
        await roll_back(node)
        assert (await roll_back(node, cause="trainer")).version == TWO
        assert (one.state, two.state) == ("retained", "live")
        assert rollbacks(node) == {"operator": 1, "trainer": 1}


async def test_next_number_is_higher_than_the_one_that_was_rolled_back_from() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        await two_live(node)
        await roll_back(node)
        with pytest.raises(VersionRefusedError, match=r"publish .*3 or higher"):
            node.catalogue.open(number(0), 1)
        three = await node.publish(THREE)
        assert three.state == "live"
        assert node.states() == {"a": (CURRENT, THREE)}


@pytest.mark.parametrize(("run", "n"), [("r", 1), ("", 1), ("r", -1)])
async def test_version_may_be_named_in_part(run: str, n: int) -> None:
    async with FakeNode.running(retain=2) as node:
        node.worker("a")
        await two_live(node)
        assert (await roll_back(node, run=run, n=n)).version == ONE


async def test_older_version_may_be_named() -> None:
    async with FakeNode.running(retain=2) as node:
        worker = node.worker("a")
        one, _ = await two_live(node)
        await node.publish(THREE)
        assert (await roll_back(node, n=1)).version == ONE
        assert (one.state, loaded(worker)[-1]) == ("live", ONE)


async def test_rollback_to_the_live_version_does_nothing_and_says_so() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await two_live(node)
        report = await roll_back(node, n=2)
        assert (report.version, outcomes(report)) == (TWO, {"a": "current"})
        assert report.note == "m@r#2 is live already: nothing was pushed"
        assert loaded(worker) == [ONE, TWO]
        assert rollbacks(node) == {}


async def test_rollback_without_engines_waits_for_the_first() -> None:
    async with FakeNode.running() as node:
        one, _ = await two_live(node)
        assert outcomes(await roll_back(node)) == {}
        assert one.state == "live"
        node.worker("late")
        await node.idle()
        assert node.states() == {"late": (CURRENT, ONE)}


async def test_engine_that_holds_it_still_is_not_pushed() -> None:
    async with FakeNode.running() as node:
        behind, other = node.worker("behind"), node.worker("other")
        await node.publish(ONE)
        behind.fail("begin")
        await node.publish(TWO)
        assert node.states()["behind"] == (CURRENT, ONE)
        behind.script.clear()
        assert outcomes(await roll_back(node)) == {"behind": "current", "other": "updated"}
        assert loaded(other) == [ONE, TWO, ONE]
        assert loaded(behind).count(ONE) == 1


async def test_version_stays_live_if_no_engine_takes_the_one_before() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        one, two = await two_live(node)
        fail_for(worker, "finish", ONE, CpeError("half a layer is missing"))
        with pytest.raises(EngineError, match=r"m@r#1 was not rolled back to: a .*half a layer.*; m@r#2 stays live"):
            await roll_back(node)
        await node.idle()
        assert (one.state, two.state) == ("retained", "live")
        assert node.states() == {"a": (CURRENT, TWO)}
        assert rollbacks(node) == {}


async def test_nothing_to_roll_back_to_is_said_with_the_reason() -> None:
    async with FakeNode.running() as node:
        node.worker("a")
        with pytest.raises(MisuseError, match="this node holds no version"):
            await roll_back(node, "")
        with pytest.raises(MisuseError, match=r"no version of m is retained here: none was live .*; there is: none"):
            await roll_back(node)
        await node.publish(ONE)
        with pytest.raises(MisuseError, match=r"the one that is live is the first; there is: m@r#1 \(live\)"):
            await roll_back(node, "")
        await node.publish(TWO)
        await node.publish(THREE)
        with pytest.raises(MisuseError, match=r"m@r#1 is evicted; .*; there is: m@r#2 \(retained\), m@r#3 \(live\)"):
            await roll_back(node, n=1)
        with pytest.raises(MisuseError, match="this node knows no version m#9"):
            await roll_back(node, n=9)
        with pytest.raises(MisuseError, match="no version of m@other is retained"):
            await roll_back(node, run="other")


async def test_setting_that_keeps_nothing_is_named() -> None:
    async with FakeNode.running(retain=0) as node:
        node.worker("a")
        await two_live(node)
        with pytest.raises(MisuseError, match=r"retention\.versions is 0, so that none is kept"):
            await roll_back(node)


async def test_version_that_was_never_live_is_not_rolled_back_to() -> None:
    async with FakeNode.running(automatic=False) as node:
        node.worker("a")
        node.stage(ONE)
        with pytest.raises(MisuseError, match="m@r#1 is staged and was never live: it gets into engines by `cpe push`"):
            await roll_back(node, n=1)


async def test_daemon_that_stops_undoes_a_rollback() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        one, two = await two_live(node)
        begun = asyncio.Event()

        def stuck(_: Any) -> None:
            del worker.script["pause"]
            begun.set()

        worker.script["pause"] = stuck
        asking = asyncio.create_task(node.pusher.request(Rollback("m")))
        await begun.wait()
        node.pusher.undo("the daemon stops")
        async with asyncio.timeout(20):
            await node.pusher.drain()
            with pytest.raises(EngineError, match="m@r#2 stays live"):
                await asking
        assert (one.state, two.state) == ("retained", "live")
        assert node.states() == {"a": (CURRENT, TWO)}
        with pytest.raises(BusyError):
            await node.pusher.request(Rollback("m"))


def held_up(worker: FakeWorker) -> list[Callable[[], None]]:
    """Have a worker finish its next round only when what comes into the list is called."""
    release: list[Callable[[], None]] = []

    def later(step: Any) -> None:
        del worker.script["finish"]
        release.append(lambda: worker.say(worker.do(step)))

    worker.script["finish"] = later
    return release


async def test_rollback_comes_before_what_waits() -> None:
    async with FakeNode.running(retain=3) as node:
        worker = node.worker("a")
        await two_live(node)
        release = held_up(worker)
        again = asyncio.create_task(node.pusher.request(PushRequest("m", engines=("a",))))
        await node.until(lambda: bool(release))
        node.stage(THREE)
        push = asyncio.create_task(node.pusher.request(PushRequest("m", engines=("a",))))
        await node.until(lambda: node.pusher.waiting == 2)
        back = asyncio.create_task(node.pusher.request(Rollback("m")))
        to = asyncio.create_task(node.pusher.request(Rollback("m", number=2)))
        await node.until(lambda: node.pusher.waiting == 4)
        release[0]()
        async with asyncio.timeout(20):
            await asyncio.gather(again, back, to, push)
        assert loaded(worker) == [ONE, TWO, TWO, ONE, TWO, THREE, THREE]


async def test_rollback_is_from_what_was_live_when_it_was_asked_for() -> None:
    async with FakeNode.running(retain=3) as node:
        worker = node.worker("a")
        await node.publish(ONE)
        release = held_up(worker)
        two = node.stage(TWO)
        await node.until(lambda: bool(release))
        back = asyncio.create_task(node.pusher.request(Rollback("m")))
        await node.until(lambda: node.pusher.waiting == 1)
        release[0]()
        with pytest.raises(BusyError, match="m@r#2 went live before the rollback's turn came: nothing was pushed"):
            await back
        assert two.state == "live"
        assert (await roll_back(node)).version == ONE


async def test_retained_version_is_not_evicted_while_it_is_pushed() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        one, _ = await two_live(node)
        release: list[Callable[[], None]] = []
        worker.script["finish"] = lambda step: release.append(lambda: worker.say(worker.do(step)))
        asking = asyncio.create_task(node.pusher.request(Rollback("m")))
        await node.until(lambda: bool(release))
        assert one.leases == 1
        worker.script.clear()
        release[0]()
        async with asyncio.timeout(20):
            await asking
        assert (one.state, one.leases) == ("live", 0)


async def test_version_that_is_rolled_back_to_is_not_evicted_while_engines_wake_up() -> None:
    """It is leased before anything is waited for: a trainer that wants its room waits, or is refused."""
    async with FakeNode.running(push={"asleep": "wake"}) as node:
        worker = node.worker("a")
        one, _ = await two_live(node)
        refused: list[CpeError] = []

        def wake(_: object) -> Any:
            receiving = node.catalogue.open(THREE, 2)
            try:
                for rank, nbytes in enumerate((node.arena.free_bytes, one.nbytes)):
                    node.catalogue.contribute(receiving, rank, [Shard("w", "uint8", (nbytes,))], nbytes)
            except ArenaFullError as error:
                refused.append(error)
            worker.wake_up()
            return worker.do(worker.commands[-1])

        worker.script["wake"] = wake
        worker.sleep()
        await roll_back(node)
        assert refused, "the version was evicted"
        assert (one.state, node.states()) == ("live", {"a": (CURRENT, ONE)})


# --- a version that not all engines took -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["begin", "load", "finish", "resume"])
async def test_partial_version_is_kept_by_default(step: str) -> None:
    async with FakeNode.running() as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_for(bad, step, TWO)
        version = await node.publish(TWO)
        assert version.state == "live"
        assert node.states() == {"bad": (CURRENT, ONE), "good": (CURRENT, TWO)}
        assert rollbacks(node) == {}


@pytest.mark.parametrize("step", ["begin", "load", "finish"])
async def test_partial_version_is_taken_back_where_the_policy_says_so(step: str) -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, good, fine = node.worker("bad"), node.worker("good"), node.worker("fine")
        one = await node.publish(ONE)
        fail_for(bad, step, TWO)
        version = await node.publish(TWO)
        assert (one.state, version.state) == ("live", "failed")
        assert node.states() == dict.fromkeys(("bad", "good", "fine"), (CURRENT, ONE))
        assert isinstance(version.error, EngineError)
        assert version.error.message == (
            "m@r#2 was taken back from good, fine (push.partial: rollback), since bad did not take it: engine 'bad'"
            f" rank 0 (pid 0, GPU gpu-0) could not {step}: out of memory"
        )
        assert loaded(good) == loaded(fine) == [ONE, TWO, ONE]
        rounds = {command.round for worker in (good, fine) for command in worker.commands if isinstance(command, Begin)}
        assert len(rounds) == 3, "one round took it back from both"
        assert rollbacks(node) == {"partial": 1}
        assert node.metrics.snapshot()['cpe_failures_total{code="engine"}'] == 1


async def test_engine_in_doubt_is_restored_in_the_round_that_takes_the_version_back() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_for(bad, "finish", TWO)
        await node.publish(TWO)
        last = [next(c for c in reversed(w.commands) if isinstance(c, Begin)).round for w in (bad, good)]
        assert last == [3, 3]


async def test_version_that_was_verified_as_another_counts_as_not_taken() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        fail_for(bad, "finish", TWO, VerificationError("what was handed over is not what was staged"))
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert node.states() == {"bad": (CURRENT, ONE), "good": (CURRENT, ONE)}


DIGEST, OTHER = b"d" * 16, b"o" * 16


@contextlib.asynccontextmanager
async def holding(content: VersionId, digest: bytes) -> AsyncIterator[tuple[FakeNode, Participant]]:
    """A node where ONE is retained and TWO live, and an engine that is said to hold one of them, before a round."""
    async with FakeNode.running(automatic=False) as node:
        node.worker("a", content=content, digest=digest)
        await node.idle()  # it is looked at before it could be given what is live
        for version in (ONE, TWO):
            record = node.stage(version, DIGEST)
            node.catalogue.begin_push(record)
            node.catalogue.go_live(record, VersionReport(version, 0, 0))
        yield node, Participant(node.engine("a"), 1, node.config.deadlines, node.clock)


@pytest.mark.parametrize(("digest", "given"), [(DIGEST, ONE), (b"", ONE), (OTHER, TWO)])
async def test_what_goes_by_the_name_of_what_an_engine_held_is_not_given_to_it(digest: bytes, given: VersionId) -> None:
    async with holding(ONE, digest) as (node, participant):
        before = node.pusher._repair.before(participant)
        assert before is not None
        assert before.id == given


@pytest.mark.parametrize(("digest", "given"), [(DIGEST, [TWO]), (OTHER, [])])
async def test_version_is_taken_back_from_who_holds_it_and_not_its_name_alone(
    digest: bytes, given: list[VersionId]
) -> None:
    async with holding(TWO, digest) as (node, participant):
        engine = node.engine("a")
        engine.change(EngineEvent.WITHDRAW, content=TWO)  # it is ready, and was in the round
        taken = node.catalogue.find(TWO)
        await node.pusher._repair.restore([participant], taken)
        assert loaded(next(iter(node.workers.values()))) == given


async def test_first_version_cannot_be_taken_back_and_stays() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        bad.fail("finish")
        version = await node.publish(ONE)
        assert version.state == "live"
        assert node.states()["good"] == (CURRENT, ONE)
        assert rollbacks(node) == {}


async def test_engine_that_cannot_be_given_what_it_held_is_quarantined() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, good = node.worker("bad"), node.worker("good")
        await node.publish(ONE)
        bad.fail("begin")
        fail_for(good, "finish", ONE, CpeError("a GPU fell off"))
        version = await node.publish(TWO)
        assert version.state == "failed"
        assert node.states() == {"bad": (CURRENT, ONE), "good": (QUARANTINED, None)}
        error = node.engine("good").error
        assert error is not None
        assert "a GPU fell off" in error.message
        assert good.paused


async def test_version_that_was_asked_for_and_is_taken_back_waits_again() -> None:
    async with FakeNode.running(automatic=False, push=ALL_OR_NONE) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        node.stage(ONE)
        await node.pusher.request(PushRequest("m"))
        two = node.stage(TWO)
        fail_for(bad, "finish", TWO)
        report = await node.pusher.request(PushRequest("m"))
        assert outcomes(report) == {"bad": "failed", "good": "taken back"}
        assert two.state == "staged"
        assert node.states() == {"bad": (CURRENT, ONE), "good": (CURRENT, ONE)}
        bad.script.clear()
        assert outcomes(await node.pusher.request(PushRequest("m"))) == {"bad": "updated", "good": "updated"}


async def test_rollback_that_not_all_engines_take_is_taken_back_too() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        bad, _ = node.worker("bad"), node.worker("good")
        one, two = await two_live(node)
        fail_for(bad, "finish", ONE)
        with pytest.raises(EngineError, match=r"m@r#1 was not rolled back to: .*; m@r#2 stays live"):
            await roll_back(node)
        await node.idle()
        assert (one.state, two.state) == ("retained", "live")
        assert node.states() == {"bad": (CURRENT, TWO), "good": (CURRENT, TWO)}


async def test_daemon_that_stops_takes_nothing_back() -> None:
    async with FakeNode.running(push=ALL_OR_NONE) as node:
        slow, _ = node.worker("slow"), node.worker("good")
        await node.publish(ONE)
        begun = asyncio.Event()

        def stuck(_: Any) -> None:
            begun.set()

        slow.script["resume"] = stuck
        version = node.stage(TWO)
        await begun.wait()
        await node.until(lambda: node.states()["good"] == (CURRENT, TWO))
        slow.script.clear()
        node.pusher.undo("the daemon stops")
        async with asyncio.timeout(20):
            await node.pusher.drain()
        assert version.state == "live"
        assert not isinstance(version.error, PeerLostError)
        assert rollbacks(node) == {}
