"""Garbage at every socket of a real daemon: none of it crashes, changes or costs anything, and each is counted.

The suite sends `MESSAGES` to each ZeroMQ endpoint. ``CPE_TEST_FUZZ=100000`` sends as many as a release is tried with,
in about two minutes. The hand-off socket takes one request a connection, and gets a twentieth of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import zmq
from xxhash import xxh3_128_digest

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.wire.codec import MAX_HEADER_BYTES, Codec, encode
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ChunkDone,
    EngineAdd,
    EngineRemove,
    EngineSpec,
    ErrorReply,
    EvictRequest,
    FrontMessage,
    FrontReply,
    ManifestPart,
    Message,
    OpenVersion,
    Ping,
    Pong,
    PushRequest,
    RollbackRequest,
    Seal,
    StatusRequest,
    StepDone,
    StepFailed,
    TrainerHello,
    VersionOpened,
    VersionStatus,
    WaitRequest,
    Watch,
    WorkerBye,
    WorkerCommand,
    WorkerHello,
    WorkerMessage,
    WorkerWelcome,
)
from cpe_daemon.wire.reports import ErrorInfo
from tests.integration.garbage import Frames, Garbage
from tests.integration.harness import MODEL, RUN, Daemon, Node
from tests.integration.processes import until
from tests.integration.raw import RawTrainer

MESSAGES = int(os.environ.get("CPE_TEST_FUZZ", "20000"))
HANDOFFS = max(1000, MESSAGES // 20)
RAW_CONNECTIONS = max(100, MESSAGES // 200)
WARM_UP = 3000
WINDOW = 64
"""Unanswered messages; the daemon drops answers only when hundreds wait."""

GROWTH_BYTES = 8 << 20
RECIPE = {"plain": 6, "nbytes": 64 << 10}
WAIT_MS = 20_000

pytestmark = pytest.mark.timeout(600)


# --- the client's side -----------------------------------------------------------------------------------------------


class Peer:
    """A DEALER that sends any bytes, and awaits one answer to each message."""

    def __init__(self, endpoint: str, answers: Any, identity: bytes = b"") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if identity:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.connect(endpoint)
        self._codec = Codec(answers)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self, wait_ms: int = WAIT_MS) -> Message | None:
        if not self._socket.poll(wait_ms):
            return None
        return self._codec.decode(self._socket.recv_multipart()[0])

    def ask(self, message: Message) -> Message | None:
        self.send(encode(message))
        return self.receive()

    def pour(self, garbage: Iterable[Frames], number: int) -> None:
        """Send so many; each has to be refused as a breach of the protocol."""
        for sent, frames in enumerate(itertools.islice(garbage, number)):
            if sent >= WINDOW:
                self._expect_refusal()
            self.send(*frames)
        for _ in range(min(number, WINDOW)):
            self._expect_refusal()
        assert self.receive(0) is None

    def _expect_refusal(self) -> None:
        answer = self.receive()
        assert isinstance(answer, ErrorReply), answer
        assert answer.error.code == "protocol", answer


def front(endpoint: str) -> Peer:
    return Peer(endpoint, FrontReply)


def engines(endpoint: str) -> Peer:
    return Peer(endpoint, WorkerCommand)


def state_of(daemon: Daemon) -> dict[str, Any]:
    """Its status without what changes by itself, and without the counters."""
    status = daemon.status()
    del status["counters"], status["daemon"]["uptime_seconds"], status["journal"]["written_at"]
    for version in status["versions"]:
        del version["age_seconds"]
    return status


def counted(daemon: Daemon, name: str) -> int:
    """Messages refused at one of its sockets."""
    return int(daemon.status()["counters"].get(f'cpe_protocol_errors_total{{socket="{name}"}}', 0))


@contextlib.contextmanager
def nothing_changes(daemon: Daemon) -> Iterator[None]:
    """The daemon's state, descriptors, threads and memory are afterwards what they were before."""
    before, usage = state_of(daemon), daemon.usage()
    yield
    assert state_of(daemon) == before
    until(lambda: daemon.usage()["fds"] <= usage["fds"], "what was connected is closed")
    after = daemon.usage()
    assert after["threads"] <= usage["threads"] + 4  # pools start their threads as they need them
    assert after["rss_bytes"] < usage["rss_bytes"] + GROWTH_BYTES
    print(f"resident: {usage['rss_bytes']} -> {after['rss_bytes']}")


