"""Benches: where an engine puts the bytes of a module that it then makes other tensors of, as for its kernels.

vLLM packs or quantises modules so, after each loading. The copies to a bench are learned as others are; what is made of
it then is the engine's own work, each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from cpe_daemon.errors import EngineError


def module_of(parameter: str) -> str:
    """The module that a parameter is of, by its name."""
    return parameter.rpartition(".")[0]


class Form(NamedTuple):
    """What has to stay for a place in a bench's tensor to stay good, whose memory is another one each time."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def form_of(tensor: torch.Tensor) -> Form:
    """A tensor's."""
    return Form(tensor.device, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


Filled = Callable[[Mapping[str, torch.Tensor]], None]
"""Is told of a module's bench when all was loaded to it, and nothing made of it yet: by parameters' names."""

Shown = Callable[[str], contextlib.AbstractContextManager[Filled]]
"""In what this returns, the module of that name is made over."""


class Benches(Protocol):
    """An engine's. Used in the receiver's thread, and on torch's current stream."""

    def showing(self, shown: Shown) -> contextlib.AbstractContextManager[object]:
        """In it, each module that the engine itself makes over is shown so."""
        ...

    def lay_out(self, module: str) -> Mapping[str, torch.Tensor]:
        """Make a module's bench: memory for its tensors, as loaders write them, by the parameters' names.

        It stays until the module is made over, or the update given up.
        """
        ...

    def make_over(self, module: str) -> None:
        """All bytes have come to a module's bench: make of it what the engine makes of it, and let it go."""
        ...


class NoBenches:
    """Of an engine that makes nothing over, or does not say so."""

    def showing(self, shown: Shown) -> contextlib.AbstractContextManager[object]:
        """Nothing is shown."""
        return contextlib.nullcontext()

    def lay_out(self, module: str) -> Mapping[str, torch.Tensor]:
        """There is none."""
        raise EngineError(f"{module} has no bench")

    def make_over(self, module: str) -> None:
        """There is none."""
        raise EngineError(f"{module} has no bench")
