"""The daemon's side of ZeroMQ: it answers everybody, waits for nobody, and takes nothing that is not a message."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import structlog
import zmq

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import BusyError, ConfigError, ProtocolError, ResourceError
from cpe_daemon.links import router as router_module
from cpe_daemon.links.router import Handler, Router
from cpe_daemon.wire.codec import Codec, encode
from cpe_daemon.wire.messages import (
    ErrorReply,
    FrontMessage,
    FrontReply,
    Message,
    Ping,
    Pong,
    Seal,
    StatusRequest,
    Watch,
    WorkerBye,
)
from cpe_daemon.wire.reports import ErrorInfo

WAIT_SECONDS = 20.0
QUEUE = 16
LARGEST = 100_000

Context = zmq.Context[zmq.Socket[bytes]]


class Client:
    """A peer; everything it does waits off the loop, with a bound."""

    def __init__(self, context: Context, endpoint: str, identity: bytes = b"", queue: int = 100_000) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, queue)
        self.socket.setsockopt(zmq.SNDHWM, 100_000)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)
        self.codec = Codec(FrontReply)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames, flags=zmq.NOBLOCK)

    async def receive(self) -> tuple[Message, list[bytes]]:
        ready = await asyncio.to_thread(self.socket.poll, int(WAIT_SECONDS * 1000))
        assert ready, "no answer came"
        header, *frames = self.socket.recv_multipart(flags=zmq.NOBLOCK)
        return self.codec.decode(header), frames

    async def ask(self, *frames: bytes) -> Message:
        self.send(*frames)
        return (await self.receive())[0]


class Daemon:
    """A router that answers `Ping` with `Pong`, and what it saw."""

    def __init__(self, context: Context, path: Path, most_frames: int = 2) -> None:
        self.context = context
        self.endpoint = f"ipc://{path}"
        self.counted: list[str] = []
        self.seen: list[tuple[bytes, Message, list[bytes]]] = []
        self.peers: list[bytes] = []
        self.clients: list[Client] = []
        taken: dict[type[Message], Handler] = {Ping: self.on_ping, Seal: self.on_seal, Watch: self.on_watch}
        self.handle: Callable[[Watch], None] = lambda watch: None
        self.router = Router(
            "front",
            context,
            accepts=FrontMessage,
            handlers=taken,
            max_frame_bytes=LARGEST,
            most_frames=most_frames,
            queue=QUEUE,
            on_protocol_error=self.counted.append,
        )
        self.router.bind(self.endpoint)
        self.router.start()

    def on_ping(self, peer: bytes, message: Ping, frames: Sequence[memoryview]) -> None:
        if peer not in self.peers:
            self.peers.append(peer)
        self.seen.append((peer, message, [bytes(frame) for frame in frames]))
        self.router.send(peer, Pong("g"), *frames)

    def on_seal(self, peer: bytes, message: Seal, frames: Sequence[memoryview]) -> None:
        raise BusyError("later")

    def on_watch(self, peer: bytes, message: Watch, frames: Sequence[memoryview]) -> None:
        self.handle(message)

    def client(self, identity: bytes = b"", queue: int = 100_000) -> Client:
        self.clients.append(Client(self.context, self.endpoint, identity, queue))
        return self.clients[-1]

    async def introduced(self, identity: bytes = b"", queue: int = 100_000) -> tuple[Client, bytes]:
        client = self.client(identity, queue)
        await client.ask(encode(Ping()))
        return client, self.seen[-1][0]


def idle_router(context: Context) -> Router:
    return Router("other", context, accepts=FrontMessage, handlers={}, max_frame_bytes=LARGEST)


@pytest.fixture
async def daemon(no_leaks: None, runtime_dir: Path) -> AsyncIterator[Daemon]:
    context: Context = zmq.Context()
    made = Daemon(context, runtime_dir / "front.sock")
    yield made
    made.router.close()
    for client in made.clients:
        client.socket.close()
    context.term()


async def test_message_reaches_its_handler_and_the_answer_its_peer(daemon: Daemon) -> None:
    one, other = daemon.client(b"one"), daemon.client(b"other")
    one.send(encode(Ping()), b"bulk")
    assert await one.receive() == (Pong("g"), [b"bulk"])
    assert await other.ask(encode(Ping())) == Pong("g")
    assert daemon.seen == [(b"one", Ping(), [b"bulk"]), (b"other", Ping(), [])]
    assert daemon.counted == []


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", encode(Ping())],
        [b"garbage"],
        [b"garbage", *[b"x"] * 500],
        [encode(Ping())[:-1]],
        [encode(Ping()) + b"\0"],
        [encode(WorkerBye())],
        [encode(Pong("g"))],
        [b"\0" * LARGEST],
    ],
    ids=["empty", "REQ", "garbage", "many frames", "cut", "long", "other conversation", "an answer", "large"],
)
async def test_what_is_no_message_is_answered_and_counted(frames: list[bytes], daemon: Daemon) -> None:
    client = daemon.client()
    answer = await client.ask(*frames)
    assert isinstance(answer, ErrorReply)
    assert answer.error.code == "protocol"
    assert daemon.counted == ["front"]
    assert daemon.seen == []
    assert await client.ask(encode(Ping())) == Pong("g")


async def test_message_without_a_handler_is_answered_and_counted(daemon: Daemon) -> None:
    answer = await daemon.client().ask(encode(StatusRequest()))
    assert answer == ErrorReply(ErrorInfo("protocol", "StatusRequest is not accepted here"))
    assert daemon.counted == ["front"]


async def test_refusal_names_the_stream_and_is_no_protocol_error(daemon: Daemon) -> None:
    assert await daemon.client().ask(encode(Seal(7, b""))) == ErrorReply(ErrorInfo("busy", "later"), stream=7)
    assert daemon.counted == []


async def test_protocol_error_of_a_handler_is_counted(daemon: Daemon) -> None:
    def refuse(watch: Watch) -> None:
        raise ProtocolError("say hello first")

    daemon.handle = refuse
    answer = await daemon.client().ask(encode(Watch(VersionId("m", "r", 1))))
    assert answer == ErrorReply(ErrorInfo("protocol", "say hello first"))
    assert daemon.counted == ["front"]


async def test_bug_in_a_handler_is_logged_and_stalls_nobody(daemon: Daemon) -> None:
    def break_down(watch: Watch) -> None:
        raise ZeroDivisionError

    daemon.handle = break_down
    unlucky, other = daemon.client(), daemon.client()
    with structlog.testing.capture_logs() as logs:
        for _ in range(QUEUE // 2):
            unlucky.send(encode(Watch(VersionId("m", "r", 1))))
            other.send(encode(Ping()))
        for _ in range(QUEUE // 2):
            answer, _ = await unlucky.receive()
            assert isinstance(answer, ErrorReply)
            assert answer.error.code == "internal"
            assert "ZeroDivisionError" in answer.error.message
            assert await other.receive() == (Pong("g"), [])
    assert {log["event"] for log in logs} == {"message.failed"}


async def test_peer_that_reads_nothing_keeps_nobody_waiting(daemon: Daemon) -> None:
    slow, slow_name = await daemon.introduced(b"slow", queue=1)
    quick, quick_name = await daemon.introduced(b"quick")
    filler = b"\0" * 50_000
    sent = 0
    while daemon.router.send(slow_name, Pong("g"), filler):
        sent += 1
        assert sent < 10_000, "what a peer does not take has no bound"
    assert not daemon.router.send(slow_name, Pong("g"), filler)
    for _ in range(300):
        assert await quick.ask(encode(Ping())) == Pong("g")
    assert daemon.router.send(quick_name, Pong("h"))
    assert await quick.receive() == (Pong("h"), [])
    for _ in range(sent):
        assert await slow.receive() == (Pong("g"), [filler])
    assert await slow.ask(encode(Ping())) == Pong("g")  # and nothing half of the one that did not fit


async def test_flood_of_one_peer_leaves_the_loop_its_turns(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two bites of a flood every other task of the daemon runs."""
    monkeypatch.setattr(router_module, "_TURN", 8)
    client = daemon.client()
    turns: list[int] = []
    finished = asyncio.Event()

    async def other_task() -> None:
        while len(daemon.seen) < 2000:
            turns.append(len(daemon.seen))
            await asyncio.sleep(0)
        finished.set()

    for _ in range(2000):
        client.send(encode(Ping()))
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(other_task())
        await finished.wait()
    assert max(after - before for before, after in pairwise(turns)) <= 8


