"""Puts the plugin of tiny_plugin.py to the test: python examples/tiny_conformance.py."""

from __future__ import annotations

import torch
from tiny_plugin import TinyEngine, TinyWorker

from inference_plugins.testing import Plugin, check


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a version: the same names, dtypes and shapes for every seed, and other values."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(held.shape, generator=generator) for name, held in TinyEngine().weights.items()}


PLUGIN = Plugin(
    make=lambda endpoint: TinyWorker(TinyEngine(), endpoint),
    close=lambda worker: worker.close(),
    weights=lambda worker: worker.engine.weights,
    serving=lambda worker: worker.loader.serving,
    checkpoint=checkpoint,
    forward=lambda worker: worker.engine.lock,
)

if __name__ == "__main__":
    for scenario, skipped in check(PLUGIN).items():
        print(f"{scenario:30}", f"does not apply: {skipped}" if skipped else "passed")
