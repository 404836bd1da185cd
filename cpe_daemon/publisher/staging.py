"""Host memory that a contribution is copied to, so that the trainer may go on while its bytes travel.

One mapping, kept from publish to publish and grown on demand: the first touch of a fresh page costs ten times a copy.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, NamedTuple, Self

from torch import Tensor
from xxhash import xxh3_128

from cpe_daemon.core.manifest import Layout, checked_nbytes
from cpe_daemon.core.types import Shard, align
from cpe_daemon.devices.digests import piece_bytes
from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.errors import ResourceError
from cpe_daemon.publisher.gpus import BOUNCE_BYTES, Gpus
from cpe_daemon.publisher.reader import Reader
from cpe_daemon.publisher.sources import shard_of
from cpe_daemon.publisher.window import Window

_GRAIN_BYTES: Final = 64 << 20
"""The mapping grows in multiples of this."""


class Consumed(NamedTuple):
    """What an iterator yielded: shards, where they lie, the digest of each, one after another, and their bytes."""

    shards: list[Shard]
    layout: Layout
    digests: bytes
    staged: memoryview


class Staging:
    """The memory. Not thread-safe; must not be written while links still send from what is there."""

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._view = memoryview(bytearray())
        self._address = 0

    def reserve(self, nbytes: int) -> memoryview:
        """Have room for a contribution of ``nbytes``, and return it; `window` gives parts of it to be written.

        Raises:
            ResourceError: the host has not enough memory.
        """
        self._reserve(nbytes, keep=0)
        return self._view[:nbytes]

    def consume(self, pairs: Iterable[tuple[str, Tensor]], gpus: Gpus) -> Consumed:
        """Copy tensors as they come, and digest them.

        Raises:
            ResourceError: the host has not enough memory, or a GPU failed.
            ManifestError: a tensor cannot be published.
        """
        shards: list[Shard] = []
        offsets: list[int] = []
        sizes: list[int] = []
        digests: list[bytes] = []
        end = 0
        with _Copying(gpus) as copying:
            for name, tensor in pairs:
                shard = shard_of(name, tensor)
                nbytes = checked_nbytes(shard)
                after = align(end + nbytes)
                self._reserve(after, keep=end)
                digests.append(copying.copy(tensor, Window(self._address, self._view), end))
                self._view[end + nbytes : after] = bytes(after - end - nbytes)
                shards.append(shard)
                offsets.append(end)
                sizes.append(nbytes)
                end = after
        return Consumed(shards, Layout(tuple(offsets), tuple(sizes), end), b"".join(digests), self._view[:end])

    def window(self, offset: int, nbytes: int) -> Window:
        """The memory at ``offset``."""
        return Window(self._address + offset, self._view[offset : offset + nbytes])

    def close(self) -> None:
        """Let go of the memory; it is unmapped when nothing views it any more."""
        self._view = memoryview(bytearray())
        self._mapping = None

    def _reserve(self, nbytes: int, keep: int) -> None:
        """Have room for ``nbytes``, keeping the first ``keep``."""
        if nbytes <= len(self._view):
            return
        size = -(-nbytes // _GRAIN_BYTES) * _GRAIN_BYTES
        mapping, view, address = self._mapping, self._view, self._address
        self.close()
        if mapping is not None and keep:
            view.release()
            try:
                mapping.resize(size)
            except BufferError:  # a link that was given up still has frames of it: leave it to them
                view = memoryview(mapping)
            except OSError as error:
                raise ResourceError(f"this host has no {size} bytes to stage a contribution in: {error}") from None
            else:
                self._take(mapping)
                return
        self._map(size)
        if keep:
            copy(self._address, address, keep)
        view.release()

    def _map(self, size: int) -> None:
        try:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise ResourceError(f"this host has no {size} bytes to stage a contribution in: {error}") from None
        with contextlib.suppress(OSError):  # huge pages make the first touch cheaper, where the kernel has them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._take(mapping)

    def _take(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._view = memoryview(mapping)
        self._address = address_of(self._view)


class _Copying:
    """A context in which whole tensors are copied and digested: what is in a GPU by a thread of its own.

    The trainer's thread goes on with its iterator, and has to find the current device as it left it.
    """

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._here, self._there = Reader(gpus), Reader(gpus)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.submit(self._there.close)
            self._pool.shutdown()

    def copy(self, tensor: Tensor, window: Window, at: int) -> bytes:
        """Copy a tensor to position ``at`` of a window, and return the digest of what is there then."""
        device = self._gpus.device_of(tensor)
        if device is None:
            return _copy(self._here, tensor, window, at, piece_bytes(1))
        self._gpus.settle(device)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "cpe-fetch")
        return self._pool.submit(_copy, self._there, tensor, window, at, BOUNCE_BYTES).result()


def _copy(reader: Reader, tensor: Tensor, window: Window, at: int, piece_bytes: int) -> bytes:
    source, nbytes = reader.find(tensor), tensor.nbytes
    hasher = xxh3_128()
    for start in range(0, nbytes, piece_bytes):
        step = min(piece_bytes, nbytes - start)
        reader.copy(source, start, step, window, at + start)
        reader.arrive()
        hasher.update(window.view[at + start : at + start + step])
    return hasher.digest()
