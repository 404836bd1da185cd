"""The GPUs of a torch engine's worker: which one is its own, and when they are at rest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from typing import Final

import torch

from cpe_daemon.devices.cuda.slots import device_index, gpu_uuid
from cpe_daemon.errors import DeadlineError, EngineError, MisuseError, PeerError

_UUID: Final = "GPU-"
"""How the UUID of a GPU begins. Sets of slots on a CPU host have other names."""


def gpu_of(gpus: Collection[torch.device]) -> str:
    """The UUID of the one GPU that a target's tensors are on; "" if they are on none.

    Raises:
        MisuseError: they are on several.
    """
    if len(gpus) > 1:
        named = ", ".join(sorted(map(str, gpus)))
        raise MisuseError(
            f"the target's tensors are on {named}: attach those of each GPU as a rank of their own, or say by gpu=UUID"
            " whose slots they are to be loaded from"
        )
    return "".join(gpu_uuid(gpu.index) for gpu in gpus)


def current(gpu: str) -> contextlib.AbstractContextManager[object]:
    """Have a thread work on a GPU, whichever was its current one; does nothing for a name that is no GPU's.

    Raises:
        MisuseError: the GPU is not visible to this process.
    """
    if not gpu.startswith(_UUID):
        return contextlib.nullcontext()
    try:
        return torch.cuda.device(device_index(gpu))
    except PeerError as error:
        raise MisuseError(f"{error}; see CUDA_VISIBLE_DEVICES") from None


def come_to_rest(gpus: Collection[torch.device], seconds: float) -> None:
    """Wait until everything that was issued on these GPUs has run: a forward pass returns long before it has.

    CUDA waits without a deadline, so it does so in a thread of its own, which is left behind where a GPU hangs.

    Raises:
        DeadlineError: they were still busy after ``seconds``.
        EngineError: one of them has failed.
    """
    if not gpus:
        return
    failures: list[RuntimeError] = []

    def synchronize() -> None:
        try:
            for gpu in gpus:
                torch.cuda.synchronize(gpu)
        except RuntimeError as error:
            failures.append(error)

    waiting = threading.Thread(target=synchronize, name="cpe-rest", daemon=True)
    waiting.start()
    waiting.join(max(seconds, 0.0))
    named = ", ".join(sorted(map(str, gpus)))
    if waiting.is_alive():
        raise DeadlineError(f"{named} was still busy after {seconds:.1f} s with what the engine had issued")
    if failures:
        raise EngineError(f"{named} failed: {failures[0]}")
