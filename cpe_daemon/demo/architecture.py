"""The demo's model: names and shapes of Qwen3-0.6B's checkpoint, or of a smaller one that is built in the same way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import ManifestError

DTYPE: Final = "bfloat16"

_SHARED_DIMENSION: Final = {
    "embed_tokens": 0,
    "lm_head": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
}
_SMALLEST_VOCAB: Final = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Qwen3 decoder with tied embeddings; fields are called as in its config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint, in module order; tied, so without an lm_head."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield _spec("model.embed_tokens", self.vocab_size, hidden)
        for number in range(self.num_hidden_layers):
            layer = f"model.layers.{number}"
            yield _spec(f"{layer}.self_attn.q_proj", queries, hidden)
            yield _spec(f"{layer}.self_attn.k_proj", keys, hidden)
            yield _spec(f"{layer}.self_attn.v_proj", keys, hidden)
            yield _spec(f"{layer}.self_attn.o_proj", hidden, queries)
            yield _spec(f"{layer}.self_attn.q_norm", self.head_dim)
            yield _spec(f"{layer}.self_attn.k_norm", self.head_dim)
            yield _spec(f"{layer}.mlp.gate_proj", inner, hidden)
            yield _spec(f"{layer}.mlp.up_proj", inner, hidden)
            yield _spec(f"{layer}.mlp.down_proj", hidden, inner)
            yield _spec(f"{layer}.input_layernorm", hidden)
            yield _spec(f"{layer}.post_attention_layernorm", hidden)
        yield _spec("model.norm", hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs())

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest tensor."""
        return max(spec.nbytes for spec in self.specs())

    def scaled(self, fraction: float) -> Architecture:
        """A model of about so much of the size: fewer layers and a smaller vocabulary, the same layers otherwise."""
        layers = max(1, round(self.num_hidden_layers * fraction))
        vocab = max(_SMALLEST_VOCAB, round(self.vocab_size * fraction / 128) * 128)
        return replace(self, num_hidden_layers=layers, vocab_size=min(vocab, self.vocab_size))

    def local_shape(self, spec: TensorSpec, world_size: int) -> tuple[int, ...]:
        """The shape of one rank's part of a tensor."""
        dim = shared_dimension(spec.name)
        return tuple(extent // (world_size if at == dim else 1) for at, extent in enumerate(spec.shape))

    def config(self) -> dict[str, Any]:
        """What transformers needs to know to build this model."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(self),
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
            "torch_dtype": DTYPE,
        }


QWEN3_600M: Final = Architecture(
    num_hidden_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
SMALL: Final = Architecture(
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=4096,
)


def shared_dimension(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks share a weight, as Megatron does; None: each has all of it."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return _SHARED_DIMENSION.get(module)


def read_config(checkpoint: Path) -> Architecture:
    """Read the architecture from a checkpoint's config.json.

    Raises:
        ManifestError: it is not there, or says too little.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
        return Architecture(**{name: int(config[name]) for name in Architecture.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} does not describe the demo's model: {error!r}") from None


def _spec(module: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", DTYPE, shape)


def parameters(architecture: Architecture) -> int:
    """How many numbers the model is made of."""
    return sum(math.prod(spec.shape) for spec in architecture.specs())
