"""The plan of a push: which bytes go from where into which slot of which GPU, bucket after bucket.

It says what to copy, never when: the pipeline (`cpe_daemon.push`) decides that, and refuses what it cannot
carry out, such as bytes that a peer still has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from cpe_daemon.core.buckets import Cut, Filling, Part, cut
from cpe_daemon.core.copies import HERE, Base, Copy, Located, PeerCopy, deal, exchange, fill, locate, sources
from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.slices import Wants, cut_to
from cpe_daemon.core.topology import Costs, Gpu, Region, Share, Topology, equal_shares, near_shares
from cpe_daemon.errors import MisuseError

__all__ = [
    "HERE",
    "Base",
    "Bucket",
    "Copy",
    "Costs",
    "Cut",
    "Gpu",
    "Part",
    "PeerCopy",
    "Plan",
    "Region",
    "Topology",
    "Transfers",
    "Wants",
    "assign",
    "cut",
]


class Transfers(NamedTuple):
    """By GPU, what it copies from the arena over its own PCIe link (stage 1), and then from other GPUs (stage 2)."""

    pulls: tuple[tuple[Copy, ...], ...]
    exchanges: tuple[tuple[PeerCopy, ...], ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One transfer unit: the same content for a slot of every GPU.

    Attributes:
        index: its place in the plan.
        nbytes: bytes of the slot that are used, padding included; a multiple of the alignment.
        parts: the tensors' bytes in the slot, in the order in which a worker takes them.
        pulls: by GPU, what it copies from the arena over its own PCIe link (stage 1).
        exchanges: by GPU, what it copies from other GPUs to complete its slot (stage 2); empty without peer
            access.
        sliced: in place of these, while workers need what they said: each slot gets what is needed there, and
            other bytes of it are whatever they were. None: everything is sent.
    """

    index: int
    nbytes: int
    parts: tuple[Part, ...]
    pulls: tuple[tuple[Copy, ...], ...]
    exchanges: tuple[tuple[PeerCopy, ...], ...]
    sliced: Transfers | None = None

    @property
    def whole(self) -> Transfers:
        """What brings everything to every slot."""
        return Transfers(self.pulls, self.exchanges)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole push.

    Attributes:
        buckets: in the order in which they are loaded.
        slot_bytes: what a bucket uses at most.
        nbytes: bytes of all tensors, without padding.
    """

    buckets: tuple[Bucket, ...]
    slot_bytes: int
    nbytes: int


def assign(
    buckets: Cut, tensors: Sequence[Tensor], bases: Sequence[Base], topology: Topology, wants: Wants | None = None
) -> Plan:
    """Give each GPU its copies.

    With peer access each GPU pulls an equal share of every bucket, from memory near to it as far as that
    goes, and takes the rest from the others; without, each pulls everything.

    Args:
        buckets: the cut of these tensors, or of others with the same names and sizes in the same order.
        tensors: a manifest's.
        bases: by rank of that manifest, where its extent begins.
        topology: the GPUs.
        wants: what they need of this cut; None: everything.

    Raises:
        MisuseError: the tensors are not those that were cut, or one's runs do not cover it exactly.
    """
    if len(tensors) != len(buckets.sizes):
        raise MisuseError(f"{len(tensors)} tensors for a cut of {len(buckets.sizes)}")
    located = locate(tensors, buckets.sizes, bases)
    return Plan(
        tuple([_bucket(index, filling, located, topology, wants) for index, filling in enumerate(buckets.fillings)]),
        buckets.slot_bytes,
        sum(buckets.sizes),
    )


def _bucket(index: int, filling: Filling, located: Located, topology: Topology, wants: Wants | None) -> Bucket:
    nbytes, parts = filling.nbytes, filling.parts
    copies = fill(parts, located)
    count = len(topology.gpus)
    near = topology.peer_access and topology.has_near_memory
    shares: tuple[Share, ...] = ()
    pulls, exchanges = (tuple(copies),) * count, _NOTHING * count
    if near:
        shares = near_shares(nbytes, topology.gpus, sources(copies, topology))
        exchanges = _exchanges(shares, count)
    elif topology.peer_access:
        shares, exchanges = _equally(nbytes, count)
    if shares:
        pulls = deal(copies, shares, count)
    slicing = wants.slicing(index, shares, near=near) if wants is not None else None
    sliced = None
    if slicing is not None:
        sliced = Transfers(tuple([cut_to(copies, runs) for runs in slicing.pulls]), slicing.exchanges)
    return Bucket(index, nbytes, parts, pulls, exchanges, sliced)


_NOTHING: Final[tuple[tuple[PeerCopy, ...], ...]] = ((),)


@lru_cache(maxsize=256)
def _equally(nbytes: int, count: int) -> tuple[tuple[Share, ...], tuple[tuple[PeerCopy, ...], ...]]:
    """Equal shares and their exchanges: the same for all buckets of one size, as runs of experts are."""
    shares = equal_shares(nbytes, count)
    return shares, exchange(shares, count)


_exchanges = lru_cache(maxsize=256)(exchange)
"""Memory is near in long stretches, so that most buckets of a size are shared out alike."""
