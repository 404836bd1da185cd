"""Forward passes in which the workers of an engine compute something together, as tensor-parallel ranks do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from inference_plugins.torch import Attachment

_SECONDS = 30


class Collective:
    """Serves in a thread of its own, pass after pass; each ends when all workers have added their parts.

    Args:
        attachment: whose lock is held for each pass.
        held: the weights; whole, so that all workers have to hold the same.
    """

    def __init__(self, attachment: Attachment, held: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._attachment = attachment
        self._held = held
        self._stopping = False
        self._passes = 0
        self._torn = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, path: str, rank: int, world_size: int) -> None:
        """Meet the other workers at a file, and begin."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{path}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_SECONDS),
        )
        self._thread.start()

    def served(self) -> dict[str, Any]:
        """How many passes there were, how many had different weights in them, and what ended them."""
        return {"passes": self._passes, "torn": self._torn, "error": self._error}

    def stop(self) -> dict[str, Any]:
        """Have all workers end after the same pass; `served`."""
        self._stopping = True
        self._thread.join(_SECONDS)
        return self.served()

    def _run(self) -> None:
        try:
            while self._pass():
                self._passes += 1
        except Exception as error:  # noqa: BLE001 - the test shall see whatever it was
            self._error = f"{type(error).__name__}: {error}"

    def _pass(self) -> bool:
        with self._attachment.lock:
            weights = sum(int(tensor.view(torch.uint8).sum()) for tensor in self._held().values())
            together = torch.tensor([weights, int(self._stopping)], dtype=torch.int64)
            torch.distributed.all_reduce(together)
            self._torn += int(together[0]) != torch.distributed.get_world_size() * weights
            return not int(together[1])
