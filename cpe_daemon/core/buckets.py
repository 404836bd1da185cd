"""Where each tensor lies in which bucket: module groups packed into slots, by names and sizes alone.

A `Cut` knows neither addresses nor GPUs. It stays good as long as names, sizes and order of the tensors do,
so a version like the one before needs no new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec

from cpe_daemon.core.groups import LEVELS, group_numbers
from cpe_daemon.core.types import ALIGNMENT_BYTES, TensorSpec, align
from cpe_daemon.errors import MisuseError


class Part(msgspec.Struct, frozen=True, gc=False):
    """Bytes of one tensor in a slot.

    ``tensor`` is an index into the tensors that were cut; bytes ``tensor_offset`` onwards of it lie at
    ``slot_offset``, a multiple of `ALIGNMENT_BYTES`. An empty tensor has one part of no bytes, at offset 0.
    """

    tensor: int
    tensor_offset: int
    nbytes: int
    slot_offset: int


class Filling(msgspec.Struct, frozen=True, gc=False):
    """What one bucket holds; ``nbytes`` of its slot are used, padding behind the last tensor included."""

    nbytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Tensors cut into buckets.

    Parts are in the order in which a worker is to take them: where a tensor is split, its parts follow one
    another in consecutive buckets, and no other split tensor begins before it is whole. So a worker needs one
    assembly buffer.

    Attributes:
        sizes: bytes of each tensor, in the order given.
        slot_bytes: what a bucket may use at most.
        fillings: the buckets.
    """

    sizes: tuple[int, ...]
    slot_bytes: int
    fillings: tuple[Filling, ...]


def cut(specs: Sequence[TensorSpec], slot_bytes: int) -> Cut:
    """Pack tensors into buckets, next fit, in the order in which their module groups first appear.

    A group that fits in a slot is never parted. A larger one is parted into finer ones (`groups.LEVELS`), and
    a tensor that is larger than a slot, alone or with its scale and bias, into parts; the last of these has
    scale and bias beside it.

    Raises:
        MisuseError: ``slot_bytes`` is not a positive multiple of `ALIGNMENT_BYTES`.
    """
    if slot_bytes <= 0 or slot_bytes % ALIGNMENT_BYTES:
        raise MisuseError(f"slots of {slot_bytes} bytes: a positive multiple of {ALIGNMENT_BYTES} is due")
    names = [spec.name for spec in specs]
    sizes = _sizes(specs)
    packer = _Packer(names, sizes, slot_bytes)
    group_of = group_numbers(names).__getitem__
    packer.add(list(group) for _, group in groupby(sorted(range(len(names)), key=group_of), group_of))
    return Cut(tuple(sizes), slot_bytes, packer.finish())


def _sizes(specs: Iterable[TensorSpec]) -> list[int]:
    """Bytes of each tensor; a large model has few kinds of them."""
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    found: list[int] = []
    for spec in specs:
        kind = spec.dtype, spec.shape
        nbytes = sizes.get(kind)
        if nbytes is None:
            nbytes = sizes[kind] = spec.nbytes
        found.append(nbytes)
    return found


class _Packer:
    """Fills one bucket after another with units of tensors, each given as indexes into names and sizes."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], slot_bytes: int) -> None:
        self._names = names
        self._sizes = sizes
        aligned = {nbytes: align(nbytes) for nbytes in set(sizes)}  # few sizes for many tensors
        self._rooms = [aligned[nbytes] for nbytes in sizes]
        self._slot_bytes = slot_bytes
        self._fillings: list[Filling] = []
        self._parts: list[Part] = []
        self._used = 0

    def add(self, units: Iterable[Sequence[int]], level: int = 0) -> None:
        """Add what has one key each at ``level`` of `LEVELS`: whole if a slot can hold it, else level by level."""
        sizes, rooms, slot_bytes = self._sizes, self._rooms, self._slot_bytes
        for unit in units:
            room = sum([rooms[index] for index in unit])
            if room > slot_bytes:
                self._divide(unit, level)
                continue
            if self._used + room > slot_bytes:
                self._close()
            parts, used = self._parts, self._used
            for index in unit:
                nbytes = sizes[index]
                parts.append(Part(index, 0, nbytes, used if nbytes else 0))
                used += rooms[index]
            self._used = used

    def finish(self) -> tuple[Filling, ...]:
        """Close the last bucket and return all."""
        self._close()
        return tuple(self._fillings)

    def _divide(self, unit: Sequence[int], level: int) -> None:
        """Add what is larger than a slot by finer keys, and what has none in parts."""
        if level + 1 < len(LEVELS):
            self.add(self._gather(unit, LEVELS[level + 1]), level + 1)
        else:
            self._part(unit)

    def _room(self, unit: Iterable[int]) -> int:
        return sum([self._rooms[index] for index in unit])

    def _gather(self, unit: Iterable[int], key: Callable[[str], str]) -> Iterable[list[int]]:
        units: dict[str, list[int]] = {}
        for index in unit:
            units.setdefault(key(self._names[index]), []).append(index)
        return units.values()

    def _part(self, unit: Sequence[int]) -> None:
        """Place a weight and its companions, together larger than a slot.

        What is larger by itself is split, the rest follows whole. If only all of it is too large, the largest
        is split, so that its last part may have the others beside it.
        """
        large = [index for index in unit if self._rooms[index] > self._slot_bytes]
        if not large:
            largest = max(unit, key=self._rooms.__getitem__)
            large = [largest] if self._room(unit) - self._rooms[largest] < self._slot_bytes else []
        small = [index for index in unit if index not in large]
        beside_bytes = self._room(small)
        for index in large:
            joins = index == large[-1] and beside_bytes < self._slot_bytes
            self._split(index, beside_bytes if joins else 0)
        self.add([index] for index in small)

    def _split(self, index: int, beside_bytes: int) -> None:
        """Place a tensor in parts, the last of which leaves ``beside_bytes`` of its bucket free."""
        size, offset = self._sizes[index], 0
        while offset < size:
            nbytes = min(size - offset, self._slot_bytes - self._used)
            ends = offset + nbytes == size
            if ends and self._used + align(nbytes) + beside_bytes > self._slot_bytes:
                nbytes = align(nbytes) - ALIGNMENT_BYTES  # the very last of it goes with what is beside it
            if nbytes:
                self._parts.append(Part(index, offset, nbytes, self._used))
                self._used += align(nbytes)
                offset += nbytes
            if offset < size:
                self._close()

    def _close(self) -> None:
        """End the current bucket, unless nothing is in it."""
        if self._parts:
            self._fillings.append(Filling(self._used, tuple(self._parts)))
        self._parts = []
        self._used = 0
