"""What operators ask for is done, answered, and bounded; what is refused changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from cpe_daemon.daemon.operations import MAX_REQUESTS, Operations
from cpe_daemon.engines.expected import Expected
from cpe_daemon.errors import BusyError, MisuseError, ProtocolError
from cpe_daemon.ingest.session import Session
from cpe_daemon.wire.messages import (
    Done,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    ErrorReply,
    Message,
    PushReply,
    PushRequest,
    RollbackRequest,
    TrainerHello,
    TrainerRollback,
)
from tests.unit.fake_node import CURRENT, FakeNode, number

ONE = number(1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Desk:
    """A node whose operations are asked, and the socket that they answer through."""

    def __init__(self, node: FakeNode, tasks: asyncio.TaskGroup, state_dir: Path) -> None:
        self.node = node
        self.state_dir = state_dir
        self.answers: dict[bytes, asyncio.Queue[Message]] = {}
        self.gone: set[bytes] = set()
        self.operations = Operations(pusher=node.pusher, registry=node.registry, tasks=tasks, session=self.session)
        self.operations.connect(self)

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        if peer in self.gone:
            return False
        self.answers.setdefault(peer, asyncio.Queue()).put_nowait(message)
        return True

    def client(self, peer: bytes) -> str:
        return peer.decode()

    def session(self, peer: bytes) -> Session:
        if not peer.startswith(b"trainer"):
            raise ProtocolError("say hello first")
        model = peer.decode().rpartition(" ")[2]
        return Session(peer, TrainerHello(1, model, "r", 0, 1), 4, 4096, 0.0)

    def say(self, message: Message, peer: bytes = b"operator") -> None:
        self.operations.handlers()[type(message)](peer, message, ())

    async def answer(self, peer: bytes = b"operator") -> Message:
        async with asyncio.timeout(20):
            return await self.answers.setdefault(peer, asyncio.Queue()).get()

    async def ask(self, message: Message) -> Message:
        self.say(message)
        return await self.answer()

    async def refused(self, message: Message) -> str:
        answer = await self.ask(message)
        assert isinstance(answer, ErrorReply)
        return f"{answer.error.code}: {answer.error.message}"

    def kept(self) -> list[EngineSpec]:
        """What a daemon that is started now would expect."""
        return list(Expected(self.state_dir / "engines.json", ["torch"]))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with FakeNode.running(automatic=False, state_dir=tmp_path) as node, asyncio.TaskGroup() as tasks:
        desk = Desk(node, tasks, tmp_path)
        yield desk
        desk.operations.close()


def add(name: str = "e", kind: str = "torch", model: str = "", world_size: int = 0) -> EngineAdd:
    return EngineAdd(EngineSpec(name, kind, model, "", world_size))


# --- pushes ----------------------------------------------------------------------------------------------------------


async def test_push_is_answered_with_its_report(desk: Desk) -> None:
    worker = desk.node.worker("a")
    desk.node.stage(ONE)
    answer = await desk.ask(PushRequest("m"))
    assert isinstance(answer, PushReply)
    assert (answer.report.version, answer.report.engines["a"].outcome) == (ONE, "updated")
    assert worker.content == ONE


async def test_push_that_is_not_possible_is_answered_with_the_reason(desk: Desk) -> None:
    assert await desk.refused(PushRequest("m")) == "misuse: no version of m is staged or live here; there is: none"


async def two_live(node: FakeNode, model: str = "m") -> None:
    """Have version 1 retained, and 2 live."""
    for n in (1, 2):
        version = node.stage(number(n, model))
        await node.pusher.request(PushRequest(model))
        assert version.state == "live"


async def test_operator_rolls_any_model_back(desk: Desk) -> None:
    await two_live(desk.node)
    answer = await desk.ask(RollbackRequest("m"))
    assert isinstance(answer, PushReply)
    assert (answer.report.version, answer.stream) == (ONE, 0)
    assert "misuse: no version of other is retained here" in await desk.refused(RollbackRequest("other"))


async def test_trainer_rolls_back_its_own_model_alone(desk: Desk) -> None:
    await two_live(desk.node)
    await two_live(desk.node, "other")
    desk.say(TrainerRollback(-3), b"trainer of other")
    answer = await desk.answer(b"trainer of other")
    assert isinstance(answer, PushReply)
    assert (answer.report.version, answer.stream) == (number(1, "other"), -3)
    assert {str(v.id): str(v.state) for v in desk.node.catalogue} == {
        "m@r#1": "retained",
        "m@r#2": "live",
        "other@r#1": "live",
        "other@r#2": "retained",
    }
    desk.say(TrainerRollback(-4, 9), b"trainer of m")
    refusal = await desk.answer(b"trainer of m")
    assert isinstance(refusal, ErrorReply)
    assert (refusal.error.code, refusal.stream) == ("misuse", -4)
    with pytest.raises(ProtocolError, match="say hello first"):
        desk.say(TrainerRollback(-1), b"stranger")


async def test_operator_who_leaves_does_not_end_the_push(desk: Desk) -> None:
    desk.node.worker("a")
    version = desk.node.stage(ONE)
    desk.gone.add(b"operator")
    desk.say(PushRequest("m"))
    await desk.node.until(lambda: version.state == "live")


async def test_requests_are_bounded_and_taken_again_when_some_are_done(desk: Desk) -> None:
    worker = desk.node.worker("a")
    desk.node.stage(ONE)
    worker.hang("finish")
    for index in range(MAX_REQUESTS):
        desk.say(PushRequest("m"), b"%d" % index)
    await desk.node.until(lambda: "finish" in worker.steps)
    with pytest.raises(BusyError, match="8 requests of operators are being carried out"):
        desk.say(PushRequest("m"))
    with pytest.raises(BusyError):
        desk.say(add())
    command = next(command for command in worker.commands if type(command).__name__ == "Finish")
    worker.say(worker.do(command))
    for index in range(MAX_REQUESTS):
        assert isinstance(await desk.answer(b"%d" % index), PushReply)
    assert isinstance(await desk.ask(add()), Done)


async def test_trainers_take_no_operator_s_place_nor_operators_theirs(desk: Desk) -> None:
    worker = desk.node.worker("a")
    desk.node.stage(ONE)
    worker.hang("finish")
    desk.say(PushRequest("m"), b"first")
    await desk.node.until(lambda: "finish" in worker.steps)
    for index in range(MAX_REQUESTS):
        desk.say(TrainerRollback(-1 - index), b"trainer of m")
    with pytest.raises(BusyError, match="8 requests of trainers are being carried out"):
        desk.say(TrainerRollback(-99), b"trainer of m")
    assert isinstance(await desk.ask(add()), Done)
    for index in range(1, MAX_REQUESTS):
        desk.say(PushRequest("m"), b"%d" % index)
    with pytest.raises(BusyError, match="8 requests of operators are being carried out"):
        desk.say(add())


async def test_push_that_waits_goes_with_the_operator_s_right_to_it(desk: Desk) -> None:
    worker = desk.node.worker("a")
    desk.node.stage(ONE)
    worker.hang("finish")
    desk.say(PushRequest("m"), b"bob")
    await desk.node.until(lambda: "finish" in worker.steps)
    desk.say(PushRequest("m"), b"anne")
    await desk.node.until(lambda: desk.node.pusher.waiting == 1)
    with structlog.testing.capture_logs() as logs:
        assert desk.operations.drop_pushes(lambda peer, kind: peer != b"anne" and kind is PushRequest) == [b"anne"]
        command = next(command for command in worker.commands if type(command).__name__ == "Finish")
        worker.say(worker.do(command))
        assert isinstance(await desk.answer(b"bob"), PushReply)
        assert isinstance(await desk.ask(add()), Done)
    assert b"anne" not in desk.answers
    assert worker.steps.count("finish") == 1
    assert [(line["event"], line["client"]) for line in logs if line["event"].startswith("operator")] == [
        ("operator.dropped", "anne")
    ]


async def test_what_operators_do_is_logged_by_their_names(desk: Desk) -> None:
    with structlog.testing.capture_logs() as logs:
        desk.say(PushRequest("m"), b"anne")
        await desk.answer(b"anne")
        desk.say(add(), b"bob")
        await desk.answer(b"bob")
    told = {line["event"]: line["client"] for line in logs if "client" in line}
    assert told == {"operator.push": "anne", "operator.refused": "anne", "engine.expected": "bob"}


async def test_endless_list_of_engines_is_refused(desk: Desk) -> None:
    with pytest.raises(MisuseError, match="1025 engines are named"):
        desk.say(PushRequest("m", engines=tuple(str(index) for index in range(1025))))


async def test_bug_is_answered_and_ends_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(desk.node.pusher, "request", broken)
    assert await desk.refused(PushRequest("m")) == "internal: ZeroDivisionError in the daemon, whose log has more"
    assert isinstance(await desk.ask(add()), Done)


async def test_requests_end_with_the_daemon(tmp_path: Path) -> None:
    node = FakeNode(state_dir=tmp_path)
    async with asyncio.timeout(20):
        async with asyncio.TaskGroup() as tasks:
            desk = Desk(node, tasks, tmp_path)
            desk.say(PushRequest("m"))
            await node.until(lambda: node.pusher.waiting == 1)
            desk.operations.close()
    with contextlib.suppress(KeyError):
        assert desk.answers[b"operator"].empty()
    node.arena.close()


# --- engines ---------------------------------------------------------------------------------------------------------


async def test_engine_is_expected_until_it_is_removed(desk: Desk) -> None:
    assert await desk.ask(add()) == Done("engine 'e' is expected from now on")
    assert [spec.name for spec in desk.node.registry.absent] == ["e"]
    assert [spec.name for spec in desk.kept()] == ["e"]
    assert await desk.ask(EngineRemove("e")) == Done("engine 'e' is forgotten")
    assert (desk.node.registry.absent, desk.kept()) == ([], [])


async def test_engine_that_is_attached_may_be_expected_as_it_is(desk: Desk) -> None:
    desk.node.worker("e", world_size=2, model="m")
    for wrong, says in (
        (add(world_size=4), "world size 4 and has world size 2"),
        (add(model="other"), "model other and has model m"),
    ):
        assert says in await desk.refused(wrong)
    assert desk.kept() == []
    assert await desk.ask(add(world_size=2)) == Done("engine 'e' is expected from now on; it is attached")


async def test_engine_that_said_no_model_takes_the_one_that_it_is_expected_with(desk: Desk) -> None:
    desk.node.worker("e")
    assert desk.node.engine("e").takes("x")
    await desk.ask(add(model="m"))
    assert not desk.node.engine("e").takes("x")


async def test_engine_that_was_killed_takes_the_model_that_it_is_expected_with_from_then_on(desk: Desk) -> None:
    desk.node.worker("e", content=number(1, "x")).die()
    assert not desk.node.engine("e").takes("m")
    assert await desk.ask(add(model="m")) == Done("engine 'e' is expected from now on")
    assert desk.node.engine("e").takes("m")
    desk.node.worker("e", incarnation="new")
    assert desk.node.engine("e").takes("m")
    assert not desk.node.engine("e").takes("x")


async def test_engine_that_was_killed_is_forgotten(desk: Desk) -> None:
    desk.node.worker("e").die()
    assert await desk.ask(EngineRemove("e")) == Done("engine 'e' is forgotten")
    assert desk.node.states() == {}


async def test_engine_that_was_killed_may_be_expected_as_another(desk: Desk) -> None:
    desk.node.worker("e", world_size=1).die()
    assert isinstance(await desk.ask(add(world_size=2)), Done)
    for rank in range(2):
        desk.node.worker("e", rank=rank, world_size=2, incarnation=f"new {rank}")
    assert desk.node.engine("e").complete


async def test_expectation_of_an_attached_engine_may_be_taken_back(desk: Desk) -> None:
    await desk.ask(add())
    desk.node.worker("e")
    answer = await desk.ask(EngineRemove("e"))
    assert answer == Done("engine 'e' is expected no longer; it is attached, and gets versions until it is stopped")
    assert desk.kept() == []
    desk.node.stage(ONE)
    assert isinstance(await desk.ask(PushRequest("m")), PushReply)
    assert desk.node.states() == {"e": (CURRENT, ONE)}


async def test_engine_that_is_attached_and_was_never_added_is_not_removed(desk: Desk) -> None:
    desk.node.worker("e")
    assert "is attached, and nobody added it: stop it" in await desk.refused(EngineRemove("e"))
    assert list(desk.node.states()) == ["e"]


async def test_engine_that_nobody_knows_is_not_removed(desk: Desk) -> None:
    await desk.ask(add("later"))
    assert await desk.refused(EngineRemove("e")) == "misuse: no engine 'e' is known here; there is: later"


async def test_refused_terms_are_not_kept(desk: Desk) -> None:
    assert "no plugin for engines of kind 'vllm' is installed; there is: torch" in await desk.refused(add(kind="vllm"))
    assert desk.kept() == []
