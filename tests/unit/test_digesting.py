"""Versions that are staged without digests, since engines are held to a fold: when they are digested, and who waits."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.config.deadlines import DeadlinesConfig
from cpe_daemon.core.admission import History, Used
from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.daemon.drain import Drain
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.digests import Digests
from cpe_daemon.errors import EngineError, VersionRefusedError
from cpe_daemon.ingest import digesting
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerHello,
    VersionOpened,
    VersionStatus,
)
from cpe_daemon.wire.reports import VersionReport
from tests.unit.test_repeats import NoHandoff

W, B = Shard("w", "uint8", (1000,)), Shard("b", "uint8", (24,))
BYTES = 1024 + 256


def number(n: int) -> VersionId:
    return VersionId("m", "r", n)


def data_of(seed: int, shards: Sequence[Shard] = (W, B)) -> bytes:
    return random.Random(seed).randbytes(layout(shards).nbytes)


def digests_of(data: bytes, shards: Sequence[Shard] = (W, B)) -> list[bytes]:
    places = zip(layout(shards).offsets, shards, strict=True)
    return [xxh3_128_digest(data[at : at + shard.nbytes]) for at, shard in places]


def identity(data: bytes) -> bytes:
    return content_digest([[W, B]], [digests_of(data)])


class Gate:
    """Chunks are digested while it is open; it counts those that were."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()
        self.chunks = 0

    def open(self) -> None:
        self._open.set()

    def digest(self, digests: Digests, chunk: int, view: memoryview) -> None:
        self.reached.set()
        assert self._open.wait(20)
        self.chunks += 1
        start = chunk * digests.chunk_bytes
        digests.chunk(chunk, view[start : start + digests.chunk_bytes]).end()


class Node:
    """What trainers whose GPUs fold talk to, without sockets or engines."""

    def __init__(self, arena_bytes: int, pool: CopyPool, tasks: asyncio.TaskGroup) -> None:
        self.now = 0.0
        self.sent: list[Message] = []
        self._told = asyncio.Event()
        self._streams = itertools.count(1)
        self.arena = Arena(arena_bytes)
        config = Config.model_validate(
            {"runtime_dir": Path("/tmp/cpe-desk"), "device": {"verify": True}, "ingest": {"copy_threads": 2}}
        )
        self.catalogue = Catalogue(self.arena, retain=1, clock=lambda: self.now)
        trainers = Trainers(
            config=config,
            generation="g",
            boot_id="this host",
            handoff=cast("HandoffServer", NoHandoff()),
            metrics=Metrics(),
            clock=lambda: self.now,
        )
        trainers.connect(self)
        self.ingest = Ingest(
            config=config,
            trainers=trainers,
            catalogue=self.catalogue,
            arena=self.arena,
            pool=pool,
            tasks=tasks,
            metrics=Metrics(),
            clock=lambda: self.now,
        )
        self.undigested = True
        """What it says of the versions that it opens."""
        self._handlers = {**trainers.handlers(), **self.ingest.handlers()}
        self.say(TrainerHello(PROTOCOL, "m", "r", 0, 1))

    @classmethod
    @asynccontextmanager
    async def running(cls, arena_bytes: int = 16 * BYTES) -> AsyncIterator[Node]:
        pool = CopyPool(2, "cpe-copy")
        async with asyncio.TaskGroup() as tasks:
            node = cls(arena_bytes, pool, tasks)
            running = tasks.create_task(node.ingest.digesting.run())
            try:
                yield node
            finally:
                running.cancel()
        await asyncio.to_thread(pool.shutdown)
        node.arena.close()

    def send(self, peer: bytes, message: Message, *_: object) -> bool:
        self.sent.append(message)
        self._told.set()
        return True

    def say(self, message: Message, *frames: bytes) -> None:
        self._handlers[type(message)](b"t0", message, [memoryview(bytearray(frame)) for frame in frames])

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - of no event: threads and turns of the loop
                await asyncio.sleep(0.001)

    async def answer(self, kind: type[Message], stream: int) -> Message:
        found: list[Message] = []

        def look() -> bool:
            found[:] = [m for m in self.sent if isinstance(m, kind) and getattr(m, "stream", 0) == stream]
            return bool(found)

        await self.until(look)
        return found[0]

    def open(self, n: int) -> int:
        """Announce a version and its shards; the stream."""
        stream = next(self._streams)
        self.say(OpenVersion(stream, number(n), 2, BYTES, folded=True, undigested=self.undigested))
        self.say(ManifestPart(stream, 0, [W, B]))
        return stream

    async def bring(self, n: int, data: bytes, digests: bytes = b"") -> Version:
        """Send a version and seal it; it is staged or has failed when this returns."""
        stream = self.open(n)
        await self.answer(VersionOpened, stream)
        version = self.catalogue.find(number(n))
        assert version is not None
        self.say(Chunk(stream, 0, BYTES), data)
        await self.answer(ChunkDone, stream)
        self.say(Seal(stream, digests, 0))
        await self.until(lambda: version.state != "receiving")
        return version

    def push(self, version: Version) -> None:
        self.catalogue.begin_push(version)

    def go_live(self, version: Version) -> Version:
        if version.state == "staged":
            self.push(version)
        self.catalogue.go_live(version, VersionReport(version.id, BYTES, 2))
        return version


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds digests back, which are made of 256 bytes at a time."""
    made = Gate()
    monkeypatch.setattr(digesting, "_digest_chunk", made.digest)
    monkeypatch.setattr(digesting, "_CHUNK_BYTES", 256)
    monkeypatch.setattr(digesting, "_LOOK_SECONDS", 0.001)
    yield made
    made.open()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Looks:
    """How often it was looked whether the node is quiet."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self._node = node
        self.count = 0
        is_quiet = node.ingest.digesting._is_quiet

        def look() -> bool:
            self.count += 1
            return is_quiet()

        monkeypatch.setattr(node.ingest.digesting, "_is_quiet", look)

    async def some(self) -> None:
        """Return when it was looked three more times."""
        begun = self.count
        await self._node.until(lambda: self.count > begun + 2)


