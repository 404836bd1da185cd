"""A version as a daemon has it: tensors cut into buckets, with the fold and the digest that workers are told."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from xxhash import xxh3_128_digest

from cpe_daemon.core.buckets import cut
from cpe_daemon.core.groups import group_numbers
from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.types import Shard, TensorSpec, VersionId, align
from cpe_daemon.wire.messages import TensorPart
from inference_plugins.fold import Folder

GARBAGE: Final = 0xA5
"""What slots are filled with once they are the daemon's again."""


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A tensor without its bytes."""
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: uint8 ``[nbytes]``, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class Version:
    """Tensors under a number, cut for slots of one size.

    Args:
        number: its number.
        tensors: by name, in the order of the manifest; copied.
        slot_bytes: a multiple of 256.
    """

    def __init__(self, number: int, tensors: Mapping[str, torch.Tensor], slot_bytes: int) -> None:
        self.id = VersionId("conformance", "run", number)
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self.specs = [spec_of(name, tensor) for name, tensor in self.tensors.items()]
        self.nbytes = sum(spec.nbytes for spec in self.specs)
        self._bytes = {name: bytes_of(tensor) for name, tensor in self.tensors.items()}
        self.buckets = [
            [self._part(part.tensor, part.tensor_offset, part.nbytes, part.slot_offset) for part in filling.parts]
            for filling in cut(self.specs, slot_bytes).fillings
        ]
        self.fold = self._fold(slot_bytes)
        shards = [Shard(spec.name, spec.dtype, spec.shape) for spec in self.specs]
        self.digest = content_digest([shards], [[_digest(self._bytes[spec.name]) for spec in self.specs]])

    def __str__(self) -> str:
        return f"version {self.id.number}"

    def fill(self, bucket: int, slot: torch.Tensor) -> None:
        """Put a bucket's bytes into a slot, uint8 ``[slot_bytes]``."""
        for part in self.buckets[bucket]:
            content = self._bytes[part.name].narrow(0, part.tensor_offset, part.nbytes)
            slot.narrow(0, part.slot_offset, part.nbytes).copy_(content)

    def _part(self, tensor: int, tensor_offset: int, nbytes: int, slot_offset: int) -> TensorPart:
        spec = self.specs[tensor]
        return TensorPart(spec.name, spec.dtype, spec.shape, tensor_offset, nbytes, slot_offset)

    def _fold(self, slot_bytes: int) -> int:
        folder, slot = Folder(), torch.empty(slot_bytes, dtype=torch.uint8)
        for seq, parts in enumerate(self.buckets):
            self.fill(seq, slot)
            folder.add(seq, parts, slot)
        return folder.result()


def _digest(content: torch.Tensor) -> bytes:
    return xxh3_128_digest(ctypes.string_at(content.data_ptr(), content.numel()))


def slots_for_all(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a slot that holds a whole version."""
    return max(256, sum(align(spec.nbytes) for spec in specs))


def slots_for_a_group(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a slot that holds the largest module group, and no more: none is parted."""
    groups: dict[int, int] = {}
    for spec, group in zip(specs, group_numbers([spec.name for spec in specs]), strict=True):
        groups[group] = groups.get(group, 0) + align(spec.nbytes)
    return max(256, *groups.values())


def slots_for_a_part(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a slot that holds a third of the largest tensor."""
    return max(256, align(max(spec.nbytes for spec in specs) // 3))


def reordered(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The same tensors in another order."""
    return {name: tensors[name] for name in names}
