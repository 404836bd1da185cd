"""The daemon's side of CURVE: it fails closed, follows its list, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
from structlog.testing import capture_logs

from cpe_daemon.core.rates import Rates
from cpe_daemon.core.roles import Role
from cpe_daemon.errors import AccessError, ConfigError, CpeError, PeerLostError, from_code
from cpe_daemon.links.allowed import ALLOWED, AllowedFile, Client, allow, revoke
from cpe_daemon.links.curve import Curve
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.keys import Credentials, KeyPair, new_pair, write_pair
from cpe_daemon.links.router import Handler, Router
from cpe_daemon.wire.messages import ErrorReply, FrontMessage, FrontReply, Message, Ping, Pong, StatusRequest

WAIT_SECONDS = 20.0
ANNE = new_pair()
SERVER = new_pair()
CREDENTIALS = Credentials(ANNE, SERVER.public)


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    write_pair(tmp_path, "daemon", SERVER)
    return tmp_path


def let_in(keys_dir: Path, pair: KeyPair, *roles: Role, name: str = "anne") -> None:
    allow(keys_dir / ALLOWED, Client(name, pair.public, frozenset(roles)))


class Door:
    """A router that takes keys, and says Pong to a Ping."""

    def __init__(self, curve: Curve, context: zmq.Context[zmq.Socket[bytes]], rates: Rates | None) -> None:
        self.counted: list[str] = []
        self.expected = 0
        self.all_counted = asyncio.Event()
        handlers: dict[type[Message], Handler] = {Ping: self.on_ping, StatusRequest: self.on_ping}
        self.router = Router(
            "remote",
            context,
            accepts=FrontMessage,
            handlers=handlers,
            max_frame_bytes=1 << 16,
            pair=curve.pair,
            access=curve.access,
            rates=rates,
            on_protocol_error=self.count,
        )
        self.endpoint = self.router.bind("tcp://127.0.0.1:0")
        self.router.start()

    def count(self, name: str) -> None:
        self.counted.append(name)
        if len(self.counted) >= self.expected:
            self.all_counted.set()

    def on_ping(self, peer: bytes, _message: object, _frames: object) -> None:
        self.router.send(peer, Pong("g"))

    async def ask(
        self, *messages: Message, credentials: Credentials | None = CREDENTIALS, seconds: float = WAIT_SECONDS
    ) -> list[Message]:
        """What is answered to messages over one connection."""
        return await asyncio.to_thread(ask, self.endpoint, messages, credentials, seconds)


def ask(endpoint: str, messages: tuple[Message, ...], credentials: Credentials | None, seconds: float) -> list[Message]:
    dealer, answers = Dealer(endpoint, FrontReply, credentials), []
    try:
        for message in messages:
            dealer.send(message, timeout=seconds)
            received = dealer.receive(WAIT_SECONDS)
            assert received is not None, "no answer came"
            answers.append(received[0])
    finally:
        dealer.close()
    return answers


def refusal(answer: Message) -> CpeError:
    assert isinstance(answer, ErrorReply), answer
    return from_code(answer.error.code, answer.error.message)


@asynccontextmanager
async def opened(curve: Curve, *, answers: bool = True, rates: Rates | None = None) -> AsyncIterator[Door]:
    with zmq.Context() as context:
        if answers:
            curve.open(context)
        answering = asyncio.create_task(curve.answer())
        door = Door(curve, context, rates)
        try:
            yield door
        finally:
            door.router.close()
            answering.cancel()
            await asyncio.wait([answering])
            curve.close()


@pytest.fixture
def curve(no_leaks: None, keys_dir: Path) -> Curve:
    let_in(keys_dir, ANNE, Role.TRAINER)
    made = Curve(keys_dir)
    made.load()
    return made


async def test_allowed_key_is_let_in(curve: Curve) -> None:
    with capture_logs() as logs:
        async with opened(curve) as door:
            assert await door.ask(Ping(), Ping()) == [Pong("g"), Pong("g")]
    (line,) = [line for line in logs if line["event"] == "client.connected"]
    assert (line["client"], line["address"]) == ("anne", "127.0.0.1")


async def test_nobody_is_let_in_while_nobody_answers(curve: Curve) -> None:
    async with opened(curve, answers=False) as door:
        with pytest.raises((AccessError, PeerLostError)):
            await door.ask(Ping(), seconds=3.0)


async def test_other_keys_are_refused_counted_and_logged_in_bounds(keys_dir: Path, curve: Curve) -> None:
    refused: list[None] = []
    curve._on_refused = lambda: refused.append(None)
    curve._refused = Rates(0.001, 20)  # however long it takes
    with capture_logs() as logs:
        async with opened(curve) as door:
            for _ in range(30):
                with pytest.raises(AccessError, match="does not allow this key"):
                    await door.ask(Ping(), credentials=Credentials(new_pair(), SERVER.public))
    assert len(refused) == 30
    assert len([line for line in logs if line["event"] == "client.refused"]) == 20


async def test_role_is_asked_for_each_message(curve: Curve) -> None:
    async with opened(curve) as door:
        pong, refused, again = await door.ask(Ping(), StatusRequest(), Ping())
        assert pong == again == Pong("g")
        assert isinstance(refusal(refused), AccessError)
        assert door.counted == ["remote"]


async def test_what_a_client_may_not_do_is_logged_by_its_name_in_bounds(keys_dir: Path, curve: Curve) -> None:
    async with opened(curve) as door:
        with capture_logs() as logs:
            await door.ask(*[StatusRequest()] * 20)
        warnings = [line for line in logs if line["event"] == "message.refused" and line["log_level"] == "warning"]
        assert len(warnings) == 5
        assert (warnings[0]["client"], warnings[0]["message"]) == ("anne", "StatusRequest")
        assert "has the role trainer" in warnings[0]["reason"]
        dealer = Dealer(door.endpoint, FrontReply, CREDENTIALS)
        try:
            await asyncio.to_thread(dealer.send, Ping())
            await asyncio.to_thread(dealer.receive, WAIT_SECONDS)
            revoke(keys_dir / ALLOWED, "anne")
            await curve.look()
            door.router._warnings = Rates(1.0, 5)
            with capture_logs() as logs:
                await asyncio.to_thread(dealer.send, Ping())
                assert isinstance((await asyncio.to_thread(dealer.receive, WAIT_SECONDS) or [None])[0], ErrorReply)
        finally:
            dealer.close()
    (line,) = [line for line in logs if line["event"] == "message.refused"]
    assert (line["log_level"], line["client"]) == ("warning", "anne")


async def test_revoked_key_is_refused_in_the_midst_of_a_connection(keys_dir: Path, curve: Curve) -> None:
    async with opened(curve) as door:
        dealer = Dealer(door.endpoint, FrontReply, CREDENTIALS)

        async def ping() -> Message:
            dealer.send(Ping())
            received = await asyncio.to_thread(dealer.receive, WAIT_SECONDS)
            assert received is not None
            return received[0]

        try:
            await asyncio.to_thread(dealer.send, Ping())
            assert (await asyncio.to_thread(dealer.receive, WAIT_SECONDS) or [None])[0] == Pong("g")
            revoke(keys_dir / ALLOWED, "anne")
            assert await curve.look()
            assert "any more" in refusal(await ping()).message
            let_in(keys_dir, ANNE, Role.TRAINER)
            assert await curve.look()
            assert await ping() == Pong("g")
        finally:
            dealer.close()


async def test_peer_is_told_once_a_second_that_it_speaks_too_often(curve: Curve) -> None:
    async with opened(curve, rates=Rates(0.001, burst=3)) as door:
        dealer = Dealer(door.endpoint, FrontReply, CREDENTIALS)
        try:
            door.expected = 47
            door.router._tellings = Rates(0.001, 1)  # a second of a busy machine's may hold fewer than all of them
            for _ in range(50):
                await asyncio.to_thread(dealer.send, Ping())
            answers = [(await asyncio.to_thread(dealer.receive, WAIT_SECONDS) or [None])[0] for _ in range(4)]
            assert answers[:3] == [Pong("g")] * 3
            assert isinstance(answers[3], ErrorReply)
            assert answers[3].error.code == "busy"
            await asyncio.wait_for(door.all_counted.wait(), 20)
            assert await asyncio.to_thread(dealer.receive, 0.05) is None
        finally:
            dealer.close()


async def test_look_keeps_the_last_good_list(keys_dir: Path, curve: Curve) -> None:
    assert not await curve.look()
    good = (keys_dir / ALLOWED).read_text()
    (keys_dir / ALLOWED).write_text("garbage\n")
    with capture_logs() as logs:
        assert not await curve.look()
        assert not await curve.look()
    assert [line["event"] for line in logs] == ["curve.list_refused"]
    assert "the one before it still is" in curve.trouble
    assert "allowed:1:" in curve.trouble
    assert ANNE.public in curve.access
    (keys_dir / ALLOWED).write_text(good)
    assert await curve.look()
    assert not curve.trouble


async def test_revocation_counts_after_reads_that_hang(
    keys_dir: Path, curve: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended, read = threading.Event(), AllowedFile.read_if_changed
    hanging: list[threading.Thread] = []

    def hang(file: AllowedFile) -> None:
        hanging.append(threading.current_thread())
        mended.wait()

    curve._patience.seconds = 0.01
    monkeypatch.setattr(AllowedFile, "read_if_changed", hang)
    with capture_logs() as logs:
        for _ in range(6):
            assert not await curve.look()
    assert "could not be read within 0.01 s" in curve.trouble
    assert [line["event"] for line in logs] == ["curve.list_refused"]
    assert len(hanging) == 4
    assert ANNE.public in curve.access
    mended.set()
    for thread in hanging:
        thread.join()
    monkeypatch.setattr(AllowedFile, "read_if_changed", read)
    curve._patience.seconds = 20.0
    revoke(keys_dir / ALLOWED, "anne")
    assert await curve.look()
    assert ANNE.public not in curve.access
    assert not curve.trouble


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "daemon.key_secret").unlink(), "cpe keys new --daemon --dir"),
        (lambda path: (path / "daemon.key_secret").chmod(0o644), "open to others"),
        (lambda path: (path / "daemon.key_secret").write_text("x"), "no key file"),
        (lambda path: (path / ALLOWED).write_text("x"), "allowed:1: has 1 fields"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_at_start(
    spoil: Callable[[Path], None], said: str, keys_dir: Path
) -> None:
    let_in(keys_dir, ANNE, Role.TRAINER)
    spoil(keys_dir)
    with pytest.raises(ConfigError, match=said):
        Curve(keys_dir).load()
