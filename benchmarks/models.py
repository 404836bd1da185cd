"""The models that benchmarks move, by the name that ``--model`` takes: real names and shapes, random bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.demo.architecture import DTYPE, QWEN3_600M, SMALL, Architecture


class Untied(Architecture):
    """A decoder whose output head is a tensor of its own, as the larger ones have it."""

    __slots__ = ()

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint, in module order."""
        yield from super().specs()
        yield TensorSpec("lm_head.weight", DTYPE, (self.vocab_size, self.hidden_size))

    def config(self) -> dict[str, Any]:
        """What transformers needs to know to build this model."""
        return {**super().config(), "tie_word_embeddings": False}


@dataclass(frozen=True, slots=True)
class Mixture(Untied):
    """A Qwen3 decoder whose layers are mixtures of experts, each with an ``intermediate_size`` of its own."""

    num_experts: int
    num_experts_per_tok: int

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint, in module order."""
        for spec in super(Mixture, self).specs():
            module, found, name = spec.name.partition("mlp.")
            if not found:
                yield spec
            elif name == "gate_proj.weight":
                yield TensorSpec(f"{module}mlp.gate.weight", DTYPE, (self.num_experts, self.hidden_size))
            elif name == "down_proj.weight":
                yield from self._experts(f"{module}mlp.experts")

    def _experts(self, module: str) -> Iterator[TensorSpec]:
        into, out_of = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        for number in range(self.num_experts):
            for name, shape in (("gate_proj", into), ("up_proj", into), ("down_proj", out_of)):
                yield TensorSpec(f"{module}.{number}.{name}.weight", DTYPE, shape)

    def config(self) -> dict[str, Any]:
        """What transformers needs to know to build this model."""
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        size = {"moe_intermediate_size": self.intermediate_size, "norm_topk_prob": True, "decoder_sparse_step": 1}
        return {**super(Mixture, self).config(), **kind, **size}


QWEN3_8B: Final = Untied(
    num_hidden_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
QWEN3_32B: Final = Untied(
    num_hidden_layers=64,
    hidden_size=5120,
    intermediate_size=25600,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)

QWEN3_MOE: Final = Mixture(
    num_hidden_layers=12,
    hidden_size=2048,
    intermediate_size=768,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151936,
    num_experts=128,
    num_experts_per_tok=8,
)
SMALL_MOE: Final = Mixture(
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=4096,
    num_experts=32,
    num_experts_per_tok=4,
)

DENSE: Final[dict[str, Architecture]] = {"0.6b": QWEN3_600M, "small": SMALL}
"""Dense models in bfloat16: Qwen3-0.6B's, and one of some megabytes that is built in the same way."""

MODELS: Final[dict[str, Architecture]] = {
    **DENSE,
    "8b": QWEN3_8B,
    "32b": QWEN3_32B,
    "moe": QWEN3_MOE,
    "small-moe": SMALL_MOE,
}
"""Those, and such as need a GPU: Qwen3-8B's 16.4 GB, Qwen3-32B's 65.5 GB, and 12 of Qwen3-30B-A3B's layers, which are
16.2 GB in 4,719 tensors; and a mixture of experts of some megabytes."""
