"""Tensors out of a bucket's bytes: copied to their places by address, or views of the slot for the engine to load.

Tensors that were split and have no place are put together first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import EngineError, ProtocolError, ResourceError
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


def meta_of(spec: TensorSpec) -> torch.Tensor:
    """Return a tensor of that dtype and shape, without memory.

    Raises:
        EngineError: this torch does not have its dtype.
    """
    return torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta")


def view_as(data: torch.Tensor, part: TensorPart) -> torch.Tensor:
    """See uint8 ``data`` ``[nbytes]`` as the tensor that it is, without a copy."""
    return data.view(dtype_of(part.dtype)).view(part.shape)


class Place(NamedTuple):
    """Memory on the slots' device in which a tensor's bytes belong: ``nbytes`` of them, from its byte ``start`` on.

    The others are not wanted here, for tensor-parallel ranks share the tensor. Whoever names a place vouches that the
    memory stays until the bytes that it is asked for have been copied.
    """

    address: int
    nbytes: int
    start: int = 0


Copying = Callable[[int, int, int], None]
"""Copies, or issues a copy: (destination, source, bytes), as `cpe_daemon.devices.slots.Slots.copy` does."""


class Assembly:
    """Takes buckets apart, and puts split tensors that have no place together, one at a time, in a buffer.

    The buffer is on the slots' device and lives from a tensor's first part to its last.
    """

    def __init__(self) -> None:
        self.placed = 0
        """Tensors that the last `take` completed in their places."""
        self._name: str | None = None
        self._place: Place | None = None
        self._buffer: torch.Tensor | None = None
        self._filled = 0

    def take(
        self, parts: Sequence[TensorPart], slot: torch.Tensor, places: Iterable[Place | None], copy: Copying
    ) -> list[tuple[str, torch.Tensor]]:
        """Copy what has a place, and return the other tensors that are whole now, in order.

        They are valid until the slot is reused or `take` is called again. Nothing is copied to a place before all
        parts are known to be good. The copies come one after another then: each leaves the caches empty, and what is
        done between two of them takes many times as long as before them all.

        Args:
            parts: of one bucket, in order.
            slot: uint8 ``[slot_bytes]``, in which they lie.
            places: of each tensor that begins in this bucket, in order; None for one that is to be returned.
            copy: of the slot's device. A copy may still be under way when this returns.

        Raises:
            ProtocolError: the parts do not follow one another, or lie outside the slot.
            ResourceError: there is no memory to put a tensor together in.
        """
        tensors: list[tuple[str, torch.Tensor]] = []
        runs: list[tuple[int, int, int]] = []
        base, slot_bytes, begun = slot.data_ptr(), slot.numel(), iter(places)
        self.placed = 0
        for part in parts:
            if not 0 <= part.slot_offset <= part.slot_offset + part.nbytes <= slot_bytes:
                raise ProtocolError(f"{part.name} lies outside of a slot of {slot_bytes} bytes")
            nbytes = math.prod(part.shape) * ITEMSIZE.get(part.dtype, 0)
            if part.tensor_offset == 0:
                place = next(begun)
                if part.nbytes == nbytes:
                    if place is None:
                        tensors.append((part.name, view_as(slot.narrow(0, part.slot_offset, nbytes), part)))
                    else:
                        runs.append(_run(place, part, base))
                        self.placed += 1
                    continue
                self._begin(part, nbytes, place, slot.device)
            if self._add(part, nbytes, slot, runs):
                if self._buffer is None:
                    self.placed += 1
                else:
                    tensors.append((part.name, view_as(self._buffer, part)))
                self.clear()
        for destination, source, count in runs:
            if count:
                copy(destination, source, count)
        return tensors

    def clear(self) -> None:
        """Forget a tensor that is not whole, and let the buffer go."""
        self._name = self._place = self._buffer = None
        self._filled = 0

    def _begin(self, part: TensorPart, nbytes: int, place: Place | None, device: torch.device) -> None:
        self.clear()
        self._name, self._place = part.name, place
        if place is None:
            try:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            except RuntimeError as error:
                raise ResourceError(
                    f"no memory to put {part.name} together, which has {nbytes} bytes: {error}"
                ) from None

    def _add(self, part: TensorPart, nbytes: int, slot: torch.Tensor, runs: list[tuple[int, int, int]]) -> bool:
        """Take one part of a split tensor; True if it is the last."""
        if part.name != self._name or part.tensor_offset != self._filled:
            raise ProtocolError(f"a part of {part.name} at {part.tensor_offset} follows nothing")
        self._filled += part.nbytes
        if self._filled > nbytes:
            raise ProtocolError(f"{self._filled} bytes of {part.name}, which has {nbytes}")
        if self._place is not None:
            runs.append(_run(self._place, part, slot.data_ptr()))
        elif self._buffer is not None:
            data = slot.narrow(0, part.slot_offset, part.nbytes)
            self._buffer.narrow(0, part.tensor_offset, part.nbytes).copy_(data)
        return self._filled == nbytes


def _run(place: Place, part: TensorPart, base: int) -> tuple[int, int, int]:
    """What is to be copied of a part, if anything: to where, from where, how many bytes.

    Args:
        place: where the tensor's bytes belong.
        part: lies in a slot.
        base: the slot's address.
    """
    first = max(part.tensor_offset, place.start)
    count = min(part.tensor_offset + part.nbytes, place.start + place.nbytes) - first
    source = base + part.slot_offset + first - part.tensor_offset
    return place.address + first - place.start, source, max(count, 0)
