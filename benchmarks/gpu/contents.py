"""What the tensors of each version hold: random bytes that trainer and engines make each for themselves.

All tensors are views of one pool of random bytes, at places that depend on the version and the name. So a version takes
no memory of its own, 65 GB of them are there at once, and an engine can compare all that it was given, bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

import torch

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.demo.architecture import Architecture

_GRAIN_BYTES: Final = 512
_WORD_BYTES: Final = 8
_BLOCK_WORDS: Final = 1 << 21
_LEAST_ROOM_BYTES: Final = 1 << 20
_LARGEST: Final = 0.06
"""Weight."""
_FACTORS: Final = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
"""Odd, and without pattern: those of SplitMix64, as torch's signed integers."""


class Contents:
    """Every tensor of every version.

    Args:
        architecture: names and shapes.
        device: where the bytes are.
    """

    def __init__(self, architecture: Architecture, device: str | torch.device = "cpu") -> None:
        self.architecture = architecture
        largest = architecture.largest_nbytes
        self._pool = self._made(largest + max(largest // 4, _LEAST_ROOM_BYTES), device)

    def _made(self, nbytes: int, device: str | torch.device) -> torch.Tensor:
        return random_bytes(nbytes, device)

    def tensor(self, spec: TensorSpec, version: int) -> torch.Tensor:
        """Return a tensor of a version; a view, not to be written to."""
        places = (self._pool.numel() - spec.nbytes) // _GRAIN_BYTES
        start = random.Random(f"{version}/{spec.name}").randrange(places) * _GRAIN_BYTES
        dtype: torch.dtype = getattr(torch, spec.dtype)
        return self._pool[start : start + spec.nbytes].view(dtype).view(spec.shape)

    def version(self, version: int) -> dict[str, torch.Tensor]:
        """Return all tensors of a version by their names."""
        return {spec.name: self.tensor(spec, version) for spec in self.architecture.specs()}


class Weights(Contents):
    """As that, but such numbers as a model may consist of, in bfloat16: tokens can be made with them."""

    def _made(self, nbytes: int, device: str | torch.device) -> torch.Tensor:
        numbers = random_bytes(nbytes, device).view(torch.int16)
        for start in range(0, numbers.numel(), _BLOCK_WORDS):
            block = numbers[start : start + _BLOCK_WORDS]
            block.view(torch.bfloat16).copy_(block.to(torch.float32) * (_LARGEST / (1 << 15)))
        return numbers.view(torch.uint8)


def random_bytes(nbytes: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return ``nbytes``, rounded up to whole words, that look random; the same on every device."""
    words = torch.empty(-(-nbytes // _WORD_BYTES), dtype=torch.int64, device=device)
    for start in range(0, words.numel(), _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS]
        torch.arange(start, start + block.numel(), out=block)
        for factor in _FACTORS:
            block.add_(1).mul_(factor)
            block.bitwise_xor_(block >> 31)
    return words.view(torch.uint8)


def poison(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors with what no version holds."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0x5A)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bit by bit: what is no number equals nothing, itself included."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
