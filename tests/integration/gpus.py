"""What tests do to real GPUs, from inside of the process whose they are."""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from cpe_daemon.devices.cuda.driver import CudaError, driver

_TRAP: Final = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry fail() { trap; }
"""


def break_context(index: int) -> None:
    """Have a kernel fail on a GPU, after which this process's context there takes no calls; others' do."""
    cuda = driver()
    cuda.use(cuda.retain(cuda.devices()[index]))
    stream, event = cuda.create_stream(), cuda.create_event()
    cuda.launch(cuda.load(_TRAP, "fail"), 1, 1, (ctypes.c_void_p * 1)(), stream)
    try:
        cuda.record(event, stream)
        cuda.wait(event)
    except CudaError:
        return
    raise RuntimeError(f"GPU {index} works still")


class Hog:
    """Takes the memory of a GPU that nobody has."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._taken: torch.Tensor | None = None
        torch.zeros(1, device=device)  # the context takes some of its own

    def take_all_but(self, nbytes: int) -> None:
        """Leave ``nbytes`` to others."""
        free, _ = torch.cuda.mem_get_info(self._device)
        self._taken = torch.empty(free - nbytes, dtype=torch.uint8, device=self._device)

    def give_back(self) -> None:
        self._taken = None
        torch.cuda.empty_cache()


def main(arguments: dict[str, str]) -> None:
    """Be a hog that is told how much to take."""
    from tests.integration.console import Console

    console = Console()
    hog = Hog(arguments["device"])
    console.serve({"take_all_but": hog.take_all_but, "give_back": hog.give_back})
