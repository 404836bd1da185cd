"""A vLLM plugin of the tests: has a worker fail, or hang, where a file beside this one says so.

It is copied to where servers find it, and never part of what is installed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENDLESS_SECONDS = 60.0


def register() -> None:
    """Wrap what the receiver's thread calls; vLLM calls this in each process, once or more."""
    from inference_plugins.vllm.loader import VllmLoader

    if hasattr(VllmLoader, "faults"):
        return
    vars_of: Any = VllmLoader
    vars_of.faults = True
    for step in ("begin", "load", "make_over", "finish"):
        setattr(VllmLoader, step, faulty(step, getattr(VllmLoader, step)))


def faulty(step: str, genuine: Callable[..., None]) -> Callable[..., None]:
    def wrapped(loader: Any, *arguments: Any) -> None:
        if step == "load":
            tensors = arguments[0]
            for number, (name, _) in enumerate(tensors, 1):
                if ordered(f"after {name}"):
                    genuine(loader, tensors[:number])
                    obey(f"after {name}")
            genuine(loader, tensors)  # so that the weights are a mixture by now
        obey(step)
        if step != "load":
            genuine(loader, *arguments)

    return wrapped


def ordered(step: str) -> str:
    """What this worker is to do there; "" for nothing. Another may take the order back meanwhile."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    try:
        engine, rank, at, deed = json.loads((HERE / "order").read_text())
    except FileNotFoundError:
        return ""
    here = [os.environ["CPE_ENGINE"], get_tensor_model_parallel_rank(), step]
    return str(deed) if [engine, rank, at] == here else ""


def obey(step: str) -> None:
    """Fail, or hang, if this worker is to do so there: at a step, or ``after`` a tensor."""
    deed, order = ordered(step), HERE / "order"
    if not deed:
        return
    if deed == "fail":
        order.unlink()  # what is loaded next, to restore this engine, is loaded well
        raise RuntimeError("the test wants this")
    (HERE / "reached.new").write_text(str(os.getpid()))
    (HERE / "reached.new").rename(HERE / "reached")
    deadline = time.monotonic() + ENDLESS_SECONDS
    while order.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
