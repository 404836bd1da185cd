"""What `benchmarks.vllm_pause` puts into a vLLM server: a clock around its pauses, and the floor, measured in a worker.

It is copied to where the server finds it, as a plugin of vLLM's and as a middleware of its API.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def register() -> None:
    """Add a method to workers, which `/collective_rpc` calls."""
    from vllm.v1.worker.gpu_worker import Worker

    Worker.cpe_floor = floor


def floor(worker: Any, path: str, runs: int) -> list[float]:
    """Reload a worker's model from tensors in memory; nothing is fetched, paused or asked for.

    Args:
        worker: vLLM's.
        path: of a file of safetensors: what the engine holds.
        runs: how often.

    Returns:
        The seconds of each.
    """
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = worker.model_runner.get_model(), worker.model_runner.model_config
    tensors = list(load_file(path).items())
    seconds = []
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        for _ in range(runs):
            began = time.perf_counter()
            initialize_layerwise_reload(model)
            model.load_weights(tensors)
            finalize_layerwise_reload(model, config)
            seconds.append(time.perf_counter() - began)
    return seconds


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
