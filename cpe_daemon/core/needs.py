"""Which bytes of each tensor an engine worker needs: as it says it, once for a set of tensors, and as plans ask for it.

A large model has 140,000 tensors, of a few kinds. So a worker says each kind once, and of each tensor which one it is:
some kilobytes in all. What is said is good for one set of tensors only, which `schema_of` names.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import MisuseError

Run = tuple[int, int]
"""Bytes from one offset up to another one."""

Runs = tuple[Run, ...]
"""By ascending offset, and apart."""

_MOST_SPANS: Final = 8
"""Of one tensor: what is needed in more pieces is needed whole."""
_MOST_KINDS: Final = 4096
"""Of one worker: tensors of further kinds are needed whole."""
_MOST_ROWS: Final = 4096
"""Of one tensor, as runs; what has more is needed from its first byte to its last one."""
_WHOLE: Final = 0
_COUNTED: Final = "H"
_COUNTED_BYTES: Final = 2


class Span(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """Bytes of a tensor: ``rows`` of ``nbytes`` each, a ``pitch`` apart, from ``start`` on."""

    start: int
    nbytes: int
    rows: int = 1
    pitch: int = 0


class Needs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker needs of the tensors that ``schema`` names; ``digest`` tells it from all else that it might need.

    ``kinds`` are spans. ``tensors`` has 16 bits for each tensor, little-endian, in the order of their names, by zlib:
    0 is one that is needed whole, and ``k`` one of which the spans of kind ``k - 1`` are.
    """

    digest: str
    schema: str
    kinds: list[list[Span]]
    tensors: bytes


def schema_of(specs: Sequence[TensorSpec]) -> str:
    """A digest of tensors, in the order of their names: names, dtypes and shapes."""
    return hashlib.blake2b(msgspec.msgpack.encode(specs), digest_size=16).hexdigest()


def by_name(specs: Sequence[TensorSpec]) -> list[int]:
    """The indexes of tensors, in the order of their names."""
    return sorted(range(len(specs)), key=[spec.name for spec in specs].__getitem__)


def describe(needed: Mapping[str, tuple[TensorSpec, Sequence[Rectangle] | None]]) -> Needs | None:
    """Put into words what a worker needs.

    Args:
        needed: by name, all tensors of a version, and whence bytes of them are copied; None: it is needed whole.

    Returns:
        None if all are needed whole.
    """
    kinds: dict[tuple[Span, ...], int] = {}
    known: dict[tuple[int, tuple[tuple[int, ...], ...]], int] = {}
    numbers = array(_COUNTED)
    specs: list[TensorSpec] = []
    for name in sorted(needed):
        spec, rectangles = needed[name]
        specs.append(spec)
        if rectangles is None:
            numbers.append(_WHOLE)
            continue
        nbytes = spec.nbytes
        key = nbytes, tuple([rectangle[1:4] + rectangle[5:] for rectangle in rectangles])
        number = known.get(key)
        if number is None:
            spans = _spans(rectangles, nbytes)
            number = known[key] = _WHOLE if spans is None else _number(kinds, spans)
        numbers.append(number)
    if not any(numbers):
        return None
    schema, tensors = schema_of(specs), zlib.compress(_swapped(numbers).tobytes(), 1)
    said = [list(spans) for spans in kinds]
    digest = hashlib.blake2b(msgspec.msgpack.encode((schema, said, tensors)), digest_size=16).hexdigest()
    return Needs(digest, schema, said, tensors)


def _number(kinds: dict[tuple[Span, ...], int], spans: tuple[Span, ...]) -> int:
    if len(kinds) >= _MOST_KINDS and spans not in kinds:
        return _WHOLE
    return kinds.setdefault(spans, len(kinds) + 1)


