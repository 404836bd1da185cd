"""Tensor lists of real checkpoints: names, dtypes and shapes as in their safetensors files, in module order.

Written from the models' configs and checked against the number of tensors that the published files have.
``layers`` shortens a model to its first so many layers and what is outside of them, to keep tests quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from cpe_daemon.core.types import TensorSpec

FP8: Final = "float8_e4m3fn"
BF16: Final = "bfloat16"
FP8_BLOCK: Final = 128
"""Rows and columns of a weight that share one scale in DeepSeek's block-fp8."""

Tensors = Iterator[TensorSpec]


def _bf16(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, BF16, shape)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    yield _bf16(f"{name}.weight", rows, columns)
    if bias:
        yield _bf16(f"{name}.bias", rows)


def _fp8_linear(name: str, rows: int, columns: int) -> Tensors:
    yield TensorSpec(f"{name}.weight", FP8, (rows, columns))
    scales = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    yield TensorSpec(f"{name}.weight_scale_inv", "float32", scales)


def _gated_mlp(name: str, hidden: int, inner: int, linear: Callable[[str, int, int], Tensors] = _linear) -> Tensors:
    yield from linear(f"{name}.gate_proj", inner, hidden)
    yield from linear(f"{name}.up_proj", inner, hidden)
    yield from linear(f"{name}.down_proj", hidden, inner)


# --- decoders with grouped-query attention -------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """What the names and shapes of a Llama-like decoder depend on; ``experts`` > 0: mlps as in Qwen3-MoE."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    lm_head: bool = True
    prefix: str = "model"


def _decoder(config: Decoder, layers: int | None) -> Tensors:
    yield _bf16(f"{config.prefix}.embed_tokens.weight", config.vocab, config.hidden)
    for number in range(config.layers if layers is None else min(layers, config.layers)):
        layer = f"{config.prefix}.layers.{number}"
        yield from _attention(f"{layer}.self_attn", config)
        if config.experts:
            yield _bf16(f"{layer}.mlp.gate.weight", config.experts, config.hidden)
            for expert in range(config.experts):
                yield from _gated_mlp(f"{layer}.mlp.experts.{expert}", config.hidden, config.inner)
        else:
            yield from _gated_mlp(f"{layer}.mlp", config.hidden, config.inner)
        for norm in config.norms:
            yield _bf16(f"{layer}.{norm}.weight", config.hidden)
    yield _bf16(f"{config.prefix}.norm.weight", config.hidden)
    if config.lm_head:
        yield _bf16("lm_head.weight", config.vocab, config.hidden)


def _attention(name: str, config: Decoder) -> Tensors:
    yield from _linear(f"{name}.q_proj", config.heads * config.head_dim, config.hidden)
    yield from _linear(f"{name}.k_proj", config.kv_heads * config.head_dim, config.hidden)
    yield from _linear(f"{name}.v_proj", config.kv_heads * config.head_dim, config.hidden)
    yield from _linear(f"{name}.o_proj", config.hidden, config.heads * config.head_dim)
    if config.qk_norm:
        yield _bf16(f"{name}.q_norm.weight", config.head_dim)
        yield _bf16(f"{name}.k_norm.weight", config.head_dim)


GEMMA_NORMS: Final = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

