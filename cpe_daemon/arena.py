"""The arena: one sealed region of host memory from which every version's extents are cut.

Owns the region and the map of its free bytes; refuses what does not fit. Which version holds which extent, and for how
long, the catalogue (`cpe_daemon.versions`) knows. No trainer ever maps the region.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from cpe_daemon.core.extents import Extent, ExtentAllocator
from cpe_daemon.core.topology import Region
from cpe_daemon.core.types import align
from cpe_daemon.devices import numa
from cpe_daemon.devices.capacity import require_bytes
from cpe_daemon.devices.memory import PREFAULT_BYTES, SharedMemory
from cpe_daemon.errors import ResourceError


class Arena:
    """A region of ``nbytes``, mapped once for the life of the daemon. Extents are the event loop's business alone.

    Raises:
        ResourceError: the region cannot be mapped.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = SharedMemory.create("cpe-arena", nbytes)
        self._extents = ExtentAllocator(nbytes)
        self.nbytes = nbytes
        self.prefaulted_bytes = 0
        self.regions: tuple[Region, ...] = ()
        """On which NUMA node which bytes lie, by ascending offset; empty where nobody chose."""
        self.unplaced = ""
        """Why nobody chose."""
        self._populated = True

    @property
    def address(self) -> int:
        """Of the first byte, in this process."""
        return self._memory.address

    @property
    def view(self) -> memoryview:
        """All bytes."""
        return self._memory.view

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent."""
        return self._extents.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """Bytes of the largest free run, the largest extent that fits."""
        return self._extents.largest_free_bytes

    @property
    def node_bytes(self) -> dict[int, int]:
        """By NUMA node, how many bytes lie there; empty where nobody chose."""
        found: dict[int, int] = {}
        for region in self.regions:
            found[region.numa_node] = found.get(region.numa_node, 0) + region.nbytes
        return found

    def largest_free_without(self, extents: Collection[Extent]) -> int:
        """Bytes of the largest extent that would fit if these were released."""
        largest = end = 0
        for extent in self._extents.extents:
            if extent not in extents:
                largest = max(largest, extent.offset - end)
                end = align(extent.end)
        return max(largest, self._extents.capacity_bytes - end)

    def place(self, regions: Sequence[Region]) -> None:
        """Have each region's pages come from its node's memory, as far as there is some; before `prefault`.

        Args:
            regions: cover the arena, in ascending order.

        Raises:
            ResourceError: the kernel refuses; pages then come from wherever it likes.
        """
        try:
            for region in regions:
                numa.prefer(self.address + region.offset, region.nbytes, region.numa_node)
        except ResourceError:
            with contextlib.suppress(ResourceError):  # the first refusal is the one to tell
                numa.forget(self.address, self.nbytes)
            raise
        self.regions = tuple(regions)

    def settle(self) -> int:
        """After `prefault`: look where the first page of each region lies, and have ``regions`` say so. Blocking.

        Returns:
            Bytes of regions that lie elsewhere than `place` was told, since memory was short there.
        """
        with contextlib.suppress(ResourceError):  # what cannot be asked is believed
            found = [numa.node_of(self.address + region.offset) for region in self.regions]
            there = tuple(
                Region(region.offset, region.nbytes, node) for region, node in zip(self.regions, found, strict=True)
            )
            strayed = [region for region, was in zip(there, self.regions, strict=True) if region != was]
            self.regions = there
            if self._populated:  # nothing is left to place, and one mapping is easier to page-lock than thousands
                numa.forget(self.address, self.nbytes)
            return sum(region.nbytes for region in strayed)
        return 0

    async def prefault(self, threads: int, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Have the kernel provide every page, several ranges at a time, off the loop.

        Args:
            threads: how many ranges at a time.
            progress: called on the loop with (bytes done, bytes in all).

        Raises:
            ResourceError: the host has not enough memory.
        """
        require_bytes(self.nbytes, "the arena (arena.size_bytes)")
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(threads, "cpe-prefault")
        offsets = iter(range(0, self.nbytes, PREFAULT_BYTES))

        async def fault() -> None:
            for offset in offsets:  # shared: each takes the next one that nobody has
                nbytes = min(PREFAULT_BYTES, self.nbytes - offset)
                there = await loop.run_in_executor(pool, self._memory.prefault, offset, nbytes)
                self._populated &= there
                self.prefaulted_bytes += nbytes
                progress(self.prefaulted_bytes, self.nbytes)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(threads):
                    tasks.create_task(fault())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:  # whoever gives up need not wait for a terabyte, only for the ranges in hand
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)

    def reserve(self, nbytes: int) -> Extent:
        """Cut an extent.

        Raises:
            ArenaFullError: no free run is large enough; names need and free bytes.
        """
        return self._extents.allocate(nbytes)

    def release(self, extent: Extent) -> None:
        """Give an extent back. Nobody may read or write it any more.

        Raises:
            MisuseError: it is not reserved.
        """
        self._extents.free(extent)

    def close(self) -> None:
        """Unmap the region."""
        self._memory.close()