@contextlib.contextmanager
def each_is_counted(daemon: Daemon, name: str, number: int) -> Iterator[None]:
    before, began = counted(daemon, name), time.monotonic()
    yield
    print(f"{number} at {name} in {time.monotonic() - began:.1f} s")
    assert counted(daemon, name) - before == number


@pytest.fixture
def daemon(node: Node) -> Daemon:
    return node.start_daemon(
        ingest__insecure=True,
        ingest__listen=["tcp://127.0.0.1:0"],
        ingest__messages_per_second=10_000_000,  # each message is to be refused for what it is
        log__level="warning",
    )


@pytest.fixture(autouse=True)
def still_serves(request: pytest.FixtureRequest, node: Node, daemon: Daemon) -> Iterator[None]:
    """Whatever a test does, the daemon takes a version into an engine before and after it."""
    worker = node.engine("serving", recipe=RECIPE, model="served")[0]
    trainer = node.trainer(model="served")
    expected = {}
    for version, wait in ((1, True), (2, False)):
        trainer.ask("build", recipe=RECIPE, seed=version)
        trainer.publish_live(version)
        expected = trainer.ask("digests")
        assert worker.ask("forward") == expected
        if wait:
            yield


def strangers(kind: type[Message]) -> Callable[[Message], bool]:
    """What a stranger may not say: anything but a hello, and what operators say, who need none."""
    operators = StatusRequest | PushRequest | RollbackRequest | WaitRequest | EvictRequest | EngineAdd | EngineRemove
    return lambda message: not isinstance(message, kind | operators)


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ipc", "tcp"])
def test_garbage_at_the_front(way: str, daemon: Daemon) -> None:
    endpoint = daemon.front if way == "ipc" else daemon.tcp_endpoint()
    garbage = iter(Garbage(FrontMessage, strangers(TrainerHello)))
    with front(endpoint) as peer:
        peer.pour(garbage, WARM_UP)
        with nothing_changes(daemon), each_is_counted(daemon, "front", MESSAGES):
            peer.pour(garbage, MESSAGES)


def test_garbage_at_the_engines_socket(daemon: Daemon) -> None:
    garbage = iter(Garbage(WorkerMessage, strangers(WorkerHello)))
    with engines(daemon.engines) as peer:
        peer.pour(garbage, WARM_UP)
        with nothing_changes(daemon), each_is_counted(daemon, "engines", MESSAGES):
            peer.pour(garbage, MESSAGES)


def test_garbage_at_the_handoff_socket(daemon: Daemon) -> None:
    rng = random.Random(5)
    path = str(daemon.runtime_dir / "handoff.sock")

    def knock(request: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
            connection.connect(path)
            connection.sendall(request)

    def request() -> bytes:
        return rng.choice(
            (
                b"",
                b"cpe-fd1:" + rng.randbytes(32),
                b"cpe-fd1:" + rng.randbytes(rng.randrange(32)),
                b"cpe-fd1:"[: rng.randrange(9)],
                rng.randbytes(rng.randrange(100)),
                rng.randbytes(20_000),
            )
        )

    for _ in range(200):
        knock(request())
    until(lambda: counted(daemon, "handoff") == 200, "the first are counted")
    began = time.monotonic()
    with nothing_changes(daemon):
        for _ in range(HANDOFFS):
            knock(request())
        until(lambda: counted(daemon, "handoff") >= 200 + HANDOFFS, "all are counted")
        assert counted(daemon, "handoff") == 200 + HANDOFFS
    print(f"{HANDOFFS} at handoff in {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("name", ["front", "tcp", "engines"])
def test_bytes_that_are_no_zeromq(name: str, daemon: Daemon) -> None:
    """libzmq cuts them off; what happens to look like its oldest protocol arrives as a message, and is refused."""
    rng = random.Random(6)
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    host, _, port = daemon.tcp_endpoint().removeprefix("tcp://").partition(":")

    def connect() -> socket.socket:
        if name == "tcp":
            return socket.create_connection((host, int(port)))
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.runtime_dir / f"{name}.sock"))
        return connection

    def rough() -> bytes:
        return rng.choice(
            (
                b"",
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
                rng.randbytes(rng.randrange(300)),
                greeting[: rng.randrange(len(greeting))],
                greeting + rng.randbytes(rng.randrange(100)),
                greeting + ready + rng.randbytes(rng.randrange(100)),
                greeting + ready + b"\x02" + (1 << 62).to_bytes(8, "big"),
                greeting + ready + b"\x01\x00" * 50,
            )
        )

    with nothing_changes(daemon):
        for _ in range(RAW_CONNECTIONS):
            with connect() as connection, contextlib.suppress(ConnectionError):
                connection.sendall(rough())


