"""A stand-in for vLLM's layerwise reload, and a small model as vLLM has them: one fused module, one deferred."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inference_plugins.vllm.compat import Layerwise, Process

HIDDEN = 4
PADDING = 2 * HIDDEN
"""Elements that an `Embedding` has beside those of a checkpoint."""
SHARDS = ("q", "k", "v")
UNCOUNTED = frozenset({"bias"})
"""Parameters that a loader writes to at once."""


class Info:
    """As vLLM's LayerReloadingInfo."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.kernel_non_persistent_buffers: set[str] = set()
        self.load_numel = 0
        self.load_numel_total: int | None = None
        self.loaded_weights: list[tuple[str, inspect.BoundArguments]] = []
        self.kernel_tensors: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def can_load(self) -> bool:
        return self.load_numel_total is not None


class Module(nn.Module):
    """One weight of ``rows`` rows, and perhaps a buffer: one that is computed, or one that checkpoints have."""

    def __init__(self, rows: int, *, buffer: str = "") -> None:
        super().__init__()
        if rows:
            self.weight = nn.Parameter(torch.zeros(rows, HIDDEN), requires_grad=False)
        if buffer:
            self.register_buffer("table", torch.ones(3), persistent=buffer == "persistent")


class Embedding(Module):
    """Has more rows than any checkpoint."""


class Attention(Module):
    """Processed at the end; its scale is optional."""

    def __init__(self) -> None:
        super().__init__(0)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)


class Model(nn.Module):
    """What vLLM runs; ``tensors`` gives a checkpoint of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Module(2)
        self.qkv = Module(3 * HIDDEN)
        self.attention = Attention()
        self.rope = Module(0, buffer="computed")
        self.norm = Module(1, buffer="computed")

    def load_weights(self, tensors: Sequence[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in tensors:
            shard = SHARDS.index(name) if name in SHARDS else None
            module = self.get_submodule("qkv" if shard is not None else name)
            parameter = module.scale if isinstance(module, Attention) else module.weight
            loader: Any = getattr(parameter, "weight_loader", load)
            loader(parameter, tensor, shard)
        return set()

    def values(self) -> dict[str, list[Any]]:
        return {name: tensor.tolist() for name, tensor in [*self.named_parameters(), *self.named_buffers()]}


class Plain(nn.Module):
    """A model whose tensors have the names of its parameters; takes only those, as drafts do, if it is ``choosy``."""

    def __init__(self, *, choosy: bool = False, **modules: nn.Module) -> None:
        super().__init__()
        self._choosy = choosy
        for name, module in modules.items():
            self.add_module(name, module)

    def load_weights(self, tensors: Sequence[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, tensor in tensors:
            if name in parameters or not self._choosy:
                parameter: Any = parameters[name]
                getattr(parameter, "weight_loader", load)(parameter, tensor)
        return set()


def tensors(value: float) -> dict[str, Tensor]:
    """A checkpoint; all of its elements are the same."""
    rows = {"embed": 2, "q": HIDDEN, "k": HIDDEN, "v": HIDDEN, "norm": 1}
    return {name: torch.full((count, HIDDEN), value) for name, count in rows.items()}


def load(parameter: Tensor, loaded_weight: Tensor, shard: int | None = None) -> None:
    """Write to a parameter, or to a third of it."""
    if shard is None and len(parameter) * HIDDEN == loaded_weight.numel() + PADDING:
        parameter[len(loaded_weight) :].fill_(0)
        parameter = parameter[: len(loaded_weight)]
    place = parameter if shard is None else parameter[shard * HIDDEN : (shard + 1) * HIDDEN]
    if place.shape != loaded_weight.shape:
        raise ValueError(f"{tuple(loaded_weight.shape)} into {tuple(place.shape)}")
    place.copy_(loaded_weight)


class Packing:
    """What packs a module's weight for its kernels, as vLLM's quantisation methods do."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight.flip(0) + 1, requires_grad=False)


