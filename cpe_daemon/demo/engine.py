"""One tensor-parallel rank of the demo's engine, as a process: ``python -m cpe_daemon.demo.engine``.

It holds its slices of a model, serves (a stand-in for a forward pass, over and over) and answers questions: a line of
JSON on standard input, a line on standard output. It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cpe_daemon.demo.architecture import Architecture, read_config, shared_dimension
from cpe_daemon.demo.checkpoint import random_weight
from cpe_daemon.demo.digests import digests_of
from cpe_daemon.errors import DeadlineError
from inference_plugins.torch import Attachment, attach

log: Final = logging.getLogger(__name__)

ENGINE: Final = "demo"
CONNECT_SECONDS: Final = 120.0
READY_SECONDS: Final = 60.0
_IDLE_SECONDS: Final = 0.01
_PASS_SECONDS: Final = 30.0
_POOL: Final = 1 << 22


class Serving:
    """Runs a forward pass after another in a thread, and notes the longest time between two.

    Args:
        tensors: the rank's weights.
        attachment: whose lock each pass holds.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], attachment: Attachment) -> None:
        self._tensors = tensors
        self._attachment = attachment
        self._passed = threading.Condition()
        self._passes = 0
        self._longest = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serving")

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def take(self) -> tuple[int, float]:
        """Await the end of a pass; return passes so far and the longest time between two since the last call.

        Raises:
            DeadlineError: none ended, so that the engine does not serve.
        """
        with self._passed:
            before = self._passes
            if not self._passed.wait_for(lambda: self._passes > before, _PASS_SECONDS):
                raise DeadlineError(f"no forward pass for {_PASS_SECONDS:g} s: {self._attachment.lock.shut_because}")
            longest, self._longest = self._longest, 0.0
            return self._passes, longest

    @torch.inference_mode()
    def _run(self) -> None:
        ended = time.monotonic()
        while not self._stopped.is_set():
            with self._attachment.lock:
                began = time.monotonic()
                self._pass()
                with self._passed:
                    self._longest = max(self._longest, began - ended)
                    self._passes += 1
                    self._passed.notify_all()
                ended = time.monotonic()
            self._stopped.wait(_IDLE_SECONDS)

    def _pass(self) -> None:
        """One token through the first layer's mlp, as far as this rank's slices go."""
        weight = self._tensors
        embedding = weight["model.embed_tokens.weight"]
        hidden = embedding[self._passes % len(embedding)] * weight["model.layers.0.input_layernorm.weight"]
        gate = torch.nn.functional.silu(weight["model.layers.0.mlp.gate_proj.weight"] @ hidden)
        up = weight["model.layers.0.mlp.up_proj.weight"] @ hidden
        output = weight["model.layers.0.mlp.down_proj.weight"] @ (gate * up)
        if not math.isfinite(float(output.sum())):
            log.warning("a forward pass gave no number")


def local_tensors(architecture: Architecture, world_size: int, seed: int) -> dict[str, torch.Tensor]:
    """This rank's slices of a model, with weights that no version has."""
    generator = torch.Generator().manual_seed(seed)
    pool = random_weight((_POOL, 1), generator).view(-1)
    tensors: dict[str, torch.Tensor] = {}
    for spec in architecture.specs():
        tensor = torch.empty(architecture.local_shape(spec, world_size), dtype=torch.bfloat16)
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _POOL):
            part = flat[start : start + _POOL]
            part.copy_(pool[: part.numel()])
        tensors[spec.name] = tensor
    return tensors


def answer(
    question: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    attachment: Attachment,
    serving: Serving,
    *,
    sabotage: bool,
) -> dict[str, Any]:
    """Answer one question: ``gap``, the passes so far and the longest time between two, or ``digests``."""
    if question.get("ask") == "gap":
        passes, seconds = serving.take()
        return {"passes": passes, "longest_gap_seconds": seconds}
    with attachment.lock:
        if sabotage:
            next(iter(tensors.values())).view(torch.uint8).view(-1)[0] ^= 1
        version = attachment.version
        digests = digests_of(tensors.items())
    return {"version": version.number if version else None, "digests": digests}


def main() -> None:
    """Run one rank until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory with the model's config.json")
    parser.add_argument("--socket", required=True, help="the daemon's socket for engines")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--sabotage", action="store_true", help="flip a bit of a weight before each comparison")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(1)  # several ranks and the daemon share the cores
    tensors = local_tensors(read_config(asked.checkpoint), asked.world_size, seed=1000 + asked.rank)
    with (
        attach(
            tensors,
            engine=ENGINE,
            rank=asked.rank,
            world_size=asked.world_size,
            socket=asked.socket,
            slicing=shared_dimension,
            connect_timeout=CONNECT_SECONDS,
        ) as attachment,
        Serving(tensors, attachment) as serving,
    ):
        attachment.ready(READY_SECONDS)
        _say({"ready": True})
        for line in sys.stdin:
            _say(answer(json.loads(line), tensors, attachment, serving, sabotage=asked.sabotage))


def _say(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
