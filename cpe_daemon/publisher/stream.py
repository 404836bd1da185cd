"""Fills chunks: tensors to bytes in chunk memory, and a digest of each tensor, by as many threads as that takes.

The bytes of a rank's contribution are one stream, laid out by `cpe_daemon.core.manifest.layout`, with zeros between the
tensors. The digests are of the bytes just written to the chunk's memory. What the host copies is digested in pieces
that are still in the cache: reading a whole chunk again costs a quarter more. Its copies are `memmove` calls: torch's
copy_ starts OpenMP threads that fight the daemon for cores (a tenth of the rate on a busy two-core host), and costs ten
times as much a small tensor. What is in a GPU comes by one asynchronous copy for each tensor of a chunk, and is
digested when the chunk is there: while one thread waits for its chunk, others digest theirs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from cpe_daemon.core.types import ALIGNMENT_BYTES
from cpe_daemon.devices.digests import ChunkDigests, Digests, NoDigests, piece_bytes
from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.in_place import InPlace, find_in_place
from cpe_daemon.publisher.reader import Reader, is_plain
from cpe_daemon.publisher.runs import cut_runs
from cpe_daemon.publisher.sources import Contribution
from cpe_daemon.publisher.window import Window

_SWITCH_SECONDS: Final = 0.0005
_MOST_THREADS: Final = 8
_RUNS_A_THREAD: Final = 4
"""Several, so that all threads end at about the same time."""
_ZEROS: Final = bytes(ALIGNMENT_BYTES)


class Sink(Protocol):
    """Where chunks go. Called by several threads, each with chunks of its own."""

    @property
    def in_order(self) -> bool:
        """Whether chunks had better be filled from the first to the last."""
        ...

    def window(self, offset: int, nbytes: int) -> Window:
        """Return memory for bytes ``offset`` to ``offset + nbytes`` of the contribution; may wait for it."""
        ...

    def filled(self, offset: int, nbytes: int) -> None:
        """The window returned for ``offset`` is full: send it."""
        ...


class Leaving(Protocol):
    """Where chunks go that are not written to a window. Called by the same threads."""

    def most_parts(self) -> int:
        """In how many parts the next chunk may be sent from where it lies; 0 if it is to be written to a window."""
        ...

    def lies(self, offset: int, chunk: InPlace, seconds: float) -> None:
        """Send a chunk from where it lies. It was digested there, which took so long."""
        ...


def threads_here() -> int:
    """How many threads fill chunks: half of the cores, since the daemon copies and digests as much, and at most 8."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))


@dataclass(frozen=True, slots=True)
class Pouring:
    """How a contribution is poured.

    Attributes:
        gpus: of this process.
        threads: how many fill chunks. One is the calling thread, if no tensor is in a GPU.
        progress: called by the calling thread with the bytes of every chunk that was filled.
    """

    gpus: Gpus
    threads: int
    progress: Callable[[int], None] = lambda nbytes: None


