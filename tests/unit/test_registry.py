"""Who is attached, what each engine holds as a whole, and who may not serve what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from cpe_daemon.core.driver import Workers
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import (
    BusyError,
    CpeError,
    DeadlineError,
    MisuseError,
    PeerLostError,
    ProtocolError,
    ResourceError,
)
from cpe_daemon.wire.messages import EngineSpec, Pause, Ping, StepDone, StepFailed, WorkerBye
from cpe_daemon.wire.reports import ErrorInfo
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, UNKNOWN, FakeNode, FakeWorker, number

ONE, TWO = number(1), number(2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    """Its pusher does not run: nobody but the registry changes an engine."""
    made = FakeNode(gpus=2)
    yield made
    made.arena.close()


DIGEST, OTHER = bytes([1]) * 16, bytes([2]) * 16


def described(node: FakeNode) -> list[tuple[Any, ...]]:
    """All that a refused message must leave as it was."""
    return [
        (e.name, e.state, e.content, e.world_size, e.incomplete_since, {r: w.peer for r, w in e.workers.items()})
        for e in node.registry
    ]


def live(node: FakeNode, version: Any, digest: bytes = b"") -> None:
    record = node.stage(version, digest)
    node.catalogue.begin_push(record)
    node.catalogue.go_live(record, None)  # type: ignore[arg-type]


# --- hello -----------------------------------------------------------------------------------------------------------


async def test_worker_is_welcomed_with_the_terms_of_its_link(node: FakeNode) -> None:
    worker = node.worker("a", gpu="gpu-1")
    welcome = worker.welcome
    assert welcome is not None
    assert (welcome.protocol, welcome.generation, welcome.handoff, welcome.hold) == (1, "g", "/nowhere", False)
    assert welcome.heartbeat_seconds == node.config.deadlines.heartbeat_interval_seconds
    assert welcome.tether == (1).to_bytes(32, "little")


async def test_worker_that_names_no_gpu_gets_one_by_its_rank(node: FakeNode) -> None:
    for rank in range(3):
        node.worker("a", rank=rank, world_size=3)
    assert [worker.gpu_name for worker in node.engine("a").workers.values()] == ["gpu-0", "gpu-1", "gpu-0"]


@pytest.mark.parametrize(
    ("hello", "error", "says"),
    [
        ({"protocol": 2}, ProtocolError, "protocol 2; this daemon speaks 1 to 1"),
        ({"protocol": 0}, ProtocolError, "protocol 0"),
        ({"protocol": -(1 << 63)}, ProtocolError, "protocol"),
        ({"rank": -1}, ProtocolError, "rank -1 of 1"),
        ({"rank": 1}, ProtocolError, "rank 1 of 1"),
        ({"world_size": 0}, ProtocolError, "rank 0 of 0"),
        ({"world_size": 4097}, ProtocolError, "rank 0 of 4097"),
        ({"rank": (1 << 64) - 2, "world_size": (1 << 64) - 1}, ProtocolError, "rank"),
        ({"incarnation": ""}, ProtocolError, "incarnation"),
        ({"model": "m" * 257}, ProtocolError, "256 characters"),
        ({"kind": "vllm"}, MisuseError, "no plugin for engines of kind 'vllm'; installed: torch"),
        ({"gpu": "GPU-0"}, MisuseError, "'GPU-0' is not this node's: gpu-0, gpu-1"),
    ],
)
async def test_hello_that_makes_no_sense_is_refused(
    hello: dict[str, Any], error: type[CpeError], says: str, node: FakeNode
) -> None:
    node.worker("known")
    before = described(node)
    worker = FakeWorker(node, "a", **hello)
    with pytest.raises(error, match=says):
        worker.attach()
    assert worker.welcome is None
    assert described(node) == before
    with pytest.raises(ProtocolError, match="hello first"):
        worker.say(Ping())


@pytest.mark.parametrize("name", ["", "n" * 257])
async def test_engine_needs_a_name_of_bounded_length(name: str, node: FakeNode) -> None:
    with pytest.raises(ProtocolError, match="name of 1 to 256"):
        node.worker(name)
    assert described(node) == []


async def test_gpu_must_be_named_where_there_are_real_ones(node: FakeNode) -> None:
    node.device.kind = "cuda"
    with pytest.raises(MisuseError, match="not this node's"):
        node.worker("a")
    assert node.worker("a", gpu="gpu-0").welcome is not None


async def test_taken_rank_is_refused_to_another_process(node: FakeNode) -> None:
    first = node.worker("a", incarnation="first")
    before = described(node)
    with pytest.raises(BusyError, match=r"engine 'a' rank 0 .* is attached already"):
        node.worker("a", incarnation="second")
    assert described(node) == before
    node.bye(first)
    assert node.worker("a", incarnation="second").welcome is not None


@pytest.mark.parametrize("differs", [{"world_size": 3}, {"model": "other"}, {"kind": "other"}])
async def test_worker_that_contradicts_its_siblings_is_refused(differs: dict[str, Any], node: FakeNode) -> None:
    node.drivers["other"] = TorchDriver
    node.worker("a", rank=0, world_size=2)
    before = described(node)
    with pytest.raises(MisuseError, match="engine 'a' has 2 ranks of kind torch"):
        node.worker("a", **({"rank": 1, "world_size": 2} | differs))
    assert described(node) == before


async def test_engine_may_return_as_another_when_nobody_is_left(node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]
    for worker in workers:
        worker.die()
    node.worker("a", rank=0, world_size=1, model="m", incarnation="new")
    assert (node.engine("a").world_size, node.engine("a").model) == (1, "m")
    assert node.engine("a").complete


# --- a refused hello changes nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello",
    [
        {"engine": "b", "incarnation": "another"},
        {"engine": "b", "rank": 1, "world_size": 3},
        {"engine": "a", "protocol": 9},
        {"engine": "a", "gpu": "GPU-7"},
        {"engine": "a", "rank": 1, "world_size": 2, "kind": "vllm"},
        {"engine": "a", "rank": 1, "world_size": 5},
    ],
)
async def test_refused_hello_of_an_attached_worker_leaves_it_attached(hello: dict[str, Any], node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2, content=ONE) for rank in range(2)]
    node.worker("b", content=ONE)
    before = described(node)
    engine = hello.pop("engine")
    impostor = FakeWorker(node, engine, **hello)
    impostor.peer = workers[1].peer
    with pytest.raises(CpeError):
        impostor.attach()
    assert described(node) == before
    workers[1].say(Ping())


async def test_hello_that_cannot_be_tied_changes_nothing(node: FakeNode) -> None:
    worker = node.worker("a", content=ONE)
    before = described(node)

    def exhausted(on_gone: Any) -> bytes:
        raise ResourceError("too many open files")

    node.ties.tie = exhausted  # type: ignore[method-assign]
    for newcomer in (FakeWorker(node, "new"), worker):
        with pytest.raises(ResourceError):
            newcomer.attach()
    assert described(node) == before
    worker.say(Ping())


async def test_driver_that_cannot_be_made_changes_nothing(node: FakeNode) -> None:
    class Broken(TorchDriver):
        def __init__(self, engine: str, workers: Workers) -> None:
            raise ZeroDivisionError

    node.drivers["broken"] = Broken
    with pytest.raises(ZeroDivisionError):
        node.worker("a", kind="broken")
    assert described(node) == []
    assert node.ties.on_gone == []


# --- what an engine holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "touched", "expected"),
    [
        ([None], [False], (CURRENT, None)),
        ([ONE], [False], (CURRENT, ONE)),
        ([ONE, ONE], [False, False], (CURRENT, ONE)),
        ([None, None], [False, False], (CURRENT, None)),
        ([ONE, TWO], [False, False], (UNKNOWN, None)),
        ([ONE, None], [False, False], (UNKNOWN, None)),
        ([None, ONE], [False, False], (UNKNOWN, None)),
        ([ONE], [True], (UNKNOWN, None)),
        ([ONE, ONE], [False, True], (UNKNOWN, None)),
        ([ONE, ONE], [True, False], (UNKNOWN, None)),
        ([ONE, ONE, TWO], [False, False, False], (UNKNOWN, None)),
    ],
)
async def test_engine_holds_what_all_its_workers_say(
    contents: list[Any], touched: list[bool], expected: tuple[str, Any], node: FakeNode
) -> None:
    joined: list[Engine] = []
    node.registry.on_joined(joined.append)
    for rank, (content, mixed) in enumerate(zip(contents, touched, strict=True)):
        assert joined == []
        node.worker("a", rank=rank, world_size=len(contents), content=content, touched=mixed)
    assert node.states() == {"a": expected}
    assert [engine.name for engine in joined] == ["a"]
    assert node.engine("a").ready is (expected[0] == CURRENT)
    assert node.engine("a").in_doubt is (expected[0] == UNKNOWN)


@pytest.mark.parametrize(
    ("live_version", "content", "touched", "hold"),
    [
        (None, None, False, False),
        (None, ONE, False, False),
        (None, ONE, True, True),
        (TWO, TWO, False, False),
        (TWO, TWO, True, True),
        (TWO, ONE, False, True),
        (TWO, None, False, True),
    ],
)
async def test_worker_holds_still_unless_it_has_what_is_live(
    live_version: Any, content: Any, *, touched: bool, hold: bool, node: FakeNode
) -> None:
    if live_version is not None:
        live(node, live_version)
    welcome = node.worker("a", content=content, touched=touched).welcome
    assert welcome is not None
    assert welcome.hold is hold


@pytest.mark.parametrize(
    ("says", "same"), [(DIGEST, True), (b"", True), (OTHER, False)], ids=["its digest", "no digest", "another"]
)
async def test_engine_that_holds_other_weights_by_the_live_version_s_name_does_not_serve_them(
    says: bytes, *, same: bool, node: FakeNode
) -> None:
    live(node, TWO, DIGEST)
    welcome = node.worker("a", content=TWO, digest=says).welcome
    assert welcome is not None
    assert welcome.hold is not same
    assert node.states() == {"a": (CURRENT, TWO) if same else (UNKNOWN, None)}


async def test_engine_whose_workers_hold_other_weights_by_one_name_is_in_doubt(node: FakeNode) -> None:
    node.worker("a", rank=0, world_size=3, content=ONE, digest=DIGEST)
    unknown = node.worker("a", rank=1, world_size=3, content=ONE).welcome
    other = node.worker("a", rank=2, world_size=3, content=ONE, digest=OTHER).welcome
    assert [unknown and unknown.hold, other and other.hold] == [False, True]
    assert node.states() == {"a": (UNKNOWN, None)}
    assert node.engine("a").digest == b""


async def test_worker_holds_still_if_its_siblings_hold_something_else(node: FakeNode) -> None:
    first, second, third = (
        node.worker("a", rank=rank, world_size=3, content=content) for rank, content in enumerate((ONE, None, ONE))
    )
    held = [worker.welcome.hold for worker in (first, second, third) if worker.welcome]
    assert held == [False, True, True]


async def test_live_version_of_another_model_keeps_nobody_from_serving(node: FakeNode) -> None:
    live(node, number(1, "other"))
    welcome = node.worker("a", model="m").welcome
    assert welcome is not None
    assert not welcome.hold


# --- whose versions an engine takes ----------------------------------------------------------------------------------


async def test_engine_that_says_no_model_is_refused_where_two_are_live(node: FakeNode) -> None:
    live(node, number(1, "a"))
    assert node.worker("before").welcome is not None
    live(node, number(1, "b"))
    before = described(node)
    with pytest.raises(
        MisuseError, match=r"engine 'e' says no model, and this node serves a, b: attach it with model="
    ):
        node.worker("e")
    assert described(node) == before
    assert node.worker("e", model="a").welcome is not None


@pytest.mark.parametrize("held", [1, 2])
async def test_engine_that_says_no_model_is_asked_what_it_holds(held: int, node: FakeNode) -> None:
    """It was attached to a daemon that is no more; one that holds what is not live may not serve it."""
    live(node, number(2, "a"))
    live(node, number(1, "b"))
    welcome = node.worker("e", content=number(held, "a")).welcome
    assert node.engine("e").serves == "a"
    assert welcome is not None
    assert welcome.hold is (held != 2)


async def test_sibling_says_the_model_for_one_that_does_not(node: FakeNode) -> None:
    live(node, number(1, "a"))
    live(node, number(1, "b"))
    node.worker("e", rank=0, world_size=2, content=number(1, "a"))
    fresh = node.worker("e", rank=1, world_size=2)
    assert fresh.welcome is not None
    assert fresh.welcome.hold


# --- what an operator expects ----------------------------------------------------------------------------------------


@pytest.fixture
async def expecting(tmp_path: Path) -> AsyncIterator[FakeNode]:
    """A node that expects an engine of model m with two ranks."""
    made = FakeNode(state_dir=tmp_path)
    await made.expected.add(EngineSpec("e", "torch", "m", world_size=2))
    yield made
    made.arena.close()


async def test_expected_engine_is_absent_until_a_worker_comes_and_after_the_last_has_left(expecting: FakeNode) -> None:
    registry = expecting.registry
    assert [spec.name for spec in registry.absent] == ["e"]
    worker = expecting.worker("e", world_size=2)
    assert registry.absent == []
    expecting.bye(worker)
    assert [spec.name for spec in registry.absent] == ["e"]


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        ({"world_size": 1}, "world size 2 and has world size 1"),
        ({"world_size": 2, "model": "other"}, "model m and has model other"),
        ({"world_size": 2, "content": number(1, "other")}, "model m and has model other"),
        ({"world_size": 2, "kind": "other"}, "kind torch and has kind other"),
    ],
)
async def test_worker_of_another_engine_than_expected_is_refused(
    hello: dict[str, Any], says: str, expecting: FakeNode
) -> None:
    expecting.drivers["other"] = TorchDriver
    with pytest.raises(MisuseError, match=f"engine 'e' is expected with {says}; .*cpe engine remove e"):
        expecting.worker("e", **hello)
    assert described(expecting) == []
    assert expecting.worker("another", **hello).welcome is not None


async def test_engine_that_says_no_model_takes_the_one_that_it_is_expected_with(expecting: FakeNode) -> None:
    live(expecting, number(1, "m"))
    live(expecting, number(1, "other"))
    welcome = expecting.worker("e", world_size=2).welcome
    assert expecting.engine("e").serves == "m"
    assert welcome is not None
    assert welcome.hold


async def test_engine_is_forgotten_only_without_workers(node: FakeNode) -> None:
    worker = node.worker("a")
    node.registry.forget("a")
    assert node.registry.find("a") is not None
    worker.die()
    node.registry.forget("a")
    assert node.registry.find("a") is None
    node.registry.forget("a")


# --- leaving and coming back -----------------------------------------------------------------------------------------


async def test_dead_worker_leaves_its_engine_in_doubt(node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2, content=ONE) for rank in range(2)]
    workers[0].die()
    engine = node.engine("a")
    assert (engine.state, engine.content, engine.complete) == ("unknown", None, False)
    assert isinstance(engine.error, PeerLostError)
    assert "engine 'a' rank 0 (pid 0, GPU gpu-0) is gone: its process ended" in engine.error.message
    assert node.ties.withdrawn == [workers[0].welcome.tether]  # type: ignore[union-attr]
    with pytest.raises(ProtocolError, match="hello first"):
        workers[0].say(Ping())
    workers[1].say(Ping())


async def test_same_death_twice_is_one(node: FakeNode) -> None:
    worker = node.worker("a")
    worker.die()
    again = node.worker("a", incarnation="again")
    worker.die()
    assert node.engine("a").complete
    again.say(Ping())


async def test_returning_process_takes_its_own_place(node: FakeNode) -> None:
    """Its daemon was slow, or its link was cut: it connects anew, under another address, and is still itself."""
    first = node.worker("a", incarnation="same", content=ONE)
    again = node.worker("a", incarnation="same", content=ONE)
    assert node.states() == {"a": (CURRENT, ONE)}
    assert node.ties.withdrawn == [first.welcome.tether]  # type: ignore[union-attr]
    with pytest.raises(ProtocolError):
        first.say(Ping())
    again.say(Ping())
    first.die()  # the old tether's end comes late
    assert node.states() == {"a": (CURRENT, ONE)}


async def test_hello_said_twice_is_answered_twice(node: FakeNode) -> None:
    worker = node.worker("a", content=ONE)
    first = worker.welcome
    worker.attach()
    assert worker.welcome is not None
    assert first is not None
    assert worker.welcome.tether != first.tether
    assert node.ties.withdrawn == [first.tether]
    assert node.states() == {"a": (CURRENT, ONE)}


async def test_worker_may_move_to_another_engine(node: FakeNode) -> None:
    worker = node.worker("a", content=ONE)
    moved = FakeWorker(node, "b", content=ONE)
    moved.peer = worker.peer
    node.workers[worker.peer] = moved
    moved.attach()
    assert node.states() == {"a": (UNKNOWN, None), "b": (CURRENT, ONE)}
    assert not node.engine("a").workers


async def test_engine_that_detaches_is_forgotten_with_its_last_worker(node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2) for rank in range(2)]
    node.bye(workers[0])
    assert [engine.name for engine in node.registry] == ["a"]
    node.bye(workers[1])
    assert list(node.registry) == []


async def test_engine_that_was_lost_is_remembered(node: FakeNode) -> None:
    node.worker("a").die()
    assert node.states() == {"a": (UNKNOWN, None)}


async def test_memory_of_lost_engines_is_bounded(node: FakeNode) -> None:
    node.worker("serving", content=ONE)
    for index in range(100):
        node.worker(f"lost-{index}").die()
    names = [engine.name for engine in node.registry]
    assert len(names) == 65
    assert names[0] == "serving"
    assert names[-1] == "lost-99"


async def test_silent_worker_is_given_up(node: FakeNode) -> None:
    silent, speaking = node.worker("silent"), node.worker("speaking")
    limit = node.config.deadlines.heartbeat_lost_seconds
    node.clock.now += limit
    speaking.say(Ping())
    node.registry.check_deadlines()
    assert node.engine("silent").workers
    node.clock.now += 0.5
    node.registry.check_deadlines()
    assert not node.engine("silent").workers
    assert node.engine("speaking").workers
    error = node.engine("silent").error
    assert error is not None
    assert "silent for 10 s" in error.message
    with pytest.raises(ProtocolError):
        silent.say(Ping())


async def test_worker_at_work_may_be_silent(node: FakeNode) -> None:
    """It loads; its step's own deadline watches it."""
    worker = node.worker("a")
    worker.hang("pause")
    handle = node.engine("a").workers[0]
    answer = handle.post(Pause(1, 60.0), 60.0)
    node.clock.now += 1000.0
    node.registry.check_deadlines()
    assert node.engine("a").workers
    worker.say(StepDone(1, "pause"))
    assert (await answer).step == "pause"
    await asyncio.sleep(0)
    assert not handle.busy


