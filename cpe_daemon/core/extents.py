"""Which byte ranges of the arena are taken: a best-fit allocator over offsets. It owns numbers, no memory.

It knows neither versions nor leases: whoever frees an extent answers for nobody reading it any more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Final

from cpe_daemon.core.types import ALIGNMENT_BYTES, align
from cpe_daemon.errors import ArenaFullError, MisuseError


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of the arena: ``nbytes`` as asked for, from ``offset`` on."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The offset behind the last byte asked for; the room taken ends at the next aligned offset."""
        return self.offset + self.nbytes


EMPTY: Final = Extent(0, 0)
"""What allocating zero bytes gives. It takes no room, and may be freed any number of times."""


class ExtentAllocator:
    """Hands out extents of an arena of ``capacity_bytes``, each aligned to `ALIGNMENT_BYTES`.

    Best fit: the smallest free run that is large enough, the lowest of equals, so that the same calls always
    give the same offsets. Free runs are kept ordered twice, by offset (to coalesce) and by size (to choose),
    and found by bisection. Not thread-safe: one owner.

    Args:
        capacity_bytes: size of the arena; what is beyond the last aligned offset stays unused.

    Raises:
        MisuseError: ``capacity_bytes`` is negative.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise MisuseError(f"an arena cannot have {capacity_bytes} bytes")
        self._capacity_bytes = capacity_bytes - capacity_bytes % ALIGNMENT_BYTES
        self._live: dict[int, Extent] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._by_size: list[tuple[int, int]] = []
        self._free_bytes = 0
        if self._capacity_bytes:
            self._insert(0, self._capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        """All bytes that could ever be handed out."""
        return self._capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes not taken, in however many runs."""
        return self._free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest extent that would fit now."""
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents taken, by offset; empty ones are not among them."""
        return tuple(self._live[offset] for offset in sorted(self._live))

    def allocate(self, nbytes: int) -> Extent:
        """Take ``nbytes`` contiguous bytes; the room taken is ``nbytes`` rounded up to the alignment.

        Returns:
            The extent, which the caller gives back with `free`.

        Raises:
            ArenaFullError: no free run is large enough.
            MisuseError: ``nbytes`` is negative.
        """
        if nbytes < 0:
            raise MisuseError(f"an extent cannot have {nbytes} bytes")
        if not nbytes:
            return EMPTY
        need = align(nbytes)
        choice = bisect_left(self._by_size, (need, 0))
        if choice == len(self._by_size):
            raise self._full(need)
        size, offset = self._by_size[choice]
        self._remove(bisect_left(self._starts, offset))
        if size > need:
            self._insert(offset + need, offset + size)
        extent = Extent(offset, nbytes)
        self._live[offset] = extent
        return extent

    def free(self, extent: Extent) -> None:
        """Give an extent back, and join its room with the free runs beside it.

        Raises:
            MisuseError: the extent is not taken (never was, or was freed before); nothing changed.
        """
        if extent == EMPTY:
            return
        if self._live.get(extent.offset) != extent:
            raise MisuseError(f"{extent} is not allocated: it never was, or was freed before")
        del self._live[extent.offset]
        start, end = extent.offset, extent.offset + align(extent.nbytes)
        after = bisect_right(self._starts, start)
        if after < len(self._starts) and self._starts[after] == end:
            end = self._remove(after)[1]
        if after and self._ends[after - 1] == start:
            start = self._remove(after - 1)[0]
        self._insert(start, end)

    def _insert(self, start: int, end: int) -> None:
        """Add a free run that touches no other."""
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        insort(self._by_size, (end - start, start))
        self._free_bytes += end - start

    def _remove(self, at: int) -> tuple[int, int]:
        """Take free run number ``at`` (by offset) away; returns where it began and ended."""
        start, end = self._starts.pop(at), self._ends.pop(at)
        del self._by_size[bisect_left(self._by_size, (end - start, start))]
        self._free_bytes -= end - start
        return start, end

    def _full(self, need_bytes: int) -> ArenaFullError:
        """The error that says why ``need_bytes`` do not fit."""
        free, largest = self._free_bytes, self.largest_free_bytes
        message = f"the arena has no room for {readable(need_bytes)}: {readable(free)} free"
        if free >= need_bytes:
            message += f", but fragmented: the largest free run is {readable(largest)}"
        else:
            message += (
                f" of {readable(self._capacity_bytes)} (arena.size_bytes: twice a model's weights hold an update)"
            )
        return ArenaFullError(message, need_bytes=need_bytes, free_bytes=free, largest_bytes=largest)


def readable(nbytes: int) -> str:
    """Bytes for a person and for a script: ``1.5 GiB (1610612736 bytes)``."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.1f} {unit} ({nbytes} bytes)"
    return f"{nbytes} bytes"
