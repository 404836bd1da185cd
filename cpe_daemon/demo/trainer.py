"""The demo's trainer: holds a model's weights in memory, and changes them as an optimizer would."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from cpe_daemon.demo.architecture import shared_dimension
from cpe_daemon.demo.digests import digest_of

LEARNING_RATE: Final = 1e-5
"""AdamW moves every weight by about so much a step, early in a fine-tuning."""

_DIRECTIONS: Final = 1 << 18


class Trainer:
    """Weights, full and unsharded, in host memory; none before `load`.

    Args:
        seed: of the steps' directions.
    """

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def load(self, checkpoint: Path) -> None:
        """Begin from a checkpoint: read into memory of this process's own, independent of what publishes it."""
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight up or down by the learning rate, rounded to what bfloat16 can hold.

        As in a real run, that rounding leaves large weights as they were, and all of most norms.
        The directions repeat, for nobody learns anything here: drawing a new one for each weight takes seconds.
        """
        signs = torch.randint(0, 2, (_DIRECTIONS,), generator=self._generator)
        update = ((2 * signs - 1) * LEARNING_RATE).to(torch.bfloat16)
        for tensor in self.tensors.values():
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), _DIRECTIONS):
                part = flat[start : start + _DIRECTIONS]
                part.add_(update[: part.numel()])

    def digests(self, world_size: int) -> list[dict[str, str]]:
        """By rank, the digest of each tensor's slice that an engine of ``world_size`` ranks has to hold."""
        return [
            {name: digest_of(slice_of(name, tensor, rank, world_size)) for name, tensor in self.tensors.items()}
            for rank in range(world_size)
        ]


def slice_of(name: str, tensor: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """A rank's part of a full tensor."""
    dim = shared_dimension(name)
    return tensor if dim is None else tensor.chunk(world_size, dim)[rank]
