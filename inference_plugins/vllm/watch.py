"""Parameters that vLLM's layerwise reload writes at once and does not count: were they loaded?

A router's ``e_score_correction_bias`` is one. A version that lacks it would leave another's in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch


class Watch:
    """Notes which of some parameters a model's loader writes to.

    Args:
        load_default: writes a tensor to a parameter that has no loader of its own.
    """

    def __init__(self, load_default: Callable[..., Any]) -> None:
        self._load_default = load_default
        self._stack = contextlib.ExitStack()
        self._watched: list[str] = []
        self.seen: set[str] = set()
        """The names of those that were loaded."""

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Watch one until `clear`."""
        genuine = getattr(parameter, "weight_loader", self._load_default)

        def noting(*arguments: Any, **named: Any) -> Any:
            self.seen.add(name)
            return genuine(*arguments, **named)

        self._watched.append(name)
        self._stack.enter_context(loading_by(parameter, noting))

    @property
    def missing(self) -> list[str]:
        """Those that were not loaded."""
        return [name for name in self._watched if name not in self.seen]

    def clear(self) -> None:
        """Watch none any more."""
        self._stack.close()
        self._watched.clear()
        self.seen.clear()


@contextlib.contextmanager
def sparing(model: torch.nn.Module, others: Set[torch.nn.Module]) -> Iterator[None]:
    """Have a model's loader leave some modules alone, as far as they are in it."""
    with contextlib.ExitStack() as stack:
        for module in model.modules() if others else ():
            if module in others:
                for parameter in module.parameters(recurse=False):
                    stack.enter_context(loading_by(parameter, _ignore))
        yield


def _ignore(*arguments: Any, **named: Any) -> bool:
    """Say that nothing was loaded: loaders of experts try the next place then."""
    return False


@contextlib.contextmanager
def loading_by(parameter: Any, loader: Callable[..., Any]) -> Iterator[None]:
    """Give a parameter another loader for a while."""
    genuine = getattr(parameter, "weight_loader", None)
    parameter.weight_loader = loader
    try:
        yield
    finally:
        if genuine is None:
            del parameter.weight_loader
        else:
            parameter.weight_loader = genuine