def test_frames_beyond_the_limit(daemon: Daemon) -> None:
    """They are cut off before they are held in memory: nobody is told, and nothing is counted."""
    with nothing_changes(daemon), each_is_counted(daemon, "front", 0), each_is_counted(daemon, "engines", 0):
        for endpoint in (daemon.front, daemon.tcp_endpoint(), daemon.engines):
            for frames in ([bytes(MAX_HEADER_BYTES + 1)], [encode(Ping()), bytes(MAX_HEADER_BYTES + 1)]):
                with front(endpoint) as peer:
                    peer.send(*frames)
                    assert peer.receive(200) is None
    with front(daemon.front) as peer, each_is_counted(daemon, "front", 1):
        peer.pour([[bytes(MAX_HEADER_BYTES)]], 1)


def test_sockets_of_other_kinds(daemon: Daemon) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with nothing_changes(daemon):
        for kind in (zmq.REQ, zmq.PUB, zmq.PUSH, zmq.PAIR, zmq.SUB, zmq.XPUB):
            with context.socket(kind) as rude:
                rude.setsockopt(zmq.LINGER, 0)
                rude.connect(daemon.front)
                if kind not in (zmq.SUB, zmq.PULL):
                    with contextlib.suppress(zmq.Again):
                        rude.send(b"garbage", zmq.NOBLOCK)
                assert kind == zmq.REQ or not rude.poll(20)
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "hello",
    [
        TrainerHello(2, MODEL, RUN, 0, 1),
        TrainerHello(-(1 << 63), MODEL, RUN, 0, 1),
        TrainerHello(1, MODEL, RUN, 1, 1),
        TrainerHello(1, MODEL, RUN, -1, 1),
        TrainerHello(1, MODEL, RUN, 0, 0),
        TrainerHello(1, MODEL, RUN, 0, 1 << 40),
        TrainerHello(1, "", RUN, 0, 1),
        TrainerHello(1, MODEL, "r" * 257, 0, 1),
        TrainerHello(1, "m" * (1 << 20), RUN, 0, 1),
    ],
    ids=lambda hello: f"{hello.protocol} {hello.rank}/{hello.world_size} {len(hello.model)} {len(hello.run)}",
)
def test_absurd_hello_of_a_trainer(hello: TrainerHello, daemon: Daemon) -> None:
    with nothing_changes(daemon), front(daemon.front) as peer, each_is_counted(daemon, "front", 2):
        for message in (hello, Chunk(1, 0, 1)):
            answer = peer.ask(message)
            assert isinstance(answer, ErrorReply)
            assert answer.error.code == "protocol"


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (WorkerHello(9, "e", "torch", 0, 1, "i"), "protocol"),
        (WorkerHello(1, "", "torch", 0, 1, "i"), "protocol"),
        (WorkerHello(1, "e" * 300, "torch", 0, 1, "i"), "protocol"),
        (WorkerHello(1, "e", "torch", 0, 1, ""), "protocol"),
        (WorkerHello(1, "e", "torch", 3, 3, "i"), "protocol"),
        (WorkerHello(1, "e", "torch", 0, 1 << 40, "i"), "protocol"),
        (WorkerHello(1, "e", "__import__('os')", 0, 1, "i"), "misuse"),
        (WorkerHello(1, "e", "torch", 0, 1, "i", gpu="GPU-0"), "misuse"),
        (WorkerHello(1, "serving", "torch", 0, 1, "impostor", model="served"), "busy"),
        (WorkerHello(1, "serving", "torch", 1, 2, "impostor", model="served"), "misuse"),
    ],
)
def test_absurd_hello_of_a_worker(hello: WorkerHello, code: str, daemon: Daemon) -> None:
    with nothing_changes(daemon), engines(daemon.engines) as peer:
        answer = peer.ask(hello)
        assert isinstance(answer, ErrorReply)
        assert answer.error.code == code
        answer = peer.ask(Ping())
        assert isinstance(answer, ErrorReply)
        assert answer.error.message == "say hello first"