async def test_engine_that_lacks_workers_is_complained_of_once(node: FakeNode) -> None:
    worker = node.worker("a", rank=1, world_size=4)
    limit = node.config.deadlines.hello_seconds
    node.clock.now += limit
    worker.say(Ping())
    node.registry.check_deadlines()
    assert node.engine("a").error is None
    node.clock.now += 0.001
    node.registry.check_deadlines()
    error = node.engine("a").error
    assert isinstance(error, DeadlineError)
    assert "engine 'a': ranks [0, 2, 3] of 4 are not attached after 10 s" in error.message


# --- answers to steps ------------------------------------------------------------------------------------------------


async def test_answer_of_a_stranger_is_refused(node: FakeNode) -> None:
    stranger = FakeWorker(node, "a")
    for message in (StepDone(1, "load"), Ping(), WorkerBye()):
        with pytest.raises(ProtocolError, match="hello first"):
            stranger.say(message)
    assert described(node) == []


async def test_answer_that_nobody_waits_for_changes_nothing(node: FakeNode) -> None:
    worker = node.worker("a", content=ONE)
    before = described(node)
    for message in (StepDone(1, "load"), StepDone(-1, "abort", touched=True), StepDone(1 << 63, "")):
        worker.say(message)
    assert described(node) == before


async def test_answer_counts_for_its_own_step_alone(node: FakeNode) -> None:
    worker = node.worker("a")
    worker.hang("pause")
    waiting = node.engine("a").workers[0].post(Pause(3, 1.0), 60.0)
    for answer in (StepDone(2, "pause"), StepDone(3, "begin"), StepDone(3, "pause", 1), StepDone(4, "resume")):
        worker.say(answer)
    assert not waiting.done()
    worker.say(StepDone(3, "pause", seconds=0.25))
    worker.say(StepDone(3, "pause", seconds=9.0))
    assert (await waiting).seconds == 0.25


