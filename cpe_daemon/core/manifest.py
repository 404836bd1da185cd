"""The manifest: the immutable list of a version's tensors, and where in whose contribution each one's bytes lie.

Each trainer rank contributes an ordered list of shards. `layout` places them in the rank's extent; `merge` joins the
ranks' lists into a `Manifest`, and refuses every set that does not cover each tensor exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cpe_daemon.core.dtypes import itemsize
from cpe_daemon.core.types import Shard, TensorSpec, VersionId, align
from cpe_daemon.errors import ManifestError

MAX_DIMS: Final = 64
MAX_NAME_CHARS: Final = 1024
MAX_TENSOR_BYTES: Final = 1 << 46
"""Bounds of one tensor, refused beyond: no model has come near them, and a corrupt shape goes far past."""

DIGEST_BYTES: Final = 16
"""Size of an xxh3_128 digest."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a rank's shards lie in its extent: ``offsets`` and ``sizes`` in their order, ``nbytes`` in all; bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int


class Run(msgspec.Struct, frozen=True, gc=False):
    """A contiguous run of a tensor's bytes and where it lies: at ``offset`` in the extent of ``rank``."""

    tensor_offset: int
    nbytes: int
    rank: int
    offset: int


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor of a manifest with the runs that make it up, in order."""

    spec: TensorSpec
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A version's tensors, complete and without overlap."""

    version: VersionId
    tensors: tuple[Tensor, ...]
    nbytes: int


def layout(shards: Iterable[Shard]) -> Layout:
    """Place shards one after another, each aligned; both ends of a link compute the same.

    Raises:
        ManifestError: a shard is malformed (see `checked_nbytes`).
    """
    offsets: list[int] = []
    sizes: list[int] = []
    end = 0
    for shard in shards:
        nbytes = checked_nbytes(shard)
        offsets.append(end)
        sizes.append(nbytes)
        end = align(end + nbytes)
    return Layout(tuple(offsets), tuple(sizes), end)


def checked_nbytes(shard: Shard) -> int:
    """Return the bytes of a shard whose name, dtype, shape and box make sense.

    Raises:
        ManifestError: they do not; names the tensor and what is wrong with it.
    """
    name, shape = shard.name, shard.shape
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise ManifestError(f"tensor name of {len(name)} characters; 1 to {MAX_NAME_CHARS} are allowed")
    size = itemsize(shard.dtype)
    if shape and (len(shape) > MAX_DIMS or min(shape) < 0):
        raise ManifestError(f"tensor {name}: impossible shape {list(shape)}")
    nbytes = math.prod(shape) * size
    if nbytes > MAX_TENSOR_BYTES:
        raise ManifestError(f"tensor {name}: {list(shape)} of {shard.dtype} is over {MAX_TENSOR_BYTES} bytes")
    if shard.start is None and shard.local_shape is None:
        return nbytes
    start, local = shard.box
    inside = len(start) == len(local) == len(shape) and all(
        first >= 0 and count >= 0 and first + count <= extent
        for first, count, extent in zip(start, local, shape, strict=True)
    )
    if not inside:
        raise ManifestError(f"tensor {name}: part {list(local)} at {list(start)} lies outside {list(shape)}")
    return math.prod(local) * size


def merge(version: VersionId, contributions: Sequence[Sequence[Shard]]) -> Manifest:
    """Join the ranks' shards into one manifest.

    Args:
        version: whose manifest it is.
        contributions: by rank, the shards in the rank's own order.

    Raises:
        ManifestError: a tensor is described differently by two ranks, or is not covered exactly once.
    """
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, list[Run]] = {}
    for rank, shards in enumerate(contributions):
        plan = layout(shards)
        for shard, offset, nbytes in zip(shards, plan.offsets, plan.sizes, strict=True):
            name, spec = shard.name, shard.spec
            piece = Run(tensor_offset(shard), nbytes, rank, offset)
            if name not in specs:
                specs[name] = spec
                pieces[name] = [piece]
            elif specs[name] != spec:
                raise ManifestError(f"rank {rank} contributes {spec}, another rank {specs[name]}")
            else:
                pieces[name].append(piece)
    tensors = tuple([_whole(spec, pieces[name]) for name, spec in specs.items()])
    return Manifest(version, tensors, sum([run.nbytes for tensor in tensors for run in tensor.runs]))


def _whole(spec: TensorSpec, runs: list[Run]) -> Tensor:
    """Order a tensor's runs, and refuse a gap or an overlap."""
    if len(runs) > 1:
        runs.sort(key=lambda run: (run.tensor_offset, run.nbytes, run.rank))
    end, nbytes = 0, spec.nbytes
    for position, run in enumerate(runs):
        repeated = position > 0 and nbytes == 0
        if run.tensor_offset < end or repeated:
            ranks = sorted({run.rank for run in runs})
            raise ManifestError(f"tensor {spec.name} is contributed more than once (by ranks {ranks})")
        if run.tensor_offset > end:
            break
        end += run.nbytes
    if end != nbytes:
        raise ManifestError(f"tensor {spec.name}: no rank contributes bytes {end} onwards of {nbytes}")
    return Tensor(spec, tuple(runs))


def tensor_offset(shard: Shard) -> int:
    """Byte offset in the whole tensor at which a shard's one contiguous run begins.

    Raises:
        ManifestError: the shard's bytes are not contiguous in the whole tensor (it splits an inner dimension).
    """
    if shard.start is None and shard.local_shape is None:
        return 0
    start, local = shard.box
    whole_behind = True
    for dim in reversed(range(len(local))):
        if not whole_behind and local[dim] != 1:
            raise ManifestError(
                f"tensor {shard.name}: part {list(local)} of {list(shard.shape)} splits an inner dimension;"
                " only contiguous parts (rows of the first dimension) are supported"
            )
        whole_behind = whole_behind and local[dim] == shard.shape[dim]
    flat = 0
    for first, extent in zip(start, shard.shape, strict=True):
        flat = flat * extent + first
    return flat * itemsize(shard.dtype)
