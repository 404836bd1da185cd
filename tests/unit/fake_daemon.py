"""A daemon as a publisher sees it, scripted by tests: real sockets and a real landing ring, and no arena behind them.

It keeps what it was sent, and notes whatever a publisher may not do: a chunk off the grid, without a credit, or in a
place that was not given back.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from xxhash import xxh3_128_digest

from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import CpeError, DigestError, ProtocolError
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.links.router import Router
from cpe_daemon.wire.codec import check_bulk
from cpe_daemon.wire.messages import (
    MOST_CHUNK_FRAMES,
    PROTOCOL,
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    Farewell,
    FrontMessage,
    ManifestPart,
    Message,
    OpenVersion,
    Ping,
    Pong,
    Seal,
    TrainerBye,
    TrainerHello,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
)
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport

WAIT_SECONDS = 20.0


@dataclass
class Received:
    """One contribution as it came."""

    peer: bytes
    opened: OpenVersion
    shards: list[Shard] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)
    chunks: int = 0
    inline_chunks: int = 0
    frames: int = 0
    digests: bytes = b""
    fold: int | None = None
    admitted: bool = False
    sealed: bool = False

    def tensors(self) -> dict[str, bytes]:
        """The bytes of each tensor."""
        offsets = layout(self.shards).offsets
        return {
            shard.name: bytes(self.content[offset : offset + shard.nbytes])
            for shard, offset in zip(self.shards, offsets, strict=True)
        }


@dataclass
class Script:
    """What it does instead of what a daemon does. Tests change it before they provoke the message that it is about."""

    farewell: str = ""
    """Answer every hello by a farewell."""
    refuse_hello: CpeError | None = None
    refuse_open: CpeError | None = None
    refuse_chunk: CpeError | None = None
    ignore_open: bool = False
    keep_chunks: bool = False
    """Acknowledge no chunk before `FakeDaemon.give_back`."""
    mute: bool = False
    """Answer no ping."""
    after_seal: Sequence[str] = ("staged", "pushing", "live")
    held: str = ""
    """The state in which it holds already what is opened; it believes that the same comes again."""
    ignore_seal: bool = False
    refuse_seal: CpeError | None = None
    """It does not: the answer to the seal of what it holds."""
    before_refusal: Sequence[VersionStatus] = ()
    """What it says before that."""


class FakeDaemon:
    """Runs from `start` to `stop` in a thread of its own; `start` again is a restart.

    Args:
        directory: for its sockets.
        name: of its sockets.
        landing: offer landing rings.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "front",
        *,
        landing: bool = True,
        credits: int = 4,
        chunk_bytes: int = 4096,
        heartbeat_seconds: float = 1.0,
        chunk_frames: int = MOST_CHUNK_FRAMES,
        folds: bool = False,
    ) -> None:
        self.endpoint = f"ipc://{directory / name}.sock"
        self._handoff_path = directory / f"{name}-handoff.sock"
        self.landing = landing
        self.credits = credits
        self.chunk_bytes = chunk_bytes
        self.heartbeat_seconds = heartbeat_seconds
        self.chunk_frames = chunk_frames
        self.folds = folds
        self.script = Script()
        self.received: list[Received] = []
        self.messages: list[Message] = []
        self.violations: list[str] = []
        self.generation = ""
        self.tethers_cut = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # --- the test's thread -------------------------------------------------------------------------------------------

    def start(self) -> FakeDaemon:
        """Listen, with a new generation."""
        self.generation = secrets.token_hex(4)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fake-daemon")
        self._thread.start()
        assert self._started.wait(WAIT_SECONDS)
        return self

    def stop(self) -> None:
        """End at once, as if killed."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(WAIT_SECONDS)
            assert not self._thread.is_alive()
            self._thread = None

    def wait_for(self, reached: Callable[[], object]) -> None:
        """Wait until something it was sent makes ``reached`` true."""
        with self._changed:
            assert self._changed.wait_for(reached, WAIT_SECONDS), self.messages[-3:]

    def wait_for_message(self, kind: type[Message], count: int = 1) -> None:
        """Wait until so many messages of a type have come."""
        self.wait_for(lambda: sum(isinstance(message, kind) for message in self.messages) >= count)

    def say(self, message: Message) -> None:
        """Send a message to whoever contributed last."""
        peer = self.received[-1].peer
        self._loop.call_soon_threadsafe(lambda: self._router.send(peer, message))

    def give_back(self) -> None:
        """Acknowledge the chunks that were kept, and those to come."""
        self.script.keep_chunks = False
        self._loop.call_soon_threadsafe(self._acknowledge_kept)

    def kept(self) -> int:
        """Chunks that were not acknowledged."""
        return len(self._kept)

    @property
    def last(self) -> Received:
        """The contribution that was opened last."""
        return self.received[-1]

    # --- its own thread ----------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._streams: dict[tuple[bytes, int], Received] = {}
        self._rings: dict[bytes, SharedMemory] = {}
        self._places: dict[bytes, set[int]] = {}
        self._kept: list[tuple[bytes, ChunkDone, Callable[[], None]]] = []
        handlers: dict[type[Message], Callable[..., None]] = {
            TrainerHello: self._on_hello,
            OpenVersion: self._on_open,
            ManifestPart: self._on_part,
            Chunk: self._on_chunk,
            Seal: self._on_seal,
            Abandon: self._on_abandon,
            TrainerBye: self._on_ping,
            Ping: self._on_ping,
        }
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        async with asyncio.TaskGroup() as tasks:
            self._handoff = HandoffServer(self._handoff_path, tasks)
            self._router = Router(
                "fake",
                context,
                accepts=FrontMessage,
                handlers={kind: self._noted(handler) for kind, handler in handlers.items()},
                max_frame_bytes=1 << 28,
                most_frames=1 + MOST_CHUNK_FRAMES,
            )
            self._router.bind(self.endpoint)
            self._handoff.start()
            self._router.start()
            self._started.set()
            await self._stopped.wait()
            self._router.close()
            self._handoff.close()
        self._kept.clear()
        self._streams.clear()
        for ring in self._rings.values():
            ring.close()
        context.term()

    def _noted(self, handler: Callable[..., None]) -> Callable[..., None]:
        def noted(peer: bytes, message: Message, frames: Sequence[memoryview]) -> None:
            if not isinstance(message, TrainerHello) and peer not in self._places:
                raise ProtocolError("say hello first")
            try:
                handler(peer, message, frames)
            finally:
                with self._changed:
                    self.messages.append(message)
                    self._changed.notify_all()

        return noted

    def _on_hello(self, peer: bytes, hello: TrainerHello, _: object) -> None:
        if self.script.refuse_hello is not None:
            raise self.script.refuse_hello
        if self.script.farewell:
            self._router.send(peer, Farewell(self.script.farewell))
            return
        token = b""
        if self.landing:
            ring = self._rings[peer] = SharedMemory.create("fake-landing", self.credits * self.chunk_bytes)
            token = self._handoff.offer(ring.fd, self._on_tether_cut)
        self._places[peer] = set()
        self._router.send(
            peer,
            TrainerWelcome(
                protocol=PROTOCOL,
                generation=self.generation,
                heartbeat_seconds=self.heartbeat_seconds,
                credits=self.credits,
                chunk_bytes=self.chunk_bytes,
                handoff=str(self._handoff.path) if token else "",
                landing_token=token,
                chunk_frames=self.chunk_frames,
                folds=self.folds,
            ),
        )

    def _on_tether_cut(self) -> None:
        with self._changed:
            self.tethers_cut += 1
            self._changed.notify_all()

    def _on_ping(self, peer: bytes, _: Ping | TrainerBye, __: object) -> None:
        if not self.script.mute:
            self._router.send(peer, Pong(self.generation))

    def _on_open(self, peer: bytes, opened: OpenVersion, _: object) -> None:
        received = Received(peer, opened)
        self.received.append(received)
        if self.script.refuse_open is not None:
            raise self.script.refuse_open
        self._streams[peer, opened.stream] = received
        self._admit(received)

    def _on_part(self, peer: bytes, part: ManifestPart, _: object) -> None:
        received = self._streams.get((peer, part.stream))
        if received is not None:
            if part.first != len(received.shards) or len(part.shards) > 512:
                self.violations.append(f"part at {part.first} with {len(part.shards)} shards")
            received.shards += part.shards
            self._admit(received)

    def _admit(self, received: Received) -> None:
        if len(received.shards) < received.opened.tensors or self.script.ignore_open:
            return
        nbytes = layout(received.shards).nbytes
        if nbytes != received.opened.nbytes:
            self.violations.append(f"announced {received.opened.nbytes} bytes, the manifest takes {nbytes}")
        received.content = bytearray(b"\xee" * nbytes)
        received.admitted = True
        self._router.send(received.peer, VersionOpened(received.opened.stream, held=bool(self.script.held)))

    def _on_chunk(self, peer: bytes, chunk: Chunk, frames: Sequence[memoryview]) -> None:
        done = ChunkDone(chunk.stream, chunk.ring_offset)
        received = self._streams.get((peer, chunk.stream))
        if received is None:
            self._router.send(peer, done)
            return
        if self.script.refuse_chunk is not None:
            self._router.send(peer, done)
            self._fail(received, self.script.refuse_chunk)
            return
        wanted = min(self.chunk_bytes, received.opened.nbytes - chunk.offset)
        if chunk.offset % self.chunk_bytes or chunk.nbytes != wanted:
            self.violations.append(f"off the grid: {chunk}")
        if chunk.ring_offset >= 0:
            sources = [self._rings[peer].view[chunk.ring_offset : chunk.ring_offset + chunk.nbytes]]
            if chunk.ring_offset in self._places[peer]:
                self.violations.append(f"place used twice: {chunk}")
            self._places[peer].add(chunk.ring_offset)
        else:
            sources = list(frames)
            received.inline_chunks += 1
            received.frames += len(frames)
            try:
                check_bulk(frames, chunk.nbytes, self.chunk_frames)
            except ProtocolError as error:
                self.violations.append(error.message)
        received.chunks += 1
        if sum(1 for who, *_ in self._kept if who == peer) >= self.credits:
            self.violations.append(f"without a credit: {chunk}")

        def read() -> None:
            received.content[chunk.offset : chunk.offset + chunk.nbytes] = b"".join(sources)

        if self.script.keep_chunks:
            self._kept.append((peer, done, read))  # read as late as a publisher has to bear
        else:
            read()
            self._done(peer, done)

    def _done(self, peer: bytes, done: ChunkDone) -> None:
        self._places[peer].discard(done.ring_offset)
        self._router.send(peer, done)

    def _acknowledge_kept(self) -> None:
        for peer, done, read in self._kept:
            read()
            self._done(peer, done)
        self._kept.clear()
        for received in [received for received in self._streams.values() if received.sealed]:
            self._verify(received)

    def _on_seal(self, peer: bytes, seal: Seal, _: object) -> None:
        received = self._streams.get((peer, seal.stream))
        if received is None:
            return
        if not received.admitted:
            self.violations.append("sealed before it was opened")
        received.digests, received.fold, received.sealed = seal.digests, seal.fold, True
        if self.script.held and not self.script.ignore_seal:
            self._compare(received)
        elif not self._kept and not self.script.ignore_seal:
            self._verify(received)

    def _compare(self, received: Received) -> None:
        stream = received.opened.stream
        del self._streams[received.peer, stream]
        if (error := self.script.refuse_seal) is not None:
            for status in self.script.before_refusal:
                self._router.send(received.peer, status)
            self._router.send(received.peer, ErrorReply(ErrorInfo(error.code, error.message), stream))
            return
        report = _report(received) if self.script.held in ("live", "retained") else None
        self._router.send(
            received.peer, VersionStatus(received.opened.version, self.script.held, report=report, stream=stream)
        )

    def _verify(self, received: Received) -> None:
        del self._streams[received.peer, received.opened.stream]
        found = b"".join(xxh3_128_digest(tensor) for tensor in received.tensors().values())
        version = received.opened.version
        if received.digests != (b"" if received.fold is not None and not received.digests else found):
            self._fail(received, DigestError("the bytes of some tensor differ"))
            return
        for state in self.script.after_seal:
            report = _report(received) if state == "live" else None
            self._router.send(received.peer, VersionStatus(version, state, report=report))

    def _on_abandon(self, peer: bytes, abandon: Abandon, _: object) -> None:
        received = self._streams.pop((peer, abandon.stream), None)
        if received is not None:
            self._router.send(peer, failed(received.opened.version, CpeError("abandoned")))

    def _fail(self, received: Received, error: CpeError) -> None:
        """Both messages that the daemon sends of a failure."""
        self._streams.pop((received.peer, received.opened.stream), None)
        info = ErrorInfo(error.code, error.message)
        self._router.send(received.peer, ErrorReply(info, received.opened.stream))
        self._router.send(received.peer, failed(received.opened.version, error))


def failed(version: VersionId, error: CpeError) -> VersionStatus:
    """The news that a version failed."""
    return VersionStatus(version, "failed", ErrorInfo(error.code, error.message))


def _report(received: Received) -> VersionReport:
    engine = EngineReport("updated", {"pause": 0.01, "load": 0.2}, received.opened.nbytes, 12.5)
    return VersionReport(
        received.opened.version, received.opened.nbytes, received.opened.tensors, 0.5, 0.25, {"e0": engine}
    )