# --- what comes out of it --------------------------------------------------------------------------------------------


async def test_what_a_trainer_digests_all_the_same_is_digested_while_it_comes(gate: Gate) -> None:
    """As of one whose bytes go by sockets."""
    data = data_of(1)
    async with Node.running() as node:
        node.undigested = False
        version = await node.bring(1, data, b"".join(digests_of(data)))
        assert version.state == "staged"
        assert version.digest == identity(data)
        assert version not in node.ingest.digesting
        gate.open()


async def test_folded_version_is_staged_at_once_and_its_digest_is_known_later(gate: Gate) -> None:
    data = data_of(1)
    async with Node.running() as node:
        told: list[Version] = []
        node.catalogue.on_digest(told.append)
        version = await node.bring(1, data)
        assert (version.state, version.digest, told) == ("staged", b"", [])
        part = version.contributions[0]
        assert (part.sealed, part.digests) == (True, None)
        node.go_live(version)
        gate.open()
        await node.until(lambda: told)
        assert (told, version.digest) == ([version], identity(data))
        assert part.digests == digests_of(data)
        await node.until(lambda: not version.leases)
        assert node.ingest.digesting.due == []


@given(
    ranks=st.lists(
        st.lists(st.integers(0, 3000) | st.sampled_from([0, 256, 1024]), max_size=6), min_size=1, max_size=3
    ),
    chunk_bytes=st.integers(1, 4).map(lambda n: 256 * n),
    threads=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_digest_is_that_of_a_version_that_was_digested_as_it_came(
    ranks: list[list[int]], chunk_bytes: int, threads: int
) -> None:
    shards = [[Shard(f"{rank}.{at}", "uint8", (n,)) for at, n in enumerate(sizes)] for rank, sizes in enumerate(ranks)]

    async def digest() -> Version:
        arena, pool = Arena(1 << 17), CopyPool(threads, "cpe-copy")
        catalogue = Catalogue(arena, retain=1, clock=lambda: 0.0, automatic=False)
        version = catalogue.open(number(1), len(shards))
        for rank, own in enumerate(shards):
            part = catalogue.contribute(version, rank, own, layout(own).nbytes)
            arena.view[part.extent.offset : part.extent.end] = data_of(rank, own)
            part.sealed = True
        worker = digesting.Digesting(catalogue, arena, pool, threads, lambda: 0.0, lambda: True)
        worker.put(version)
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(worker.finish(), 20)
        running.cancel()
        await asyncio.to_thread(pool.shutdown)
        arena.close()
        return version

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digesting, "_CHUNK_BYTES", chunk_bytes)
        version = asyncio.run(digest())
    expected = [digests_of(data_of(rank, own), own) for rank, own in enumerate(shards)]
    assert version.digest == content_digest(shards, expected)
    assert version.leases == 0