# --- inside a session ------------------------------------------------------------------------------------------------

SHARDS = [Shard(f"w{index}", "uint8", (300_000,)) for index in range(2)]
DATA = random.Random(8).randbytes(2 * 300_032)


def out_of_place(opened: int, chunk_bytes: int, version: VersionId) -> list[tuple[Message, list[bytes], str]]:
    """Messages that can be read and are wrong here: the first chunk of three has come. With frames and error code."""
    other = VersionId("other", RUN, 1)
    part = bytes(chunk_bytes)
    return [
        (Chunk(99, 0, chunk_bytes), [part], "protocol"),
        (Chunk(-1, 0, chunk_bytes), [part], "protocol"),
        (Chunk(0, 0, chunk_bytes), [part], "protocol"),
        (Chunk(opened, 0, chunk_bytes), [part], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes), [], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes), [part, part], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes), [part[:-1]], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes - 1), [part[:-1]], "protocol"),
        (Chunk(opened, chunk_bytes + 1, chunk_bytes), [part], "protocol"),
        (Chunk(opened, -chunk_bytes, chunk_bytes), [part], "protocol"),
        (Chunk(opened, 1 << 62, chunk_bytes), [part], "protocol"),
        (Chunk(opened, chunk_bytes, 0), [b""], "protocol"),
        (Chunk(opened, chunk_bytes, -5), [], "protocol"),
        (Chunk(opened, chunk_bytes, 1 << 62), [part], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes, 0), [], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes, 1 << 62), [], "protocol"),
        (Chunk(opened, chunk_bytes, chunk_bytes, 7), [part], "protocol"),
        (ManifestPart(opened, 0, SHARDS), [], "protocol"),
        (ManifestPart(opened, 2, SHARDS), [], "protocol"),
        (ManifestPart(99, 0, SHARDS), [], "protocol"),
        (Seal(opened, bytes(32)), [], "protocol"),
        (Seal(99, bytes(32)), [], "protocol"),
        (Abandon(99, "no such stream"), [], "protocol"),
        (Abandon(-1, ""), [], "protocol"),
        (OpenVersion(opened, version, 1, 256), [], "protocol"),
        (OpenVersion(opened + 1, other, 1, 256), [], "protocol"),
        (OpenVersion(opened + 1, VersionId(MODEL, "another-run", 1), 1, 256), [], "protocol"),
        (OpenVersion(opened + 1, VersionId(MODEL, RUN, -1), 1, 256), [], "protocol"),
        (TrainerHello(2, MODEL, RUN, 0, 1), [], "protocol"),
        (TrainerHello(1, MODEL, RUN, 5, 1), [], "protocol"),
        (StepDone(1, "load"), [], "protocol"),
        (WorkerBye(), [], "protocol"),
        (Pong("g"), [], "protocol"),
    ]


