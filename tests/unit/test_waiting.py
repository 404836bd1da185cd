"""Who waits for a version hears of it when it is live, when it has failed, or when the time is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from cpe_daemon.core.types import VersionId
from cpe_daemon.daemon import waiting as module
from cpe_daemon.daemon.waiting import MAX_OF_ONE, MAX_WAITERS, Waiting
from cpe_daemon.errors import (
    BusyError,
    CpeError,
    ManifestError,
    MisuseError,
    PeerLostError,
    ProtocolError,
    VersionRefusedError,
)
from cpe_daemon.ingest.session import Session
from cpe_daemon.push.rollback import Rollback
from cpe_daemon.wire.messages import ErrorReply, Message, TrainerWait, WaitReply, WaitRequest
from tests.unit.fake_node import FakeNode, number

ONE, TWO, THREE = number(1), number(2), number(3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Desk:
    """A node, those who wait at it, and the socket that they are answered through."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.sessions: dict[bytes, Any] = {}
        self.answers: dict[bytes, asyncio.Queue[Message]] = {}
        self.waiting = Waiting(node.catalogue, session=self.session, automatic=node.config.push.automatic)
        self.waiting.connect(self)

    def session(self, peer: bytes) -> Session:
        if peer not in self.sessions:
            raise ProtocolError("say hello first")
        return cast("Session", self.sessions[peer])

    def trainer(self, peer: bytes, model: str = "m", run: str = "r") -> Any:
        self.sessions[peer] = SimpleNamespace(hello=SimpleNamespace(model=model, run=run), gone=False)
        return self.sessions[peer]

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        self.answers.setdefault(peer, asyncio.Queue()).put_nowait(message)
        return True

    def client(self, peer: bytes) -> str:
        return peer.decode()

    def say(self, message: Message, peer: bytes = b"o") -> None:
        self.waiting.handlers()[type(message)](peer, message, ())

    def told(self, peer: bytes = b"o") -> list[Message]:
        queue = self.answers.get(peer, asyncio.Queue())
        return [queue.get_nowait() for _ in range(queue.qsize())]

    async def refused(self, peer: bytes = b"o") -> str:
        async with asyncio.timeout(20):
            answer = await self.answers.setdefault(peer, asyncio.Queue()).get()
        assert isinstance(answer, ErrorReply), answer
        return f"{answer.error.code}: {answer.error.message}"


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with FakeNode.running(retain=2) as node:
        desk = Desk(node)
        yield desk
        desk.waiting.close()


@pytest.fixture
async def held_back() -> AsyncIterator[Desk]:
    """Nothing is pushed by itself."""
    async with FakeNode.running(automatic=False) as node:
        desk = Desk(node)
        yield desk
        desk.waiting.close()


async def test_version_that_is_live_is_told_at_once(desk: Desk) -> None:
    await desk.node.publish(TWO)
    for n in (2, 1, 0):
        desk.say(WaitRequest(n, 60.0, "m", "r"))
        assert desk.told() == [WaitReply(TWO)]
    assert len(desk.waiting) == 0


async def test_version_is_told_when_it_is_live(desk: Desk) -> None:
    desk.say(WaitRequest(2, 60.0, "m"))
    await desk.node.publish(ONE)
    assert (desk.told(), len(desk.waiting)) == ([], 1)
    await desk.node.publish(TWO)
    assert (desk.told(), len(desk.waiting)) == ([WaitReply(TWO)], 0)
    await desk.node.publish(THREE)
    assert desk.told() == []


async def test_later_version_of_the_run_will_do(desk: Desk) -> None:
    desk.say(WaitRequest(2, 60.0, "m", "r"))
    await desk.node.publish(THREE)
    assert desk.told() == [WaitReply(THREE)]


async def test_version_that_was_rolled_back_is_waited_for_again(desk: Desk) -> None:
    await desk.node.publish(ONE)
    await desk.node.publish(TWO)
    await desk.node.pusher.request(Rollback("m"))
    desk.say(WaitRequest(2, 60.0, "m"))
    assert desk.told() == []
    await desk.node.pusher.request(Rollback("m"))
    assert desk.told() == [WaitReply(TWO)]


