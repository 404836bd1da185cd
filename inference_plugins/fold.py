"""Folds the bytes that an engine is handed, where they lie: see `cpe_daemon.core.fold` for what a fold is.

On a GPU a kernel of our own does it, at the speed of the memory; torch's operations do where that cannot be had, and on
the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch

from cpe_daemon.core.fold import LAST_SHIFT, ROUNDS, ROW_BYTES, ROW_WORDS, STEP, WEIGHTS, modulo
from cpe_daemon.devices.fold_rows import Rows, signed
from cpe_daemon.errors import CpeError, ProtocolError
from cpe_daemon.wire.messages import TensorPart

log: Final = logging.getLogger(__name__)

_CPU_ROWS: Final = 1 << 10
_CUDA_ROWS: Final = 1 << 17
"""Rows whose products are made and summed in one go: they should stay in the cache, and launches are not free."""

_NO_BUCKET: Final = -1


class Sum(Protocol):
    """Adds up the values of rows, on a device's current stream."""

    def prepare(self, rows: Rows) -> Any:
        """What `add` wants to know of such a bucket, on the device; good for any number of times."""
        ...

    def add(self, prepared: Any, slot: torch.Tensor) -> None:
        """Add a bucket's rows; does not wait for the device."""
        ...

    def total(self) -> int:
        """The sum, modulo 2^64, as soon as the device has it."""
        ...

    def begin(self) -> None:
        """Begin with 0 again, and let go of memory that is needed only while buckets come."""
        ...


class Folder:
    """Folds one version after another. Belongs to the receiver's thread; works on the device's current stream.

    Nothing here waits for the device but `result`, and a bucket that is not like the last one of its number. What
    describes a bucket is kept for the next round.
    """

    def __init__(self) -> None:
        self._sum: Sum | None = None
        self._shape: tuple[torch.device, int] | None = None
        """The device, and the size of a slot."""
        self._buckets: dict[int, tuple[Sequence[TensorPart], Any]] = {}

    def begin(self) -> None:
        """Forget what was folded."""
        if self._sum is not None:
            self._sum.begin()

    def add(self, seq: int, parts: Sequence[TensorPart], slot: torch.Tensor) -> None:
        """Fold a bucket's bytes; the slot may be overwritten when the stream has come this far.

        Args:
            seq: the bucket's number.
            parts: what lies in it; rows of the slot without a gap.
            slot: uint8 ``[slot_bytes]``; only read.

        Raises:
            ProtocolError: the parts do not follow one another, or lie outside the slot.
        """
        adding = self._sum_on(slot)
        known, prepared = self._buckets.get(seq, (None, None))
        if known != parts:
            prepared = adding.prepare(_describe(parts, slot.numel()))
            self._buckets[seq] = parts, prepared
        adding.add(prepared, slot)

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
        return 0 if self._sum is None else self._sum.total()

    def _sum_on(self, slot: torch.Tensor) -> Sum:
        """What adds up on the slot's device; anew if that is another one."""
        shape = slot.device, slot.numel()
        if self._sum is None or self._shape != shape:
            self._shape = shape
            self._buckets.clear()
            self._sum = _kernel_sum(slot.device) or TorchSum(*shape)
        return self._sum


def _kernel_sum(device: torch.device) -> Sum | None:
    """Our own kernel, where there is a GPU and it can be compiled."""
    if device.type != "cuda":
        return None
    from cpe_daemon.devices.cuda.fold import KernelSum  # here, so that a host without GPUs has no part of it

    try:
        return KernelSum(device)
    except CpeError as error:
        log.warning("what is loaded is verified slowly, by torch's operations: %s", error.message)
        return None


class _Bucket(NamedTuple):
    """A bucket as `TorchSum` wants it: int64, on the device. ``tail_rows`` and ``tail_bytes`` are of rows not full."""

    rows: int
    keys: torch.Tensor
    counts: torch.Tensor
    tail_rows: torch.Tensor
    tail_bytes: torch.Tensor


class TorchSum:
    """Torch's operations, some thirty of them for a bucket.

    Args:
        device: where the slots are.
        slot_bytes: size of a slot. Up to a third of it is taken as scratch memory while buckets come.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self._device = device
        self._rows = slot_bytes // ROW_BYTES
        self._scratch: _Scratch | None = None

    def prepare(self, rows: Rows) -> _Bucket:
        """Find the rows that are not full, and move all to the device."""
        (at,) = rows.tails.nonzero(as_tuple=True)
        described = rows.keys, rows.counts, rows.counts.cumsum(0)[at] - 1, rows.tails[at]
        return _Bucket(rows.total, *(tensor.to(self._device) for tensor in described))

    def add(self, prepared: _Bucket, slot: torch.Tensor) -> None:
        """Add a bucket's rows to the sum."""
        if prepared.rows:
            if self._scratch is None:
                self._scratch = _Scratch(self._device, self._rows)
            self._scratch.add(prepared, slot)

    def total(self) -> int:
        """The sum."""
        return 0 if self._scratch is None else modulo(int(self._scratch.total.item()))

    def begin(self) -> None:
        """Let the scratch memory go, and with it the sum."""
        self._scratch = None


class _Scratch:
    """Memory on the device for folding one bucket at a time, and the sum of all."""

    def __init__(self, device: torch.device, rows: int) -> None:
        def int64(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self._weights = torch.tensor([signed(weight) for weight in WEIGHTS], device=device)
        self._ramp = torch.arange(rows, device=device).mul_(signed(STEP))
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
        if len(bucket.tail_rows):
            values.index_copy_(0, bucket.tail_rows, self._sums_of_tails(bucket, words))
        values += self._ramp[: bucket.rows]
        values += torch.repeat_interleave(bucket.keys, bucket.counts, output_size=bucket.rows)
        for shift, factor in ROUNDS:
            values ^= _logical_shift(values, shift, shifted)
            values *= signed(factor)
        values ^= _logical_shift(values, LAST_SHIFT, shifted)
        self.total += values.sum()

    def _sums_of_tails(self, bucket: _Bucket, words: torch.Tensor) -> torch.Tensor:
        """Sum the rows that are not full, without what lies behind their tensors' ends."""
        kept = (bucket.tail_bytes.unsqueeze(1) - self._word_offsets).clamp_(0, 8)
        return (words[bucket.tail_rows]).bitwise_and_(self._kept[kept]).mul_(self._weights).sum(dim=1)


def _logical_shift(values: torch.Tensor, shift: int, out: torch.Tensor) -> torch.Tensor:
    """Shift right, filling with zeros: torch's shift repeats the sign."""
    return torch.bitwise_right_shift(values, shift, out=out).bitwise_and_((1 << 64 - shift) - 1)


def _describe(parts: Sequence[TensorPart], slot_bytes: int) -> Rows:
    """Find out what there is to know of a bucket.

    Raises:
        ProtocolError: the parts are not where they have to be.
    """
    rows = Rows.of(
        [part.name for part in parts],
        [part.tensor_offset // ROW_BYTES for part in parts],
        [part.nbytes for part in parts],
    )
    for part, begin in zip(parts, rows.begins.tolist(), strict=True):
        if part.nbytes and (part.slot_offset != begin * ROW_BYTES or part.tensor_offset % ROW_BYTES):
            raise ProtocolError(
                f"byte {part.tensor_offset} of {part.name} at {part.slot_offset} of a slot: not in rows"
            )
    if rows.total * ROW_BYTES > slot_bytes:
        raise ProtocolError(f"{rows.total * ROW_BYTES} bytes for a slot of {slot_bytes}")
    return rows