QWEN3_0_6B: Final = Decoder(1024, 3072, 28, 16, 8, 128, 151936, qk_norm=True)
QWEN3_8B: Final = Decoder(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True)
QWEN3_30B_A3B: Final = Decoder(2048, 768, 48, 32, 4, 128, 151936, experts=128, qk_norm=True)
QWEN3_235B_A22B: Final = Decoder(4096, 1536, 94, 64, 4, 128, 151936, experts=128, qk_norm=True)
LLAMA_3_1_8B: Final = Decoder(4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_3_1_405B: Final = Decoder(16384, 53248, 126, 128, 8, 128, 128256)
GEMMA_2_9B: Final = Decoder(3584, 14336, 42, 16, 8, 256, 256000, norms=GEMMA_NORMS, lm_head=False)
GEMMA_3_4B: Final = Decoder(
    2560,
    10240,
    34,
    8,
    4,
    256,
    262208,
    qk_norm=True,
    norms=GEMMA_NORMS,
    lm_head=False,
    prefix="language_model.model",
)


def _gemma_3(layers: int | None) -> Tensors:
    yield from _decoder(GEMMA_3_4B, layers)
    yield _bf16("multi_modal_projector.mm_input_projection_weight", 1152, 2560)
    yield _bf16("multi_modal_projector.mm_soft_emb_norm.weight", 1152)
    yield from _siglip("vision_tower.vision_model", layers)


def _siglip(name: str, layers: int | None) -> Tensors:
    """The vision tower of Gemma 3: 896 pixels in patches of 14."""
    hidden, inner = 1152, 4304
    yield _bf16(f"{name}.embeddings.patch_embedding.weight", hidden, 3, 14, 14)
    yield _bf16(f"{name}.embeddings.patch_embedding.bias", hidden)
    yield _bf16(f"{name}.embeddings.position_embedding.weight", 4096, hidden)
    for number in range(27 if layers is None else min(layers, 27)):
        layer = f"{name}.encoder.layers.{number}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", hidden, hidden, bias=True)
        yield from _linear(f"{layer}.mlp.fc1", inner, hidden, bias=True)
        yield from _linear(f"{layer}.mlp.fc2", hidden, inner, bias=True)
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _norm(f"{layer}.{norm}", hidden)
    yield from _norm(f"{name}.post_layernorm", hidden)


def _norm(name: str, hidden: int) -> Tensors:
    yield _bf16(f"{name}.weight", hidden)
    yield _bf16(f"{name}.bias", hidden)


# --- DeepSeek V3 and Kimi K2: MLA, block-fp8 -----------------------------------------------------------


@dataclass(frozen=True)
class Mla:
    """What the names and shapes of a DeepSeek-V3-like model depend on; ``mtp``: one more layer behind."""

    layers: int
    dense_layers: int
    heads: int
    experts: int
    vocab: int
    mtp: bool
    hidden: int = 7168
    inner: int = 18432
    expert_inner: int = 2048
    q_rank: int = 1536
    kv_rank: int = 512
    rope_dim: int = 64
    head_dim: int = 128


DEEPSEEK_V3: Final = Mla(61, 3, 128, 256, 129280, mtp=True)
KIMI_K2: Final = Mla(61, 1, 64, 384, 163840, mtp=False)


def _mla_model(config: Mla, layers: int | None) -> Tensors:
    yield _bf16("model.embed_tokens.weight", config.vocab, config.hidden)
    for number in range(config.layers if layers is None else min(layers, config.layers)):
        yield from _mla_layer(f"model.layers.{number}", config, dense=number < config.dense_layers)
    if config.mtp:
        yield from _mtp_layer(f"model.layers.{config.layers}", config)
    yield _bf16("model.norm.weight", config.hidden)
    yield _bf16("lm_head.weight", config.vocab, config.hidden)


def _mla_layer(name: str, config: Mla, dense: bool) -> Tensors:
    yield from _mla_attention(f"{name}.self_attn", config)
    mlp = f"{name}.mlp"
    if dense:
        yield from _gated_mlp(mlp, config.hidden, config.inner, _fp8_linear)
    else:
        yield _bf16(f"{mlp}.gate.weight", config.experts, config.hidden)
        yield TensorSpec(f"{mlp}.gate.e_score_correction_bias", "float32", (config.experts,))
        yield from _gated_mlp(f"{mlp}.shared_experts", config.hidden, config.expert_inner, _fp8_linear)
        for expert in range(config.experts):
            yield from _gated_mlp(f"{mlp}.experts.{expert}", config.hidden, config.expert_inner, _fp8_linear)
    yield _bf16(f"{name}.input_layernorm.weight", config.hidden)
    yield _bf16(f"{name}.post_attention_layernorm.weight", config.hidden)


def _mla_attention(name: str, config: Mla) -> Tensors:
    query = config.heads * (config.head_dim + config.rope_dim)
    key_value = config.heads * 2 * config.head_dim
    yield from _fp8_linear(f"{name}.q_a_proj", config.q_rank, config.hidden)
    yield _bf16(f"{name}.q_a_layernorm.weight", config.q_rank)
    yield from _fp8_linear(f"{name}.q_b_proj", query, config.q_rank)
    yield from _fp8_linear(f"{name}.kv_a_proj_with_mqa", config.kv_rank + config.rope_dim, config.hidden)
    yield _bf16(f"{name}.kv_a_layernorm.weight", config.kv_rank)
    yield from _fp8_linear(f"{name}.kv_b_proj", key_value, config.kv_rank)
    yield from _fp8_linear(f"{name}.o_proj", config.hidden, config.heads * config.head_dim)