async def test_waiting_ends_when_the_worker_does(node: FakeNode) -> None:
    worker = node.worker("a")
    worker.hang("pause")
    handle = node.engine("a").workers[0]
    waiting = handle.post(Pause(3, 1.0), 60.0)
    worker.die()
    with pytest.raises(PeerLostError, match="its process ended"):
        await waiting
    with pytest.raises(PeerLostError, match="its process ended"):
        await handle.post(Pause(4, 1.0), 60.0)


async def test_failure_names_worker_and_step(node: FakeNode) -> None:
    worker = node.worker("a", pid=17)
    worker.fail("pause", "no such layer")
    with pytest.raises(CpeError, match=r"engine 'a' rank 0 \(pid 17, GPU gpu-0\) could not pause: no such layer"):
        await node.engine("a").workers[0].step(Pause(3, 1.0), 60.0)


async def test_step_that_nobody_awaits_any_more_is_forgotten(node: FakeNode) -> None:
    worker = node.worker("a")
    worker.hang("pause")
    handle = node.engine("a").workers[0]
    waiting = handle.post(Pause(3, 1.0), 60.0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not handle.busy
    worker.say(StepDone(3, "pause"))


async def test_late_answer_is_a_deadline_error_that_names_the_worker(node: FakeNode) -> None:
    worker = node.worker("a")
    worker.hang("pause")
    handle = node.engine("a").workers[0]
    with pytest.raises(DeadlineError, match=r"engine 'a' rank 0 .* did not pause within 0\.01 s"):
        await handle.post(Pause(3, 1.0), 0.01)
    await asyncio.sleep(0)
    assert not handle.busy
    worker.say(StepFailed(3, "pause", ErrorInfo("deadline", "it comes late as well")))


# --- where an engine's API is ----------------------------------------------------------------------------------------


async def test_leader_of_an_engine_says_where_its_api_is(node: FakeNode) -> None:
    node.worker("a", rank=0, world_size=3, leader=True, url="http://127.0.0.1:8000")
    for rank, url in ((1, "http://127.0.0.1:9000"), (2, "")):
        node.worker("a", rank=rank, world_size=3, leader=False, url=url)
    assert node.engine("a").url == "http://127.0.0.1:8000"
    node.worker("b", url="http://127.0.0.1:8001")  # of an older release: each of its workers leads
    assert node.engine("b").url == "http://127.0.0.1:8001"
