"""Folds a version's bytes in the arena, as the workers fold them on their devices: see `cpe_daemon.core.fold`.

An extent's rows are folded as they come, whatever lies in them. Where ranks share a tensor in other portions than whole
rows, what lies around the seams is left out then, and folded when the version is whole: `fold_seams`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cpe_daemon.core.fold import LAST_SHIFT, ROUNDS, ROW_BYTES, ROW_WORDS, STEP, WEIGHTS, key, modulo, own_bytes, seed
from cpe_daemon.core.manifest import Layout, Tensor, tensor_offset
from cpe_daemon.core.types import Shard, align

Words = NDArray[np.uint64]
"""As numpy has them, arithmetic is modulo 2^64."""

_ROWS: Final = 65536
"""Rows whose sums are worked on in one go: enough to hide what a call costs, few enough to stay in the cache."""

_WEIGHTS: Final = np.array(WEIGHTS, np.uint64)
_RAMP: Final = np.arange(_ROWS, dtype=np.uint64) * np.uint64(STEP)
_WORD_OFFSETS: Final = np.arange(0, ROW_BYTES, 8)
_KEPT: Final = np.array([(1 << 8 * nbytes) - 1 for nbytes in range(9)], np.uint64)


class ExtentFold:
    """The fold of one extent. Thread-safe, if each chunk is one thread's.

    Args:
        view: the extent's bytes.
        shards: what it holds, in order.
        layout: where each shard lies.
    """

    def __init__(self, view: memoryview, shards: Sequence[Shard], layout: Layout) -> None:
        offsets = [0 if shard.start is None else tensor_offset(shard) for shard in shards]
        seeds, sizes = np.array([seed(shard.name) for shard in shards], np.uint64), np.array(layout.sizes, np.int64)
        self._view = view
        self._begins = np.concatenate(([0], np.cumsum(-(-sizes // ROW_BYTES))))
        first_rows = np.array(offsets, np.int64) // ROW_BYTES - self._begins[:-1]
        self._keys = (seeds + first_rows.astype(np.uint64)) * np.uint64(STEP)
        (tails,) = np.nonzero(sizes % ROW_BYTES)
        self._tail_rows = self._begins[tails + 1] - 1
        self._tail_nbytes = sizes[tails] % ROW_BYTES
        self._left_out = list(_left_out(shards, layout))
        self._lock = threading.Lock()  # guards what follows
        self._parted: dict[int, int] = {}
        """Bytes that have come of rows of which some have not."""
        self.total = 0
        """Of the chunks that have come."""

    def chunk(self, offset: int, nbytes: int) -> ChunkFold:
        """Begin with bytes that are about to come, once each."""
        return ChunkFold(self, offset, offset + nbytes)

    def sum_up(self, first: int, last: int, sums: Words) -> None:
        """Sum the rows from ``first`` to ``last``."""
        words = _words(self._view[first * ROW_BYTES : last * ROW_BYTES])
        np.einsum("rc,c->r", words, _WEIGHTS, out=sums)
        begin, end = np.searchsorted(self._tail_rows, (first, last))
        if begin < end:  # the bytes behind a tensor's end are whatever they are
            at = self._tail_rows[begin:end] - first
            kept = np.clip(self._tail_nbytes[begin:end, None] - _WORD_OFFSETS, 0, 8)
            sums[at] = ((words[at] & _KEPT[kept]) * _WEIGHTS).sum(axis=1)

    def take(self, first: int, sums: Words, ends: Iterable[tuple[int, int]]) -> None:
        """Take in rows from ``first`` on, whose sums are overwritten; ``ends`` are rows and bytes of them that came."""
        total = self._fold(first, sums)
        for row in self._completed(ends):
            alone = np.empty(1, np.uint64)
            self.sum_up(row, row + 1, alone)
            total += self._fold(row, alone)
        with self._lock:
            self.total = modulo(self.total + total)

    def _completed(self, ends: Iterable[tuple[int, int]]) -> list[int]:
        """Rows of which all bytes have come with these."""
        completed: list[int] = []
        with self._lock:
            for row, nbytes in ends:
                came = self._parted.pop(row, 0) + nbytes
                if came == ROW_BYTES:
                    completed.append(row)
                elif came:
                    self._parted[row] = came
        return completed

    def _fold(self, begin: int, sums: Words) -> int:
        """Make row sums values, and add them up."""
        spare = np.empty(min(_ROWS, len(sums)), np.uint64)
        total = 0
        for at in range(0, len(sums), _ROWS):
            values = sums[at : at + _ROWS]
            first, last = begin + at, begin + at + len(values)
            self._add_keys(first, last, values)
            _mix(values, spare[: len(values)])
            self._leave_out(first, last, values)
            total += int(np.add.reduce(values))
        return total

    def _add_keys(self, first: int, last: int, values: Words) -> None:
        values += _RAMP[: last - first]
        begin = np.searchsorted(self._begins, first, "right") - 1
        end = np.searchsorted(self._begins, last, "left")
        counts = np.diff(np.clip(self._begins[begin : end + 1], first, last))
        values += np.repeat(self._keys[begin:end] + np.uint64(modulo(first * STEP)), counts)

    def _leave_out(self, first: int, last: int, values: Words) -> None:
        at = bisect_left(self._left_out, first, key=lambda rows: rows.stop)
        while at < len(self._left_out) and self._left_out[at].start < last:
            rows = self._left_out[at]
            values[max(rows.start - first, 0) : rows.stop - first] = 0
            at += 1


class ChunkFold:
    """Bytes of an extent from ``begin`` to ``end``, in the thread that brings them."""

    def __init__(self, fold: ExtentFold, begin: int, end: int) -> None:
        self._fold = fold
        self._begin = begin
        self._end = end
        self._first, self._last = -(-begin // ROW_BYTES), end // ROW_BYTES
        self._sums = np.empty(max(self._last - self._first, 0), np.uint64)
        self._summed = self._first

    def upto(self, nbytes: int) -> None:
        """The first ``nbytes`` have come: sum them up while they are in the cache."""
        summed, came = self._summed, (self._begin + nbytes) // ROW_BYTES
        if came > summed:
            self._fold.sum_up(summed, came, self._sums[summed - self._first : came - self._first])
            self._summed = came

    def end(self) -> None:
        """All of them have come, and been summed up."""
        if self._first > self._last:
            ends = [(self._last, self._end - self._begin)]
        else:
            head, tail = self._first * ROW_BYTES - self._begin, self._end - self._last * ROW_BYTES
            ends = [(self._first - 1, head), (self._last, tail)]
        self._fold.take(self._first, self._sums, ends)


def fold_seams(tensors: Iterable[Tensor], extents: Sequence[memoryview]) -> int:
    """Fold the rows of tensors that `ExtentFold` left out of the ranks' extents.

    Args:
        tensors: a manifest's.
        extents: by rank, its bytes.
    """
    total = 0
    for tensor in tensors:
        if len(tensor.runs) > 1:
            for rows in _seams(tensor):
                total += _fold_gathered(tensor, rows, extents)
    return modulo(total)


def _is_straight(tensor_offset: int) -> bool:
    return tensor_offset % ROW_BYTES == 0


def _left_out(shards: Sequence[Shard], layout: Layout) -> Iterator[range]:
    """Rows of an extent, in order, that are no rows of a tensor."""
    for shard, begin, nbytes in zip(shards, layout.offsets, layout.sizes, strict=True):
        if (own := own_bytes(shard)) < nbytes:
            yield range((begin + align(own)) // ROW_BYTES, align(begin + nbytes) // ROW_BYTES)


def _seams(tensor: Tensor) -> Iterator[range]:
    """Rows of a tensor that its runs do not hold as rows."""
    folded, nbytes = 0, tensor.spec.nbytes
    for run in tensor.runs:
        if _is_straight(run.tensor_offset):
            first, end = run.tensor_offset // ROW_BYTES, run.tensor_offset + run.nbytes
            if folded < first:
                yield range(folded, first)
            folded = align(end) // ROW_BYTES if end == nbytes else end // ROW_BYTES
    last = align(nbytes) // ROW_BYTES
    if folded < last:
        yield range(folded, last)


def _fold_gathered(tensor: Tensor, rows: range, extents: Sequence[memoryview]) -> int:
    """Fold rows of a tensor whose bytes are put together from its runs."""
    total = 0
    gathered, values, spare = bytearray(_ROWS * ROW_BYTES), np.empty(_ROWS, np.uint64), np.empty(_ROWS, np.uint64)
    for first in range(rows.start, rows.stop, _ROWS):
        count = min(_ROWS, rows.stop - first)
        begin, end = first * ROW_BYTES, min((first + count) * ROW_BYTES, tensor.spec.nbytes)
        gathered[end - begin : count * ROW_BYTES] = bytes(count * ROW_BYTES - (end - begin))
        for run in tensor.runs:
            low, high = max(begin, run.tensor_offset), min(end, run.tensor_offset + run.nbytes)
            if low < high:
                at = run.offset + low - run.tensor_offset
                gathered[low - begin : high - begin] = extents[run.rank][at : at + high - low]
        some = values[:count]
        np.einsum("rc,c->r", _words(memoryview(gathered)[: count * ROW_BYTES]), _WEIGHTS, out=some)
        some += _RAMP[:count] + np.uint64(key(tensor.spec.name, first))
        _mix(some, spare[:count])
        total += int(np.add.reduce(some))
    return total


def _words(view: memoryview) -> Words:
    """See rows of bytes as words ``[rows, ROW_WORDS]``."""
    return np.frombuffer(view, np.uint64).reshape(-1, ROW_WORDS)


def _mix(values: Words, spare: Words) -> None:
    """`cpe_daemon.core.fold.mix` of each, in place."""
    for shift, factor in ROUNDS:
        values ^= np.right_shift(values, np.uint64(shift), out=spare)
        values *= np.uint64(factor)
    values ^= np.right_shift(values, np.uint64(LAST_SHIFT), out=spare)
