"""Which tensors belong together, by name alone: the module groups that a bucket may not part.

Loaders of engines hold on to what arrives until its partners arrive, and some forget it at the end of the
call that brought it: SGLang's DeepSeek loaders drop q_a_proj or kv_a_proj_with_mqa without a word if they
come in two calls, vLLM's keep a weight until its scale is there. So these travel in one bucket wherever a
slot can hold them:

* everything in one submodule of a layer: its attention, its dense mlp, its mixer; router and shared experts
  with the mlp;
* one expert of a layer (``experts.17.*``), so that consecutive experts pack into runs;
* outside of layers, everything in one module: a weight with its bias, scale, zero points and packed parts.

A group larger than a slot is parted along `LEVELS`, from coarse to fine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

_COUNTED: Final = re.compile(
    r"(?:.*\.)?"  # greedy: the last such number decides (stages.0.blocks.7, layers.3.mlp.experts.17)
    r"(?:[^.]*experts\.\d+"
    r"|(?:[^.]*(?:layers?|blocks?|stages?)|h)\.\d+(?:\.[^.]+)?)"
    r"(?=\.|$)"
)
"""A module's path up to an expert's number, or up to the submodule behind a layer's number.

Other numbers count something inside of a layer (LongCat's self_attn.0, diffusers' to_out.0), or stand where
there are no layers (the linear modules of a projector)."""

_NUMBERED: Final = re.compile(r"(?:.*?\.)?\d+(?:\.[^.]+)?(?=\.|$)")
"""A module's path up to the submodule behind its first number, whatever that counts."""

_FUSED: Final = {
    member: fused
    for fused, members in {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "wqkv": ("wq", "wk", "wv"),
        "query_key_value": ("query", "key", "value"),
        "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
        "wqkv_a": ("wq_a", "wkv_a", "wkv"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "w13": ("w1", "w3"),
        "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
        "in_proj_ba": ("in_proj_b", "in_proj_a"),
    }.items()
    for member in members
}
"""Modules that loaders fuse into one parameter, by the fused one's name."""

_ROLE: Final = re.compile(
    r"(?:_(?:weight|blocks|packed|shape|qweight|bias(?:es)?|scales?(?:_inv|_\d+)?|zero_points?|q?zeros|g_idx))+$"
)
"""What a leaf's name ends in if several describe one weight: gate_up_proj_blocks and gate_up_proj_scales."""

_ORDINARY: Final = frozenset(
    ("weight", "qweight", "bias", "biases", "scale", "scales", "zeros", "qzeros", "g_idx", "input", "output")
)
"""Leaves of a module that has but one weight, without their roles."""


def group_numbers(names: Iterable[str]) -> list[int]:
    """By tensor, the number of its module group (`group_key`); groups count up in the order of their first tensors."""
    groups: dict[str, int] = {}
    experts: dict[str, int] = {}
    numbers: list[int] = []
    for name in names:
        parent = name.rsplit(".", 2)[0]
        number = experts.get(parent)  # a short way past the rule: nearly all tensors of a large model are experts'
        if number is None:
            if _is_expert(parent):
                number = experts[parent] = groups.setdefault(parent, len(groups))
            else:
                number = groups.setdefault(group_key(name), len(groups))
        numbers.append(number)
    return numbers


def group_key(name: str) -> str:
    """The module group of a tensor: those with the same key travel in one bucket if a slot can hold them."""
    module = module_key(name)
    match = _COUNTED.match(module) or _NUMBERED.match(module)
    return match.group() if match else _fused_module(module)


def fused_key(name: str) -> str:
    """The tensor's module, or what loaders fuse it and its siblings into (q, k and v; gate and up)."""
    return _fused_module(module_key(name))


def module_key(name: str) -> str:
    """The module that holds the tensor: everything in front of the leaf's name; "" at the root."""
    return name.rpartition(".")[0]


def companion_key(name: str) -> str:
    """The tensor's module and which weight of it the leaf describes: a weight with its own scales and bias.

    The leaves of an ordinary linear module (weight, weight_scale_inv, bias; qweight, qzeros, scales, g_idx)
    are one.
    """
    module, _, leaf = name.rpartition(".")
    stem = _ROLE.sub("", leaf)
    return module if stem in _ORDINARY else f"{module}.{stem}"


LEVELS: Final[tuple[Callable[[str], str], ...]] = (group_key, fused_key, module_key, companion_key)
"""The ways to gather tensors, each finer than the one before; behind the last, a tensor is alone."""


def _is_expert(path: str) -> bool:
    """Whether a path ends in an expert's number: then it is the group of all modules right below it, by `_COUNTED`."""
    number = path.rpartition("experts.")[2]
    return number.isdecimal() and number != path


def _fused_module(module: str) -> str:
    parent, _, last = module.rpartition(".")
    fused = _FUSED.get(last)
    return f"{parent}.{fused}" if fused else module
