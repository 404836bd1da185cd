"""A stream's chunks are copied by the threads that it may have, and every stream has its turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import ALIGNMENT_BYTES, Shard
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.memory import address_of
from cpe_daemon.ingest.copier import Copier, Job
from cpe_daemon.ingest.writer import ExtentWriter, Span
from cpe_daemon.wire.messages import Chunk

A = ALIGNMENT_BYTES
WAIT_SECONDS = 20.0


class Writing(ExtentWriter):
    """A writer of chunks of 256 bytes that notes what it writes, and waits for `gate` before each."""

    def __init__(self, name: str, log: list[str], chunks: int = 12) -> None:
        shards = [Shard("w", "uint8", (chunks * A,))]
        self.arena = bytearray(chunks * A)
        self.source = bytearray(index % 251 for index in range(chunks * A))
        view = memoryview(self.arena)
        super().__init__(address_of(view), view, shards, layout(shards), A, A)
        self.name = name
        self.log = log
        self.reached = threading.Event()
        self.gate = threading.Event()
        self.fails_at = -1
        self.together = 0

    def write(self, offset: int, sources: Sequence[Span]) -> None:
        self.together += 1
        assert self.together == 1
        self.reached.set()
        assert self.gate.wait(WAIT_SECONDS)
        self.log.append(f"{self.name}{offset // A}")
        self.together -= 1
        if offset // A == self.fails_at:
            raise OSError("bad address")
        super().write(offset, sources)

    def job(self, index: int) -> Job:
        self.accept(index * A, A)
        return Job(Chunk(1, index * A, A), [Span(address_of(memoryview(self.source)) + index * A, A)])


class Together(Writing):
    """A writer whose every chunk waits until so many are being written at once."""

    def __init__(self, threads: int) -> None:
        super().__init__("a", [])
        self.most = 0
        self._barrier = threading.Barrier(threads)
        self._lock = threading.Lock()

    def write(self, offset: int, sources: Sequence[Span]) -> None:
        with self._lock:
            self.together += 1
            self.most = max(self.most, self.together)
        self._barrier.wait(WAIT_SECONDS)
        ExtentWriter.write(self, offset, sources)
        with self._lock:
            self.together -= 1
        self._barrier.wait(WAIT_SECONDS)


class Told:
    """What the loop was told of a stream."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.chunks: list[int] = []
        self.errors: list[Exception] = []
        self._changed = asyncio.Event()
        self._thread = threading.get_ident()

    def __call__(self, jobs: Sequence[Job], error: Exception | None) -> None:
        assert threading.get_ident() == self._thread
        self.batches.append(len(jobs))
        self.chunks += [job.chunk.offset // A for job in jobs]
        self.errors += [error] if error is not None else []
        self._changed.set()

    async def until(self, chunks: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.chunks) < chunks:
                self._changed.clear()
                await self._changed.wait()


async def closed(pool: CopyPool) -> None:
    await asyncio.to_thread(pool.shutdown)


async def test_chunks_are_copied_in_order_and_told_in_batches(no_leaks: None) -> None:
    pool, log, told = CopyPool(4, "cpe-test"), list[str](), Told()
    writer = Writing("a", log)
    copier = Copier(writer, pool, 1, 4, told)
    for index in range(12):
        copier.put(writer.job(index))
    assert writer.reached.wait(WAIT_SECONDS)
    writer.gate.set()
    await told.until(12)
    assert told.chunks == list(range(12))
    assert told.batches == [4, 4, 4]
    assert log == [f"a{index}" for index in range(12)]
    assert writer.arena == writer.source
    await closed(pool)


async def test_batch_is_not_awaited_where_there_is_nothing_to_copy() -> None:
    pool, told = CopyPool(1, "cpe-test"), Told()
    writer = Writing("a", [])
    writer.gate.set()
    copier = Copier(writer, pool, 1, 4, told)
    for index in range(3):
        copier.put(writer.job(index))
        await told.until(index + 1)
    assert told.batches == [1, 1, 1]
    await closed(pool)


async def test_stream_that_waits_for_a_thread_has_its_turn_after_a_batch() -> None:
    pool, log = CopyPool(1, "cpe-test"), list[str]()
    writers, tolds = [Writing("a", log), Writing("b", log)], [Told(), Told()]
    copiers = [Copier(writer, pool, 1, 2, told) for writer, told in zip(writers, tolds, strict=True)]
    for writer, copier in zip(writers, copiers, strict=True):
        for index in range(4):
            copier.put(writer.job(index))
    assert writers[0].reached.wait(WAIT_SECONDS)
    for writer in writers:
        writer.gate.set()
    for told in tolds:
        await told.until(4)
    assert log == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "b3"]
    await closed(pool)