def _spans(rectangles: Sequence[Rectangle], nbytes: int) -> tuple[Span, ...] | None:
    """Where rectangles are copied from; None if that is about everything."""
    found: list[Span] = []
    for rectangle in rectangles:
        if rectangle.rows > 1 and rectangle.source_pitch > rectangle.nbytes:
            found.append(Span(rectangle.source, rectangle.nbytes, rectangle.rows, rectangle.source_pitch))
        elif rectangle.total_bytes:
            found.append(Span(rectangle.source, rectangle.total_bytes))
    single = merge(sorted((span.start, span.start + span.nbytes) for span in found if span.rows == 1), 0)
    spans = sorted({span for span in found if span.rows > 1} | {Span(start, end - start) for start, end in single})
    if Span(0, nbytes) in spans or len(spans) > _MOST_SPANS:
        return None
    return tuple(spans)


def kinds_of(needs: Needs, tensors: int) -> Sequence[int]:
    """By tensor, in the order of their names, of which kind it is; 0: it is needed whole.

    Raises:
        MisuseError: it is not said of so many tensors, there is no such kind, or there are more than anybody would say.
    """
    if len(needs.kinds) > _MOST_KINDS or any(len(spans) > _MOST_SPANS for spans in needs.kinds):
        raise MisuseError(f"needs of {len(needs.kinds)} kinds, or of one with too many spans")
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(needs.tensors, _COUNTED_BYTES * tensors + 1)
    except zlib.error as error:
        raise MisuseError(f"needs that cannot be unpacked: {error}") from None
    if len(data) != _COUNTED_BYTES * tensors:
        raise MisuseError(f"needs of {len(data) / _COUNTED_BYTES:g} tensors or more, where there are {tensors}")
    numbers = _swapped(array(_COUNTED, data))
    if numbers and max(numbers) > len(needs.kinds):
        raise MisuseError(f"needs of {len(needs.kinds)} kinds, one of which is named {max(numbers)}")
    return numbers


def _swapped(numbers: array[int]) -> array[int]:
    """The same where numbers are little-endian; where they are not, in the other order."""
    if array("H", b"\1\0")[0] != 1:
        numbers = array(_COUNTED, numbers)
        numbers.byteswap()
    return numbers


def runs_of(spans: Iterable[Span], nbytes: int, gap: int) -> Runs:
    """Spans of a tensor of ``nbytes`` as runs, which may hold what is in between where that is ``gap`` bytes or less.

    Raises:
        MisuseError: one lies outside of the tensor.
    """
    runs: list[Run] = []
    for span in spans:
        start, width, rows, pitch = span.start, span.nbytes, span.rows, span.pitch
        end = start + (rows - 1) * pitch + width
        if min(start, width - 1, rows - 1, pitch) < 0 or end > nbytes:
            raise MisuseError(f"{rows} rows of {width} bytes, {pitch} apart, from {start} on, of a tensor of {nbytes}")
        if rows > _MOST_ROWS or pitch - width <= gap:
            runs.append((start, end))
        else:
            runs += [(at, at + width) for at in range(start, start + rows * pitch, pitch)][:rows]
    return merge(sorted(runs), gap)


def merge(runs: Iterable[Run], gap: int) -> Runs:
    """Make one of runs, by ascending beginning, that are no more than ``gap`` bytes apart; leave out empty ones."""
    merged: list[Run] = []
    start = end = -1
    for first, last in runs:
        if first >= last:
            continue
        if end >= 0 and first - end <= gap:
            end = max(end, last)
            continue
        if end >= 0:
            merged.append((start, end))
        start, end = first, last
    if end >= 0:
        merged.append((start, end))
    return tuple(merged)


def intersect(some: Sequence[Run], others: Sequence[Run]) -> Iterator[Run]:
    """What is in both; each by ascending offset, and apart."""
    ahead = iter(others)
    other = next(ahead, None)
    for start, end in some:
        while other is not None and other[1] <= start:
            other = next(ahead, None)
        while other is not None and other[0] < end:
            yield max(start, other[0]), min(end, other[1])
            if other[1] > end:
                break
            other = next(ahead, None)