async def test_what_brings_digests_is_compared_before_it_is_staged(gate: Gate) -> None:
    gate.open()
    async with Node.running() as node:
        version = await node.bring(1, data_of(1), b"".join(digests_of(data_of(1))))
        assert (version.state, version.digest) == ("staged", identity(data_of(1)))
        assert not version.leases
        failed = await node.bring(2, data_of(2), b"".join(digests_of(data_of(1))))
        assert failed.state == "failed"
        assert "the bytes of w, b differ from what the trainer digested" in str(failed.error)
        assert node.catalogue.numbers.histories["m"].used["r"] == Used(1, version.digest)


@pytest.mark.parametrize("same", [True, False])
async def test_version_that_comes_again_after_a_restart_is_compared_before_it_is_staged(same: bool, gate: Gate) -> None:
    gate.open()
    async with Node.running() as node:
        node.catalogue.numbers.remember("m", History("r", {"r": Used(1, identity(data_of(1)))}))
        version = await node.bring(1, data_of(1 if same else 2))
        assert version.state == ("staged" if same else "failed")
        assert same or "was staged before with other weights" in str(version.error)
        assert not same or version.digest == identity(data_of(1))


async def test_version_that_stalls_while_it_is_digested_to_be_compared_is_given_up(gate: Gate) -> None:
    async with Node.running() as node:
        bringing = asyncio.create_task(node.bring(1, data_of(1), b"".join(digests_of(data_of(1)))))
        await node.until(gate.reached.is_set)
        node.ingest.stop("the daemon stops")
        version = await bringing
        assert version.state == "failed"
        gate.open()
        await node.until(lambda: node.arena.free_bytes == node.arena.nbytes)
        assert gate.chunks == 1


# --- when ------------------------------------------------------------------------------------------------------------


async def test_nothing_is_digested_while_versions_are_received_or_pushed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open()
    async with Node.running() as node:
        looks = Looks(node, monkeypatch)
        first = await node.bring(1, data_of(1))
        await looks.some()
        node.push(first)
        await looks.some()
        stream = node.open(2)
        node.go_live(first)
        await looks.some()
        node.say(Abandon(stream, "changed its mind"))
        with node.catalogue.lease(first):  # as a round does that gives it to an engine which came late
            await looks.some()
            assert (gate.chunks, first.digest) == (0, b"")
        await node.until(lambda: first.digest)
        assert gate.chunks == 5


