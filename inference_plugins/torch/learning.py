"""What a user attached, as a target; a function among others, with what it does to be learned or without."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import EngineError
from inference_plugins.assembly import Placement
from inference_plugins.learned import LearnedLoading, switched_on, tensors_of
from inference_plugins.torch.targets import Callback, CallbackTarget, Slicer, Target, TensorTarget

WritesTo = torch.nn.Module | Mapping[str, torch.Tensor]
"""All that a function writes to."""


class LearningTarget(CallbackTarget):
    """Calls a function for each tensor until it is known where its bytes go, and for others for good.

    Args:
        callback: the function; it keeps nothing, and writes to nothing else.
        slicer: cuts what it is given.
        writes_to: what it writes to.
        on: whether anything is to be learned.
    """

    def __init__(self, callback: Callback, slicer: Slicer, writes_to: WritesTo, *, on: bool) -> None:
        super().__init__(callback, slicer)
        self._parameters = _parameters_of(writes_to)
        self.learned = LearnedLoading(self._parameters, on=on)
        self._whole: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        """What was cut last, as long as who had it cut holds it."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Refuse what cannot be sliced."""
        super().expect(tensors)
        self.learned.expect(tensors)

    def begin(self) -> None:
        """Look the parameters up."""
        super().begin()
        self.learned.begin()

    def cut(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Cut this rank's parts; refuse what cannot be sliced."""
        self._whole = weakref.WeakValueDictionary(tensors)
        return super().cut(tensors)

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> list[Placement | None]:
        """Where those belong of which that was learned."""
        return self.learned.place(tensors, device)

    def write(self, name: str, part: torch.Tensor) -> None:
        """Call the function, and look on."""
        self._called = True
        self.learned.observe([(name, self._whole[name])], partial(self._callback, name, part))

    def missing(self) -> list[str]:
        """Tensors that did not come whose ways are known; of others the function alone knows."""
        return self.learned.missing

    def prove(self) -> None:
        """Compare what arrived."""
        self.learned.finish()

    def gpus(self) -> set[torch.device]:
        """Those of the parameters, and the thread's current one."""
        return super().gpus() | {tensor.device for tensor in self._parameters().values() if tensor.is_cuda}


def make_target(
    target: torch.nn.Module | Mapping[str, torch.Tensor] | Callback,
    slicer: Slicer,
    ignore: Collection[str],
    writes_to: WritesTo | None = None,
) -> Target:
    """Wrap what a user attached.

    Args:
        target: what is written to, or who is given tensors.
        slicer: cuts this rank's part.
        ignore: names of a version that have no place in what is written to.
        writes_to: all that a function writes to, if what it does is to be learned.

    Raises:
        EngineError: it is none of the three, or something is written to by no function.
    """
    if writes_to is not None and (isinstance(target, torch.nn.Module | Mapping) or not callable(target)):
        raise EngineError("writes_to goes with a function: what it writes to")
    if isinstance(target, torch.nn.Module):
        module = target
        return TensorTarget(lambda: module.state_dict(keep_vars=True), slicer, ignore)
    if isinstance(target, Mapping):
        mapping = target
        return TensorTarget(lambda: mapping, slicer, ignore)
    if not callable(target):
        raise EngineError(
            f"cannot attach a {type(target).__name__}; an nn.Module, a dict of tensors or a callback is needed"
        )
    if writes_to is None:
        return CallbackTarget(target, slicer)
    return LearningTarget(target, slicer, writes_to, on=switched_on())


def _parameters_of(writes_to: WritesTo) -> Callable[[], dict[str, torch.Tensor]]:
    def look_up() -> dict[str, torch.Tensor]:
        if isinstance(writes_to, torch.nn.Module):
            return tensors_of(writes_to)
        return dict(writes_to)

    return look_up
