"""The nouns that every room shares: versions, tensors, shards. Immutable; they travel on the wire as they are."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from cpe_daemon.core.dtypes import itemsize

ALIGNMENT_BYTES: Final = 256
"""Every tensor begins at a multiple of this, in the arena and in a slot: enough for any dtype and wide device loads."""


def align(nbytes: int) -> int:
    """Round ``nbytes`` up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class VersionId(msgspec.Struct, frozen=True, order=True):
    """A version of a model's weights: ``number`` grows within a trainer's ``run``."""

    model: str
    run: str
    number: int

    def __str__(self) -> str:
        return f"{self.model}@{self.run}#{self.number}"


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor without its bytes: name, torch dtype name, global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, contiguous; 0 for an empty one."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype}, {list(self.shape)})"


class Shard(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rank's part of a tensor: the box that begins at ``start`` and has ``local_shape``, in the global ``shape``.

    A whole tensor leaves ``start`` and ``local_shape`` as None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...] | None = None
    local_shape: tuple[int, ...] | None = None

    @property
    def spec(self) -> TensorSpec:
        """The tensor that this is a part of."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(start, local shape), with a whole tensor's spelt out."""
        start = (0,) * len(self.shape) if self.start is None else self.start
        return start, self.shape if self.local_shape is None else self.local_shape

    @property
    def nbytes(self) -> int:
        """Bytes of this part, contiguous."""
        return math.prod(self.box[1]) * itemsize(self.dtype)
