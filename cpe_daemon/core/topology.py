"""Which GPUs a push serves, and which of them pulls which bytes of a slot over its own PCIe link."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from cpe_daemon.core.types import align
from cpe_daemon.errors import MisuseError


class Gpu(NamedTuple):
    """A GPU whose slots a push fills; ``numa_node``: the host node that its PCIe link hangs on, if known."""

    uuid: str
    numa_node: int | None = None


class Region(NamedTuple):
    """A range of the arena, in bytes, that lies in the memory of one NUMA node."""

    offset: int
    nbytes: int
    numa_node: int


class Share(NamedTuple):
    """Bytes ``start`` to ``end`` (exclusive) of a slot, which the GPU with index ``gpu`` pulls for all."""

    start: int
    end: int
    gpu: int


class Source(NamedTuple):
    """Bytes ``start`` onwards of a slot come from memory of ``numa_node``, if that is known."""

    start: int
    numa_node: int | None


class Costs(NamedTuple):
    """What copies cost, for who has to choose between few large ones and many small ones.

    Attributes:
        fetch_bytes: what could be fetched from the arena while one more copy is issued.
        exchange_bytes: the same of copies between GPUs.
        exchange_speed: bytes that a GPU copies from others in the time in which it fetches one.
    """

    fetch_bytes: int = 0
    exchange_bytes: int = 0
    exchange_speed: float = 1.0


FREE: Final = Costs()
"""Copies that cost nothing but their bytes."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The GPUs of a push, by index, and how they reach memory.

    Attributes:
        gpus: at least one.
        peer_access: every GPU can copy from every other's memory.
        regions: on which NUMA node the arena lies; what no region names counts as near to no GPU.
        costs: of copies.

    Raises:
        MisuseError: there is no GPU, one is named twice, or two regions overlap.
    """

    gpus: tuple[Gpu, ...]
    peer_access: bool
    regions: tuple[Region, ...] = ()
    costs: Costs = FREE
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        uuids = [gpu.uuid for gpu in self.gpus]
        if not uuids:
            raise MisuseError("a topology without GPUs")
        if len(set(uuids)) < len(uuids):
            raise MisuseError(f"a topology that names a GPU twice: {', '.join(uuids)}")
        object.__setattr__(self, "regions", tuple(sorted(self.regions)))
        object.__setattr__(self, "_offsets", tuple(region.offset for region in self.regions))
        for region, following in pairwise(self.regions):
            if region.offset + region.nbytes > following.offset:
                raise MisuseError(f"arena regions overlap: {region} and {following}")

    @property
    def has_near_memory(self) -> bool:
        """Whether some arena bytes are nearer to one GPU than to another."""
        return bool(self.regions) and len({gpu.numa_node for gpu in self.gpus}) > 1

    def nodes(self, address: int, nbytes: int) -> list[tuple[int, int | None]]:
        """Walk an arena range: (address, NUMA node from there on) by ascending address."""
        at = bisect_right(self._offsets, address) - 1
        end = address + nbytes
        if at >= 0 and end <= self._offsets[at] + self.regions[at].nbytes:
            return [(address, self.regions[at].numa_node)]
        found: list[tuple[int, int | None]] = []
        for index in range(max(0, at), bisect_left(self._offsets, end)):
            offset, region_bytes, node = self.regions[index]
            if offset > address:
                found.append((address, None))
                address = offset
            if offset + region_bytes > address:
                found.append((address, node))
                address = min(offset + region_bytes, end)
        if address < end:
            found.append((address, None))
        return found


def equal_shares(nbytes: int, count: int) -> tuple[Share, ...]:
    """Part a slot's first ``nbytes`` among ``count`` GPUs about equally, at multiples of the alignment.

    Returns:
        Shares that cover the bytes in ascending order, at most one for a GPU.
    """
    quota = align(-(-nbytes // count))
    return tuple(
        Share(start, min(start + quota, nbytes), gpu) for gpu in range(count) if (start := gpu * quota) < nbytes
    )


def near_shares(nbytes: int, gpus: Sequence[Gpu], sources: Iterable[Source]) -> tuple[Share, ...]:
    """Part a slot like `equal_shares`, but each byte to a GPU near its source while that one's quota lasts.

    Args:
        nbytes: used bytes of the slot, a multiple of the alignment.
        gpus: among whom to part.
        sources: where the slot's bytes come from, by ascending start.

    Returns:
        Shares that cover the bytes in ascending order.
    """
    quotas = [align(-(-nbytes // len(gpus)))] * len(gpus)
    shares: list[Share] = []

    def share_out(start: int, end: int, takers: Iterable[int]) -> int:
        """Give what is left from ``start`` to those with quota left; returns where that ended."""
        for gpu in takers:
            if start == end:
                break
            quota = quotas[gpu]
            if quota:
                stop = min(start + quota, end)
                shares.append(Share(start, stop, gpu))
                quotas[gpu] = quota - (stop - start)
                start = stop
        return start

    near: dict[int | None, list[int]] = {None: []}
    for gpu, (_, node) in enumerate(gpus):
        if node is not None:
            near.setdefault(node, []).append(gpu)
    far: list[tuple[int, int]] = []
    for start, end, node in _blocks(nbytes, sources):
        start = share_out(start, end, near.get(node, ()))
        if start < end:
            far.append((start, end))
    for start, end in far:
        share_out(start, end, range(len(gpus)))
    return _joined(sorted(shares))


def _blocks(nbytes: int, sources: Iterable[Source]) -> Iterator[tuple[int, int, int | None]]:
    """(start, end, node), aligned: a bound between nodes moves up; what one node has in a row becomes one."""
    start: int = 0
    node: int | None = None
    for source in sources:
        if source.numa_node != node:
            bound = min(align(source.start), nbytes)
            if bound > start:
                yield start, bound, node
            start, node = bound, source.numa_node
    if nbytes > start:
        yield start, nbytes, node


def _joined(shares: Iterable[Share]) -> tuple[Share, ...]:
    """Join neighbours of one GPU."""
    joined: list[Share] = []
    for share in shares:
        if joined and joined[-1].gpu == share.gpu:
            share = Share(joined.pop().start, share.end, share.gpu)
        joined.append(share)
    return tuple(joined)
