"""Checks a plan byte by byte, by arithmetic of its own: every GPU's slots come to hold every tensor, each byte once.

Nothing of the planner's is asked. What a plan says is followed instead: parts against the manifest, pulls against where
the ranks' extents lie, exchanges against what the other GPUs pull.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from cpe_daemon.core.copies import PeerCopy
from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.plan import Base, Bucket, Copy, Part, Plan

Range = tuple[int, int]
"""Start and end in a slot."""
Piece = tuple[int, int, int]
"""Start and end in a slot, and the source's address less the start: how far the bytes move."""


class WrongPlanError(Exception):
    """A plan that does not bring each byte once to where it belongs."""


class Checker:
    """Checks one plan.

    Args:
        plan: the plan.
        tensors: the manifest's, which it is to bring.
        bases: by rank, where its extent begins; all in this node's arena.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], bases: Sequence[Base]) -> None:
        self._plan = plan
        self._tensors = tensors
        self._bases = [base.address for base in bases]
        self._shares: dict[tuple[int, int], list[list[Range]]] = {}

    def check(self) -> int:
        """Check all of it.

        Returns:
            Bytes that arrive in the slots of each GPU.

        Raises:
            WrongPlanError: naming the bucket or the tensor.
        """
        reached = [0] * len(self._tensors)
        for bucket in self._plan.buckets:
            self._check_parts(bucket, reached)
            for pulls in self._complete(bucket):
                self._check_carried(bucket, pulls)
        for tensor, nbytes in zip(self._tensors, reached, strict=True):
            if nbytes != tensor.spec.nbytes:
                raise WrongPlanError(f"{tensor.spec.name}: {nbytes} of {tensor.spec.nbytes} bytes are in buckets")
        return sum(reached)

    def _check_parts(self, bucket: Bucket, reached: list[int]) -> None:
        """Parts lie one behind another within the slot, and go on where their tensor's last part ended."""
        end = 0
        for part in bucket.parts:
            nbytes = part.nbytes
            if nbytes:
                if part.slot_offset < end:
                    raise WrongPlanError(f"bucket {bucket.index}: {part} overlaps what is before it")
                end = part.slot_offset + nbytes
            if reached[part.tensor] != part.tensor_offset:
                raise WrongPlanError(f"bucket {bucket.index}: {part} where {reached[part.tensor]} is due")
            reached[part.tensor] += nbytes
        if not end <= bucket.nbytes <= self._plan.slot_bytes:
            raise WrongPlanError(f"bucket {bucket.index}: {end} bytes in {bucket.nbytes} of {self._plan.slot_bytes}")

    def _complete(self, bucket: Bucket) -> Iterable[Iterable[Copy]]:
        """What comes from the arena into every slot: over the GPU's own link, or by the others who pull it.

        Without exchanges that is one list for each GPU. With them it is one for all: each GPU has exactly what the
        others do not take from it, and takes all that they pull.
        """
        if not any(bucket.exchanges):
            return bucket.pulls
        for gpu, (pulls, share) in enumerate(zip(bucket.pulls, self._shares_of(bucket), strict=True)):
            at = 0
            for copy in pulls:
                start, end = copy.slot_offset, copy.slot_offset + copy.nbytes
                while at < len(share) and share[at][1] <= start:
                    at += 1
                if at == len(share) or not share[at][0] <= start < end <= share[at][1]:
                    raise WrongPlanError(f"bucket {bucket.index}: GPU {gpu} pulls {copy}, which nobody takes from it")
        return [sorted(chain.from_iterable(bucket.pulls), key=_slot_offset)]

    def _shares_of(self, bucket: Bucket) -> list[list[Range]]:
        """By GPU, the ranges of its slot that the others take: the same for all others, and all of the slot together.

        Raises:
            WrongPlanError: a GPU takes other ranges than the rest, or some bytes come from no GPU, or from two.
        """
        key = id(bucket.exchanges), bucket.nbytes  # buckets that are shared out alike have the very same ones
        if key not in self._shares:
            self._shares[key] = _shares(bucket)
        return self._shares[key]

    def _check_carried(self, bucket: Bucket, pulls: Iterable[Copy]) -> None:
        """Every byte of every part comes from its own place in the arena, and once."""
        copies = _apart(bucket, pulls)
        start = end = shift = 0
        for part in bucket.parts:
            for at, last, due_shift in self._due(part):
                while at < last:
                    if end <= at:
                        start, end, shift = next(copies, (bucket.nbytes, bucket.nbytes + 1, 0))
                    elif start <= at and shift == due_shift:
                        at = min(end, last)
                    else:
                        raise WrongPlanError(f"bucket {bucket.index}: byte {at} does not come, or comes from elsewhere")
        for start, end, _ in copies:
            raise WrongPlanError(f"bucket {bucket.index}: bytes {start} to {end} come, and no tensor has them")

    def _due(self, part: Part) -> list[Piece]:
        """Where the bytes of a part are to come from."""
        first, last = part.tensor_offset, part.tensor_offset + part.nbytes
        base = part.slot_offset - first
        runs = self._tensors[part.tensor].runs
        if len(runs) == 1:
            return [(base + first, base + last, self._bases[runs[0].rank] + runs[0].offset - base)]
        due = []
        for run in runs:
            start, end = max(first, run.tensor_offset), min(last, run.tensor_offset + run.nbytes)
            if start < end:
                shift = self._bases[run.rank] + run.offset - run.tensor_offset - base
                due.append((base + start, base + end, shift))
        return due


def _shares(bucket: Bucket) -> list[list[Range]]:
    count = len(bucket.exchanges)
    shares = [_taken(bucket.exchanges[(gpu + 1) % count], gpu) for gpu in range(count)]
    for gpu, exchanges in enumerate(bucket.exchanges):
        if any(_taken(exchanges, other) != share for other, share in enumerate(shares) if other != gpu):
            raise WrongPlanError(f"bucket {bucket.index}: GPU {gpu} takes other ranges than its neighbours")
        if _taken(exchanges, gpu):
            raise WrongPlanError(f"bucket {bucket.index}: GPU {gpu} takes from itself")
    at = 0
    for start, end in sorted(chain.from_iterable(shares)):
        if start != at:
            raise WrongPlanError(f"bucket {bucket.index}: a share ends at byte {at}, the next one begins at {start}")
        at = end
    if at != bucket.nbytes:
        raise WrongPlanError(f"bucket {bucket.index}: shares of {at} of {bucket.nbytes} bytes")
    return shares


def _taken(exchanges: Iterable[PeerCopy], gpu: int) -> list[Range]:
    """What is taken from a GPU."""
    return sorted((copy.slot_offset, copy.slot_offset + copy.nbytes) for copy in exchanges if copy.gpu == gpu)


def _apart(bucket: Bucket, pulls: Iterable[Copy]) -> Iterator[Piece]:
    """The copies' pieces.

    Raises:
        WrongPlanError: two write the same bytes, or one writes outside of the bucket.
    """
    reached = 0
    for copy in pulls:
        start, end = copy.slot_offset, copy.slot_offset + copy.nbytes
        if not reached <= start < end <= bucket.nbytes:
            raise WrongPlanError(f"bucket {bucket.index}: {copy} where bytes up to {reached} have come")
        reached = end
        yield start, end, copy.address - start


def _slot_offset(copy: Copy) -> int:
    return copy.slot_offset
