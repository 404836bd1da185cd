"""Where tensors' bytes lie, and the copies that bring buckets into slots, from the arena and between GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from cpe_daemon.core.buckets import Part
from cpe_daemon.core.topology import Share, Source, Topology

HERE: Final = ""
"""The origin of bytes that lie in this node's own arena."""


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A contiguous run of a tensor's bytes, at ``address`` in the arena of ``origin`` (a peer's id, `HERE`)."""

    tensor_offset: int
    nbytes: int
    address: int
    origin: str = HERE


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Stage 1: ``nbytes`` from ``address`` in the arena of ``origin`` to ``slot_offset`` in a GPU's own slot.

    It may carry the padding between two tensors that are neighbours in the arena and in the slot alike.
    """

    origin: str
    address: int
    slot_offset: int
    nbytes: int


class PeerCopy(msgspec.Struct, frozen=True, gc=False):
    """Stage 2: ``nbytes`` from the slot of GPU ``gpu`` (an index) to one's own, both at ``slot_offset``."""

    gpu: int
    slot_offset: int
    nbytes: int


def fill(parts: Iterable[Part], segments: Sequence[Sequence[Segment]]) -> list[Copy]:
    """The copies that fill one slot with ``parts``, by ascending slot offset.

    Bytes as far apart in the arena as in the slot go in one copy. A slot is packed densely, so less than one
    alignment of padding lies between two tensors; what a copy carries beside them lies between its segments.

    Args:
        parts: what the slot is to hold, by ascending slot offset; empty parts may be anywhere.
        segments: by tensor, where its bytes lie.
    """
    copies: list[Copy] = []
    run_origin, run_shift, run_start, run_end = (
        HERE,
        0,
        0,
        0,
    )  # a run's address is its slot offset + its shift
    for part in parts:
        first, last = part.tensor_offset, part.tensor_offset + part.nbytes
        base = part.slot_offset - first
        for segment in segments[part.tensor]:
            start = segment.tensor_offset
            end = start + segment.nbytes
            shift = segment.address - start - base
            if start < first:
                start = first
            if end > last:
                end = last
            if start >= end:
                continue
            if shift != run_shift or segment.origin != run_origin or not run_end:
                if run_end:
                    copies.append(Copy(run_origin, run_start + run_shift, run_start, run_end - run_start))
                run_origin, run_shift, run_start = segment.origin, shift, base + start
            run_end = base + end
    if run_end:
        copies.append(Copy(run_origin, run_start + run_shift, run_start, run_end - run_start))
    return copies


def deal(copies: Iterable[Copy], shares: Sequence[Share], count: int) -> tuple[tuple[Copy, ...], ...]:
    """By GPU, what of ``copies`` falls into its shares; a copy that reaches over several shares is cut.

    Args:
        copies: by ascending slot offset.
        shares: cover all of them, in ascending order.
        count: the number of GPUs.
    """
    dealt: list[list[Copy]] = [[] for _ in range(count)]
    at = 0
    for copy in copies:
        start, end = copy.slot_offset, copy.slot_offset + copy.nbytes
        while start < end:
            if shares[at].end <= start:
                at += 1
                continue
            stop = min(end, shares[at].end)
            address = copy.address + start - copy.slot_offset
            dealt[shares[at].gpu].append(Copy(copy.origin, address, start, stop - start))
            start = stop
    return tuple([tuple(pulls) for pulls in dealt])


def sources(copies: Iterable[Copy], topology: Topology) -> Iterator[Source]:
    """The NUMA nodes that a slot's bytes come from; a peer's bytes come from none."""
    for copy in copies:
        if copy.origin != HERE:
            yield Source(copy.slot_offset, None)
            continue
        for address, node in topology.nodes(copy.address, copy.nbytes):
            yield Source(copy.slot_offset + address - copy.address, node)


def exchange(shares: Iterable[Share], count: int) -> tuple[tuple[PeerCopy, ...], ...]:
    """By GPU, the peer copies that complete its slot, given what each of ``count`` GPUs pulls.

    Each begins with the GPU behind it, so that not all read from the same one at once.
    """
    held: list[list[PeerCopy]] = [[] for _ in range(count)]
    for start, end, gpu in shares:
        held[gpu].append(PeerCopy(gpu, start, end - start))
    return tuple(tuple([copy for others in held[gpu + 1 :] + held[:gpu] for copy in others]) for gpu in range(count))
