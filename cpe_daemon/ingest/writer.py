"""Bytes into an extent: copied and digested by several threads, so that what is verified is what is served.

Where engines verify what a trainer's GPUs folded, they are copied only (`cpe_daemon.ingest.digesting`).
Chunks come on a fixed grid, each once, in any order. Each thread digests what it has copied, or leaves to another what
cannot be digested yet (`cpe_daemon.devices.digests`): always the arena's bytes, never the sender's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cpe_daemon.core.manifest import DIGEST_BYTES, Layout
from cpe_daemon.core.types import Shard
from cpe_daemon.devices.digests import Digests
from cpe_daemon.devices.memory import copy
from cpe_daemon.errors import DigestError, ProtocolError

if TYPE_CHECKING:  # imports numpy, which not every daemon needs
    from cpe_daemon.ingest.fold import ExtentFold

_NAMED: Final = 10


class Span(NamedTuple):
    """So many bytes at an address."""

    address: int
    nbytes: int


class ExtentWriter:
    """Fills one extent.

    `accept` and `check` belong to the event loop, `write` to any thread.

    Args:
        address: of the extent's first byte.
        view: the extent's bytes.
        shards: what it holds, in order.
        layout: where each shard lies.
        chunk_bytes: the grid; every chunk but the last has this size.
        piece_bytes: copied and digested in one go (`cpe_daemon.devices.digests.piece_bytes`).
        fold: folds what has come, if that is wanted.
        digested: whether digests are made of what has come.
    """

    def __init__(
        self,
        address: int,
        view: memoryview,
        shards: Sequence[Shard],
        layout: Layout,
        chunk_bytes: int,
        piece_bytes: int,
        fold: ExtentFold | None = None,
        *,
        digested: bool = True,
    ) -> None:
        self._address = address
        self._view = view
        self._shards = shards
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._piece_bytes = piece_bytes
        self._fold = fold
        count = -(-layout.nbytes // chunk_bytes)
        self._accepted = bytearray(count)
        self._left = count
        self.accepted_bytes = 0
        """Bytes that have come, copied already or about to be."""
        self._digests = Digests(layout, chunk_bytes, lasting=True) if digested else None

    @property
    def all_accepted(self) -> bool:
        """Whether every chunk has been accepted."""
        return self._left == 0

    @property
    def fold(self) -> int | None:
        """The fold of the extent's bytes, when every write has returned; None if nobody wants it."""
        return self._fold.total if self._fold is not None else None

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

    def write(self, offset: int, sources: Sequence[Span]) -> None:
        """Copy an accepted chunk into the arena, and digest what can be digested by now, if that is wanted.

        ``sources`` hold its bytes, one after another, and as many as it has.
        """
        if self._digests is None:  # in one go: nothing else wants a piece while it is in the cache
            for source in sources:
                copy(self._address + offset, source.address, source.nbytes)
                offset += source.nbytes
            return
        nbytes = sum(source.nbytes for source in sources)
        digests = self._digests.chunk(offset // self._chunk_bytes, self._view[offset : offset + nbytes])
        fold = self._fold.chunk(offset, nbytes) if self._fold is not None else None
        at = digested = 0
        for source in sources:
            for start in range(0, source.nbytes, self._piece_bytes):
                step = min(self._piece_bytes, source.nbytes - start)
                copy(self._address + offset + at, source.address + start, step)
                at += step
                if at - digested < self._piece_bytes and at < nbytes:
                    continue  # more small parts: one digest of them is cheaper than one of each
                digests.upto(at)
                if fold is not None:
                    fold.upto(at)
                digested = at
        digests.end()
        if fold is not None:
            fold.end()

    def check(self, digests: bytes) -> Sequence[bytes] | None:
        """Compare with the trainer's digests, when every write has returned; return them one by one.

        None if nothing was digested: then nothing was compared either.

        Raises:
            ProtocolError, DigestError: as `check_digests`.
        """
        if self._digests is None:
            return None
        check_digests(self._shards, self._digests.found, digests)
        return self._digests.found


def check_digests(shards: Sequence[Shard], ours: Sequence[bytes], theirs: bytes) -> None:
    """Compare the digests of what is in the arena with those that the trainer says, 16 bytes each.

    Raises:
        ProtocolError: there is not one digest a shard.
        DigestError: bytes differ; names the first ten tensors that do.
    """
    if len(theirs) != DIGEST_BYTES * len(shards):
        raise ProtocolError(f"{len(theirs)} bytes of digests for {len(shards)} tensors")
    if b"".join(ours) == theirs:
        return
    split = [theirs[at : at + DIGEST_BYTES] for at in range(0, len(theirs), DIGEST_BYTES)]
    differing = [shard.name for shard, mine, said in zip(shards, ours, split, strict=True) if mine != said]
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    raise DigestError(f"the bytes of {', '.join(differing[:_NAMED])}{more} differ from what the trainer digested")