async def test_every_message_of_a_burst_is_answered(daemon: Daemon) -> None:
    """A send may swallow the edge that announces waiting messages: none may be left lying for that."""
    clients = [daemon.client() for _ in range(4)]
    for _ in range(50):
        for client in clients:
            for _ in range(10):
                client.send(encode(Ping()))
        for client in clients:
            for _ in range(10):
                assert await client.receive() == (Pong("g"), [])


async def test_answer_to_a_stranger_returns_false(daemon: Daemon) -> None:
    assert not daemon.router.send(b"nobody", Pong("g"))
    assert not daemon.router.send(b"", Pong("g"))
    assert not daemon.router.send_encoded(b"nobody", b"header", b"frame")


async def test_answer_to_a_dead_peer_returns_false(daemon: Daemon) -> None:
    client, name = await daemon.introduced(b"mortal")
    other, _ = await daemon.introduced()
    client.socket.close()
    async with asyncio.timeout(WAIT_SECONDS):
        while daemon.router.send(name, Pong("g")):
            await other.ask(encode(Ping()))
    assert not daemon.router.send(name, Pong("g"))
    assert await other.ask(encode(Ping())) == Pong("g")


async def test_returning_peer_takes_its_identity_over(daemon: Daemon) -> None:
    """Without ROUTER_HANDOVER a restarted peer is ignored while the daemon still sees its old connection."""
    before, name = await daemon.introduced(b"same")
    after, again = await daemon.introduced(b"same")
    assert name == again == b"same"
    assert daemon.router.send(name, Pong("for the new one"))
    assert await after.receive() == (Pong("for the new one"), [])
    assert not before.socket.poll(0)


