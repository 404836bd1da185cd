"""Host memory that a contribution is copied to, so that the trainer may go on while its bytes travel.

One mapping, kept from publish to publish and grown on demand: the first touch of a fresh page costs ten times a copy.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from typing import Final, NamedTuple

from torch import Tensor

from cpe_daemon.core.manifest import Layout, checked_nbytes
from cpe_daemon.core.types import Shard, align
from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.errors import ResourceError
from cpe_daemon.publisher.sources import shard_of
from cpe_daemon.publisher.stream import HostBytes, Window

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

    def consume(self, pairs: Iterable[tuple[str, Tensor]]) -> Consumed:
        """Copy tensors as they come, and digest them.

        Raises:
            ResourceError: the host has not enough memory.
            ManifestError: a tensor cannot be published.
        """
        shards: list[Shard] = []
        offsets: list[int] = []
        sizes: list[int] = []
        digests: list[bytes] = []
        end = 0
        for name, tensor in pairs:
            shard = shard_of(name, tensor)
            checked_nbytes(shard)
            source = HostBytes(tensor)
            after = align(end + source.nbytes)
            self._reserve(after, keep=end)
            digests.append(source.copy_all(Window(self._address, self._view), end))
            self._view[end + source.nbytes : after] = bytes(after - end - source.nbytes)
            shards.append(shard)
            offsets.append(end)
            sizes.append(source.nbytes)
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