def _mtp_layer(name: str, config: Mla) -> Tensors:
    yield _bf16(f"{name}.embed_tokens.weight", config.vocab, config.hidden)
    yield _bf16(f"{name}.enorm.weight", config.hidden)
    yield _bf16(f"{name}.hnorm.weight", config.hidden)
    yield _bf16(f"{name}.eh_proj.weight", config.hidden, 2 * config.hidden)
    yield from _mla_layer(name, config, dense=False)
    yield _bf16(f"{name}.shared_head.norm.weight", config.hidden)
    yield _bf16(f"{name}.shared_head.head.weight", config.vocab, config.hidden)


# --- gpt-oss: all experts of a layer in one tensor, mxfp4 ----------------------------------------------


def _gpt_oss_20b(layers: int | None) -> Tensors:
    hidden, heads, kv_heads, head_dim, experts = 2880, 64, 8, 64, 32
    yield _bf16("model.embed_tokens.weight", 201088, hidden)
    for number in range(24 if layers is None else min(layers, 24)):
        layer = f"model.layers.{number}"
        yield _bf16(f"{layer}.self_attn.sinks", heads)
        yield from _linear(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, bias=True)
        yield from _linear(f"{layer}.self_attn.k_proj", kv_heads * head_dim, hidden, bias=True)
        yield from _linear(f"{layer}.self_attn.v_proj", kv_heads * head_dim, hidden, bias=True)
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, bias=True)
        yield from _linear(f"{layer}.mlp.router", experts, hidden, bias=True)
        for projection, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            fused = f"{layer}.mlp.experts.{projection}"
            yield TensorSpec(f"{fused}_blocks", "uint8", (experts, rows, hidden // 32, 16))
            yield TensorSpec(f"{fused}_scales", "uint8", (experts, rows, hidden // 32))
            yield _bf16(f"{fused}_bias", experts, rows)
        yield _bf16(f"{layer}.input_layernorm.weight", hidden)
        yield _bf16(f"{layer}.post_attention_layernorm.weight", hidden)
    yield _bf16("model.norm.weight", hidden)
    yield _bf16("lm_head.weight", 201088, hidden)


_MODELS: Final[dict[str, Callable[[int | None], Tensors]]] = {
    "Qwen3-0.6B": lambda layers: _decoder(QWEN3_0_6B, layers),
    "Qwen3-8B": lambda layers: _decoder(QWEN3_8B, layers),
    "Qwen3-30B-A3B": lambda layers: _decoder(QWEN3_30B_A3B, layers),
    "Qwen3-235B-A22B": lambda layers: _decoder(QWEN3_235B_A22B, layers),
    "Llama-3.1-8B": lambda layers: _decoder(LLAMA_3_1_8B, layers),
    "Llama-3.1-405B": lambda layers: _decoder(LLAMA_3_1_405B, layers),
    "Gemma-2-9B": lambda layers: _decoder(GEMMA_2_9B, layers),
    "Gemma-3-4B": _gemma_3,
    "DeepSeek-V3": lambda layers: _mla_model(DEEPSEEK_V3, layers),
    "Kimi-K2": lambda layers: _mla_model(KIMI_K2, layers),
    "gpt-oss-20b": _gpt_oss_20b,
}

MODELS: Final = tuple(_MODELS)
"""The models known here."""

COUNTS: Final = {
    "Qwen3-0.6B": 311,
    "Qwen3-8B": 399,
    "Qwen3-30B-A3B": 18_867,
    "Qwen3-235B-A22B": 36_945,
    "Llama-3.1-8B": 291,
    "Llama-3.1-405B": 1_137,
    "Gemma-2-9B": 464,
    "Gemma-3-4B": 883,
    "DeepSeek-V3": 91_991,
    "Kimi-K2": 139_583,
    "gpt-oss-20b": 459,
}
"""How many tensors a whole model has."""


def tensors_of(model: str, layers: int | None = None) -> list[TensorSpec]:
    """The tensors of ``model``, one of `MODELS`, or of its first ``layers`` layers."""
    return list(_MODELS[model](layers))