async def test_stream_has_as_many_threads_as_it_may(no_leaks: None) -> None:
    pool, told = CopyPool(4, "cpe-test"), Told()
    writer = Together(3)
    copier = Copier(writer, pool, 3, 1, told)
    for index in range(12):
        copier.put(writer.job(index))
    await told.until(12)
    assert writer.most == 3
    assert sorted(told.chunks) == list(range(12))
    assert writer.arena == writer.source
    await closed(pool)


async def test_failed_copy_is_told_with_its_chunk_and_does_not_keep_the_others() -> None:
    pool, told = CopyPool(2, "cpe-test"), Told()
    writer = Writing("a", [])
    writer.fails_at = 1
    writer.gate.set()
    copier = Copier(writer, pool, 1, 4, told)
    for index in range(6):
        copier.put(writer.job(index))
    await told.until(6)
    assert told.chunks == list(range(6))
    assert [str(error) for error in told.errors] == ["bad address"]
    await closed(pool)


async def test_pool_that_shuts_down_copies_what_it_was_given() -> None:
    """The loop counts on every chunk to come back: what it keeps for them would stay for ever."""
    pool, log = CopyPool(1, "cpe-test"), list[str]()
    writers, tolds = [Writing("a", log), Writing("b", log)], [Told(), Told()]
    for writer, told in zip(writers, tolds, strict=True):
        copier = Copier(writer, pool, 1, 2, told)
        for index in range(6):
            copier.put(writer.job(index))
    assert writers[0].reached.wait(WAIT_SECONDS)
    pool.shutdown(wait=False)
    for writer in writers:
        writer.gate.set()
    for told in tolds:
        await told.until(6)
    await closed(pool)


def test_copy_goes_on_in_its_thread_only_while_nobody_waits_for_one(no_leaks: None) -> None:
    pool = CopyPool(1, "cpe-test")
    begun, going_on = threading.Event(), threading.Event()
    answers: list[bool] = []

    def copy() -> None:
        answers.append(pool.go_on())
        begun.set()
        assert going_on.wait(WAIT_SECONDS)
        answers.append(pool.go_on())

    first = pool.submit(copy)
    assert begun.wait(WAIT_SECONDS)
    second = pool.submit(int)
    going_on.set()
    first.result(WAIT_SECONDS)
    second.result(WAIT_SECONDS)
    assert answers == [True, False]
    assert pool.submit(pool.go_on).result(WAIT_SECONDS)
    pool.shutdown()


def test_age_of_a_copy_begins_anew_when_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CopyPool(1, "cpe-test")
    now = 100.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    monkeypatch.setattr("cpe_daemon.devices.copypool.time", Clock)
    begun, going_on, gone_on, over = (threading.Event() for _ in range(4))

    def copy() -> None:
        begun.set()
        assert going_on.wait(WAIT_SECONDS)
        assert pool.go_on()
        gone_on.set()
        assert over.wait(WAIT_SECONDS)

    copying = pool.submit(copy)
    assert begun.wait(WAIT_SECONDS)
    now = 107.0
    assert pool.stuck_seconds == 7.0
    going_on.set()
    assert gone_on.wait(WAIT_SECONDS)
    assert pool.stuck_seconds == 0.0
    over.set()
    copying.result(WAIT_SECONDS)
    pool.shutdown()
