"""Sees what is done with tensors, and tells of it: every operation, and the methods by which bytes leave torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from inference_plugins.learned.aside import is_unwatched

_ESCAPES: Final = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
"""Methods that let others have the values. Who only asks for an address is found out by what changes unseen."""


class Onlooker(Protocol):
    """Who is told."""

    def done(self, operation: Any, inputs: Sequence[Any], named: Mapping[str, Any], outcome: Any) -> None:
        """An operation was done."""
        ...

    def puzzled(self, operation: Any, error: Exception) -> None:
        """`done` has raised."""
        ...

    def escaped(self, tensor: torch.Tensor, method: str) -> None:
        """Somebody has the bytes."""
        ...


@contextlib.contextmanager
def looking_on(onlooker: Onlooker) -> Iterator[None]:
    """Tell of all that this thread does in it, but for what is `unwatched`."""
    with _Above(onlooker), _Below(onlooker):
        yield


class _Below(TorchDispatchMode):
    """Sees what operations come to."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes seconds, to keep it from compiling what is here."""
        return False

    def __init__(self, onlooker: Onlooker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._onlooker = onlooker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        if is_unwatched():
            return outcome
        try:
            self._onlooker.done(func, args, kwargs or {}, outcome)
        except Exception as error:  # task boundary: a load does not fail for being watched
            self._onlooker.puzzled(func, error)
        return outcome


class _Above(TorchFunctionMode):
    """Sees the methods by which bytes leave torch."""

    def __init__(self, onlooker: Onlooker) -> None:
        super().__init__()
        self._onlooker = onlooker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ESCAPES and args and isinstance(args[0], torch.Tensor):
            self._onlooker.escaped(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among values, and in lists and dicts of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def has_tensors(value: Any) -> bool:
    """Whether there is any."""
    return next(tensors_in([value]), None) is not None


def written_by(operation: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an operation writes to."""
    for at, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = inputs[at] if at < len(inputs) else named.get(argument.name)
            yield from tensors_in([value])


def shares_memory(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether a tensor has the memory of one of others."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    storage = tensor.untyped_storage().data_ptr()
    return any(
        other.layout is torch.strided and not other.is_meta and other.untyped_storage().data_ptr() == storage
        for other in others
    )