def pour(
    contribution: Contribution,
    sink: Sink,
    chunk_bytes: int,
    pouring: Pouring,
    leaving: Leaving | None = None,
    *,
    digested: bool = True,
) -> bytes:
    """Write a contribution into the windows of ``sink``, each of ``chunk_bytes`` but the last.

    Args:
        contribution: what to write. Its tensors must not change meanwhile, but by what was issued to a GPU on this
            thread's current stream: that is waited for.
        sink: asked for windows. What it raises ends the pouring.
        chunk_bytes: the size of a chunk.
        pouring: how.
        leaving: takes chunks, as far as it wants them, from where they lie.
        digested: whether digests are wanted.

    Returns:
        The digests of all shards, one after another, in order; or nothing.

    Raises:
        ResourceError: a GPU failed.
    """
    devices = {device for tensor in contribution.tensors if (device := pouring.gpus.device_of(tensor)) is not None}
    for device in devices:
        pouring.gpus.settle(device)
    layout = contribution.layout
    digests = Digests(layout, chunk_bytes, lasting=False) if digested else NoDigests(layout, chunk_bytes)
    if pouring.threads == 1 and not devices:
        with Reader(pouring.gpus) as reader:
            filler = _Filler(contribution, sink, digests, reader, piece_bytes(1), leaving, all_here=True)
            for chunk in range(-(-layout.nbytes // chunk_bytes)):
                pouring.progress(filler.fill(chunk))
    else:
        runs = cut_runs(layout, chunk_bytes, pouring.threads * _RUNS_A_THREAD)
        if not sink.in_order:
            runs.sort(key=len, reverse=True)  # the longest last would keep one thread while all others are done
        _Crew(contribution, sink, digests, runs, pouring, leaving, all_here=not devices).work()
    return b"".join(digests.found)


def digest(contribution: Contribution, pouring: Pouring) -> bytes:
    """Return what `pour` returns, without any sink: tensors pass through memory that stays in the cache.

    Raises:
        ResourceError: a GPU failed.
    """
    return pour(contribution, _Nowhere(), piece_bytes(pouring.threads), pouring)


class _Nowhere:
    """A sink whose every window is the calling thread's own memory, over and over."""

    in_order = False

    def __init__(self) -> None:
        self._mine = threading.local()

    def window(self, offset: int, nbytes: int) -> Window:
        """The thread's memory. All windows but the last have one size."""
        if len(kept := getattr(self._mine, "memory", bytearray())) < nbytes:
            kept = self._mine.memory = bytearray(nbytes)
        view = memoryview(kept)[:nbytes]
        return Window(address_of(view), view)

    def filled(self, offset: int, nbytes: int) -> None:
        """It was digested: that is all."""


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    """Meanwhile, have threads of this process yield the interpreter to one another a tenth as late as usual.

    Otherwise those that fill chunks wait for it longer than they copy.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Crew:
    """Threads that fill one contribution's chunks, run by run."""

    def __init__(
        self,
        contribution: Contribution,
        sink: Sink,
        digests: Digests,
        runs: Sequence[range],
        pouring: Pouring,
        leaving: Leaving | None,
        *,
        all_here: bool,
    ) -> None:
        self._contribution = contribution
        self._sink = sink
        self._digests = digests
        self._runs = deque(runs)
        self._pouring = pouring
        self._leaving = leaving
        self._all_here = all_here
        self._filled: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Bytes of each chunk, and None when a thread ends."""
        self._stop = threading.Event()

    def work(self) -> None:
        """Fill all chunks; raises what a thread raised, when all have ended."""
        threads = min(self._pouring.threads, len(self._runs))
        if not threads:
            return
        with _quick_switches(), ThreadPoolExecutor(threads, "cpe-pour") as pool:
            done = [pool.submit(self._work) for _ in range(threads)]
            try:
                left = threads
                while left:
                    nbytes = self._filled.get()  # each thread's waits are bounded, and it says None at its end
                    if nbytes is None:
                        left -= 1
                    else:
                        self._pouring.progress(nbytes)
            finally:
                self._stop.set()
        for thread in done:
            thread.result()

    def _work(self) -> None:
        complete = False
        try:
            with Reader(self._pouring.gpus) as reader:
                size = piece_bytes(self._pouring.threads)
                filler = _Filler(
                    self._contribution, self._sink, self._digests, reader, size, self._leaving, all_here=self._all_here
                )
                while self._runs and not self._stop.is_set():
                    self._fill_run(filler)
            complete = True
        finally:
            if not complete:
                self._stop.set()
            self._filled.put(None)

    def _fill_run(self, filler: _Filler) -> None:
        try:
            run = self._runs.popleft()
        except IndexError:
            return  # another thread was faster
        for chunk in run:
            if self._stop.is_set():
                return
            self._filled.put(filler.fill(chunk))


class _Filler:
    """Fills chunks, in one thread; ``all_here`` if no tensor is in a GPU."""

    def __init__(
        self,
        contribution: Contribution,
        sink: Sink,
        digests: Digests,
        reader: Reader,
        piece_bytes: int,
        leaving: Leaving | None,
        *,
        all_here: bool,
    ) -> None:
        self._leaving = leaving
        self._piece_bytes = piece_bytes
        self._contribution = contribution
        self._tensors = contribution.tensors
        self._layout = contribution.layout
        self._sink = sink
        self._digests = digests
        self._reader = reader
        self._all_here = all_here

    def fill(self, chunk: int) -> int:
        """Fill a chunk, or have it sent from where it lies; return how many bytes it has."""
        start = chunk * self._digests.chunk_bytes
        nbytes = min(self._digests.chunk_bytes, self._layout.nbytes - start)
        if self._leaving is not None and self._leave(self._leaving, chunk, start, nbytes):
            return nbytes
        window = self._sink.window(start, nbytes)
        digests = self._digests.chunk(chunk, window.view)
        self._write(start, window, digests)
        self._reader.arrive()
        digests.end()
        self._sink.filled(start, nbytes)
        return nbytes

    def _leave(self, leaving: Leaving, chunk: int, start: int, nbytes: int) -> bool:
        """Have a chunk sent from where it lies; False if that is not wanted, or cannot be."""
        if not (most := leaving.most_parts()):
            return False
        in_place = find_in_place(self._contribution, self._digests.first_shard(start), start, nbytes, most)
        if in_place is None:
            return False
        began = time.perf_counter()
        self._digests.chunk(chunk, in_place).end()
        leaving.lies(start, in_place, time.perf_counter() - began)
        return True

    def _write(self, start: int, window: Window, digests: ChunkDigests) -> None:
        """Write what of the tensors is in the chunk that begins at ``start``, and zeros between them."""
        offsets, sizes, total = self._layout.offsets, self._layout.sizes, len(window.view)
        at = digested = 0
        shard = self._digests.first_shard(start)
        while at < total:
            begin = offsets[shard] - start if shard < len(sizes) else total
            if at < begin:
                gap = min(begin, total)
                window.view[at:gap] = _ZEROS[: gap - at]
                at = gap
                continue
            tensor, nbytes = self._tensors[shard], min(sizes[shard] + begin, total) - at
            if self._all_here and begin == at and nbytes <= self._piece_bytes and tensor.is_cpu and is_plain(tensor):
                copy(window.address + at, tensor.data_ptr(), nbytes)  # the way of small tensors: no objects made
            else:
                self._write_part(tensor, at - begin, nbytes, window, at, digests)
            at += nbytes
            if at - digested >= self._piece_bytes and not self._reader.pending:
                digests.upto(at)
                digested = at
            shard += 1

    def _write_part(
        self, tensor: Tensor, start: int, nbytes: int, window: Window, at: int, digests: ChunkDigests
    ) -> None:
        """Write ``nbytes`` of a tensor, from ``start`` on, and digest them if they are there at once."""
        source = self._reader.find(tensor)
        size = self._piece_bytes if source.device is None else max(nbytes, 1)  # a call costs more there
        for done in range(0, nbytes, size):
            step = min(size, nbytes - done)
            self._reader.copy(source, start + done, step, window, at + done)
            if not self._reader.pending:
                digests.upto(at + done + step)
