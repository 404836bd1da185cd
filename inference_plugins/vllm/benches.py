"""What vLLM's layerwise reload loads a module to, before it packs or quantises that for the module's kernels.

In the reload a module's parameters have the form of checkpoints', and memory of their own; what vLLM makes of them is
copied to the tensors that the kernels use. Here that is done module by module, with nothing left to be loaded: the
bytes are there already. Until a module is made over its kernels' tensors wait in its reload info, as they do in any
reload, and `Reload.undo` puts them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch

from inference_plugins.learned.benches import Shown
from inference_plugins.vllm.compat import Layerwise, Process


class ModelBenches:
    """One model's benches (see `inference_plugins.learned.benches.Benches`).

    Args:
        model: as vLLM runs it.
        layerwise: vLLM's functions.
    """

    def __init__(self, model: torch.nn.Module, layerwise: Layerwise) -> None:
        self._layerwise = layerwise
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._laid_out = set[torch.nn.Module]()

    @property
    def laid_out(self) -> Set[torch.nn.Module]:
        """The modules whose parameters are on benches."""
        return self._laid_out

    def clear(self) -> None:
        """The kernels' tensors of all of them have been put back."""
        self._laid_out.clear()

    def showing(self, shown: Shown) -> contextlib.AbstractContextManager[object]:
        """In it, each module that vLLM processes is shown so, before and while it does."""
        return self._layerwise.processing_by(self._shown_by(shown))

    def lay_out(self, module: str) -> Mapping[str, torch.Tensor]:
        """Take a module's parameters away, and give it such as loaders write to."""
        layer = self._modules[module]
        self._laid_out.add(layer)
        self._layerwise.initialize(_Alone(layer))
        return self._materialize(layer, self._layerwise.info(layer))

    def make_over(self, module: str) -> None:
        """Have vLLM process what is in them, and copy it to the tensors of the module's kernels, which are put back."""
        layer = self._modules[module]
        self._layerwise.process(layer, self._layerwise.info(layer))
        self._laid_out.discard(layer)

    def _materialize(self, layer: torch.nn.Module, info: Any) -> dict[str, torch.Tensor]:
        """Give a module's parameters memory; returns those that got some, but for what kernels never see of it."""
        empty = [name for name, tensor in _tensors(layer) if tensor.is_meta]
        self._layerwise.materialize(layer, info)
        prefix = f"{name}." if (name := self._names[layer]) else ""
        computed = info.kernel_non_persistent_buffers
        return {prefix + name: tensor for name, tensor in _tensors(layer) if name in empty and name not in computed}

    def _shown_by(self, shown: Shown) -> Process:
        def process(layer: torch.nn.Module, info: Any) -> None:
            processor = self._layerwise.processor(layer)
            loaded = {name for name, _ in info.loaded_weights}
            if processor is None or layer not in self._names or loaded & set(info.kernel_non_persistent_buffers):
                self._layerwise.process(layer, info)
                return
            bench = self._materialize(layer, info)
            with shown(self._names[layer]) as filled, _before(processor, lambda: filled(bench)):
                self._layerwise.process(layer, info)

        return process


class _Alone(torch.nn.Module):
    """A model that is one module of another one's, without what is in that."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._layer = [layer]

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:
        """That one."""
        return iter(self._layer)


@contextlib.contextmanager
def _before(processor: Any, work: Callable[[], None]) -> Iterator[None]:
    """Have ``work`` done before anything is processed."""
    own, process = vars(processor).get("process_weights_after_loading"), processor.process_weights_after_loading

    def both(layer: Any) -> None:
        work()
        process(layer)

    processor.process_weights_after_loading = both
    try:
        yield
    finally:
        if own is None:
            del processor.process_weights_after_loading
        else:
            processor.process_weights_after_loading = own


def _tensors(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
