"""Which bytes of which tensors lie where in memory, as far as copies that were seen say."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cpe_daemon.core.rectangles import Rectangle, clip, overlap
from cpe_daemon.errors import MisuseError

_MOST_PIECES: Final = 1 << 12
"""That one copy out of other memory than a tensor's own may come to."""


class Piece(NamedTuple):
    """Bytes of a tensor: ``rectangle``'s source counts from that one's beginning, its destination from the owner's."""

    tensor: str
    rectangle: Rectangle


class Span(NamedTuple):
    """Memory that has a name: from ``begin`` up to ``end``."""

    begin: int
    end: int
    name: str


class Spans:
    """Spans by address. Of one that lies in another, only the other is known."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = list[Span]()
        for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
            if span.begin < span.end and not (self._spans and span.end <= self._spans[-1].end):
                self._spans.append(span)
        self._begins = [span.begin for span in self._spans]

    @property
    def all(self) -> list[Span]:
        """Those that are known, by address."""
        return self._spans

    def find(self, begin: int, end: int) -> Span | None:
        """The span in which all of that memory lies."""
        at = bisect.bisect_right(self._begins, begin) - 1
        return self._spans[at] if at >= 0 and end <= self._spans[at].end else None


class Scratch:
    """Memory that a loader made: what it holds of tensors, or why that is not known.

    Args:
        tensor: in that memory.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.begin = storage.data_ptr()
        self._alive = StorageWeakRef(storage)
        self.pieces: list[Piece] = []
        self.spoilt = ""
        """Why its bytes are not those of tensors."""
        self.names = set[str]()
        """Tensors that had a part in it."""
        self._begins = list[int]()
        """Where the pieces begin, which are in that order."""
        self._apart = True
        """Whether each piece ends before the next begins."""

    @property
    def freed(self) -> bool:
        """Whether the memory is another's by now."""
        return bool(self._alive.expired())

    def spoil(self, reason: str, names: Iterable[str] = ()) -> None:
        """Its bytes are no longer those of tensors."""
        self.spoilt = self.spoilt or reason
        self.names.update(names)

    def add(self, pieces: Sequence[Piece]) -> None:
        """Bytes were written; others that they overwrite are forgotten only if they are all overwritten."""
        self.names.update(piece.tensor for piece in pieces)
        for new in pieces:
            at = bisect.bisect_left(self._begins, new.rectangle.destination)
            if not self._fits(new.rectangle, at):
                self._make_room(new.rectangle)
                at = bisect.bisect_left(self._begins, new.rectangle.destination)
            self._begins.insert(at, new.rectangle.destination)
            self.pieces.insert(at, new)

    def _fits(self, new: Rectangle, at: int) -> bool:
        """Whether it lies between its neighbours; those of columns do not, and all have to be looked at then."""
        before = self.pieces[at - 1].rectangle.destination_end if at else 0
        behind = self._begins[at] if at < len(self._begins) else new.destination_end
        self._apart = self._apart and before <= new.destination and new.destination_end <= behind
        return self._apart

    def _make_room(self, new: Rectangle) -> None:
        """Forget what is overwritten."""
        kept = list[Piece]()
        for old in self.pieces:
            first, end = old.rectangle.destination, old.rectangle.destination_end
            if end <= new.destination or new.destination_end <= first or not overlap([old.rectangle, new]):
                kept.append(old)
            elif new.rows > 1 or first < new.destination or new.destination_end < end:
                self.spoil("overwritten in part")
        self.pieces = kept
        self._begins = [piece.rectangle.destination for piece in kept]
        ends = [piece.rectangle.destination_end for piece in kept]
        self._apart = all(end <= begin for end, begin in zip(ends, self._begins[1:], strict=False))

    def read(self, wanted: Rectangle) -> list[Piece]:
        """What is copied by a rectangle whose source counts from the beginning here.

        Raises:
            MisuseError: not all of its bytes are known to be tensors', or they are in too many pieces.
        """
        overlapping = [
            piece
            for piece in self.pieces
            if piece.rectangle.destination < wanted.source_end and wanted.source < piece.rectangle.destination_end
        ]
        if len(overlapping) == 1 and overlapping[0].rectangle.rows == 1:
            tensor, run = overlapping[0]
            if run.destination <= wanted.source and wanted.source_end <= run.destination_end:
                return [Piece(tensor, wanted._replace(source=wanted.source - run.destination + run.source))]
        if wanted.rows * max(len(overlapping), 1) > _MOST_PIECES:
            raise MisuseError("it is in too many pieces")
        found = list[Piece]()
        for row in range(wanted.rows):
            first = wanted.source + row * wanted.source_pitch
            ahead = wanted.destination + row * wanted.destination_pitch - first
            for tensor, whole in overlapping:
                parts = clip(_turned(whole), first, first + wanted.nbytes)
                found += [Piece(tensor, _turned(part).moved(ahead, 0)) for part in parts]
        if sum(piece.rectangle.total_bytes for piece in found) != wanted.total_bytes:
            raise MisuseError("padded")
        return found


def _turned(rectangle: Rectangle) -> Rectangle:
    """The copy back."""
    destination, source, nbytes, rows, destination_pitch, source_pitch = rectangle
    return Rectangle(source, destination, nbytes, rows, source_pitch, destination_pitch)


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to behind its last, in memory."""
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(steps + 1) * tensor.itemsize


def span_of(name: str, tensor: torch.Tensor) -> Span:
    """The memory of a tensor."""
    begin = tensor.data_ptr()
    return Span(begin, begin + extent(tensor), name)


def layout_of(tensor: torch.Tensor) -> Hashable:
    """What has to stay for a place in it to stay good."""
    address = 0 if tensor.is_meta or tensor.layout is not torch.strided else tensor.data_ptr()
    strides = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    return tensor.device, address, tensor.dtype, tuple(tensor.shape), strides


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a parameter, from its first element on; uint8."""
    offset = tensor.storage_offset() * tensor.itemsize
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.untyped_storage(), offset, (extent(tensor),), (1,))


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that may be written to in a module: parameters and buffers, by every name that they have."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))
