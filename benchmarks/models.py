"""The models that benchmarks move, by the name that ``--model`` takes: real names and shapes, random bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cpe_daemon.core.types import TensorSpec
from cpe_daemon.demo.architecture import DTYPE, QWEN3_600M, SMALL, Architecture


class Untied(Architecture):
    """A decoder whose output head is a tensor of its own, as the larger ones have it."""

    __slots__ = ()

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint, in module order."""
        yield from super().specs()
        yield TensorSpec("lm_head.weight", DTYPE, (self.vocab_size, self.hidden_size))


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

DENSE: Final[dict[str, Architecture]] = {"0.6b": QWEN3_600M, "small": SMALL}
"""Dense models in bfloat16: Qwen3-0.6B's, and one of some megabytes that is built in the same way."""

MODELS: Final[dict[str, Architecture]] = {**DENSE, "8b": QWEN3_8B, "32b": QWEN3_32B}
"""Those, and such as need a GPU: Qwen3-8B's 16.4 GB and Qwen3-32B's 65.5 GB."""
