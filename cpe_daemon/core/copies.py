"""Where tensors' bytes lie, and the copies that bring buckets into slots, from the arena and between GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from cpe_daemon.core.buckets import Part
from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.topology import Share, Source, Topology
from cpe_daemon.errors import MisuseError

HERE: Final = ""
"""The origin of bytes that lie in this node's own arena."""

SCATTERED: Final = -1
"""In place of an address: the tensor lies in several pieces, or at a peer."""


class Base(NamedTuple):
    """Where the extent of a rank begins: at ``address`` in the arena of ``origin`` (a peer's id, `HERE`)."""

    origin: str
    address: int


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A contiguous run of a tensor's bytes, at ``address`` in the arena of ``origin``."""

    tensor_offset: int
    nbytes: int
    address: int
    origin: str


class Located(NamedTuple):
    """Where the bytes of tensors lie.

    Attributes:
        addresses: by tensor, where it begins in this node's arena, if it lies there in one piece; else `SCATTERED`.
        segments: by the index of a tensor that does not, the segments that make it up, in order.
    """

    addresses: list[int]
    segments: dict[int, list[Segment]]


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


def locate(tensors: Iterable[Tensor], sizes: Iterable[int], bases: Sequence[Base]) -> Located:
    """Say where the tensors of a manifest lie.

    Args:
        tensors: their runs lie in the ranks' extents.
        sizes: bytes of each.
        bases: by rank, where its extent begins.

    Raises:
        MisuseError: a tensor's runs do not cover it exactly.
    """
    here = [address if origin == HERE else SCATTERED for origin, address in bases]
    addresses: list[int] = []
    segments: dict[int, list[Segment]] = {}
    for index, (tensor, nbytes) in enumerate(zip(tensors, sizes, strict=True)):
        runs = tensor.runs
        if len(runs) == 1:  # as nearly always: a rank contributes whole tensors
            run = runs[0]
            base = here[run.rank]
            if base != SCATTERED and run.nbytes == nbytes and not run.tensor_offset:
                addresses.append(base + run.offset)
                continue
        addresses.append(SCATTERED)
        segments[index] = _segments(tensor, nbytes, bases)
    return Located(addresses, segments)


def _segments(tensor: Tensor, nbytes: int, bases: Sequence[Base]) -> list[Segment]:
    segments: list[Segment] = []
    end = 0
    for run in tensor.runs:
        if run.tensor_offset != end or run.nbytes < 0:
            raise MisuseError(f"tensor {tensor.spec.name}: {run} where one from {end} on is due")
        end += run.nbytes
        origin, address = bases[run.rank]
        if run.nbytes:
            segments.append(Segment(run.tensor_offset, run.nbytes, address + run.offset, origin))
    if end != nbytes:
        raise MisuseError(f"tensor {tensor.spec.name}: its runs cover {end} of {nbytes} bytes")
    return segments


def fill(parts: Iterable[Part], located: Located) -> list[Copy]:
    """The copies that fill one slot with ``parts``, by ascending slot offset.

    Bytes as far apart in the arena as in the slot go in one copy. A slot is packed densely, so less than one
    alignment of padding lies between two tensors; what a copy carries beside them lies between its segments.

    Args:
        parts: what the slot is to hold, by ascending slot offset; empty parts may be anywhere.
        located: where the tensors lie that ``parts`` count.
    """
    addresses, segments = located
    copies: list[Copy] = []
    origin, shift, start, end = HERE, 0, 0, 0  # of the copy at hand: its address is its slot offset + its shift
    for part in parts:
        address = addresses[part.tensor]
        if address == SCATTERED:
            for piece in _pieces(part, segments[part.tensor]):
                if not end or piece[:2] != (origin, shift):
                    if end:
                        copies.append(Copy(origin, start + shift, start, end - start))
                    origin, shift, start, _ = piece
                end = piece[3]
        elif nbytes := part.nbytes:
            first = part.slot_offset
            first_shift = address + part.tensor_offset - first
            if not end or first_shift != shift or origin != HERE:
                if end:
                    copies.append(Copy(origin, start + shift, start, end - start))
                origin, shift, start = HERE, first_shift, first
            end = first + nbytes
    if end:
        copies.append(Copy(origin, start + shift, start, end - start))
    return copies


def _pieces(part: Part, segments: Iterable[Segment]) -> list[tuple[str, int, int, int]]:
    """A part's bytes by segment: (origin, how far in its arena from where in the slot, start and end in the slot)."""
    base = part.slot_offset - part.tensor_offset
    pieces = []
    for segment in segments:
        start = max(segment.tensor_offset, part.tensor_offset)
        end = min(segment.tensor_offset + segment.nbytes, part.tensor_offset + part.nbytes)
        if start < end:
            shift = segment.address - segment.tensor_offset - base
            pieces.append((segment.origin, shift, base + start, base + end))
    return pieces


def deal(copies: Iterable[Copy], shares: Sequence[Share], count: int) -> tuple[tuple[Copy, ...], ...]:
    """By GPU, what of ``copies`` falls into its shares; a copy that reaches over several shares is cut.

    Args:
        copies: by ascending slot offset.
        shares: cover all of them, in ascending order.
        count: the number of GPUs.
    """
    dealt: list[list[Copy]] = [[] for _ in range(count)]
    remaining = iter(shares)
    share_end, pulls = 0, dealt[0]
    for copy in copies:
        start = copy.slot_offset
        end = start + copy.nbytes
        if end <= share_end:
            pulls.append(copy)
            continue
        origin, shift = copy.origin, copy.address - start
        while share_end < end:
            if share_end > start:
                pulls.append(Copy(origin, start + shift, start, share_end - start))
                start = share_end
            _, share_end, gpu = next(remaining)
            pulls = dealt[gpu]
        pulls.append(Copy(origin, start + shift, start, end - start))
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
    everything = [copy for copies in held + held for copy in copies]
    exchanges = []
    at = 0
    for copies in held:
        at += len(copies)
        exchanges.append(tuple(everything[at : at + len(everything) // 2 - len(copies)]))
    return tuple(exchanges)
