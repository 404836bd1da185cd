"""Has one stream's chunks copied into its extent, by threads that all streams share.

A stream has the threads that it may have, and no more: each takes chunks in the order in which they came, so that
`ExtentWriter` digests every piece while it is still in the cache. A second one copies ahead, and the digest then reads
those bytes from memory again: with few cores that costs more than it brings.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.ingest.writer import ExtentWriter, Span
from cpe_daemon.wire.messages import Chunk


class Job(NamedTuple):
    """A chunk and where its bytes lie; ``frames`` keep them there, if they came as such."""

    chunk: Chunk
    runs: Sequence[Span]
    frames: Sequence[memoryview] = ()


Copied = Callable[[Sequence[Job], Exception | None], None]
"""Called with chunks that were copied, and with what went wrong with one of them, if anything did."""


class Copier:
    """The queue of one stream. Belongs to the event loop.

    Args:
        writer: fills the extent.
        pool: the threads.
        threads: how many of them at most work for the stream at once.
        batch: how many chunks at most are copied before the loop hears of it. Waking it costs as much as copying some
            hundred KiB, and its answers wake the trainer.
        copied: called on the loop; owns the jobs again.
    """

    def __init__(self, writer: ExtentWriter, pool: CopyPool, threads: int, batch: int, copied: Copied) -> None:
        self._writer = writer
        self._pool = pool
        self._threads = threads
        self._batch = batch
        self._copied = copied
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()  # guards the two, which a thread looks at together when it runs out of jobs
        self._working = 0

    def put(self, job: Job) -> None:
        """Have a chunk that the writer accepted copied."""
        with self._lock:
            self._jobs.append(job)
            another = self._working < self._threads
            self._working += another
        if another:
            self._pool.submit(self._work)

    def _work(self) -> None:
        """Copy batch by batch, until there is nothing more or another stream waits for a thread."""
        while True:
            self._copy_batch()
            with self._lock:
                if not self._jobs:
                    self._working -= 1
                    return
            if not self._pool.go_on():
                try:
                    self._pool.submit(self._work)
                except RuntimeError:
                    continue  # it shuts down, and waits for this thread to copy what is left
                return

    def _copy_batch(self) -> None:
        jobs: list[Job] = []
        error: Exception | None = None
        while len(jobs) < self._batch and (job := self._next()) is not None:
            jobs.append(job)
            try:
                self._writer.write(job.chunk.offset, job.runs)
            except Exception as failed:  # task boundary: the loop has to hear of it, and to take the chunks back
                error = failed
        self._loop.call_soon_threadsafe(self._copied, jobs, error)

    def _next(self) -> Job | None:
        with self._lock:
            return self._jobs.popleft() if self._jobs else None
