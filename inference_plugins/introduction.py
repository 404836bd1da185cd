"""How a worker of an engine that is a server introduces itself."""

from __future__ import annotations

import os
import socket
import uuid

import torch

from cpe_daemon.devices.cuda.slots import gpu_uuid
from cpe_daemon.wire.messages import PROTOCOL, WorkerHello
from inference_plugins.settings import WorkerSettings


def introduce(
    settings: WorkerSettings, kind: str, engine: str, rank: int, world_size: int, device: torch.device, url: str = ""
) -> WorkerHello:
    """Make the hello of one worker.

    Args:
        settings: whose engine, model and url count before all else.
        kind: of engine.
        engine: its name, if the settings have none.
        rank: of the worker; the first one speaks for the engine.
        world_size: how many workers the engine has.
        device: where its weights are.
        url: of the engine's API, if the settings have none.

    Raises:
        ResourceError: it is on a GPU, and there is no NVIDIA driver here.
    """
    gpu = ""
    if device.type == "cuda":
        index: int | None = device.index
        gpu = gpu_uuid(torch.cuda.current_device() if index is None else index)
    return WorkerHello(
        protocol=PROTOCOL,
        engine=settings.engine or engine,
        kind=kind,
        rank=rank,
        world_size=world_size,
        incarnation=uuid.uuid4().hex,
        model=settings.model,
        node=socket.gethostname(),
        gpu=gpu,
        leader=rank == 0,
        pid=os.getpid(),
        url=settings.url or url,
    )
