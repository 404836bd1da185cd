"""Digests of shards whose bytes come in chunks, in any order and by several threads.

A shard's bytes are digested in their order, but different shards at once, and nobody waits for anybody: where a shard
reaches over the end of a chunk, the state of its digest meets the bytes that come next. Whichever thread brings the
second of the two goes on with them.
"""

from __future__ import annotations

import bisect
import threading
from typing import Final, Protocol

from xxhash import xxh3_128, xxh3_128_digest

from cpe_daemon.core.manifest import Layout

_OF_NOTHING: Final = xxh3_128_digest(b"")
_FEW: Final = 2
_SMALL_BYTES: Final = 512 << 10
_LARGE_BYTES: Final = 4 << 20


def piece_bytes(threads: int) -> int:
    """How much each of so many threads copies, digests and folds in one go.

    A small piece is in the cache from one to the next. But every step has to get the interpreter's lock back, which
    takes tens of microseconds when many threads want it: with pieces of 512 KiB, twelve are as fast as three.
    """
    return _SMALL_BYTES if threads <= _FEW else _LARGE_BYTES


class Bytes(Protocol):
    """Of one chunk: a memoryview, or what gives one of any run of bytes that are one shard's."""

    def __len__(self) -> int: ...

    def __getitem__(self, run: slice, /) -> memoryview: ...


class Digests:
    """The digests of all shards of one contribution. Thread-safe, if each chunk is one thread's.

    Args:
        layout: where each shard lies.
        chunk_bytes: the size of every chunk but the last.
        lasting: whether a chunk's memory keeps its bytes after `ChunkDigests.end`; if not, bytes that still wait for
            their turn are copied.
    """

    def __init__(self, layout: Layout, chunk_bytes: int, *, lasting: bool) -> None:
        self.layout = layout
        self.chunk_bytes = chunk_bytes
        self.found = [_OF_NOTHING] * len(layout.sizes)
        """The digest of each shard, once all of its bytes have come."""
        self._lasting = lasting
        self._lock = threading.Lock()  # guards the two that meet: each has what came first at the start of a chunk
        self._states: dict[int, xxh3_128] = {}
        self._heads: dict[int, memoryview] = {}

    def chunk(self, index: int, view: Bytes) -> ChunkDigests:
        """Begin with a chunk, whose bytes ``view`` holds, or is about to."""
        start = index * self.chunk_bytes
        shard = self.first_shard(start)
        if shard == len(self.found) or self.layout.offsets[shard] >= start:
            return ChunkDigests(self, index, view, shard, None, blocked=False)
        with self._lock:
            state = self._states.pop(index, None)
        return ChunkDigests(self, index, view, shard, state, blocked=state is None)

    def first_shard(self, at: int) -> int:
        """The first shard with bytes at or behind a position; the number of shards if there is none."""
        shard = max(bisect.bisect_right(self.layout.offsets, at) - 1, 0)
        while shard < len(self.layout.sizes) and self.layout.offsets[shard] + self.layout.sizes[shard] <= at:
            shard += 1
        return shard

    def bring_state(self, index: int, state: xxh3_128) -> None:
        """The bytes before a chunk are digested, and the shard goes on in it."""
        while True:
            with self._lock:
                head = self._heads.pop(index, None)
                if head is None:
                    self._states[index] = state
                    return
            if not self._take(index, state, head):
                return
            index += 1

    def bring_head(self, index: int, head: memoryview) -> None:
        """The bytes with which a shard goes on in a chunk are there."""
        kept = head if self._lasting else memoryview(bytes(head))
        with self._lock:
            state = self._states.pop(index, None)
            if state is None:
                self._heads[index] = kept
                return
        if self._take(index, state, kept):
            self.bring_state(index + 1, state)

    def _take(self, index: int, state: xxh3_128, head: memoryview) -> bool:
        """Digest what waited at the start of a chunk; return whether the shard fills it and goes on in the next."""
        state.update(head)
        shard = self.first_shard(index * self.chunk_bytes)
        if self.layout.offsets[shard] + self.layout.sizes[shard] > (index + 1) * self.chunk_bytes:
            return True
        self.found[shard] = state.digest()
        return False


class NoDigests(Digests):
    """In their place, where nobody wants any: it knows where shards lie."""

    def __init__(self, layout: Layout, chunk_bytes: int) -> None:
        super().__init__(layout, chunk_bytes, lasting=False)
        self.found.clear()

    def chunk(self, index: int, view: Bytes) -> ChunkDigests:
        """A chunk of which nothing is digested."""
        return ChunkDigests(self, index, view, len(self.layout.sizes), None, blocked=False)


class ChunkDigests:
    """One chunk's part of it, for the thread that fills the chunk."""

    __slots__ = ("_at", "_blocked", "_index", "_owner", "_shard", "_start", "_state", "_view")

    def __init__(
        self, owner: Digests, index: int, view: Bytes, shard: int, state: xxh3_128 | None, *, blocked: bool
    ) -> None:
        self._owner = owner
        self._index = index
        self._view = view
        self._start = self._at = index * owner.chunk_bytes
        self._shard = shard
        self._state = state
        self._blocked = 0
        if blocked:
            layout = owner.layout
            self._blocked = min(layout.offsets[shard] + layout.sizes[shard] - self._start, len(view))
            self._shard += 1

    def upto(self, end: int) -> None:
        """Digest the first ``end`` bytes of the chunk, which are there, as far as that is not done yet."""
        layout, found, start, view = self._owner.layout, self._owner.found, self._start, self._view
        offsets, sizes, shard = layout.offsets, layout.sizes, self._shard
        end += start
        while shard < len(sizes):
            begin = offsets[shard]
            last = begin + sizes[shard]
            if last > end:
                self._update(max(begin, self._at), end)
                break
            if self._state is not None:
                self._update(self._at, last)
                found[shard], self._state = self._state.digest(), None
            elif begin < last:
                found[shard] = xxh3_128_digest(view[begin - start : last - start])
            shard += 1
        self._shard = shard

    def _update(self, at: int, end: int) -> None:
        """Digest bytes of a shard that has others before or behind them."""
        if at >= end:
            return
        if self._state is None:
            self._state = xxh3_128()
        self._state.update(self._view[at - self._start : end - self._start])
        self._at = end

    def end(self) -> None:
        """All bytes of the chunk are there: digest the rest, and leave to others what cannot be digested yet."""
        self.upto(len(self._view))
        if self._state is not None:
            self._owner.bring_state(self._index + 1, self._state)
        if self._blocked:
            self._owner.bring_head(self._index, self._view[: self._blocked])
