"""Tensors out of a bucket's bytes: copied to their places by address, or views of the slot for the engine to load.

Tensors that were split and have no place are put together first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.core.rectangles import Rectangle, clip
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.devices.slots import Replay
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


Placement = Place | tuple[Rectangle, ...]
"""Where a tensor's bytes belong: one run of them, or rectangles whose sources count from its first byte."""


class Copier(Protocol):
    """Who copies out of slots: what `Assembly` needs of `cpe_daemon.devices.slots.Slots`."""

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        """Make ready to copy rectangles out of a slot, from the beginning of which their sources count."""
        ...


class _Known(NamedTuple):
    """A bucket all of whose tensors have places, as it came before."""

    copier: Copier
    parts: Sequence[TensorPart]
    places: list[Placement | None]
    before: tuple[object, ...]
    after: tuple[str | None, Placement | None, int]
    """What had begun before it, and with it: see `Assembly._begun`."""
    placed: int
    replay: Replay


class Assembly:
    """Takes buckets apart, and puts split tensors that have no place together, one at a time, in a buffer.

    The buffer is on the slots' device and lives from a tensor's first part to its last.
    """

    def __init__(self) -> None:
        self.placed = 0
        """Tensors that the last `take` completed in their places."""
        self._name: str | None = None
        self._place: Placement | None = None
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self._known: dict[int, _Known] = {}

    def take(
        self,
        parts: Sequence[TensorPart],
        slot: torch.Tensor,
        places: Iterable[Placement | None],
        copier: Copier,
        seq: int | None = None,
    ) -> list[tuple[str, torch.Tensor]]:
        """Copy what has a place, and return the other tensors that are whole now, in order.

        They are valid until the slot is reused or `take` is called again. Nothing is copied to a place before all
        parts are known to be good. The copies come one after another then: each leaves the caches empty, and what is
        done between two of them takes many times as long as before them all. A bucket that comes as it did before is
        neither looked at nor prepared again.

        Args:
            parts: of one bucket, in order.
            slot: uint8 ``[slot_bytes]``, in which they lie.
            places: of each tensor that begins in this bucket, in order; None for one that is to be returned.
            copier: of the slot's device. A copy may still be under way when this returns.
            seq: the bucket's number, by which it is remembered; None: it is not.

        Raises:
            ProtocolError: the parts do not follow one another, or lie outside the slot.
            ResourceError: there is no memory to put a tensor together in.
        """
        places, before = list(places), self._begun
        known = None if seq is None else self._known.get(seq)
        if known is not None and known[:4] == (copier, parts, places, before) and self._buffer is None:
            self._name, self._place, self._filled = known.after
            self.placed = known.placed
            known.replay(slot.data_ptr())
            return []
        tensors, rectangles = self._take_apart(parts, slot, places)
        if rectangles:
            replay = copier.prepare(rectangles)
            replay(slot.data_ptr())
            if seq is not None and not tensors and self._buffer is None:
                self._known[seq] = _Known(copier, parts, places, before, self._begun, self.placed, replay)
        return tensors

    @property
    def parted(self) -> bool:
        """Whether a part of a tensor is still to come."""
        return self._name is not None

    def clear(self) -> None:
        """Forget a tensor that is not whole, and let the buffer go."""
        self._name = self._place = self._buffer = None
        self._filled = 0

    @property
    def _begun(self) -> tuple[str | None, Placement | None, int]:
        """The tensor of which some parts have come, where it belongs, and how many of its bytes these are."""
        return self._name, self._place, self._filled

    def _take_apart(
        self, parts: Sequence[TensorPart], slot: torch.Tensor, places: Iterable[Placement | None]
    ) -> tuple[list[tuple[str, torch.Tensor]], list[Rectangle]]:
        """What is whole and has no place, and what is to be copied."""
        tensors: list[tuple[str, torch.Tensor]] = []
        rectangles: list[Rectangle] = []
        slot_bytes, begun = slot.numel(), iter(places)
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
                        _add_rectangles(rectangles, place, part)
                        self.placed += 1
                    continue
                self._begin(part, nbytes, place, slot.device)
            if self._add(part, nbytes, slot, rectangles):
                if self._buffer is None:
                    self.placed += 1
                else:
                    tensors.append((part.name, view_as(self._buffer, part)))
                self.clear()
        return tensors, rectangles

    def _begin(self, part: TensorPart, nbytes: int, place: Placement | None, device: torch.device) -> None:
        self.clear()
        self._name, self._place = part.name, place
        if place is None:
            try:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            except RuntimeError as error:
                raise ResourceError(
                    f"no memory to put {part.name} together, which has {nbytes} bytes: {error}"
                ) from None

    def _add(self, part: TensorPart, nbytes: int, slot: torch.Tensor, rectangles: list[Rectangle]) -> bool:
        """Take one part of a split tensor; True if it is the last."""
        if part.name != self._name or part.tensor_offset != self._filled:
            raise ProtocolError(f"a part of {part.name} at {part.tensor_offset} follows nothing")
        self._filled += part.nbytes
        if self._filled > nbytes:
            raise ProtocolError(f"{self._filled} bytes of {part.name}, which has {nbytes}")
        if self._place is not None:
            _add_rectangles(rectangles, self._place, part)
        elif self._buffer is not None:
            data = slot.narrow(0, part.slot_offset, part.nbytes)
            self._buffer.narrow(0, part.tensor_offset, part.nbytes).copy_(data)
        return self._filled == nbytes


def _add_rectangles(rectangles: list[Rectangle], place: Placement, part: TensorPart) -> None:
    """Add what is to be copied of a part, if anything; the sources count from the slot's beginning.

    Args:
        rectangles: of the bucket.
        place: where the tensor's bytes belong.
        part: lies in a slot.
    """
    begin, end = part.tensor_offset, part.tensor_offset + part.nbytes
    if isinstance(place, Place):
        first = max(begin, place.start)
        count = min(end, place.start + place.nbytes) - first
        if count > 0:
            rectangles.append(Rectangle(place.address + first - place.start, part.slot_offset + first - begin, count))
        return
    for whole in place:
        rectangles += [clipped.moved(0, part.slot_offset - begin) for clipped in clip(whole, begin, end)]
