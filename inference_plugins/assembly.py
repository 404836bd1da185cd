"""Tensors out of a bucket's bytes: views of the slot for whole ones, an assembly buffer for those that were split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cpe_daemon.core.dtypes import ITEMSIZE
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


class Assembly:
    """Puts split tensors together, one at a time. The buffer lives from a tensor's first part to its last."""

    def __init__(self) -> None:
        self._name = ""
        self._buffer: torch.Tensor | None = None
        self._filled = 0

    def take(self, parts: Sequence[TensorPart], slot: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that are whole now, in order; valid until the slot is reused or `take` is called again.

        Args:
            parts: of one bucket, in order.
            slot: uint8 ``[slot_bytes]``, in which they lie.

        Raises:
            ProtocolError: the parts do not follow one another.
        """
        tensors: list[tuple[str, torch.Tensor]] = []
        for part in parts:
            data = slot.narrow(0, part.slot_offset, part.nbytes)
            nbytes = math.prod(part.shape) * ITEMSIZE.get(part.dtype, 0)
            if part.nbytes == nbytes:
                tensors.append((part.name, view_as(data, part)))
            else:
                whole = self._add(part, data, nbytes)
                if whole is not None:
                    tensors.append((part.name, view_as(whole, part)))
        return tensors

    def clear(self) -> None:
        """Let the buffer go."""
        self._buffer = None
        self._filled = 0

    def _add(self, part: TensorPart, data: torch.Tensor, nbytes: int) -> torch.Tensor | None:
        if part.tensor_offset == 0:
            self._name, self._filled = part.name, 0
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=data.device)
        buffer = self._buffer
        if buffer is None or part.name != self._name or part.tensor_offset != self._filled:
            raise ProtocolError(f"a part of {part.name} at {part.tensor_offset} follows nothing")
        buffer.narrow(0, part.tensor_offset, part.nbytes).copy_(data)
        self._filled += part.nbytes
        if self._filled < nbytes:
            return None
        self.clear()
        return buffer
