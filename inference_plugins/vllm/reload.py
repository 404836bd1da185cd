"""vLLM's layerwise reload of one model, made safe: what was begun can be undone, and what is missing is found.

While a module is being reloaded its parameters are on the meta device, and the tensors that its kernels use wait in the
module's reload info. vLLM puts them back when the module is complete. If an update ends before that, `undo` does: a
forward pass over meta tensors would end the engine, and vLLM would skip such a module in the next update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Final

import torch

from cpe_daemon.errors import EngineError
from inference_plugins.vllm.benches import ModelBenches
from inference_plugins.vllm.compat import Layerwise, Refilled
from inference_plugins.vllm.watch import Watch, sparing

_NAMED: Final = 10


class Reload:
    """One model's reload. Belongs to one thread at a time, while the engine does not run the model.

    Args:
        model: as vLLM runs it.
        model_config: vLLM's, of that model.
        layerwise: vLLM's functions.
        others: modules that may be in it, but are another model's, which is reloaded first: that one's tensors count.
        spared: returns the names of modules that are not reloaded in this update: others write to their parameters.
        benches: of those of these that are made over; None: there are none.
    """

    def __init__(
        self,
        model: Any,
        model_config: Any,
        layerwise: Layerwise,
        others: Set[torch.nn.Module] = frozenset(),
        spared: Callable[[], Set[str]] = frozenset,
        benches: ModelBenches | None = None,
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._layerwise = layerwise
        self._others = others
        self._spared = spared
        self._benches = benches or ModelBenches(model, layerwise)
        self._pending: list[tuple[str, torch.nn.Module, Any]] = []
        """The modules that were not complete when last looked at: their name, and their reload info."""
        self._begun = 0
        """How many modules there were to be loaded."""
        self._refilled: Refilled = []
        self._watch = Watch(layerwise.load_default)

    @property
    def modules(self) -> Set[torch.nn.Module]:
        """All that the model consists of."""
        return set(self._model.modules())

    def begin(self) -> None:
        """Take the parameters of all modules away, until they have been loaded; but of those that are on benches."""
        self._undo(self._benches.laid_out)
        self._refilled = self._layerwise.refill(self._model)
        self._layerwise.initialize(self._model)
        spared = self._spared()
        for name, module in self._model.named_modules() if spared else ():
            info = self._layerwise.info(module)
            if name in spared and info.can_load() and module not in self._benches.laid_out:
                self._layerwise.put_back(module, info)
                info.reset()
        infos = ((name, module, self._layerwise.info(module)) for name, module in self._model.named_modules())
        apart = self._others | self._benches.laid_out
        self._pending = [entry for entry in infos if entry[1] not in apart and entry[2].can_load()]
        self._begun = len(self._pending)
        theirs = {id(one) for module in self._others for one in module.parameters(recurse=False)}
        for name, parameter in self._model.named_parameters():
            module, _, last = name.rpartition(".")
            if last in self._layerwise.uncounted and id(parameter) not in theirs and module not in spared:
                self._watch.add(name, parameter)

    @property
    def idle(self) -> bool:
        """Whether nothing came for it since `begin`."""
        waiting = [info for _, _, info in self._pending if info.can_load() and not info.loaded_weights]
        return len(waiting) == self._begun and not self._watch.seen

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Give tensors to the model's loader. A module's are written to its parameters when the last of them came.

        What waits for that no longer refers to the memory of ``tensors`` when this returns: it was cloned. It is what
        came of modules whose tensors are not all in this bucket, one group of modules at the most.
        """
        with self._layerwise.any_order(), sparing(self._model, self._others):
            self._model.load_weights(tensors)
        given = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
        self._pending = [entry for entry in self._pending if entry[2].can_load()]
        for _, _, info in self._pending:
            for _, arguments in info.loaded_weights:
                for name, value in arguments.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in given:
                        arguments.arguments[name] = value.clone()

    def finish(self) -> None:
        """Complete the reload.

        Raises:
            EngineError: tensors did not come that modules need; nothing was completed.
        """
        tied = self._tied()
        if missing := [*self._incomplete(tied), *self._watch.missing]:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise EngineError(f"not all tensors came of {', '.join(missing[:_NAMED])}{more}")
        self._layerwise.finalize(self._model, self._model_config)
        for module in tied:
            self._layerwise.prepare(module)
        self._watch.clear()
        self._pending, self._refilled = [], []

    def undo(self) -> None:
        """Put the parameters of modules back that were not complete, with the values that they had.

        Modules that were complete keep what was loaded. Does nothing if nothing was begun.
        """
        self._undo(frozenset())
        self._benches.clear()

    def _undo(self, but: Set[torch.nn.Module]) -> None:
        self._watch.clear()
        undone = set[torch.nn.Module]()
        for module in self._model.modules():
            info = self._layerwise.info(module)
            if module not in self._others and module not in but and info.can_load():
                if info.kernel_tensors is not None:
                    self._layerwise.put_back(module, info)
                info.reset()
                undone.add(module)
        for module, name, empty in self._refilled:
            if module in undone:
                setattr(module, name, empty)
        self._layerwise.end(self._model)
        self._pending, self._refilled = [], []

    def _incomplete(self, tied: Sequence[torch.nn.Module]) -> Iterator[str]:
        """Modules whose tensors have not all been loaded, and what came of them.

        Attention's scales are optional, and buffers outside of checkpoints are computed. vLLM would fill other buffers
        that nothing came for with what happens to be in memory.
        """
        for name, module, info in self._pending:
            needed = self._needed(module, info)
            if info.load_numel < needed and not any(module is one for one in tied):
                yield f"{name} ({info.load_numel} of {needed} elements)"

    def _tied(self) -> list[torch.nn.Module]:
        """Modules for which nothing came, and whose parameters are others' for which all came: lm_head, as a rule.

        What vLLM makes of their weights for its kernels has to be made anew.
        """
        waiting = {module for _, module, _ in self._pending if self._layerwise.info(module).can_load()}
        loaded = set[int]()
        for module in self._model.modules():
            info = self._layerwise.info(module)
            if module not in waiting:
                loaded.update(map(id, module.parameters(recurse=False)))
            elif info.load_numel and info.load_numel >= self._needed(module, info):
                loaded.update(map(id, info.kernel_tensors[0].values()))  # only what no checkpoint has is missing
        return [
            module
            for _, module, info in self._pending
            if module in waiting
            and not info.loaded_weights
            and self._needed(module, info)
            and all(id(parameter) in loaded for parameter in info.kernel_tensors[0].values())
        ]

    def _needed(self, module: torch.nn.Module, info: Any) -> int:
        """How many elements have to come for a module that waits; 0 for one that can do without."""
        if not info.can_load() or self._layerwise.is_deferred(module) or not (info.kernel_tensors or ({},))[0]:
            return 0
        needed: int = info.load_numel_total - self._computed(module, info) - self._layerwise.padding(module)
        return needed

    def _computed(self, module: torch.nn.Module, info: Any) -> int:
        """How many of the elements that vLLM counts are not loaded from a checkpoint."""
        names = set(info.kernel_non_persistent_buffers) - self._layerwise.uncounted
        names -= {name for name, _ in info.loaded_weights}
        return sum(buffer.numel() for name, buffer in module.named_buffers(recurse=False) if name in names)
