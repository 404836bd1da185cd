"""Takes contributions: from `OpenVersion` to a staged version, or to nothing left behind.

A version becomes staged only when every rank has sealed, every digest holds over the arena's bytes, and every tensor is
covered once. A trainer that dies, stalls or lies fails its version, whose bytes are let go; the live one is untouched.
A message that is merely out of place is refused and changes nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.fold import covers
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import layout
from cpe_daemon.core.tally import Tally
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.digests import piece_bytes
from cpe_daemon.errors import (
    BusyError,
    CpeError,
    DeadlineError,
    ManifestError,
    PeerLostError,
    ProtocolError,
)
from cpe_daemon.ingest.copier import Copier, Job
from cpe_daemon.ingest.digesting import Digesting
from cpe_daemon.ingest.folding import extent_fold
from cpe_daemon.ingest.news import FINAL, missing, nobody_to_ask, status_of
from cpe_daemon.ingest.repeats import Repeats
from cpe_daemon.ingest.room import Room
from cpe_daemon.ingest.session import Session
from cpe_daemon.ingest.stream import Stream
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.ingest.whole import join
from cpe_daemon.ingest.writer import ExtentWriter
from cpe_daemon.links.router import Handler
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    VersionOpened,
    VersionStatus,
    Watch,
)
from cpe_daemon.wire.reports import ErrorInfo

_MAX_REASON_CHARS: Final = 256
_MAX_STREAMS: Final = 4
_BATCHES: Final = 4  # of credits that come back: the trainer fills one while others are copied


class Ingest:
    """All contributions on their way in. Belongs to the event loop; only `ExtentWriter.write` runs in ``pool``.

    Args:
        config: the daemon's settings.
        trainers: the links that contributions come over.
        catalogue: is told what is opened, staged and failed.
        arena: where the bytes go.
        pool: threads that copy and digest.
        tasks: owns what takes time.
        metrics: counters.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        config: Config,
        trainers: Trainers,
        catalogue: Catalogue,
        arena: Arena,
        pool: CopyPool,
        tasks: asyncio.TaskGroup,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._trainers = trainers
        self._catalogue = catalogue
        self._arena = arena
        self._pool = pool
        self._tasks = tasks
        self._metrics = metrics
        self._clock = clock
        self.received = {transport: Tally(clock) for transport in ("landing", "inline")}
        """Chunks copied into the arena, by the way they came."""
        self._progress: dict[VersionId, float] = {}
        self._room = Room(catalogue, arena, config.deadlines.reserve_seconds)
        threads = max(1, config.ingest.copy_thread_count // 2)  # engines serve meanwhile, on the same processors
        self.digesting = Digesting(catalogue, arena, pool, threads, clock, self._room.is_short)
        self._repeats = Repeats(trainers, self.digesting, clock)
        self._stopped_because = ""
        self.examine: Callable[[Version], Awaitable[None]] = nobody_to_ask  # raises what a version has to fail with
        catalogue.watch(self._on_version)
        catalogue.on_digest(self._repeats.settle)
        trainers.on_lost(self._on_lost)

    def handlers(self) -> Mapping[type[Message], Handler]:
        """The messages that are answered here."""
        streams: dict[type[Message], Handler] = {
            ManifestPart: self._on_part,
            Chunk: self._on_chunk,
            Seal: self._on_seal,
            Abandon: self._on_abandon,
        }
        return {OpenVersion: self._on_open, Watch: self._on_watch, **self._repeats.before(streams)}

    def stop(self, reason: str) -> None:
        """Take no new version; those that are being received fail."""
        self._stopped_because = reason
        for version in [v for v in self._catalogue if v.state is VersionState.RECEIVING]:
            self._fail(version, PeerLostError(f"{reason}, and had not received {version.id} whole"))

    # --- manifest and room -------------------------------------------------------------------------------------------

    def _on_open(self, peer: bytes, opened: OpenVersion, _: object) -> None:
        session = self._trainers.session(peer)
        hello, version = session.hello, opened.version
        if (version.model, version.run) != (hello.model, hello.run) or version.number < 0:
            raise ProtocolError(f"{version} is not a version of {hello.model}@{hello.run}")
        if opened.stream <= session.last_stream:
            raise ProtocolError(f"stream {opened.stream} was used before")
        session.last_stream = opened.stream  # even if it is refused: what follows for it is not wanted, and no mistake
        if self._stopped_because:
            raise BusyError(f"{self._stopped_because}, and takes no more versions; publish again when another runs")
        if (in_flight := len(session.streams) + len(session.repeats)) >= _MAX_STREAMS:
            raise BusyError(f"{session.name} has {in_flight} publishes in flight")
        if not 0 <= opened.tensors <= self._config.ingest.max_tensors or opened.nbytes < 0:
            raise ManifestError(f"{opened.tensors} tensors; ingest.max_tensors is {self._config.ingest.max_tensors}")
        record = self._catalogue.open(version, hello.world_size, force=opened.force)
        if record.held:
            self._repeats.open(session, opened, record)
            return
        streams = (stream for link in self._trainers for stream in link.streams.values())
        if hello.rank in record.contributions or any((s.version, s.rank) == (record, hello.rank) for s in streams):
            raise BusyError(f"rank {hello.rank} is contributing to {version} already")
        stream = session.streams[opened.stream] = Stream(opened, record, hello.rank)
        session.watching.add(version)
        self._touch(record)
        if stream.manifest_complete:
            self._spawn(record, self._make_room(session, stream))

    def _on_part(self, peer: bytes, part: ManifestPart, _: object) -> None:
        session = self._trainers.session(peer)
        stream = session.stream(part.stream)
        if stream is None:
            return
        stream.add(part)
        self._touch(stream.version)
        if stream.manifest_complete:
            self._spawn(stream.version, self._make_room(session, stream))

    async def _make_room(self, session: Session, stream: Stream) -> None:
        """Check the manifest, reserve the extent, and make ready to fill it."""
        plan = await asyncio.to_thread(layout, stream.shards)
        verified = self._config.device.verifies and stream.folded
        stream.covered = verified and await asyncio.to_thread(covers, stream.shards)
        if plan.nbytes != stream.nbytes:
            raise ManifestError(f"the manifest takes {plan.nbytes} bytes, the trainer announced {stream.nbytes}")
        stream.contribution = await self._room.reserve(stream, plan.nbytes)
        offset = stream.contribution.extent.offset
        view = self._arena.view[offset : offset + plan.nbytes]
        folds = self._config.device.verifies and not stream.folded
        fold = await asyncio.to_thread(extent_fold, view, stream.shards, plan) if folds else None
        threads = max(1, self._config.ingest.copy_thread_count * 3 // 4)  # the others are for the other ranks
        stream.writer = ExtentWriter(
            self._arena.address + offset,
            view,
            stream.shards,
            plan,
            session.chunk_bytes,
            piece_bytes(threads),
            fold,
            digested=not (stream.covered and stream.undigested),
        )
        copied = functools.partial(self._copied, session, stream)
        batch = max(1, session.credits // (_BATCHES * threads))
        stream.copier = Copier(stream.writer, self._pool, threads, batch, copied)
        self._touch(stream.version)
        self._trainers.send(session, VersionOpened(stream.id))
        await self.examine(stream.version)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _on_chunk(self, peer: bytes, chunk: Chunk, frames: Sequence[memoryview]) -> None:
        session = self._trainers.session(peer)
        stream = session.stream(chunk.stream)
        if stream is None:  # failed meanwhile: the bytes are not wanted, the credit is due
            self._trainers.send(session, ChunkDone(chunk.stream, chunk.ring_offset))
            return
        writer = stream.ready()
        runs = session.take(chunk, frames)
        try:
            writer.accept(chunk.offset, chunk.nbytes)
        except ProtocolError:
            session.give_back(chunk.ring_offset)
            raise
        session.landed = session.landed or chunk.ring_offset >= 0
        stream.begin_write(lambda: self._catalogue.lease(stream.version))
        self.received["landing" if chunk.ring_offset >= 0 else "inline"].begin()
        stream.copy(Job(chunk, runs, frames))

    def _copied(self, session: Session, stream: Stream, jobs: Sequence[Job], error: Exception | None) -> None:
        """Chunks are in the arena: return their credits, and go on if these were the last."""
        for chunk, *_ in jobs:
            self.received["landing" if chunk.ring_offset >= 0 else "inline"].end(chunk.nbytes)
            session.give_back(chunk.ring_offset)
            stream.end_write()
            self._trainers.send(session, ChunkDone(stream.id, chunk.ring_offset))
        session.free()
        if error is not None:
            raise error
        self._touch(stream.version)
        self._try_seal(session, stream)

    def _on_seal(self, peer: bytes, seal: Seal, _: object) -> None:
        session = self._trainers.session(peer)
        stream = session.stream(seal.stream)
        if stream is None:
            return
        stream.take_seal(seal)
        self._try_seal(session, stream)

    def _try_seal(self, session: Session, stream: Stream) -> None:
        """Verify a contribution whose last write has returned; stage the version if no other is missing."""
        if session.streams.get(stream.id) is not stream:
            return
        try:
            finished = stream.finish(verified=self._config.device.verifies)
        except CpeError as error:
            self._trainers.send(session, ErrorReply(ErrorInfo(error.code, error.message), stream.id))
            self._fail(stream.version, error)
            return
        if finished and stream.version.sealed:
            self._spawn(stream.version, self._stage(stream.version))

    async def _stage(self, version: Version) -> None:
        began = self._clock()
        if version.state is not VersionState.RECEIVING:  # it has failed since its last rank sealed
            return
        with self._catalogue.lease(version):
            await self.digesting.before_staging(version, self._touch)
            whole = await asyncio.to_thread(join, version, self._arena.view)
            if version.state is VersionState.RECEIVING:
                self._catalogue.stage(version, *whole)
                if not version.digest:
                    self.digesting.put(version)
                self._metrics.observe_phases(version.id.model, "", {"stage": self._clock() - began})

    # --- the end of it -----------------------------------------------------------------------------------------------

    def _on_abandon(self, peer: bytes, abandon: Abandon, _: object) -> None:
        session = self._trainers.session(peer)
        stream = session.stream(abandon.stream)
        if stream is not None:
            reason = abandon.reason[:_MAX_REASON_CHARS]
            self._fail(stream.version, PeerLostError(f"{session.name} gave up: {reason}"))

    def _on_lost(self, session: Session, reason: str) -> None:
        """A rank that goes before the others have sealed takes its version with it, even if it has sealed itself.

        Its successor may mean other weights by the same number, and must not be mixed with what it left.
        """
        for stream in list(session.streams.values()):
            if not stream.version.sealed:
                self._fail(stream.version, PeerLostError(f"{session.name} is gone: {reason}"))

    def _on_watch(self, peer: bytes, watch: Watch, _: object) -> None:
        session = self._trainers.session(peer)
        known = self._catalogue.last(watch.version)
        if known is None:
            error = ErrorInfo(PeerLostError.code, f"this daemon knows no version {watch.version}")
            self._trainers.send(session, VersionStatus(watch.version, VersionState.FAILED, error))
            return
        if known.state not in FINAL:
            session.watching.add(watch.version)
        self._trainers.send(session, status_of(known))

    def _fail(self, version: Version, error: CpeError) -> None:
        if version.state is VersionState.RECEIVING:
            self._metrics.failures.labels(code=error.code).inc()
            self._catalogue.fail(version, error)

    def _spawn(self, version: Version, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except CpeError as error:
                self._fail(version, error)

        self._tasks.create_task(guarded())

    def _on_version(self, version: Version) -> None:
        """A version changed: tell whoever watches it; close the streams of one that is no longer received.

        The end of one that is being digested is told when it is, and may come again; if the daemon stops, at once.
        """
        early = version.state in FINAL and version in self.digesting and not self._stopped_because
        if version.state is not VersionState.RECEIVING:
            self._progress.pop(version.id, None)
        for session in self._trainers:
            if version.state is not VersionState.RECEIVING:
                for stream in [s for s in session.streams.values() if s.version is version]:
                    del session.streams[stream.id]
            if version.id in session.watching and not early:
                self._trainers.send(session, status_of(version))
                if version.state in FINAL:
                    session.watching.discard(version.id)

    # --- deadlines ---------------------------------------------------------------------------------------------------

    def _touch(self, version: Version) -> None:
        if version.state is VersionState.RECEIVING:
            self._progress[version.id] = self._clock()

    def fail_stalled(self) -> None:
        """Fail every version that no rank has moved for too long, or that takes too long in all."""
        now, deadlines = self._clock(), self._config.deadlines
        self._repeats.drop_late(deadlines.receive_total_seconds)
        for stream in self._room.waiting:
            self._touch(stream.version)
        for version in [v for v in self._catalogue if v.state is VersionState.RECEIVING]:
            idle, total = now - self._progress.get(version.id, now), now - version.opened_at
            if idle > deadlines.receive_idle_seconds or total > deadlines.receive_total_seconds:
                so_far = f"{missing(version)} after {total:.0f} s, nothing came for {idle:.0f} s"
                self._fail(version, DeadlineError(f"{version.id}: {so_far}"))
