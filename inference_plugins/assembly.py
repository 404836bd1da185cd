"""Tensors out of a bucket's bytes: views of the slot for whole ones; those that were split are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.devices.slots import fill
from cpe_daemon.errors import EngineError, ProtocolError
from cpe_daemon.wire.messages import TensorPart


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a manifest's dtype name.

    Raises:
        EngineError: this torch does not have it.
    """
    dtype = getattr(torch, name, None) if name in ITEMSIZE else None
    if not isinstance(dtype, torch.dtype):
        raise EngineError(f"torch {torch.__version__} here has no dtype {name!r}")
    return dtype


def view_as(data: torch.Tensor, part: TensorPart) -> torch.Tensor:
    """See uint8 ``data`` ``[nbytes]`` as the tensor that it is, without a copy."""
    return data.view(dtype_of(part.dtype)).view(part.shape)


class Place(NamedTuple):
    """Where a split tensor's bytes are written: ``memory``, uint8 ``[n]``, takes ``n`` of them from ``start`` on.

    The others are not wanted here: tensor-parallel ranks share the tensor.
    """

    memory: torch.Tensor
    start: int

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Write ``data``, the tensor's bytes from ``offset`` on, as far as they belong here."""
        first = max(offset, self.start)
        end = min(offset + data.numel(), self.start + self.memory.numel())
        if first < end:
            fill(self.memory.narrow(0, first - self.start, end - first), data.narrow(0, first - offset, end - first))


Find = Callable[[TensorPart], Place | None]
"""Tells, at a split tensor's first part, where the engine wants it written; None: put it together first."""


class Assembly:
    """Puts split tensors together, one at a time: in their place if the engine names one, else in a buffer.

    The buffer lives from a tensor's first part to its last.
    """

    def __init__(self) -> None:
        self.placed = 0
        """Split tensors that the last `take` completed in their place: these are not given out."""
        self._name = ""
        self._place: Place | None = None
        self._buffer: torch.Tensor | None = None
        self._filled = 0

    def take(
        self, parts: Sequence[TensorPart], slot: torch.Tensor, find: Find = lambda part: None
    ) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that are whole now, in order; valid until the slot is reused or `take` is called again.

        Args:
            parts: of one bucket, in order.
            slot: uint8 ``[slot_bytes]``, in which they lie.
            find: asked where a split tensor goes.

        Raises:
            ProtocolError: the parts do not follow one another.
        """
        self.placed = 0
        tensors: list[tuple[str, torch.Tensor]] = []
        for part in parts:
            data = slot.narrow(0, part.slot_offset, part.nbytes)
            nbytes = math.prod(part.shape) * ITEMSIZE.get(part.dtype, 0)
            if part.nbytes == nbytes:
                tensors.append((part.name, view_as(data, part)))
            elif self._add(part, data, nbytes, find):
                if self._buffer is None:
                    self.placed += 1
                else:
                    tensors.append((part.name, view_as(self._buffer, part)))
                self.clear()
        return tensors

    def clear(self) -> None:
        """Forget a tensor that is not whole, and let the buffer go."""
        self._place = self._buffer = None
        self._filled = 0

    def _add(self, part: TensorPart, data: torch.Tensor, nbytes: int, find: Find) -> bool:
        """Write one part; True if it was the last."""
        if part.tensor_offset == 0:
            self.clear()
            self._name, self._place = part.name, find(part)
            if self._place is None:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=data.device)
                self._place = Place(self._buffer, 0)
        if self._place is None or part.name != self._name or part.tensor_offset != self._filled:
            raise ProtocolError(f"a part of {part.name} at {part.tensor_offset} follows nothing")
        if self._filled + part.nbytes > nbytes:
            raise ProtocolError(f"{self._filled + part.nbytes} bytes of {part.name}, which has {nbytes}")
        self._place.write(part.tensor_offset, data)
        self._filled += part.nbytes
        return self._filled == nbytes