async def test_version_of_another_run_or_model_will_not_do(desk: Desk) -> None:
    await desk.node.publish(VersionId("m", "old", 9))
    desk.say(WaitRequest(1, 60.0, "m", "new"), b"named")
    desk.say(WaitRequest(1, 60.0, "other"), b"other")
    desk.node.clock.now += 1.0
    record = desk.node.catalogue.open(VersionId("m", "new", 0), 1)
    desk.say(WaitRequest(1, 60.0, "m"), b"newest")
    assert desk.told(b"newest") == desk.told(b"named") == desk.told(b"other") == []
    desk.node.catalogue.fail(record, PeerLostError("gone"))
    live = VersionId("m", "new", 1)
    await desk.node.publish(live)
    assert desk.told(b"newest") == desk.told(b"named") == [WaitReply(live)]
    assert desk.told(b"other") == []


async def test_version_that_was_refused_begins_no_run(desk: Desk) -> None:
    """A checkpoint of another model, say, that somebody published by mistake: what is served is what it was."""
    await desk.node.publish(THREE)
    desk.node.clock.now += 1.0
    refused = desk.node.catalogue.open(VersionId("m", "manual", 7), 1)
    desk.node.catalogue.fail(refused, ManifestError("no tensor here is called w"))
    desk.say(WaitRequest(3, 60.0, "m"))
    assert desk.told() == [WaitReply(THREE)]
    with pytest.raises(ManifestError, match="m@manual#7 has failed: no tensor here is called w"):
        desk.say(WaitRequest(7, 60.0, "m"), b"mistaken")
    desk.say(WaitRequest(7, 60.0, "m", "r"), b"other")
    assert desk.told(b"other") == []


async def test_model_need_not_be_said_where_there_is_one(desk: Desk) -> None:
    desk.say(WaitRequest(1, 60.0))
    await desk.node.publish(ONE)
    assert desk.told() == [WaitReply(ONE)]
    await desk.node.publish(number(1, "n"))
    with pytest.raises(MisuseError, match="this node holds versions of m, n: say which model is meant"):
        desk.say(WaitRequest(1, 60.0))


async def test_failure_is_told_when_it_happens_and_at_once_afterwards(desk: Desk) -> None:
    desk.say(WaitRequest(1, 60.0, "m", "r"))
    record = desk.node.catalogue.open(ONE, 1)
    desk.node.catalogue.fail(record, PeerLostError("the trainer died"))
    assert await desk.refused() == "peer_lost: m@r#1 has failed: the trainer died"
    with pytest.raises(PeerLostError, match="m@r#1 has failed"):
        desk.say(WaitRequest(1, 60.0, "m", "r"))
    assert len(desk.waiting) == 0


async def test_number_that_failed_and_comes_again_is_waited_for(desk: Desk) -> None:
    desk.node.catalogue.fail(desk.node.catalogue.open(ONE, 1), PeerLostError("the trainer died"))
    record = desk.node.catalogue.open(ONE, 1)
    desk.say(WaitRequest(1, 60.0, "m", "r"))
    assert (desk.told(), len(desk.waiting)) == ([], 1)
    desk.node.catalogue.fail(record, PeerLostError("again"))
    assert "again" in await desk.refused()


async def test_run_that_was_superseded_is_not_waited_for(desk: Desk) -> None:
    await desk.node.publish(ONE)
    desk.say(WaitRequest(2, 60.0, "m", "r"))
    await desk.node.publish(VersionId("m", "s", 0))
    assert await desk.refused() == "version_refused: m@r#2 will not be live: run 'r' was superseded by run 's'"
    with pytest.raises(VersionRefusedError):
        desk.say(WaitRequest(2, 60.0, "m", "r"))


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("nothing", "nothing of it has come; none is live"),
        ("live", "nothing of it has come; m@r#1 is live"),
        ("receiving", "m@r#2 is receiving, for ranks [0, 2] of 3 have not sealed; m@r#1 is live"),
    ],
)
async def test_deadline_tells_how_far_it_is(before: str, said: str, desk: Desk) -> None:
    if before != "nothing":
        await desk.node.publish(ONE)
    if before == "receiving":
        version = desk.node.catalogue.open(TWO, 3)
        for rank in (0, 1):
            desk.node.catalogue.contribute(version, rank, [], 0).sealed = rank == 1
    desk.say(WaitRequest(2, 0.0099998, "m", "r"))  # what is left of a client's time when it asks
    assert await desk.refused() == f"deadline: m@r#2 is not live after 0.01 s: {said}"
    assert len(desk.waiting) == 0


async def test_deadline_of_what_is_held_back_says_the_mend(held_back: Desk) -> None:
    held_back.node.stage(ONE)
    held_back.say(WaitRequest(1, 0.01, "m"))
    assert "m@r#1 is staged, and waits for `cpe push m`; none is live" in await held_back.refused()