async def test_frame_beyond_the_limit_cuts_only_its_sender_off(daemon: Daemon) -> None:
    rude, polite = daemon.client(), daemon.client()
    assert await polite.ask(encode(Ping())) == Pong("g")
    rude.send(encode(Ping()), b"\0" * (LARGEST + 1))
    assert await polite.ask(encode(Ping())) == Pong("g")
    assert await rude.ask(encode(Ping())) == Pong("g")  # it may connect anew; that message itself is gone
    assert [frames for _, _, frames in daemon.seen] == [[], [], []]
    assert daemon.counted == []


async def test_unknown_fields_are_counted_over_all_peers(daemon: Daemon) -> None:
    assert daemon.router.unknown_fields == 0


# --- the socket itself -----------------------------------------------------------------------------------------------


async def test_ipc_socket_is_for_owner_and_group_only_and_goes_with_the_router(daemon: Daemon) -> None:
    path = daemon.endpoint.removeprefix("ipc://")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    client, name = await daemon.introduced()
    daemon.router.close()
    assert not os.path.exists(path)  # noqa: ASYNC240 - of memory
    assert not daemon.router.send(name, Pong("g"))
    daemon.router.close()
    assert client.socket.poll(0) == 0


async def test_tcp_port_zero_is_replaced_by_the_one_chosen(daemon: Daemon) -> None:
    endpoint = daemon.router.bind("tcp://127.0.0.1:0")
    assert not endpoint.endswith(":0")
    client = Client(daemon.context, endpoint)
    daemon.clients.append(client)
    assert await client.ask(encode(Ping())) == Pong("g")
    with pytest.raises(ResourceError, match="Address already in use"):
        daemon.router.bind(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        ("ipc:///nonexistent/front.sock", ConfigError),
        ("tcp://192.0.2.1:1", ResourceError),
        ("http://x", ConfigError),
        ("", ConfigError),
    ],
)
async def test_endpoint_that_cannot_be_bound_is_named(endpoint: str, kind: type[Exception], daemon: Daemon) -> None:
    with pytest.raises(kind) as caught:
        daemon.router.bind(endpoint)
    assert endpoint in str(caught.value)


async def test_socket_of_another_daemon_is_neither_taken_nor_removed(daemon: Daemon) -> None:
    other = idle_router(daemon.context)
    with pytest.raises(ResourceError, match="another process does; stop that"):
        other.bind(daemon.endpoint)
    other.close()
    assert await daemon.client().ask(encode(Ping())) == Pong("g")


