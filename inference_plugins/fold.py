"""Folds the bytes that an engine is handed, where they lie: see `cpe_daemon.core.fold` for what a fold is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from cpe_daemon.core.fold import LAST_SHIFT, ROUNDS, ROW_BYTES, ROW_WORDS, STEP, WEIGHTS, modulo, seed
from cpe_daemon.errors import ProtocolError
from cpe_daemon.wire.messages import TensorPart

_CPU_ROWS: Final = 1 << 10
_CUDA_ROWS: Final = 1 << 17
"""Rows whose products are made and summed in one go: they should stay in the cache, and launches are not free."""

_NO_BUCKET: Final = -1


def _signed(value: int) -> int:
    """The same 64 bits as torch has them."""
    return value - (1 << 64) if value >> 63 else value


class _Tails(NamedTuple):
    """The rows that are not full, and how many bytes of each count; int64 ``[tails]``."""

    rows: torch.Tensor
    nbytes: torch.Tensor


class _Bucket(NamedTuple):
    """A bucket as it came in the last round: keys and counts are int64 ``[parts]``, on the device."""

    parts: Sequence[TensorPart]
    rows: int
    keys: torch.Tensor
    counts: torch.Tensor
    tails: _Tails | None


class Folder:
    """Folds one version after another. Belongs to the receiver's thread; works on the device's current stream.

    Nothing here waits for the device but `result`, and a bucket that is not like the last one of its number. What it
    takes there, a third of a slot at most, is let go of by `begin`; what describes a bucket is kept for the next round.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._scratch: _Scratch | None = None

    def begin(self) -> None:
        """Forget what was folded."""
        self._scratch = None

    def add(self, seq: int, parts: Sequence[TensorPart], slot: torch.Tensor) -> None:
        """Fold a bucket's bytes; the slot may be overwritten when the stream has come this far.

        Args:
            seq: the bucket's number.
            parts: what lies in it; rows of the slot without a gap.
            slot: uint8 ``[slot_bytes]``; only read.

        Raises:
            ProtocolError: the parts do not follow one another, or lie outside the slot.
        """
        bucket = self._buckets.get(seq)
        if bucket is None or bucket.parts != parts or bucket.keys.device != slot.device:
            bucket = self._buckets[seq] = _describe(parts, slot)
        if bucket.rows:
            if self._scratch is None:
                self._scratch = _Scratch(slot.device, slot.numel() // ROW_BYTES)
            self._scratch.add(bucket, slot)

    def warm_up(self, slot: torch.Tensor) -> None:
        """Take all steps once, with bytes that do not count."""
        nbytes = slot.numel() - 1
        self.begin()
        self.add(_NO_BUCKET, [TensorPart("", "uint8", (nbytes,), 0, nbytes, 0)], slot)
        self.result()
        del self._buckets[_NO_BUCKET]
        self.begin()

    def result(self) -> int:
        """The fold of all buckets since `begin`, as soon as the device has it."""
        return 0 if self._scratch is None else modulo(int(self._scratch.total.item()))


class _Scratch:
    """Memory on the device for folding one bucket at a time, and the sum of all."""

    def __init__(self, device: torch.device, rows: int) -> None:
        def int64(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self._weights = torch.tensor([_signed(weight) for weight in WEIGHTS], device=device)
        self._ramp = torch.arange(rows, device=device).mul_(_signed(STEP))
        self._values, self._shifted = int64(rows), int64(rows)
        at_once = min(_CUDA_ROWS if device.type == "cuda" else _CPU_ROWS, max(rows // 8, 1))
        self._products = int64(at_once, ROW_WORDS)
        self._kept = torch.tensor([(1 << 8 * nbytes) - 1 for nbytes in range(8)] + [-1], device=device)
        self._word_offsets = torch.arange(0, ROW_BYTES, 8, device=device)

    def add(self, bucket: _Bucket, slot: torch.Tensor) -> None:
        """Add a bucket's rows to the sum."""
        words = slot.narrow(0, 0, bucket.rows * ROW_BYTES).view(torch.int64).view(-1, ROW_WORDS)
        values, shifted = self._values[: bucket.rows], self._shifted[: bucket.rows]
        step = len(self._products)
        for piece, sums in zip(words.split(step), values.split(step), strict=True):
            torch.sum(torch.mul(piece, self._weights, out=self._products[: len(piece)]), dim=1, out=sums)
        if bucket.tails is not None:
            values.index_copy_(0, bucket.tails.rows, self._sums_of_tails(bucket.tails, words))
        values += self._ramp[: bucket.rows]
        values += torch.repeat_interleave(bucket.keys, bucket.counts, output_size=bucket.rows)
        for shift, factor in ROUNDS:
            values ^= _logical_shift(values, shift, shifted)
            values *= _signed(factor)
        values ^= _logical_shift(values, LAST_SHIFT, shifted)
        self.total += values.sum()

    def _sums_of_tails(self, tails: _Tails, words: torch.Tensor) -> torch.Tensor:
        """Sum the rows that are not full, without what lies behind their tensors' ends."""
        kept = (tails.nbytes.unsqueeze(1) - self._word_offsets).clamp_(0, 8)
        return (words[tails.rows]).bitwise_and_(self._kept[kept]).mul_(self._weights).sum(dim=1)


def _logical_shift(values: torch.Tensor, shift: int, out: torch.Tensor) -> torch.Tensor:
    """Shift right, filling with zeros: torch's shift repeats the sign."""
    return torch.bitwise_right_shift(values, shift, out=out).bitwise_and_((1 << 64 - shift) - 1)


def _describe(parts: Sequence[TensorPart], slot: torch.Tensor) -> _Bucket:
    """Find out what there is to know of a bucket.

    Raises:
        ProtocolError: the parts are not where they have to be.
    """
    seeds = torch.tensor([_signed(seed(part.name)) for part in parts], dtype=torch.int64)
    sizes = torch.tensor([part.nbytes for part in parts], dtype=torch.int64)
    counts = (sizes + ROW_BYTES - 1) // ROW_BYTES
    ends = counts.cumsum(0)
    begins = ends - counts
    for part, begin in zip(parts, begins.tolist(), strict=True):
        if part.nbytes and (part.slot_offset != begin * ROW_BYTES or part.tensor_offset % ROW_BYTES):
            raise ProtocolError(
                f"byte {part.tensor_offset} of {part.name} at {part.slot_offset} of a slot: not in rows"
            )
    rows = int(counts.sum())
    if rows * ROW_BYTES > slot.numel():
        raise ProtocolError(f"{rows * ROW_BYTES} bytes for a slot of {slot.numel()}")
    first_rows = torch.tensor([part.tensor_offset // ROW_BYTES for part in parts], dtype=torch.int64) - begins
    keys = (seeds + first_rows) * _signed(STEP)
    (at,) = (sizes % ROW_BYTES).nonzero(as_tuple=True)
    tails = _Tails((ends[at] - 1).to(slot.device), (sizes[at] % ROW_BYTES).to(slot.device)) if len(at) else None
    return _Bucket(parts, rows, keys.to(slot.device), counts.to(slot.device), tails)
