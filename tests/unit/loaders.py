"""Checkpoints and loaders as engines have them, without an engine: dense, mixtures of experts, tied, shared by ranks.

`engine_of` makes one worker's parameters and the function that loads a checkpoint into them, in the way of vLLM's and
SGLang's loaders: fused projections, experts stacked, slices by narrow, names that are mapped, and names that are
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

Load = Callable[[str, Tensor], object]

VOCABULARY: Final = 48
HIDDEN: Final = 16
HEAD: Final = 8
HEADS: Final = 4
INNER: Final = 24
DTYPE: Final = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model: ``experts`` of 0 is a dense one."""

    layers: int = 2
    kv_heads: int = 2
    experts: int = 0
    tied: bool = False
    biases: bool = False


MODELS: Final = {
    "qwen3": Shape(),
    "qwen3-moe": Shape(experts=4),
    "llama tied": Shape(tied=True),
    "gqa of one kv head": Shape(kv_heads=1, biases=True),
}


def checkpoint(shape: Shape, seed: int) -> dict[str, Tensor]:
    """A version: everything varies."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(sizes, generator=generator).to(DTYPE).contiguous() for name, sizes in _sizes(shape)}


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield f"{at}.self_attn.{name}_proj.weight", (heads * HEAD, HIDDEN)
            if shape.biases:
                yield f"{at}.self_attn.{name}_proj.bias", (heads * HEAD,)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        if not shape.experts:
            yield from _mlp(f"{at}.mlp")
            continue
        yield f"{at}.mlp.gate.weight", (shape.experts, HIDDEN)
        for expert in range(shape.experts):
            yield from _mlp(f"{at}.mlp.experts.{expert}")
    yield "model.norm.weight", (HIDDEN,)
    if not shape.tied:
        yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _mlp(at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.gate_proj.weight", (INNER, HIDDEN)
    yield f"{at}.up_proj.weight", (INNER, HIDDEN)
    yield f"{at}.down_proj.weight", (HIDDEN, INNER)


@dataclass
class Engine:
    """One worker: its parameters, and what loads them; ``loaded`` are the names that the loader was given."""

    parameters: dict[str, Tensor]
    rank: int
    world_size: int
    kv_heads: int
    experts: int
    expert_parallel: bool = False
    loaded: list[str] = field(default_factory=list)

    def load(self, name: str, tensor: Tensor) -> None:
        """As engines' ``load_weights`` do with one of its pairs."""
        self.loaded.append(name)
        module, _, kind = name.rpartition(".")
        at, _, last = module.rpartition(".")
        if last in {"q_proj", "k_proj", "v_proj"}:
            self._qkv(self.parameters[f"{at}.qkv_proj.{kind}"], tensor, "qkv".index(last[0]))
        elif ".experts." in at:
            self._expert(at, last, tensor)
        elif last in {"gate_proj", "up_proj"}:
            half = self.parameters[f"{at}.gate_up_proj.weight"].chunk(2)[last == "up_proj"]
            half.data.copy_(self._mine(tensor, 0))
        elif last in {"o_proj", "down_proj"}:
            self.parameters[name].data.copy_(self._mine(tensor, 1))
        elif last in {"embed_tokens", "lm_head"}:
            self.parameters[name][: VOCABULARY // self.world_size] = self._mine(tensor, 0)
        else:
            self.parameters[name].copy_(tensor)

    def move(self, name: str) -> None:
        """Give a parameter, and those that are tied to it, other memory."""
        old = self.parameters[name]
        new = old.clone()
        for tied in [other for other, tensor in self.parameters.items() if tensor is old]:
            self.parameters[tied] = new

    def _mine(self, tensor: Tensor, dim: int) -> Tensor:
        size = tensor.shape[dim] // self.world_size
        return tensor.narrow(dim, self.rank * size, size)

    def _qkv(self, parameter: Tensor, tensor: Tensor, which: int) -> None:
        """Heads of keys and values are shared by ranks where there are fewer than ranks."""
        q, kv = HEADS // self.world_size * HEAD, max(self.kv_heads // self.world_size, 1) * HEAD
        start, size = ((0, q), (q, kv), (q + kv, kv))[which]
        replicas = max(self.world_size // self.kv_heads, 1)
        at = self.rank if which == 0 else self.rank // replicas
        parameter.data.narrow(0, start, size).copy_(tensor.narrow(0, at * size, size))

    def _expert(self, at: str, last: str, tensor: Tensor) -> None:
        experts, _, number = at.rpartition(".")
        expert = int(number)
        if self.expert_parallel:
            mine = self.experts // self.world_size
            if expert // mine != self.rank:
                return
            expert %= mine
            part0, part1 = tensor, tensor
        else:
            part0, part1 = self._mine(tensor, 0), self._mine(tensor, 1)
        if last == "down_proj":
            self.parameters[f"{experts}.w2_weight"].data[expert].copy_(part1)
            return
        w13 = self.parameters[f"{experts}.w13_weight"].data[expert]
        size = w13.shape[0] // 2
        w13.narrow(0, size * (last == "up_proj"), size).copy_(part0)


def engine_of(shape: Shape, rank: int = 0, world_size: int = 1, *, expert_parallel: bool = False) -> Engine:
    """A worker whose parameters hold nothing yet."""
    parameters: dict[str, Tensor] = {}

    def add(name: str, *sizes: int) -> None:
        parameters[name] = torch.zeros(sizes, dtype=DTYPE)

    q, kv = HEADS // world_size * HEAD, max(shape.kv_heads // world_size, 1) * HEAD
    inner = INNER if expert_parallel else INNER // world_size
    add("model.embed_tokens.weight", VOCABULARY // world_size, HIDDEN)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        add(f"{at}.self_attn.qkv_proj.weight", q + 2 * kv, HIDDEN)
        if shape.biases:
            add(f"{at}.self_attn.qkv_proj.bias", q + 2 * kv)
        add(f"{at}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD // world_size)
        add(f"{at}.input_layernorm.weight", HIDDEN)
        add(f"{at}.post_attention_layernorm.weight", HIDDEN)
        if shape.experts:
            experts = shape.experts // world_size if expert_parallel else shape.experts
            add(f"{at}.mlp.gate.weight", shape.experts, HIDDEN)
            add(f"{at}.mlp.experts.w13_weight", experts, 2 * inner, HIDDEN)
            add(f"{at}.mlp.experts.w2_weight", experts, HIDDEN, inner)
        else:
            add(f"{at}.mlp.gate_up_proj.weight", 2 * INNER // world_size, HIDDEN)
            add(f"{at}.mlp.down_proj.weight", HIDDEN, INNER // world_size)
    add("model.norm.weight", HIDDEN)
    if shape.tied:
        parameters["lm_head.weight"] = parameters["model.embed_tokens.weight"]
    else:
        add("lm_head.weight", VOCABULARY // world_size, HIDDEN)
    return Engine(parameters, rank, world_size, shape.kv_heads, shape.experts, expert_parallel)
