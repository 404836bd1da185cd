"""Writes a random checkpoint as one finds them on the Hugging Face hub: safetensors shards, index, config.json."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.demo.architecture import Architecture

INDEX_NAME: Final = "model.safetensors.index.json"
_STD: Final = 0.02
_NORM_STD: Final = 0.1
_MOST_FILES: Final = 4


def write_config(directory: Path, architecture: Architecture) -> None:
    """Write config.json, which is all that an engine needs to build its tensors."""
    (directory / "config.json").write_text(json.dumps(architecture.config(), indent=2))


def write_weights(directory: Path, architecture: Architecture, seed: int, progress: Callable[[int, int], None]) -> int:
    """Write random weights; return how many shards they take. Draws them with as many threads as there are cores.

    Args:
        directory: where the shards and their index go.
        architecture: names and shapes.
        seed: the same seed gives the same bytes.
        progress: called with bytes done and bytes in all.
    """
    total, done = architecture.nbytes, 0
    shards = list(_shards(architecture.specs(), -(-total // _MOST_FILES)))
    weight_map: dict[str, str] = {}
    with contextlib.closing(_drawn(architecture, seed)) as drawn:
        for number, specs in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            for spec in specs:
                tensors[spec.name] = next(drawn)
                weight_map[spec.name] = file
                done += spec.nbytes
                progress(done, total)
            save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2))
    return len(shards)


def _drawn(architecture: Architecture, seed: int) -> Generator[torch.Tensor, None, None]:
    """Every tensor, in order; several are drawn at a time, each by a generator of its own."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "demo-draw") as pool:
        try:
            waiting = deque(
                pool.submit(random_weight, spec.shape, torch.Generator().manual_seed(seed + index))
                for index, spec in enumerate(architecture.specs())
            )
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A matrix as a model begins with, or a norm's weight: around one."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return tensor.normal_(1.0, _NORM_STD, generator=generator)
    return tensor.normal_(0.0, _STD, generator=generator)


def _shards(specs: Iterable[TensorSpec], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    """Fill one shard after another up to ``shard_bytes``; a larger tensor has one for itself."""
    shard: list[TensorSpec] = []
    used = 0
    for spec in specs:
        if shard and used + spec.nbytes > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(spec)
        used += spec.nbytes
    if shard:
        yield shard
