"""A chunk's bytes where they lie: in the memory of the tensors, so that nobody has to copy them to send them."""

from __future__ import annotations

import bisect
import ctypes
import itertools
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.publisher.reader import is_plain
from cpe_daemon.publisher.sources import Contribution

SMALL_BYTES: Final = 64 << 10
"""Parts smaller than this are copied into one with their neighbours: a frame of its own costs as much."""
_MOST_JOINED_BYTES: Final = 512 << 10
"""Of one chunk. Where more of it is in small parts, it had better be copied whole, to memory that is there already."""


class InPlace:
    """The parts of one chunk, one after another. They keep the tensors' memory, and must not change.

    Slices of it have to lie within one part: those of what is in one tensor do.
    """

    __slots__ = ("_ends", "parts")

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self.parts = parts
        self._ends = list(itertools.accumulate(part.nbytes for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, run: slice) -> memoryview:
        first = run.start or 0
        part = self.parts[index := bisect.bisect_right(self._ends, first)]
        start = self._ends[index] - part.nbytes
        return part[first - start : run.stop - start]

    def copy_to(self, address: int) -> None:
        """Copy all of it; the caller vouches for the memory there."""
        for part in self.parts:
            copy(address, address_of(part), part.nbytes)
            address += part.nbytes


def find_in_place(contribution: Contribution, shard: int, start: int, nbytes: int, most: int) -> InPlace | None:
    """Find the bytes ``start`` to ``start + nbytes`` of a contribution; ``shard`` is the first that has any of them.

    Returns:
        Where they lie, in ``most`` parts or fewer. None if there would be more, or a tensor's bytes are not in the
        memory of this host, one after another.
    """
    offsets, sizes = contribution.layout.offsets, contribution.layout.sizes
    parts: list[memoryview] = []
    joined, left = bytearray(), _MOST_JOINED_BYTES
    at, end = start, start + nbytes
    while at < end:
        begin = offsets[shard] if shard < len(sizes) else end
        if at < begin:
            upto = min(begin, end)
            joined += bytes(upto - at)
        else:
            tensor, upto = contribution.tensors[shard], min(begin + sizes[shard], end)
            shard += 1
            if at == upto:
                continue
            if not tensor.is_cpu or not is_plain(tensor):
                return None
            address = tensor.data_ptr() + at - begin
            if upto - at < SMALL_BYTES:
                joined += ctypes.string_at(address, upto - at)
                left -= upto - at
            else:
                parts += [memoryview(joined)] if joined else []
                parts.append(_lent(tensor, address, upto - at))
                joined = bytearray()
        if left < 0 or len(parts) > most:
            return None
        at = upto
    parts += [memoryview(joined)] if joined else []
    return InPlace(parts) if len(parts) <= most else None


def _lent(tensor: Tensor, address: int, nbytes: int) -> memoryview:
    """View memory of a tensor, which is kept as long as anybody views it."""
    memory = (ctypes.c_char * nbytes).from_address(address)
    memory.owner = tensor  # type: ignore[attr-defined] # an instance of a class made on the fly has room for it
    return memoryview(memory).cast("B")