class FakeLayerwise:
    """Takes parameters away, collects what comes, and writes a module when it is whole; as vLLM, checks nothing."""

    def __init__(self) -> None:
        self.infos: dict[nn.Module, Info] = {}
        self.finalized: list[Any] = []
        self.prepared: list[nn.Module] = []
        self.emptied: list[nn.Module] = []
        """Modules whose weight was let go once kernels had what they need."""
        self._recorded: dict[tuple[nn.Module, str], torch.Size] = {}
        """Shapes that parameters have in checkpoints, where they are not those that kernels use."""
        self._completes: Process = lambda module, info: self.process(module, info)
        self.functions = Layerwise(
            initialize=self.initialize,
            finalize=self.finalize,
            info=self.info,
            put_back=self.put_back,
            is_deferred=lambda module: isinstance(module, Attention),
            any_order=contextlib.nullcontext,
            padding=lambda module: PADDING if isinstance(module, Embedding) else 0,
            prepare=self.prepared.append,
            refill=self.refill,
            load_default=load,
            processor=lambda module: getattr(module, "quant_method", None),
            materialize=self.materialize,
            process=lambda module, info: self.process(module, info),
            processing_by=self.processing_by,
            uncounted=UNCOUNTED,
        )

    def refill(self, model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
        refilled = []
        for module in model.modules():
            if module in self.emptied:
                owner: Any = module
                refilled.append((module, "weight", owner.weight))
                owner.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN), requires_grad=False)
        return refilled

    def info(self, module: nn.Module) -> Info:
        return self.infos.setdefault(module, Info())

    def record(self, model: nn.Module) -> None:
        """Remember the parameters that a model has now, before it is processed for the first time."""
        self._recorded = {
            (module, name): parameter.shape
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def initialize(self, model: nn.Module) -> None:
        owner: Any = model
        owner._original_do_torchao_reload = getattr(owner, "_do_torchao_reload", False)
        owner._do_torchao_reload = False
        for module in model.modules():
            info = self.info(module)
            if info.can_load():
                continue  # as vLLM does: this is why an update that failed must be undone
            parameters, buffers = dict(module._parameters), dict(module._buffers)
            info.kernel_tensors = parameters, buffers  # type: ignore[assignment]
            info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
            counted = {name: t for name, t in [*parameters.items(), *buffers.items()] if name not in UNCOUNTED}
            info.load_numel_total = sum(
                self._recorded.get((module, name), tensor.shape).numel()
                for name, tensor in counted.items()
                if tensor is not None
            )
            for name, parameter in parameters.items():
                if parameter is not None and name not in UNCOUNTED:
                    shape = self._recorded.get((module, name), parameter.shape)
                    empty: Any = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
                    empty.weight_loader = self._collecting(module, name)
                    module._parameters[name] = empty

    def _collecting(self, module: nn.Module, name: str) -> Callable[..., None]:
        info = self.info(module)

        def collect(*args: Any, **kwargs: Any) -> None:
            if not info.can_load():
                return
            bound = inspect.signature(load).bind(*args, **kwargs)
            info.loaded_weights.append((name, bound))
            info.load_numel += bound.arguments["loaded_weight"].numel()
            if not isinstance(module, Attention) and info.load_numel >= (info.load_numel_total or 0):
                self._complete(module, info)

        return collect

    def _complete(self, module: nn.Module, info: Info) -> None:
        self._completes(module, info)

    @contextlib.contextmanager
    def processing_by(self, process: Process) -> Iterator[None]:
        before, self._completes = self._completes, process
        try:
            yield
        finally:
            self._completes = before

    def materialize(self, module: nn.Module, info: Any) -> None:
        """With whatever was in memory before."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.full_like(parameter, 77.0, device="cpu")
                module._parameters[name] = nn.Parameter(made, requires_grad=False)

    def process(self, module: nn.Module, info: Any) -> None:
        kernel, _ = info.kernel_tensors or ({}, {})
        self.materialize(module, info)
        for name, bound in info.loaded_weights:
            load(module.get_parameter(name), *bound.args[1:])
        if (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)
        for name, tensor in kernel.items():
            if name not in UNCOUNTED:
                tensor.copy_(module.get_parameter(name))
        self.put_back(module, info)
        info.reset()

    def put_back(self, module: nn.Module, info: Any) -> None:
        module._parameters.update(info.kernel_tensors[0])
        module._buffers.update(info.kernel_tensors[1])

    def finalize(self, model: nn.Module, config: Any) -> None:
        self.finalized.append(config)
        for module in model.modules():
            info = self.info(module)
            if info.can_load():
                if info.loaded_weights:
                    self._complete(module, info)
                else:
                    self.put_back(module, info)
                info.reset()
            if module in self.emptied:
                owner: Any = module
                owner.weight = nn.Parameter(torch.empty(0), requires_grad=False)