async def test_push_that_begins_meanwhile_has_the_processors_after_a_chunk(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Node.running() as node:
        looks = Looks(node, monkeypatch)
        first = node.go_live(await node.bring(1, data_of(1)))
        await node.until(gate.reached.is_set)
        stream = node.open(2)
        gate.open()
        await looks.some()
        assert (gate.chunks, first.digest) == (1, b"")
        node.say(Abandon(stream, "changed its mind"))
        await node.until(lambda: first.digest)


async def test_node_that_is_never_quiet_digests_in_the_end(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.open()
    async with Node.running() as node:
        looks = Looks(node, monkeypatch)
        version = await node.bring(1, data_of(1))
        node.push(version)
        await looks.some()
        node.now += digesting._PATIENCE_SECONDS - 0.1
        await looks.some()
        assert gate.chunks == 0
        node.now += 0.2
        await node.until(lambda: version.digest)
        assert version.state == "pushing"


async def test_end_of_a_daemon_waits_for_digests_and_for_nothing_else(gate: Gate) -> None:
    async with Node.running() as node:
        first = node.go_live(await node.bring(1, data_of(1)))
        second = await node.bring(2, data_of(2))
        finishing = asyncio.create_task(node.ingest.digesting.finish())
        await node.until(gate.reached.is_set)
        assert node.ingest.digesting.due == [number(1), number(2)]
        gate.open()
        await asyncio.wait_for(finishing, 20)
        assert (first.digest, second.digest) == (identity(data_of(1)), identity(data_of(2)))
        assert second.state == "staged"


async def test_daemon_that_ends_tells_at_once_what_it_gives_up(gate: Gate) -> None:
    async with Node.running() as node:
        version = await node.bring(1, data_of(1))
        node.ingest.stop("the daemon stops")
        node.catalogue.fail(version, EngineError("the daemon stops"))
        (failed,) = [m for m in node.sent if isinstance(m, VersionStatus) and m.state == "failed"]
        assert failed.version == number(1)
        gate.open()
        await asyncio.wait_for(node.ingest.digesting.finish(), 20)
        assert [m for m in node.sent if isinstance(m, VersionStatus)][-1] is failed
        assert version.digest == identity(data_of(1))


async def test_daemon_that_ends_while_it_digests_lets_go(gate: Gate, no_leaks: None) -> None:
    async with Node.running() as node:
        version = node.go_live(await node.bring(1, data_of(1)))
        await node.until(gate.reached.is_set)
        gate.open()
    assert (version.digest, version.leases) == (b"", 0)


# --- bytes that others want, or nobody any more ----------------------------------------------------------------------


async def test_want_of_room_hurries_nothing_that_would_make_none(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Node.running() as node:
        gate.open()
        looks = Looks(node, monkeypatch)
        monkeypatch.setattr(node.ingest.digesting, "_short", lambda: True)
        version = await node.bring(1, data_of(1))
        node.push(version)
        await looks.some()
        assert gate.chunks == 0
        node.go_live(version)
        await node.until(lambda: version.digest)


async def test_room_of_a_version_that_is_not_digested_is_given_up_when_it_is(gate: Gate) -> None:
    """Three do not fit: the one that was live is evicted for the third, and digested first though bytes come."""
    async with Node.running(arena_bytes=2 * BYTES) as node:
        first = node.go_live(await node.bring(1, data_of(1)))
        second = await node.bring(2, data_of(2))
        node.push(second)
        stream = node.open(3)
        node.catalogue.go_live(second, VersionReport(second.id, BYTES, 2))
        await node.until(gate.reached.is_set)
        assert (first.state, first.digest) == ("retained", b"")
        gate.open()
        await node.answer(VersionOpened, stream)
        assert (first.state, first.digest) == ("evicted", identity(data_of(1)))


async def test_version_that_failed_may_come_again_as_what_it_was_as_soon_as_that_is_told(gate: Gate) -> None:
    async with Node.running() as node:
        version = await node.bring(1, data_of(1))
        node.push(version)
        node.open(2)  # whatever else is done
        node.catalogue.fail(version, EngineError("no engine took it"))
        with pytest.raises(VersionRefusedError, match="failed: its last bytes are still being let go; try again"):
            node.open(1)
        assert not [m for m in node.sent if isinstance(m, VersionStatus) and m.state == "failed"]
        gate.open()
        await node.until(lambda: [m for m in node.sent if isinstance(m, VersionStatus) and m.state == "failed"])
        assert node.catalogue.numbers.histories["m"].used["r"] == Used(1, identity(data_of(1)))
        other = await node.bring(1, data_of(2))
        assert other.state == "failed"
        assert "was staged before with other weights" in str(other.error)
        again = await node.bring(1, data_of(1))
        assert (again.state, again.digest) == ("staged", identity(data_of(1)))


async def test_version_that_cannot_come_again_is_not_digested_once_it_is_gone(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Node.running() as node:
        first = node.go_live(await node.bring(1, data_of(1)))
        await node.until(gate.reached.is_set)
        node.go_live(await node.bring(2, data_of(2)))
        node.go_live(await node.bring(3, data_of(3)))
        assert (first.state, first.leases) == ("evicted", 1)
        gate.open()
        await node.until(lambda: node.catalogue.find(number(1)) is None)
        assert (first.digest, first.contributions) == (b"", {})
        assert gate.chunks < 5 * 3
        await node.until(lambda: not node.ingest.digesting.due)
        assert node.catalogue.numbers.histories["m"].used["r"] == Used(3, identity(data_of(3)))


# --- a version that comes again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
async def test_version_that_comes_again_waits_for_the_digests_of_what_is_held(same: bool, gate: Gate) -> None:
    async with Node.running() as node:
        version = await node.bring(1, data_of(1))
        node.push(version)  # it is not quiet, and somebody waits all the same
        stream = node.open(1)
        assert await node.answer(VersionOpened, stream) == VersionOpened(stream, held=True)
        node.say(Seal(stream, b"".join(digests_of(data_of(1 if same else 2))), 0))
        await node.until(gate.reached.is_set)
        assert not [m for m in node.sent if isinstance(m, VersionStatus | ErrorReply) and m.stream == stream]
        gate.open()
        if same:
            assert await node.answer(VersionStatus, stream) == VersionStatus(number(1), "pushing", stream=stream)
        else:
            refused = await node.answer(ErrorReply, stream)
            assert isinstance(refused, ErrorReply)
            assert refused.error.code == "version_refused"
            assert "held here (pushing) with other weights" in refused.error.message
        assert version.digest == identity(data_of(1))


async def test_version_that_comes_again_is_digested_for_that_though_it_is_gone_meanwhile(gate: Gate) -> None:
    async with Node.running() as node:
        node.go_live(await node.bring(1, data_of(1)))
        await node.until(gate.reached.is_set)
        stream = node.open(1)
        node.go_live(await node.bring(2, data_of(2)))
        node.go_live(await node.bring(3, data_of(3)))
        node.say(Seal(stream, b"".join(digests_of(data_of(1))), 0))
        gate.open()
        status = await node.answer(VersionStatus, stream)
        assert isinstance(status, VersionStatus)
        assert status.state == "evicted"


async def test_digests_that_are_not_known_in_time_are_a_deadline(gate: Gate) -> None:
    async with Node.running() as node:
        await node.bring(1, data_of(1))
        stream = node.open(1)
        node.say(Seal(stream, b"".join(digests_of(data_of(1))), 0))
        node.now += 1801.0
        node.ingest.fail_stalled()
        late = await node.answer(ErrorReply, stream)
        assert isinstance(late, ErrorReply)
        assert late.error.message == "digests of m@r#1 were not known here within 1800 s"
        gate.open()


# --- whatever happens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_becomes_of_versions_their_digests_are_right_and_nothing_stays(seed: int, gate: Gate) -> None:
    gate.open()
    chance = random.Random(seed)
    async with Node.running(arena_bytes=3 * BYTES) as node:
        versions: list[Version] = []
        for n in range(1, 12):
            versions.append(await node.bring(n, data_of(n)))
            node.push(versions[-1])
            match chance.choice(["live", "live", "failed", "rolled back", "again", "other"]):
                case "failed":
                    node.catalogue.fail(versions[-1], EngineError("no engine took it"))
                case "rolled back":
                    node.go_live(versions[-1])
                    for retained in [v for v in versions if v.state == "retained"][-1:]:
                        node.go_live(retained)
                case "again":
                    stream = node.open(n)
                    node.go_live(versions[-1])
                    node.say(Seal(stream, b"".join(digests_of(data_of(n))), 0))
                    await node.answer(VersionStatus, stream)
                case "other":
                    stream = node.open(n)
                    node.say(Seal(stream, b"".join(digests_of(data_of(0))), 0))
                    await node.answer(ErrorReply, stream)
                    node.go_live(versions[-1])
                case _:
                    node.go_live(versions[-1])
            for _ in range(chance.randrange(8)):
                await asyncio.sleep(0)
        await asyncio.wait_for(node.ingest.digesting.finish(), 20)
        for version in versions:
            assert version.digest in (identity(data_of(version.id.number)), b"")
            assert version.digest or not version.held
            assert not version.leases
        assert node.catalogue.numbers.histories["m"].used["r"] == Used(11, identity(data_of(11)))
        held = [version for version in versions if version.held]
        assert node.arena.free_bytes == node.arena.nbytes - sum(version.room_bytes for version in held)


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hurried", [True, False])
async def test_end_of_a_daemon_waits_no_longer_than_it_may_and_names_what_is_not_digested(
    hurried: bool, gate: Gate
) -> None:
    nobody = cast("Any", None)
    async with Node.running() as node:
        node.go_live(await node.bring(1, data_of(1)))
        drain = Drain(
            deadlines=DeadlinesConfig(),
            ingest=node.ingest,
            pusher=nobody,
            trainers=nobody,
            registry=nobody,
            journal=nobody,
            tell=nobody,
        )
        signalled = asyncio.Event()
        if hurried:
            signalled.set()
        with structlog.testing.capture_logs() as logs:
            await drain._learn_digests(signalled, 3600.0 if hurried else 0.01)
        assert [entry["versions"] for entry in logs if entry["event"] == "daemon.versions_not_digested"] == [["m@r#1"]]
        gate.open()
        with structlog.testing.capture_logs() as logs:
            await drain._learn_digests(asyncio.Event(), 20.0)
        assert [entry["event"] for entry in logs] == ["version.digested"]
