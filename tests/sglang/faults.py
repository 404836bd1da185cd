"""An SGLang plugin of the tests: has a worker fail, or hang, where a file beside this one says so.

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
    """Wrap what the receiver's thread calls; SGLang calls this in each process."""
    from inference_plugins.sglang.loader import SglangLoader

    for step in ("begin", "place", "load", "finish"):
        setattr(SglangLoader, step, faulty(step, getattr(SglangLoader, step)))


def faulty(step: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(loader: Any, *arguments: Any) -> Any:
        if step == "place":  # tensors that are copied without the loader are loaded too
            if loader.touched:
                obey("load")
            return genuine(loader, *arguments)
        if step != "load":
            obey(step)
            return genuine(loader, *arguments)
        genuine(loader, *arguments)  # so that the weights are a mixture by now
        obey(step)
        return None

    return wrapped


def obey(step: str) -> None:
    from sglang.srt.runtime_context import get_parallel

    order = HERE / "order"
    if not order.exists():
        return
    engine, rank, at, deed = json.loads(order.read_text())
    if [engine, rank, at] != [os.environ["CPE_ENGINE"], get_parallel().tp_rank, step]:
        return
    if deed in ("fail", "fail always"):
        if deed == "fail":
            order.unlink()  # what is loaded next, to restore this engine, is loaded well
        raise RuntimeError("the test wants this")
    (HERE / "reached.new").write_text(str(os.getpid()))
    (HERE / "reached.new").rename(HERE / "reached")
    deadline = time.monotonic() + ENDLESS_SECONDS
    while order.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
