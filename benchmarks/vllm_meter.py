"""What benchmarks put into a vLLM server, as a plugin of vLLM's and as a middleware of its API.

A clock around its pauses; and in its workers vLLM's own reload of the model, and a digest of what the model is then.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def register() -> None:
    """Add methods to workers, which `/collective_rpc` calls."""
    from vllm.v1.worker.gpu_worker import Worker

    Worker.cpe_floor, Worker.cpe_load, Worker.cpe_digest = floor, load, digest


def floor(worker: Any, path: str, runs: int) -> list[float]:
    """Reload a worker's model from tensors in memory; nothing is fetched, paused or asked for.

    Args:
        worker: vLLM's.
        path: of a file of safetensors: what the engine holds.
        runs: how often.

    Returns:
        The seconds of each.
    """
    from safetensors.torch import load_file

    tensors = list(load_file(path).items())
    return [_reload(worker, tensors) for _ in range(runs)]


def load(worker: Any, model: str, version: int) -> float:
    """Reload a worker's model from a version's tensors (`benchmarks.gpu.contents`) on its device; return the seconds.

    Args:
        worker: vLLM's.
        model: one of `benchmarks.models`.
        version: which contents.
    """
    from benchmarks.gpu.contents import Weights
    from benchmarks.models import MODELS

    made = Weights(MODELS[model], worker.device)
    seconds = _reload(worker, list(made.version(version).items()))
    del made
    return seconds


def digest(worker: Any) -> str:
    """Digest all parameters and buffers of a worker's model."""
    import torch

    from inference_plugins.learned.proof import Witness, look_at

    model, witness, made = worker.model_runner.get_model(), Witness(), hashlib.blake2b(digest_size=8)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        memory = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        made.update(repr((name, [int(seen) for seen in look_at(witness, memory, 0, memory.numel())])).encode())
    return made.hexdigest()


def _reload(worker: Any, tensors: list[tuple[str, Any]]) -> float:
    """Have vLLM reload a worker's model, from start to finish; return the seconds."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = worker.model_runner.get_model(), worker.model_runner.model_config
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        began = time.perf_counter()
        initialize_layerwise_reload(model)
        model.load_weights(tensors)
        finalize_layerwise_reload(model, config)
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        return time.perf_counter() - began


class Clock:
    """A middleware that notes, as lines of JSON, how long it was from the reply to a pause to the call to resume."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._paused = 0.0
        self._file = Path(os.environ["CPE_METER"])

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Pass a request on."""
        route = scope["path"].rpartition("/")[2] if scope["type"] == "http" else ""
        if route == "resume" and self._paused:
            with self._file.open("a") as file:
                file.write(json.dumps(time.perf_counter() - self._paused) + "\n")
            self._paused = 0.0

        async def sent(message: Any) -> None:
            await send(message)
            if route == "pause" and message["type"] == "http.response.body":
                self._paused = time.perf_counter()

        await self._app(scope, receive, sent)
