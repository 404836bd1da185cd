"""Whether bytes that were sent are bytes that arrived, and whether they could have told if they were not.

Bytes are gone from a slot before the last of them has arrived, so they are compared by digests of 64 bits, which depend
on the place of every element. Everything is asked of the device on which the bytes are, and nothing waits for it but
`Evidence.settled`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from cpe_daemon.core.fold import LAST_SHIFT, ROUNDS, STEP
from cpe_daemon.core.rectangles import Rectangle

_ELEMENTS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE: Final = 1 << 22
"""Elements that are looked at in one go: as 64-bit integers they take eight times as many bytes."""
_LINE: Final = 4096
"""Bytes of a row of what has no shape of its own."""
_WINDOW: Final = 8
_FEW: Final = 2 * _WINDOW
"""Elements that are too few to show any order of theirs by themselves: they have to be seen with other contents too."""


class Seen(NamedTuple):
    """Bytes, as they were seen; both are tensors of no dimension on their device."""

    digest: torch.Tensor
    """int64."""
    tells: torch.Tensor
    """bool: they would have another digest in another order, and are not all alike. False where that was not asked."""


class Shape(NamedTuple):
    """How the bytes of a rectangle are looked at: as a matrix of so many elements, of so many bytes each."""

    rows: int
    columns: int
    itemsize: int


def shape_of(rectangle: Rectangle, itemsize: int, row: int) -> Shape:
    """See a rectangle as its tensor's rows.

    Args:
        rectangle: of whole elements.
        itemsize: bytes of an element.
        row: elements of the last dimension of the tensor.
    """
    if itemsize not in _ELEMENTS:
        itemsize, row = 8, 2 * row  # complex128
    elements = rectangle.nbytes // itemsize
    if rectangle.rows > 1:
        return Shape(rectangle.rows, elements, itemsize)
    if 1 < row < elements and elements % row == 0:
        return Shape(elements // row, row, itemsize)
    return Shape(1, elements, itemsize)


class Witness:
    """Looks at bytes. Belongs to the receiver's thread; works on the device's current stream."""

    def __init__(self) -> None:
        self._weights: dict[torch.device, torch.Tensor] = {}

    def see(self, memory: torch.Tensor, start: int, pitch: int, shape: Shape, *, telling: bool) -> Seen:
        """Look at a matrix in memory.

        Args:
            memory: uint8, of one dimension.
            start: where the first row begins.
            pitch: bytes from one row to the next; what is given counts only if there are several that do not follow one
                another, 0 otherwise.
            shape: of the matrix.
            telling: whether to look too if it would show its order.
        """
        rows, columns, itemsize = shape
        weights = self._weights_for(max(rows, columns), memory.device)
        read = memory.as_strided(
            (rows, columns * itemsize), (pitch or columns * itemsize, 1), memory.storage_offset() + start
        )
        by_row = torch.empty(rows, dtype=torch.int64, device=memory.device)
        by_column = torch.zeros(columns, dtype=torch.int64, device=memory.device)
        step = max(_AT_ONCE // columns, 1)
        values = by_column
        for first in range(0, rows, step):
            piece = read[first : first + step].contiguous().view(_ELEMENTS[itemsize])
            values = piece.to(torch.int64)
            torch.sum(values * weights[:columns], dim=1, out=by_row[first : first + step])
            if telling:
                by_column += (values * weights[first : first + len(values)].unsqueeze(1)).sum(0)
        digest = (_mixed(by_row) * weights[:rows]).sum()
        if not telling:
            return Seen(digest, torch.zeros((), dtype=torch.bool, device=memory.device))
        if rows == 1 or columns == 1:
            return Seen(digest, self._tells(values.reshape(-1), weights))
        tells = _differ(by_row) & _differ(by_column)
        if rows == columns:
            tells = tells & (by_row != by_column).any()
        return Seen(digest, tells)

    def _tells(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Whether a sequence has no period, nor long stretches that are alike."""
        if len(values) < _FEW:
            return _differ(values) if len(values) > 1 else (values != 0).all()
        windows = (values.unfold(0, _WINDOW, 1) * weights[:_WINDOW]).sum(1)
        return _differ(windows)

    def _weights_for(self, count: int, device: torch.device) -> torch.Tensor:
        """Odd numbers without any order; int64 ``[at least count]``."""
        known = self._weights.get(device)
        if known is None or len(known) < count:
            steps = torch.arange(1, max(count, 1 << 12) + 1, dtype=torch.int64, device=device) * _signed(STEP)
            known = self._weights[device] = _mixed(steps) | 1
        return known


class Evidence:
    """What was sent and what arrived, of many tensors, to be compared at once."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sent: list[Seen] = []
        self._arrived: list[torch.Tensor] = []

    def add(self, name: str, sent: Seen, arrived: Seen) -> None:
        """Of one rectangle of a tensor's."""
        self._names.append(name)
        self._sent.append(sent)
        self._arrived.append(arrived.digest)

    def settled(self) -> dict[str, Verdict]:
        """By tensor: what comes of all its rectangles together."""
        verdicts = dict[str, Verdict]()
        devices = {seen.digest.device for seen in self._sent}
        for device in devices:
            picked = [at for at, seen in enumerate(self._sent) if seen.digest.device == device]
            sent = torch.stack([self._sent[at].digest for at in picked])
            tells = torch.stack([self._sent[at].tells for at in picked]).tolist()
            arrived = torch.stack([self._arrived[at].to(device) for at in picked])
            equal = (sent == arrived).tolist()
            for at, same, told, digest in zip(picked, equal, tells, sent.tolist(), strict=True):
                before = verdicts.get(self._names[at], Verdict(True, True, 0))
                verdicts[self._names[at]] = Verdict(
                    before.equal and same, before.tells and told, before.digest ^ digest
                )
        return verdicts


class Verdict(NamedTuple):
    """Of one tensor."""

    equal: bool
    tells: bool
    digest: int
    """Of its bytes."""


def look_at(witness: Witness, memory: torch.Tensor, start: int, nbytes: int) -> list[torch.Tensor]:
    """Digests of a run of bytes."""
    whole = nbytes - nbytes % _LINE
    shapes = [(start, Shape(whole // _LINE, _LINE, 1)), (start + whole, Shape(1, nbytes - whole, 1))]
    return [
        witness.see(memory, at, 0, shape, telling=False).digest for at, shape in shapes if shape.rows * shape.columns
    ]


def few(shape: Shape) -> bool:
    """Whether there are too few elements to show an order by themselves."""
    return shape.rows * shape.columns < _FEW


def _differ(values: torch.Tensor) -> torch.Tensor:
    """Whether there are at least half as many different numbers as numbers, and two."""
    ordered = values.sort().values
    others = (ordered[1:] != ordered[:-1]).sum() + 1
    return (others * 2 >= len(values)) & (others >= min(2, len(values)))


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """Each number's bits, mixed: the end of splitmix64, with shifts that repeat the sign."""
    for shift, factor in ROUNDS:
        values = (values ^ (values >> shift)) * _signed(factor)
    return values ^ (values >> LAST_SHIFT)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
