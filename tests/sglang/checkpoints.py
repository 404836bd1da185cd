"""Models of these tests beside those of vLLM's."""

from __future__ import annotations

from typing import Any

import torch

from tests.vllm.checkpoints import mixture


@torch.no_grad()
def vary(model: torch.nn.Module) -> None:
    """Have norms be no constants, as in a trained model: of constants nobody can tell in which order they arrived."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def many() -> Any:
    """Qwen3-MoE of 1,968 tensors, of a few KiB each."""
    return mixture(layers=5, experts=128)