async def test_socket_that_was_left_behind_is_replaced_and_only_its_owner_removes_it(daemon: Daemon) -> None:
    path = daemon.endpoint.removeprefix("ipc://")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    other = idle_router(daemon.context)
    other.bind(daemon.endpoint)
    daemon.router.close()
    assert os.path.exists(path)  # noqa: ASYNC240 - of memory
    other.close()
    assert not os.path.exists(path)  # noqa: ASYNC240 - of memory


async def test_file_that_is_no_socket_is_kept(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="it is no socket"):
        daemon.router.bind(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "kept"


async def test_raw_bytes_at_the_socket_are_nobodys_message(daemon: Daemon) -> None:
    path = daemon.endpoint.removeprefix("ipc://")
    for request in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\xff" + b"\0" * 8 + b"\x7f"):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(request)
        await writer.drain()
        writer.close()
    assert await daemon.client().ask(encode(Ping())) == Pong("g")
    assert len(daemon.seen) == 1  # random bytes may look like frames of ZMTP 1.0; those are refused as any others


# --- limits --------------------------------------------------------------------------------------


async def test_message_of_many_frames_is_refused_once_and_what_follows_is_taken(daemon: Daemon) -> None:
    client = daemon.client()
    for number in (3, 4, 5, 5000):
        client.send(encode(Ping()), *[b"x"] * (number - 1))
        answer = await client.receive()
        assert answer == (ErrorReply(ErrorInfo("protocol", "a message has 1 to 2 frames")), [])
        assert await client.ask(encode(Ping())) == Pong("g")
    assert daemon.counted == ["front"] * 4
    assert len(daemon.seen) == 4


async def test_messages_of_one_router_may_have_more_frames_than_those_of_another(
    no_leaks: None, runtime_dir: Path
) -> None:
    with zmq.Context() as context:
        made = Daemon(context, runtime_dir / "front.sock", most_frames=9)
        client = made.client()
        client.send(encode(Ping()), *[b"x"] * 8)
        assert await client.receive() == (Pong("g"), [b"x"] * 8)
        for number in (10, 11, 12, 5000):
            client.send(encode(Ping()), *[b"x"] * (number - 1))
            answer = await client.receive()
            assert answer == (ErrorReply(ErrorInfo("protocol", "a message has 1 to 9 frames")), [])
            assert await client.ask(encode(Ping())) == Pong("g")
        made.router.close()
        client.socket.close()


async def test_others_are_served_while_a_long_message_is_thrown_away(daemon: Daemon) -> None:
    long, other = daemon.client(), daemon.client()
    for _ in range(50_000):
        long.socket.send(b"", zmq.SNDMORE)
    long.send(b"")
    assert await other.ask(encode(Ping())) == Pong("g")
    assert isinstance((await long.receive())[0], ErrorReply)


async def test_routing_id_of_a_key_is_refused_without_one(daemon: Daemon) -> None:
    answer = await daemon.client(b"k" + bytes(48)).ask(encode(Ping()))
    assert isinstance(answer, ErrorReply)
    assert answer.error.code == "access"
    assert daemon.counted == ["front"]
    assert await daemon.client(b"k" + bytes(47)).ask(encode(Ping())) == Pong("g")


async def test_socket_file_is_the_group_s_whatever_the_umask(
    no_leaks: None, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chmod", lambda *_: None)
    for umask in (0, 0o777):
        before = os.umask(umask)
        try:
            with zmq.Context() as context:
                made = Daemon(context, runtime_dir / "front.sock")
                assert stat.S_IMODE((runtime_dir / "front.sock").stat().st_mode) == 0o660
                made.router.close()
        finally:
            os.umask(before)


async def test_daemon_sends_no_heartbeats_of_libzmq(daemon: Daemon) -> None:
    """One that falls due for a peer which filled its queue and left aborts the process."""
    socket = daemon.router._socket
    assert socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
    assert socket.getsockopt(zmq.TCP_KEEPALIVE) == 1
    assert 0 < int(socket.getsockopt(zmq.RCVHWM)) <= 4096
