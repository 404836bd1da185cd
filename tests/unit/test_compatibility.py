"""Whether a version fits the engines of a node, asked outside of any round: who is asked, and who has the last word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.types import Shard, TensorSpec
from cpe_daemon.errors import CpeError, EngineError, ManifestError
from cpe_daemon.push import driving
from cpe_daemon.push.compatibility import Compatibility, announced, specs_of
from cpe_daemon.versions import Version
from cpe_daemon.wire.codec import Codec
from cpe_daemon.wire.messages import Check, EngineSpec, Expect, PushRequest, WorkerCommand
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, FakeNode, FakeWorker, number

ONE, TWO = number(1), number(2)
SHORT = 0.02
SHARDS = [[Shard("w", "uint8", (4, 2), (0, 0), (2, 2)), Shard("b", "uint8", (3,))], [Shard("w", "uint8", (4, 2))]]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    """Its pusher does not run."""
    made = FakeNode()
    yield made
    made.arena.close()
    wrong = {worker.peer: worker.serving_wrong for worker in made.workers.values() if worker.serving_wrong}
    assert not wrong, wrong


@pytest.fixture
def compatibility(node: FakeNode) -> Compatibility:
    return Compatibility(node.registry, DeadlinesConfig(check_seconds=SHORT))


def refuse(worker: FakeWorker, why: str = "no tensor here is called b") -> None:
    worker.script["check"] = lambda _: ManifestError(why)


def asked(worker: FakeWorker) -> list[int]:
    """The numbers of the questions that it was asked."""
    return [command.round for command in worker.commands if isinstance(command, Check)]


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_of_all_ranks_are_told_once_each() -> None:
    assert specs_of(SHARDS) == [TensorSpec("w", "uint8", (4, 2)), TensorSpec("b", "uint8", (3,))]


@pytest.mark.parametrize("count", [0, 1, 4096, 4097])
def test_announcement_tells_every_tensor_in_its_order(count: int) -> None:
    specs = [TensorSpec(f"w{index}", "uint8", ()) for index in range(count)]
    codec = Codec(WorkerCommand)
    messages = [codec.decode(header) for header in announced(-3, specs)]
    told: list[TensorSpec] = []
    for message in messages:
        assert isinstance(message, Expect)
        assert (message.round, message.first, message.total) == (-3, len(told), count)
        told += message.tensors
    assert told == specs
    assert len(messages) == max(1, -(-count // 4096))


# --- a version whose bytes are still to come -------------------------------------------------------------------------


async def test_version_that_every_engine_refuses_is_refused(node: FakeNode, compatibility: Compatibility) -> None:
    workers = [node.worker("a"), node.worker("b")]
    for worker in workers:
        refuse(worker)
    refusal = await compatibility.refusal(ONE, SHARDS)
    assert isinstance(refusal, ManifestError)
    why = [f"engine '{e}' rank 0 (pid 0, GPU gpu-0) cannot take it: no tensor here is called b" for e in ("a", "b")]
    assert str(refusal) == f"no engine here can take m@r#1: {'; '.join(why)}"
    assert [worker.steps for worker in workers] == [[], []]
    assert node.states() == {"a": (CURRENT, None), "b": (CURRENT, None)}


async def test_version_that_one_engine_can_take_is_not_refused(node: FakeNode, compatibility: Compatibility) -> None:
    refuse(node.worker("a"))
    node.worker("b")
    assert await compatibility.refusal(ONE, SHARDS) is None


async def test_questions_are_numbered_as_no_round_is(node: FakeNode, compatibility: Compatibility) -> None:
    worker = node.worker("a")
    for _ in range(2):
        await compatibility.refusal(ONE, SHARDS)
    assert asked(worker) == [-1, -2]
    assert [c.round for c in worker.commands if isinstance(c, Expect)] == [-1, -2]


async def test_node_without_engines_refuses_nothing(compatibility: Compatibility) -> None:
    assert await compatibility.refusal(ONE, SHARDS) is None


async def test_engines_that_cannot_be_asked_have_no_say(node: FakeNode, compatibility: Compatibility) -> None:
    """Busy, incomplete, asleep, of another model: the one that is asked speaks for itself alone."""
    refuse(node.worker("a"))
    busy, asleep = node.worker("busy"), node.worker("asleep")
    busy.hang("pause")
    waiting = asyncio.create_task(node.engine("busy").driver.pause(1, 60.0))
    asleep.sleep()
    others = [busy, asleep, node.worker("half", world_size=2), node.worker("other", model="another")]
    await node.until(lambda: node.engine("busy").workers[0].busy)
    assert isinstance(await compatibility.refusal(ONE, SHARDS), ManifestError)
    assert [asked(worker) for worker in others] == [[], [], [], []]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("error", [CpeError("CUDA error"), None], ids=["fails", "hangs"])
async def test_engine_that_does_not_answer_might_fit(
    error: CpeError | None, node: FakeNode, compatibility: Compatibility
) -> None:
    node.worker("a").script["check"] = lambda _: error
    assert await compatibility.refusal(ONE, SHARDS) is None


async def test_engine_that_is_late_does_not_save_a_version_that_all_others_refuse(
    node: FakeNode, compatibility: Compatibility
) -> None:
    node.worker("late").hang("check")
    refuse(node.worker("a"))
    assert isinstance(await compatibility.refusal(ONE, SHARDS), ManifestError)


async def test_engine_that_loaded_such_tensors_is_not_asked(node: FakeNode, compatibility: Compatibility) -> None:
    worker = node.worker("a")
    refuse(worker)
    node.engine("a").workers[0].loaded = specs_of(SHARDS)
    assert await compatibility.refusal(ONE, SHARDS) is None
    assert asked(worker) == []
    assert await compatibility.refusal(ONE, SHARDS[:0]) is not None  # of no tensors at all: others than it has loaded


async def test_bug_in_a_driver_is_no_refusal(node: FakeNode, compatibility: Compatibility) -> None:
    class Broken(TorchDriver):
        async def check(self, round: int, seconds: float) -> None:
            raise KeyError("no such route")

    node.drivers["broken"] = Broken
    node.worker("a", kind="broken")
    assert await compatibility.refusal(ONE, SHARDS) is None
    error = await compatibility.ask(node.engine("a"), [])
    assert str(error) == "engine 'a' could not say: KeyError: 'no such route'"


async def test_driver_that_hangs_is_not_waited_for(
    node: FakeNode, compatibility: Compatibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(TorchDriver):
        async def check(self, round: int, seconds: float) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(driving, "MARGIN_SECONDS", SHORT)
    node.drivers["hanging"] = Hanging
    node.worker("a", kind="hanging")
    assert await compatibility.refusal(ONE, SHARDS) is None


def receiving(node: FakeNode, shards: Sequence[Sequence[Shard]], world_size: int) -> Version:
    version = node.catalogue.open(ONE, world_size)
    for rank, part in enumerate(shards):
        node.catalogue.contribute(version, rank, part, 64)
    return version


async def test_version_is_examined_when_all_manifests_are_here(node: FakeNode, compatibility: Compatibility) -> None:
    worker = node.worker("a")
    refuse(worker)
    version = receiving(node, SHARDS[:1], 2)
    await compatibility.examine(version)
    assert asked(worker) == []
    node.catalogue.contribute(version, 1, SHARDS[1], 64)
    with pytest.raises(ManifestError, match="no engine here can take m@r#1"):
        await compatibility.examine(version)
    assert asked(worker) == [-1]


async def test_version_is_examined_once_though_all_ranks_come_at_once(
    node: FakeNode, compatibility: Compatibility
) -> None:
    worker = node.worker("a")
    version = receiving(node, SHARDS, 2)
    await asyncio.gather(compatibility.examine(version), compatibility.examine(version))
    assert asked(worker) == [-1]


# --- a dry run -------------------------------------------------------------------------------------------------------


async def test_dry_run_asks_every_engine_and_pauses_none(tmp_path: Path) -> None:
    async with FakeNode.running(automatic=False, deadlines={"check_seconds": 0.2}, state_dir=tmp_path) as node:
        workers = {name: node.worker(name) for name in ("fits", "differs", "late", "broken", "asleep")}
        refuse(workers["differs"], "w is [3] here, [4] in the version")
        workers["late"].hang("check")
        workers["broken"].fail("check", "CUDA error")
        workers["asleep"].sleep()
        await node.expected.add(EngineSpec("gone", "torch", "m"))
        version = node.stage(ONE)
        report = await node.pusher.request(PushRequest("m", dry_run=True))
        outcomes = {name: one.outcome for name, one in report.engines.items()}
        assert outcomes == {
            "fits": "fits",
            "differs": "differs",
            "late": "unanswered",
            "broken": "unanswered",
            "asleep": "asleep",
            "gone": "absent",
        }
        differs = report.engines["differs"].error
        assert differs is not None
        assert differs.code == "manifest"
        assert differs.message.endswith("w is [3] here, [4] in the version")
        assert (report.version, report.tensors, report.nbytes) == (ONE, 6, 6 * 512)
        assert version.state == "staged"
        assert not any("pause" in worker.steps for worker in workers.values())


async def test_dry_run_of_the_live_version_says_that_it_fits_who_holds_it() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        before = list(worker.steps)
        report = await node.pusher.request(PushRequest("m", dry_run=True))
        assert {name: one.outcome for name, one in report.engines.items()} == {"a": "fits"}
        assert worker.steps == before


async def test_dry_run_may_be_of_a_retained_version() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node.publish(ONE)
        await node.publish(TWO)
        report = await node.pusher.request(PushRequest("m", number=1, dry_run=True))
        assert (report.version, worker.content) == (ONE, TWO)
        with pytest.raises(CpeError, match="is retained"):
            await node.pusher.request(PushRequest("m", number=1))


async def test_dry_run_of_named_engines_asks_no_others() -> None:
    async with FakeNode.running(automatic=False) as node:
        a, b = node.worker("a"), node.worker("b")
        node.stage(ONE)
        report = await node.pusher.request(PushRequest("m", engines=("b",), dry_run=True))
        assert (list(report.engines), asked(a), asked(b)) == (["b"], [], [-1])
        a.sleep()
        with pytest.raises(EngineError, match="asleep"):
            await node.pusher.request(PushRequest("m", engines=("a",), dry_run=True))
