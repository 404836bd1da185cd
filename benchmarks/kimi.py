"""Kimi-K2 as trainers publish it: the names, dtypes and shapes of its block-fp8 checkpoint, parted among ranks.

Shapes follow from the model's public config.json; no weights are made. The published checkpoint has as many tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cpe_daemon.core.types import Shard, TensorSpec

LAYERS: Final = 61
EXPERTS: Final = 384
_DENSE_LAYERS: Final = 1
_HIDDEN: Final = 7168
_INNER: Final = 18432
_EXPERT_INNER: Final = 2048
_VOCABULARY: Final = 163840
_HEADS: Final = 64
_QUERY_RANK: Final = 1536
_KEY_VALUE_RANK: Final = 512
_ROPE_DIM: Final = 64
_HEAD_DIM: Final = 128
"""Of values, and of queries and keys without their rotated part."""
_BLOCK: Final = 128
"""Rows and columns of a weight that share one scale."""

_EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")


def tensors(layers: int = LAYERS) -> list[TensorSpec]:
    """The tensors of the first ``layers`` layers and of what is outside of them, in module order."""
    return list(_model(layers))


def _model(layers: int) -> Iterator[TensorSpec]:
    yield _plain("model.embed_tokens", _VOCABULARY, _HIDDEN)
    for number in range(layers):
        layer = f"model.layers.{number}"
        yield from _attention(f"{layer}.self_attn")
        if number < _DENSE_LAYERS:
            yield from _mlp(f"{layer}.mlp", _INNER)
        else:
            yield from _experts(f"{layer}.mlp")
        yield _plain(f"{layer}.input_layernorm", _HIDDEN)
        yield _plain(f"{layer}.post_attention_layernorm", _HIDDEN)
    yield _plain("model.norm", _HIDDEN)
    yield _plain("lm_head", _VOCABULARY, _HIDDEN)


def _attention(name: str) -> Iterator[TensorSpec]:
    yield from _quantized(f"{name}.q_a_proj", _QUERY_RANK, _HIDDEN)
    yield _plain(f"{name}.q_a_layernorm", _QUERY_RANK)
    yield from _quantized(f"{name}.q_b_proj", _HEADS * (_HEAD_DIM + _ROPE_DIM), _QUERY_RANK)
    yield from _quantized(f"{name}.kv_a_proj_with_mqa", _KEY_VALUE_RANK + _ROPE_DIM, _HIDDEN)
    yield _plain(f"{name}.kv_a_layernorm", _KEY_VALUE_RANK)
    yield from _quantized(f"{name}.kv_b_proj", _HEADS * 2 * _HEAD_DIM, _KEY_VALUE_RANK)
    yield from _quantized(f"{name}.o_proj", _HIDDEN, _HEADS * _HEAD_DIM)


def _experts(name: str) -> Iterator[TensorSpec]:
    yield _plain(f"{name}.gate", EXPERTS, _HIDDEN)
    yield TensorSpec(f"{name}.gate.e_score_correction_bias", "float32", (EXPERTS,))
    yield from _mlp(f"{name}.shared_experts", _EXPERT_INNER)
    for expert in range(EXPERTS):
        yield from _mlp(f"{name}.experts.{expert}", _EXPERT_INNER)


def _mlp(name: str, inner: int) -> Iterator[TensorSpec]:
    yield from _quantized(f"{name}.gate_proj", inner, _HIDDEN)
    yield from _quantized(f"{name}.up_proj", inner, _HIDDEN)
    yield from _quantized(f"{name}.down_proj", _HIDDEN, inner)


def _quantized(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", "float8_e4m3fn", (rows, columns))
    yield TensorSpec(f"{name}.weight_scale_inv", "float32", (-(-rows // _BLOCK), -(-columns // _BLOCK)))


def _plain(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", "bfloat16", shape)


# --- parted among trainer ranks --------------------------------------------------------------------------------------


def by_expert(specs: Sequence[TensorSpec], ranks: int) -> list[list[Shard]]:
    """Part as expert parallelism does: a rank has a run of each layer's experts, and its share of the other tensors."""
    shares: list[list[Shard]] = [[] for _ in range(ranks)]
    for index, spec in enumerate(specs):
        expert = _EXPERT.search(spec.name)
        rank = int(expert[1]) * ranks // EXPERTS if expert else index % ranks
        shares[rank].append(_shard(spec))
    return shares


def by_tensor(specs: Sequence[TensorSpec], ranks: int) -> list[list[Shard]]:
    """Deal tensors in turn, so that no two neighbours are of one rank: the most copies that whole tensors can need."""
    shares: list[list[Shard]] = [[] for _ in range(ranks)]
    for index, spec in enumerate(specs):
        shares[index % ranks].append(_shard(spec))
    return shares


def _shard(spec: TensorSpec) -> Shard:
    return Shard(spec.name, spec.dtype, spec.shape)


SPREADS: Final[dict[str, Callable[[Sequence[TensorSpec], int], list[list[Shard]]]]] = {
    "experts": by_expert,
    "tensors": by_tensor,
}
"""The ways to part, by the name that ``--spread`` takes."""
