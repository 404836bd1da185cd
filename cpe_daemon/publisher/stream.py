"""Cuts a contribution into chunks: tensors to bytes in chunk memory, and a digest of each tensor.

The bytes of a rank's contribution are one stream, laid out by `cpe_daemon.core.manifest.layout`, with zeros between the
tensors. The digests are of the bytes just written to the chunk's memory, in pieces that are still in the cache: reading
a whole chunk again costs a quarter more. Copies are `memmove` calls: torch's copy_ starts OpenMP threads that fight
the daemon for cores (a tenth of the rate on a busy two-core host), and costs ten times as much a small tensor.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest

from cpe_daemon.core.types import ALIGNMENT_BYTES
from cpe_daemon.devices.memory import copy
from cpe_daemon.publisher.sources import Contribution

PIECE_BYTES: Final = 256 << 10
"""Copied and digested in one go."""

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ZEROS: Final = bytes(ALIGNMENT_BYTES)


class Window(NamedTuple):
    """Memory for one chunk. Whoever holds ``view`` keeps ``address`` valid."""

    address: int
    view: memoryview


class Sink(Protocol):
    """Where chunks go."""

    def window(self, offset: int, nbytes: int) -> Window:
        """Return memory for bytes ``offset`` to ``offset + nbytes`` of the contribution; may wait for it."""
        ...

    def filled(self, offset: int, nbytes: int) -> None:
        """The window last returned is full: send it."""
        ...


def pour(contribution: Contribution, sink: Sink, chunk_bytes: int) -> bytes:
    """Write a contribution into the windows of ``sink``, in order, each of ``chunk_bytes`` but the last.

    Args:
        contribution: what to write. Its tensors must not change meanwhile.
        sink: asked for one window at a time. What it raises ends the pouring.
        chunk_bytes: the size of a chunk.

    Returns:
        The digests of all shards, one after another, in order.
    """
    cutter = _Cutter(sink, contribution.layout.nbytes, chunk_bytes)
    digests: list[bytes] = []
    for tensor, offset in zip(contribution.tensors, contribution.layout.offsets, strict=True):
        cutter.pad(offset)
        digests.append(cutter.write(tensor))
    cutter.pad(contribution.layout.nbytes)
    return b"".join(digests)


class HostBytes:
    """A tensor's contiguous bytes, to be copied piece by piece; copies it first if they are not contiguous.

    A tensor on another device stays there: each piece is copied to the host by itself.
    """

    __slots__ = ("_address", "_device", "_tensor", "nbytes", "piece_bytes")

    def __init__(self, tensor: Tensor) -> None:
        if not _is_plain(tensor):
            tensor = _contiguous(tensor.detach().resolve_conj().resolve_neg())
        self._tensor = tensor
        self.nbytes = tensor.nbytes
        self.piece_bytes = PIECE_BYTES
        self._device: Tensor | None = None
        self._address = 0
        if tensor.is_cpu:
            self._address = tensor.data_ptr()
        elif self.nbytes:
            self._device = tensor.detach().reshape(-1).view(torch.uint8)
            self.piece_bytes = self.nbytes  # a call costs more there than what the cache saves

    def copy(self, start: int, nbytes: int, window: Window, at: int) -> None:
        """Copy ``nbytes`` from ``start`` on to position ``at`` of a window. Releases the GIL."""
        if self._device is None:
            copy(window.address + at, self._address + start, nbytes)
        else:
            target = torch.frombuffer(window.view[at : at + nbytes], dtype=torch.uint8)
            target.copy_(self._device[start : start + nbytes])

    def copy_all(self, window: Window, at: int) -> bytes:
        """Copy everything to position ``at`` of a window; return the digest of what is there then."""
        hasher = xxh3_128()
        for start in range(0, self.nbytes, max(self.piece_bytes, 1)):
            step = min(self.piece_bytes, self.nbytes - start)
            self.copy(start, step, window, at + start)
            hasher.update(window.view[at + start : at + start + step])
        return hasher.digest()


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its values as they are.

    A conjugated or negated view shares its base's memory, which holds other values than the tensor.
    """
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _contiguous(tensor: Tensor) -> Tensor:
    """Copy as plain bits: torch cannot copy all of the dtypes that it has, or warns of it."""
    bits = _BITS.get(tensor.element_size())
    return (tensor if bits is None else tensor.view(bits)).contiguous()


class _Cutter:
    """The position in the stream and in the window that is being filled."""

    def __init__(self, sink: Sink, total: int, chunk_bytes: int) -> None:
        self._sink = sink
        self._total = total
        self._chunk_bytes = chunk_bytes
        self._window = Window(0, memoryview(b""))
        self._start = 0  # of the window, in the stream
        self._at = 0  # in the window
        self._size = 0  # of the window

    def pad(self, offset: int) -> None:
        """Write zeros up to ``offset``: less than the alignment."""
        left = offset - self._start - self._at
        while left > 0:
            step = min(left, self._room())
            self._window.view[self._at : self._at + step] = _ZEROS[:step]
            self._advance(step)
            left -= step

    def write(self, tensor: Tensor) -> bytes:
        """Write a tensor's bytes and return their digest."""
        nbytes = tensor.nbytes
        at = self._at
        if 0 < nbytes <= min(self._size - at, PIECE_BYTES) and tensor.is_cpu and _is_plain(tensor):
            copy(self._window.address + at, tensor.data_ptr(), nbytes)  # the way of small tensors: no objects made
            found = xxh3_128_digest(self._window.view[at : at + nbytes])
            self._advance(nbytes)
            return found
        source = HostBytes(tensor)
        hasher = xxh3_128()
        done = 0
        while done < nbytes:
            step = min(nbytes - done, self._room(), source.piece_bytes)
            at = self._at
            source.copy(done, step, self._window, at)
            hasher.update(self._window.view[at : at + step])
            self._advance(step)
            done += step
        return hasher.digest()

    def _room(self) -> int:
        """Bytes left in the window; asks for the next one if it is full."""
        if self._at == self._size:
            self._start += self._size
            self._at = 0
            self._size = min(self._chunk_bytes, self._total - self._start)
            self._window = self._sink.window(self._start, self._size)
        return self._size - self._at

    def _advance(self, nbytes: int) -> None:
        self._at += nbytes
        if self._at == self._size:
            self._sink.filled(self._start, self._size)
