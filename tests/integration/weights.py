"""Tensors that a trainer and an engine can make independently of one another, from a recipe and a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from cpe_daemon.core.dtypes import ITEMSIZE

LARGE_BYTES = (3 << 20) + (1 << 19) + 2
"""Of the zoo's largest tensor: more than three slots of 1 MiB."""

DTYPES = [name for name in ITEMSIZE if hasattr(torch, name)]
_SHAPES: list[tuple[int, ...]] = [(), (0,), (0, 4), (1,), (7,), (3, 5), (16, 32), (2, 3, 4), (64, 130), (1, 1, 1, 9)]


class Spec(NamedTuple):
    """What a tensor looks like to those who publish and take it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def specs(recipe: Mapping[str, Any]) -> list[Spec]:
    """What a recipe makes.

    ``{"plain": n, "nbytes": k}``: n float32 vectors of k bytes. ``{"zoo": n}``: n tensors of every dtype and many
    shapes, some of them to be sliced by `slicing`. ``{"layers": n}``: n layers of large tensors that are to be sliced,
    and a small one each. ``drop``, ``retype``, ``reshape`` and ``add`` spoil the result.
    """
    if "layers" in recipe:
        made = _layers(recipe["layers"])
    elif "zoo" in recipe:
        made = _zoo(recipe["zoo"])
    else:
        made = _plain(recipe["plain"], recipe.get("nbytes", 64 << 10))
    dtypes, shapes = recipe.get("retype", {}), recipe.get("reshape", {})
    made += [Spec(name, "float32", (8,)) for name in recipe.get("add", [])]
    return [
        Spec(spec.name, dtypes.get(spec.name, spec.dtype), tuple(shapes.get(spec.name, spec.shape)))
        for spec in made
        if spec.name not in recipe.get("drop", [])
    ]


def slicing(name: str) -> int | None:
    """The rule by which tensor-parallel ranks share the zoo's tensors."""
    return {"col": 0, "row": 1}.get(name.rpartition(".")[2])


def build(made: Iterable[Spec], seed: int) -> dict[str, Tensor]:
    """Tensors of random bits; some of them are no contiguous memory."""
    return {spec.name: _tensor(spec, seed * 1_000_003 + index, index) for index, spec in enumerate(made)}


def blank(made: Iterable[Spec], rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """An engine's places for these tensors, all zeros, every third two-dimensional one transposed in memory."""
    places: dict[str, Tensor] = {}
    for index, spec in enumerate(made):
        shape = list(spec.shape)
        dim = slicing(spec.name)
        if dim is not None:
            shape[dim] //= world_size
        if len(shape) == 2 and index % 3 == 0:
            places[spec.name] = _zeros(shape[::-1], spec.dtype).t()
        else:
            places[spec.name] = _zeros(shape, spec.dtype)
    return places


def part_of(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What of whole tensors a tensor-parallel rank should hold."""
    return {
        name: tensor if slicing(name) is None else tensor.chunk(world_size, slicing(name) or 0)[rank]
        for name, tensor in tensors.items()
    }


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of every tensor's dtype, shape and bytes."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    bits = tensor.detach().cpu().view(_bits(tensor)).contiguous().reshape(-1)
    data = bits.view(torch.uint8).numpy().tobytes() if bits.numel() else b""
    return xxh3_128_hexdigest(f"{tensor.dtype}{list(tensor.shape)}".encode() + data)


def _plain(count: int, nbytes: int) -> list[Spec]:
    return [Spec(f"layers.{index}.weight", "float32", (nbytes // 4,)) for index in range(count)]


def _layers(count: int) -> list[Spec]:
    shapes = {"gate.col": (256, 512), "up.col": (256, 512), "down.row": (32, 65536), "norm": (512,)}
    return [
        Spec(f"layers.{layer}.{name}", "bfloat16" if "row" in name else "float32", shape)
        for layer in range(count)
        for name, shape in shapes.items()
    ]


def _zoo(count: int) -> list[Spec]:
    made = [
        Spec("lm_head.weight", "uint8", (LARGE_BYTES,)),
        Spec("model.layers.0.attn.col", "bfloat16", (512, 768)),
        Spec("model.layers.0.mlp.row", "float16", (768, 512)),
        Spec("model.layers.1.attn.col", "float32", (2048, 300)),
        Spec("model.layers.1.mlp.row", "int8", (100, 2 << 10)),
    ]
    for index in range(count - len(made)):
        dtype = DTYPES[index % len(DTYPES)]
        shape = _SHAPES[index // len(DTYPES) % len(_SHAPES)]
        made.append(Spec(f"model.layers.{index % 24}.part{index}.weight", dtype, shape))
    return made


def _tensor(spec: Spec, seed: int, index: int) -> Tensor:
    count = torch.Size(spec.shape).numel()
    kind = getattr(torch, spec.dtype)
    bits = torch.empty(count * ITEMSIZE[spec.dtype], dtype=torch.uint8)
    bits.random_(0, 2 if spec.dtype == "bool" else 256, generator=torch.Generator().manual_seed(seed))
    tensor = bits.view(kind).reshape(spec.shape)
    if len(spec.shape) < 2 or index % 2:
        return tensor
    wide = torch.stack([tensor.view(_bits(tensor)), tensor.view(_bits(tensor))], dim=-1)  # every second element of it
    return wide[..., 1].view(kind)


def _bits(tensor: Tensor) -> torch.dtype:
    """An integer type as wide as a tensor's elements: torch cannot stack all of its types."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return width.get(tensor.element_size(), tensor.dtype)


def _zeros(shape: Iterable[int], dtype: str) -> Tensor:
    size = list(shape)
    count = torch.Size(size).numel()
    return torch.zeros(count * ITEMSIZE[dtype], dtype=torch.uint8).view(getattr(torch, dtype)).reshape(size)