async def test_trainer_waits_for_its_own_model_and_run(desk: Desk) -> None:
    desk.trainer(b"t")
    desk.say(TrainerWait(-7, 1, 60.0), b"t")
    desk.say(TrainerWait(-8, 1, 0.01, "other"), b"t")
    assert "m@other#1 is not live" in await desk.refused(b"t")
    await desk.node.publish(ONE)
    assert desk.told(b"t") == [WaitReply(ONE, -7)]
    with pytest.raises(ProtocolError, match="say hello first"):
        desk.say(TrainerWait(-1, 1, 60.0), b"stranger")


async def test_version_that_engines_serve_since_before_is_live(desk: Desk) -> None:
    before = [TWO]
    waiting = Waiting(desk.node.catalogue, session=desk.session, automatic=True, before=lambda: before)
    waiting.connect(desk)
    handler = waiting.handlers()[WaitRequest]
    handler(b"o", WaitRequest(1, 60.0), ())
    handler(b"o", WaitRequest(2, 60.0, "m", "r"), ())
    assert desk.told() == [WaitReply(TWO)] * 2
    for other in (WaitRequest(3, 60.0, "m"), WaitRequest(1, 60.0, "m", "other"), WaitRequest(1, 60.0, "n")):
        handler(b"o", other, ())
        assert desk.told() == []
    handler(b"o", WaitRequest(3, 60.0, "m"), ())
    before.clear()
    await desk.node.publish(THREE)
    assert desk.told() == [WaitReply(THREE)]
    waiting.close()


async def test_wait_that_is_said_again_is_one(desk: Desk) -> None:
    for _ in range(3):
        desk.say(WaitRequest(1, 60.0, "m"))
    assert len(desk.waiting) == 1
    await desk.node.publish(ONE)
    assert desk.told() == [WaitReply(ONE)]


async def test_those_who_wait_are_bounded_and_those_who_left_make_room(desk: Desk) -> None:
    sessions = [desk.trainer(b"%d" % index) for index in range(MAX_WAITERS)]
    for index in range(MAX_WAITERS):
        desk.say(TrainerWait(-1, 1, 60.0), b"%d" % index)
    with pytest.raises(BusyError, match="256 clients wait"):
        desk.say(WaitRequest(1, 60.0, "m"))
    sessions[3].gone = True
    desk.say(WaitRequest(1, 60.0, "m"))
    assert len(desk.waiting) == MAX_WAITERS


async def test_one_client_does_not_take_the_place_of_all(desk: Desk) -> None:
    desk.trainer(b"t")
    for stream in range(MAX_OF_ONE):
        desk.say(TrainerWait(-1 - stream, 1, 60.0), b"t")
    with pytest.raises(BusyError, match="this client waits for 16 versions already"):
        desk.say(TrainerWait(-99, 1, 60.0), b"t")
    desk.say(TrainerWait(-1, 1, 60.0), b"t")
    desk.say(WaitRequest(1, 60.0, "m"))
    assert len(desk.waiting) == MAX_OF_ONE + 1


async def test_operator_who_does_not_say_it_again_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_FORGOTTEN_SECONDS", 0.01)
    desk.say(WaitRequest(1, 60.0, "m"))
    await desk.node.until(lambda: len(desk.waiting) == 0)
    await desk.node.publish(ONE)
    assert desk.told() == []


async def test_trainer_whose_link_is_gone_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_FORGOTTEN_SECONDS", 0.01)
    session = desk.trainer(b"t")
    desk.say(TrainerWait(-1, 1, 60.0), b"t")
    session.gone = True
    await desk.node.until(lambda: len(desk.waiting) == 0)


@pytest.mark.parametrize(("n", "seconds"), [(-1, 1.0), (1, 0.0), (1, -1.0), (1, float("nan")), (1, float("inf"))])
async def test_wait_that_makes_no_sense_is_refused(n: int, seconds: float, desk: Desk) -> None:
    with pytest.raises(MisuseError, match="makes no sense"):
        desk.say(WaitRequest(n, seconds, "m"))
    assert len(desk.waiting) == 0


async def test_error_in_one_wait_ends_no_other(desk: Desk) -> None:
    desk.say(WaitRequest(1, 60.0), b"any")
    desk.say(WaitRequest(1, 60.0, "n"), b"n")
    await desk.node.publish(number(0, "m"))
    await desk.node.publish(number(1, "n"))
    assert isinstance(desk.told(b"any")[0], ErrorReply)
    assert desk.told(b"n") == [WaitReply(number(1, "n"))]
    assert issubclass(MisuseError, CpeError)
