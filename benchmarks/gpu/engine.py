"""One engine worker, as ``python -m benchmarks.gpu.engine``: it holds its rank's tensors, and answers for them.

A line of JSON for each on its standard input: after ``poison`` nothing of a version is left in its tensors; ``check``
compares every one with what the version that it claims to hold must be, and says what differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks.gpu.contents import Contents, poison, same
from benchmarks.models import MODELS
from cpe_daemon.demo.architecture import Architecture, shared_dimension
from cpe_daemon.demo.trainer import slice_of
from inference_plugins.torch import Attachment, attach

_CONNECT_SECONDS: Final = 300.0
_LOCK_SECONDS: Final = 120.0
_NAMED: Final = 3


class Rank:
    """One rank's tensors on one device, and what they must be.

    Args:
        architecture: names and shapes.
        rank: this worker's.
        world_size: how many share the model.
        device: where the tensors are.
    """

    def __init__(self, architecture: Architecture, rank: int, world_size: int, device: torch.device) -> None:
        self.tensors = {
            spec.name: torch.empty(architecture.local_shape(spec, world_size), dtype=torch.bfloat16, device=device)
            for spec in architecture.specs()
        }
        self._contents = Contents(architecture, device)
        self._rank, self._world_size = rank, world_size
        self._on_gpu = device.type == "cuda"
        self.poison()

    @property
    def extra_bytes(self) -> int:
        """GPU memory that was taken beside the tensors since the last `poison`, at most at once."""
        return torch.cuda.max_memory_allocated() - self._own_bytes if self._on_gpu else 0

    def poison(self) -> None:
        """Overwrite all tensors."""
        poison(self.tensors.values())
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._own_bytes = torch.cuda.memory_allocated()

    def tidy(self) -> None:
        """Give back what comparing took: others may count the GPU's memory."""
        if self._on_gpu:
            torch.cuda.empty_cache()

    def wrong(self, version: int) -> list[str]:
        """Names of the tensors that are not what a version must be here."""
        return [
            name
            for name, whole in self._contents.version(version).items()
            if not same(self.tensors[name], slice_of(name, whole, self._rank, self._world_size))
        ]


def answer(question: Mapping[str, Any], rank: Rank, attachment: Attachment) -> dict[str, Any]:
    """Answer one question, while no update can be going on."""
    with attachment.lock:
        if question["ask"] == "poison":
            rank.poison()
            return {}
        extra_bytes, held = rank.extra_bytes, attachment.version
        wrong = rank.wrong(held.number) if held is not None else []
        rank.tidy()
        return {
            "version": held.number if held is not None else None,
            "wrong": len(wrong),
            "named": wrong[:_NAMED],
            "extra_bytes": extra_bytes,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Attach, and answer until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--socket", required=True, help="the daemon's socket for engines")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--gpu", required=True, help="UUID, or the name of a set of slots on a CPU host")
    asked = parser.parse_args(arguments)
    rank = Rank(MODELS[asked.model], asked.rank, asked.world_size, device_of(asked.gpu))
    with attach(
        rank.tensors,
        engine=asked.engine,
        rank=asked.rank,
        world_size=asked.world_size,
        socket=asked.socket,
        slicing=shared_dimension,
        gpu=asked.gpu,
        connect_timeout=_CONNECT_SECONDS,
        lock_timeout=_LOCK_SECONDS,
    ) as attachment:
        # Not earlier: what a sibling answers before it gets the live version again, and this rank only after that,
        # would be a forward pass that one has begun and the other has not; the next pause would wait for it.
        attachment.ready(timeout=_LOCK_SECONDS)
        say({"ready": True})
        for line in sys.stdin:
            say(answer(json.loads(line), rank, attachment))


def device_of(gpu: str) -> torch.device:
    """This process's device for a GPU, made the current one; the CPU for a set of slots of a CPU host."""
    if not gpu.startswith("GPU-"):
        torch.set_num_threads(1)
        return torch.device("cpu")
    here = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
    torch.cuda.set_device(here.index(gpu))
    return torch.device("cuda", here.index(gpu))


def say(line: Mapping[str, object]) -> None:
    """Answer by a line of JSON."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
