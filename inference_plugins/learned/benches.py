"""Benches: where an engine puts the bytes of a module that it then makes other tensors of, as for its kernels.

vLLM packs or quantises modules so, after each loading. The copies to a bench are learned as others are; what is made of
it then is the engine's own work, each time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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


class Benched:
    """The modules whose tensors are copied to benches: which of these there are in this round, and what is to come.

    Args:
        benches: the engine's.
    """

    def __init__(self, benches: Benches) -> None:
        self._benches = benches
        self._forms: Mapping[str, Mapping[str, Form]] = {}
        self._modules: dict[str, list[str]] = {}
        self._counts: Mapping[str, int] = {}
        self._begun: list[str] = []
        """Tensors that began to come since modules were last made over."""
        self._missing = dict[str, int]()
        """By module that has a bench: how many tensors are still to come."""
        self._laid_out: dict[str, int] = {}
        """By parameter that is on a bench: its address."""

    def learn(self, forms: Mapping[str, Mapping[str, Form]], modules: Mapping[str, Iterable[str]]) -> None:
        """Take what was learned.

        Args:
            forms: by module that has a bench, those of that bench's tensors.
            modules: by tensor, all modules that it goes to.
        """
        self._forms = forms
        found = {tensor: [module for module in its if module in forms] for tensor, its in modules.items()}
        self._modules = {tensor: its for tensor, its in found.items() if its}
        self._counts = Counter(module for its in self._modules.values() for module in its)

    def begin(self) -> None:
        """A round begins; whatever benches there were are gone."""
        self._begun.clear()
        self._missing.clear()
        self._laid_out.clear()

    def __contains__(self, tensor: object) -> bool:
        """Whether a module that a tensor goes to is made over."""
        return tensor in self._modules

    def expect(self, tensor: str) -> Mapping[str, int]:
        """A tensor begins to come, for the first time in this round.

        Returns:
            Where parameters are that are on benches, among them those that it goes to.

        Raises:
            EngineError: a bench has another form than it had; all has to be learned anew.
        """
        for module in self._modules[tensor]:
            if module not in self._missing:
                self._lay_out(module)
        self._begun.append(tensor)
        return self._laid_out

    def _lay_out(self, module: str) -> None:
        bench = self._benches.lay_out(module)
        if {name: form_of(made) for name, made in bench.items()} != self._forms[module]:
            raise EngineError(f"what is made over for {module} has another form than it had")
        self._missing[module] = self._counts[module]
        self._laid_out |= {name: made.data_ptr() for name, made in bench.items()}

    def make_over(self) -> None:
        """Make over what is whole, for all of what began to come has come; copies to GPUs were issued at least."""
        begun, self._begun = self._begun, []
        for tensor in begun:
            for module in self._modules[tensor]:
                self._missing[module] -= 1
                if not self._missing[module]:
                    self._benches.make_over(module)
                    del self._missing[module]
                    for name in self._forms[module]:
                        del self._laid_out[name]