def test_garbage_inside_a_trainer_s_session_changes_nothing_for_its_version(daemon: Daemon) -> None:
    version = VersionId(MODEL, RUN, 1)
    with RawTrainer(daemon.front) as trainer:
        credits, chunk_bytes = trainer.welcome.credits, trainer.welcome.chunk_bytes
        stream = trainer.open(1, SHARDS)
        trainer.send_bytes(stream, DATA[:chunk_bytes])
        trainer.expect(ChunkDone)
        before = state_of(daemon)
        peer = Inside(trainer._dealer, FrontReply)
        with each_is_counted(daemon, "front", len(wrong := out_of_place(stream, chunk_bytes, version))):
            for message, frames, code in wrong:
                answer = peer.refused(encode(message), *frames)
                assert answer.error.code == code, message
        garbage = iter(Garbage(FrontMessage, lambda message: False, seed=1))
        number = max(1000, MESSAGES // 5)
        with each_is_counted(daemon, "front", number):
            for index, frames in enumerate(itertools.islice(garbage, number)):
                peer.refused(*frames)
                if index % 1000 == 0:
                    assert peer.asked(encode(Ping())) == Pong(trainer.welcome.generation)
        assert state_of(daemon) == before
        assert credits == trainer.welcome.credits

        for offset in range(chunk_bytes, len(DATA), chunk_bytes):
            trainer.send(
                Chunk(stream, offset, len(DATA[offset : offset + chunk_bytes])), DATA[offset : offset + chunk_bytes]
            )
        for digests in (b"", bytes(16), bytes(31), bytes(48)):
            assert peer.refused(encode(Seal(stream, digests))).error.code == "protocol"
        assert daemon.version(1)["state"] == "receiving"
        sealed = b"".join(xxh3_128_digest(DATA[at : at + 300_000]) for at in (0, 300_032))
        trainer.send(Seal(stream, sealed))
        until(lambda: daemon.version(1)["state"] == "live", "it is live")


def test_rank_that_opens_its_version_again_after_sealing_is_refused(daemon: Daemon) -> None:
    """It must not cost the other ranks theirs."""
    shards, data = SHARDS[:1], DATA[:300_032]
    with (
        RawTrainer(daemon.front, rank=0, world_size=2) as first,
        RawTrainer(daemon.front, rank=1, world_size=2) as last,
    ):
        stream = first.open(1, shards)
        first.send_bytes(stream, data)
        first.seal(stream, shards, data)
        until(lambda: daemon.version(1)["ranks_sealed"] == 1, "the first rank is done")
        first.send(OpenVersion(7, VersionId(MODEL, RUN, 1), 0, 0))
        with pytest.raises(Exception, match=r"rank 0 is contributing to .* already"):
            first.expect(VersionOpened)
        renamed = [Shard("v", "uint8", (300_000,))]
        stream = last.open(1, renamed)
        last.send_bytes(stream, data)
        last.seal(stream, renamed, data)
        until(lambda: daemon.version(1)["state"] == "live", "it is live")


def test_garbage_inside_a_worker_s_session_changes_nothing_for_its_engine(daemon: Daemon) -> None:
    with engines(daemon.engines) as peer:
        welcome = peer.ask(WorkerHello(1, "raw", "torch", 0, 1, "i", content=None, model="raw"))
        assert isinstance(welcome, WorkerWelcome)
        peer.receive(1000)  # let serve what it started with
        before = state_of(daemon)
        assert daemon.engine("raw")["ready"]
        garbage = iter(Garbage(WorkerMessage, lambda message: False, seed=2))
        rounds = max(1, MESSAGES // 5 // 1000)
        with each_is_counted(daemon, "engines", rounds * 1000 + 2 * rounds):
            for _ in range(rounds):
                peer.pour(garbage, 1000)
                for wrong in (WorkerHello(3, "raw", "torch", 0, 1, "i"), WorkerHello(1, "raw", "torch", 9, 1, "i")):
                    assert isinstance(peer.ask(wrong), ErrorReply)
                for stale in stale_answers():
                    peer.send(encode(stale))
                assert peer.ask(Ping()) == Pong(welcome.generation)
        for refused in (WorkerHello(1, "serving", "torch", 0, 1, "i"), WorkerHello(1, "raw", "tensorrt", 0, 1, "i")):
            assert isinstance(peer.ask(refused), ErrorReply)
        assert state_of(daemon) == before
        assert peer.ask(Ping()) == Pong(welcome.generation)


def stale_answers() -> Sequence[Message]:
    """Answers to steps that nobody asked for."""
    rounds = (0, 1, -1, 1 << 62)
    error = ErrorInfo("engine", "no such layer")
    return [
        *(
            StepDone(r, step, touched=True)
            for r in rounds
            for step in ("pause", "load", "finish", "abort", "resume", "?")
        ),
        *(StepFailed(r, step, error, 3) for r in rounds for step in ("load", "")),
    ]


def test_what_is_asked_of_unknown_versions_changes_nothing(daemon: Daemon) -> None:
    with RawTrainer(daemon.front) as trainer:
        peer = Inside(trainer._dealer, FrontReply, asks=True)
        before = state_of(daemon)
        for number in (0, 77, -1, (1 << 63) - 1, -(1 << 63)):
            for name in (MODEL, "", "x" * 5000):
                peer.asked(encode(Watch(VersionId(name, RUN, number))))
        assert state_of(daemon) == before


def nonsense(rng: random.Random) -> Message:
    """Something that an operator may say, and no daemon can do."""
    text = rng.choice(("", "x", "served\n", "\0", "n" * 300, "\x1b[2J", "../../etc"))
    number = rng.choice((-2, 0, 3, 1 << 62, -(1 << 63)))
    return rng.choice(
        (
            PushRequest(text or "x", text, number),
            PushRequest("served", "no such run", number),
            PushRequest("served", engines=(text or "x",)),
            PushRequest("served", engines=("x",) * 2000),
            EngineAdd(EngineSpec(text, text)),
            EngineAdd(EngineSpec("e", "tensorrt")),
            EngineAdd(EngineSpec("e", "torch", url=text or "x")),
            EngineAdd(EngineSpec("e", "torch", world_size=rng.choice((-1, 5000, 1 << 62)))),
            EngineAdd(EngineSpec("serving", "torch", "another")),
            EngineRemove(text or "x"),
            EngineRemove("serving"),
        )
    )


def test_nonsense_of_operators_is_refused_and_changes_nothing(daemon: Daemon) -> None:
    rng = random.Random(9)
    with front(daemon.front) as peer:
        with nothing_changes(daemon):
            for _ in range(max(1000, MESSAGES // 10)):
                message = nonsense(rng)
                answer = peer.ask(message)
                assert isinstance(answer, ErrorReply), message
                assert answer.error.code in ("misuse", "engine"), answer
        for _ in range(16):  # more at a time than are carried out
            peer.send(encode(nonsense(rng)))
        answers = [peer.receive() for _ in range(16)]
    assert {answer.error.code for answer in answers if isinstance(answer, ErrorReply)} <= {"misuse", "engine", "busy"}
    assert all(isinstance(answer, ErrorReply) for answer in answers)


class Inside:
    """Any bytes over the link of a `Dealer`, whose socket it borrows.

    Args:
        dealer: the link.
        answers: what the daemon sends over it.
        asks: whether states of versions are answers, and no news to be passed over.
    """

    def __init__(self, dealer: Dealer, answers: Any, *, asks: bool = False) -> None:
        self._asks = asks
        self._socket = dealer._socket
        self._codec = Codec(answers)

    def asked(self, *frames: bytes) -> Message:
        """Send, and return the answer, passing over news."""
        self._socket.send_multipart(frames)
        while self._socket.poll(WAIT_MS):
            answer = self._codec.decode(self._socket.recv_multipart()[0])
            if not isinstance(answer, ChunkDone) and (not isinstance(answer, VersionStatus) or self._asks):
                return answer
        pytest.fail("no answer")

    def refused(self, *frames: bytes) -> ErrorReply:
        """Send what has to be refused."""
        answer = self.asked(*frames)
        assert isinstance(answer, ErrorReply), answer
        return answer
