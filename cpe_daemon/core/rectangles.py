"""Rectangles of bytes: rows that lie the same distance apart at either end of a copy; strided tensors as such.

Pure arithmetic of addresses and offsets in bytes: whoever copies a slice of a tensor, or only a part of it, asks here
which bytes go where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cpe_daemon.errors import MisuseError

_MOST_RECTANGLES: Final = 1 << 16
"""Of one tensor: more of them would cost more to hold and to copy than the tensor is worth."""
_MOST_COLUMNS: Final = 64
"""Of one matrix that are compared with one another."""


class Rectangle(NamedTuple):
    """``rows`` of ``nbytes`` each, copied from ``source`` to ``destination``, where they lie a pitch apart.

    Rows do not overlap at either end: a pitch is not less than ``nbytes`` where there are several rows. Both ends count
    from wherever their owner says: an address, or the beginning of a tensor, a parameter or a slot.
    """

    destination: int
    source: int
    nbytes: int
    rows: int = 1
    destination_pitch: int = 0
    source_pitch: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self.nbytes * self.rows

    @property
    def destination_end(self) -> int:
        """Behind the last row's last byte."""
        return self.destination + (self.rows - 1) * self.destination_pitch + self.nbytes

    @property
    def source_end(self) -> int:
        """Behind the last row's last byte."""
        return self.source + (self.rows - 1) * self.source_pitch + self.nbytes

    def moved(self, destination: int, source: int) -> Rectangle:
        """The same, with its ends that much further on."""
        return self._replace(destination=self.destination + destination, source=self.source + source)

    def _some(self, first: int, count: int) -> Rectangle:
        """Rows ``first`` onwards, ``count`` of them."""
        destination = self.destination + first * self.destination_pitch
        source = self.source + first * self.source_pitch
        if count == 1:
            return Rectangle(destination, source, self.nbytes)
        return Rectangle(destination, source, self.nbytes, count, self.destination_pitch, self.source_pitch)

    def _within(self, row: int, first: int, end: int) -> Rectangle:
        """What of a row comes from ``first`` up to ``end``; some of it does."""
        begin = self.source + row * self.source_pitch
        low, high = max(first, begin), min(end, begin + self.nbytes)
        return Rectangle(self.destination + row * self.destination_pitch + low - begin, low, high - low)


def clip(whole: Rectangle, first: int, end: int) -> list[Rectangle]:
    """The part of a rectangle whose source lies from ``first`` up to ``end``, as three rectangles at the most.

    They are the end of a row, whole rows, and the beginning of another one.
    """
    if first >= end or whole.nbytes <= 0 or whole.rows <= 0 or end <= whole.source or whole.source_end <= first:
        return []
    if first <= whole.source and whole.source_end <= end:
        return [whole]
    if whole.rows == 1:
        return [whole._within(0, first, end)]
    pitch, clipped = whole.source_pitch, list[Rectangle]()
    low = max((first - whole.source - whole.nbytes) // pitch + 1, 0)  # the first row that ends behind `first`
    high = min(-(-(end - whole.source) // pitch), whole.rows)  # behind the last one that begins before `end`
    if low >= high:
        return []
    if not _is_inside(whole, low, first, end):
        clipped.append(whole._within(low, first, end))
        low += 1
    last = []
    if low < high and not _is_inside(whole, high - 1, first, end):
        high -= 1
        last.append(whole._within(high, first, end))
    if low < high:
        clipped.append(whole._some(low, high - low))
    return clipped + last


def _is_inside(whole: Rectangle, row: int, first: int, end: int) -> bool:
    begin = whole.source + row * whole.source_pitch
    return first <= begin and begin + whole.nbytes <= end


def strided(
    shape: Sequence[int],
    itemsize: int,
    destination: int,
    destination_strides: Sequence[int],
    source: int,
    source_strides: Sequence[int],
) -> list[Rectangle]:
    """The copy of one strided tensor to another of the same shape, as the fewest rectangles that are easily found.

    Args:
        shape: of both.
        itemsize: bytes of an element of both.
        destination: where the first element goes.
        destination_strides: in bytes, of each dimension.
        source: where the first element is.
        source_strides: in bytes, of each dimension.

    Raises:
        MisuseError: an element is read or written more than once, elements are read in another order than they are
            written, or there would be more rectangles than are worth it; says which.
    """
    if 0 in shape:
        return []
    dims = _merged(
        [dim for dim in zip(shape, destination_strides, source_strides, strict=True) if dim[0] > 1], itemsize
    )
    nbytes = itemsize
    if dims and dims[-1][1] == dims[-1][2] == itemsize:
        nbytes *= dims.pop()[0]
    _check(dims, nbytes)
    if not dims:
        return [Rectangle(destination, source, nbytes)]
    rows, destination_pitch, source_pitch = dims.pop()
    first = Rectangle(destination, source, nbytes, rows, destination_pitch, source_pitch)
    return [first.moved(*offsets) for offsets in _offsets(dims)]


_Dim = tuple[int, int, int]
"""Elements, and the strides at the destination and at the source."""


def _merged(dims: list[_Dim], itemsize: int) -> list[_Dim]:
    """Order dimensions by where they are read, and make one of two that follow one another at both ends."""
    merged = list[_Dim]()
    for count, destination, source in sorted(dims, key=lambda dim: (-dim[2], -dim[1])):
        if merged and merged[-1][1] == destination * count and merged[-1][2] == source * count:
            merged[-1] = merged[-1][0] * count, destination, source
        else:
            merged.append((count, destination, source))
    return merged


def _check(dims: Sequence[_Dim], nbytes: int) -> None:
    """Raise unless each dimension's steps reach over all that is inside of it, at both ends."""
    written = read = nbytes
    for count, destination, source in reversed(dims):
        if destination == 0 or source == 0:
            raise MisuseError("elements are repeated")
        if destination < written or source < read:
            raise MisuseError("elements change their order")
        written += (count - 1) * destination
        read += (count - 1) * source
    if (count := math.prod(dim[0] for dim in dims[:-1])) > _MOST_RECTANGLES:
        raise MisuseError(f"it is in {count} pieces")


def _offsets(dims: Sequence[_Dim]) -> Iterator[tuple[int, int]]:
    for index in itertools.product(*(range(count) for count, _, _ in dims)):
        yield (
            sum(at * dim[1] for at, dim in zip(index, dims, strict=True)),
            sum(at * dim[2] for at, dim in zip(index, dims, strict=True)),
        )


def overlap(rectangles: Sequence[Rectangle]) -> bool:
    """Whether bytes might be written twice. Columns of one matrix are told apart, but nothing more intricate is."""
    filled = sorted(whole for whole in rectangles if whole.nbytes and whole.rows)
    cluster, end = list[Rectangle](), 0
    for whole in filled:
        if whole.destination >= end:
            cluster, end = [], whole.destination_end
        elif len(cluster) > _MOST_COLUMNS or any(_meet(whole, other) for other in cluster):
            return True
        cluster.append(whole)
        end = max(end, whole.destination_end)
    return False


def _meet(one: Rectangle, other: Rectangle) -> bool:
    if other.destination_end <= one.destination or one.destination_end <= other.destination:
        return False
    pitch = one.destination_pitch if one.rows > 1 else other.destination_pitch
    if not pitch or any(whole.rows > 1 and whole.destination_pitch != pitch for whole in (one, other)):
        return True
    ahead = (other.destination - one.destination) % pitch
    return ahead < one.nbytes or ahead + other.nbytes > pitch
