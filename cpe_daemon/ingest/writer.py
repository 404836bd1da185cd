"""Bytes into an extent: copied by several threads, digested in order, so that what is verified is what is served.

Chunks come on a fixed grid, each once. Whichever thread completes the unbroken front of copied chunks digests it, while
the others copy on: the digest reads the arena's bytes, never the sender's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from xxhash import xxh3_128, xxh3_128_digest

from cpe_daemon.core.manifest import DIGEST_BYTES, Layout
from cpe_daemon.core.types import Shard
from cpe_daemon.devices.memory import copy
from cpe_daemon.errors import DigestError, ProtocolError

PIECE_BYTES: Final = 256 << 10
"""Copied and digested in one go, so that the digest reads the cache."""

_NAMED: Final = 10


class ExtentWriter:
    """Fills one extent.

    `accept` and `check` belong to the event loop, `write` to any thread.

    Args:
        address: of the extent's first byte.
        view: the extent's bytes.
        shards: what it holds, in order.
        layout: where each shard lies.
        chunk_bytes: the grid; every chunk but the last has this size.
    """

    def __init__(
        self, address: int, view: memoryview, shards: Sequence[Shard], layout: Layout, chunk_bytes: int
    ) -> None:
        self._address = address
        self._view = view
        self._shards = shards
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        count = -(-layout.nbytes // chunk_bytes)
        self._accepted = bytearray(count)
        self._left = count
        self.accepted_bytes = 0
        """Bytes that have come, copied already or about to be."""
        self._copied = bytearray(count)
        self._front = 0  # chunks digested; this and what follows belong to the holder of the lock
        self._lock = threading.Lock()
        self._shard = 0
        self._shard_done = 0
        self._hasher = xxh3_128()
        self._digests = bytearray()

    @property
    def all_accepted(self) -> bool:
        """Whether every chunk has been accepted."""
        return self._left == 0

    def accept(self, offset: int, nbytes: int) -> None:
        """Take note of a chunk that is about to be written.

        Raises:
            ProtocolError: it is off the grid, outside the extent, or came before.
        """
        chunk, rest = divmod(offset, self._chunk_bytes)
        if rest or not 0 <= chunk < len(self._accepted):
            raise ProtocolError(f"chunk at {offset} is off the grid of {self._chunk_bytes} bytes")
        if nbytes != min(self._chunk_bytes, self._layout.nbytes - offset):
            raise ProtocolError(f"chunk at {offset} has {nbytes} bytes")
        if self._accepted[chunk]:
            raise ProtocolError(f"chunk at {offset} came twice")
        self._accepted[chunk] = 1
        self._left -= 1
        self.accepted_bytes += nbytes

    def write(self, offset: int, source: int, nbytes: int) -> None:
        """Copy an accepted chunk from the address ``source`` into the arena, and digest what is in order by now."""
        chunk = offset // self._chunk_bytes
        if chunk == self._front and self._lock.acquire(blocking=False):
            try:
                self._copy_and_digest(offset, source, nbytes)
                self._front = chunk + 1
            finally:
                self._lock.release()
        else:
            copy(self._address + offset, source, nbytes)
            self._copied[chunk] = 1
        while self._front_copied() and self._lock.acquire(blocking=False):
            try:
                while self._front_copied():
                    self._front += 1
                    self._digest(min(self._front * self._chunk_bytes, self._layout.nbytes))
            finally:
                self._lock.release()

    def check(self, digests: bytes) -> list[bytes]:
        """Compare with the trainer's digests, when every write has returned; return them one by one.

        Raises:
            ProtocolError: there is not one digest a shard.
            DigestError: bytes differ; names the first ten tensors that do.
        """
        self._digest(self._layout.nbytes)  # of tensors without bytes, no chunk may have told
        if len(digests) != DIGEST_BYTES * len(self._shards):
            raise ProtocolError(f"{len(digests)} bytes of digests for {len(self._shards)} tensors")
        split = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
        if digests != self._digests:
            ours = (bytes(self._digests[at : at + DIGEST_BYTES]) for at in range(0, len(digests), DIGEST_BYTES))
            differing = [
                shard.name for shard, mine, theirs in zip(self._shards, ours, split, strict=False) if mine != theirs
            ]
            more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
            raise DigestError(
                f"the bytes of {', '.join(differing[:_NAMED])}{more} differ from what the trainer digested"
            )
        return split

    def _copy_and_digest(self, offset: int, source: int, nbytes: int) -> None:
        address = self._address + offset
        for start in range(0, nbytes, PIECE_BYTES):
            step = min(PIECE_BYTES, nbytes - start)
            copy(address + start, source + start, step)
            self._digest(offset + start + step)

    def _front_copied(self) -> bool:
        return self._front < len(self._copied) and self._copied[self._front] == 1

    def _digest(self, end: int) -> None:
        """Digest the extent's bytes up to ``end``, all of which are there, as far as that is not done yet."""
        view, offsets, sizes = self._view, self._layout.offsets, self._layout.sizes
        while self._shard < len(sizes):
            begin = offsets[self._shard]
            at, last = begin + self._shard_done, begin + sizes[self._shard]
            if last > end:
                if at < end:
                    self._hasher.update(view[at:end])
                    self._shard_done = end - begin
                return
            if self._shard_done:
                self._hasher.update(view[at:last])
                self._digests += self._hasher.digest()
                self._hasher.reset()
                self._shard_done = 0
            else:
                self._digests += xxh3_128_digest(view[begin:last])
            self._shard += 1
