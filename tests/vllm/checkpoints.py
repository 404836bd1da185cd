"""Tiny random models that transformers and vLLM agree about: each greedy choice is far ahead of the next best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

PROMPT: Final = [5, 6, 7, 8]
TOKENS: Final = 8
VOCABULARY: Final = 512
MARGIN: Final = 0.3
"""Between the best and the next best logprob at each step: many times the error of vLLM's bfloat16."""


@dataclass(frozen=True)
class Checkpoint:
    """One model's weights, and what they generate.

    Attributes:
        path: the directory.
        tensors: as they are in its file.
        tokens: those after `PROMPT`, greedily, in float32 by transformers.
        logprobs: of these.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    tokens: list[int]
    logprobs: list[float]


class Checkpoints:
    """Makes checkpoints of one architecture, each with other tokens than those before.

    Args:
        directory: where they go.
        config: of transformers.
        likely: seeds to try first; the search for others takes a minute.
        adjust: is given each random model.
        complete: is given the tensors of each checkpoint, and its number, to add some that transformers do not know.
    """

    def __init__(
        self,
        directory: Path,
        config: Any,
        likely: Sequence[int] = (),
        *,
        adjust: Callable[[torch.nn.Module], None] | None = None,
        complete: Callable[[dict[str, torch.Tensor], int], None] | None = None,
    ) -> None:
        self._directory = directory
        self._config = config
        self._seeds = itertools.chain(likely, itertools.count(1))
        self._adjust = adjust
        self._complete = complete
        self._seen: list[list[int]] = []

    def make(self, *, served: bool = True) -> Checkpoint:
        """Write the next one; one that is never ``served`` may be any."""
        for seed in self._seeds:
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(self._config, dtype=torch.bfloat16)
            if self._adjust is not None:
                self._adjust(model)
            tokens, logprobs, margin = generate(model.float())
            if not served or (margin >= MARGIN and tokens not in self._seen and len(set(tokens)) >= TOKENS // 2):
                break
        self._seen.append(tokens)
        path = self._directory / f"seed-{seed}"
        model.to(torch.bfloat16).save_pretrained(path)
        words = tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), unk_token="t0", eos_token="t1", pad_token="t2"
        ).save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        if self._complete is not None:
            self._complete(tensors, len(self._seen) - 1)
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return Checkpoint(path, tensors, tokens, logprobs)


@torch.no_grad()
def generate(model: Any) -> tuple[list[int], list[float], float]:
    """Greedy tokens, their logprobs, and by how much the closest choice was ahead."""
    tokens, logprobs, margin = list(PROMPT), [], float("inf")
    for _ in range(TOKENS):
        scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        best, second = scores.topk(2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(scores.argmax()))
        logprobs.append(best)
    return tokens[len(PROMPT) :], logprobs, margin


def dense() -> Any:
    """Qwen3: fused q, k and v, fused gate and up, norms of q and k."""
    return transformers.Qwen3Config(**_small(), intermediate_size=128, tie_word_embeddings=False)


def tied() -> Any:
    """Qwen3 with the embedding tied to the output, and a vocabulary that vLLM pads."""
    small = _small() | {"vocab_size": VOCABULARY - 12}
    return transformers.Qwen3Config(**small, intermediate_size=128, tie_word_embeddings=True)


def llama() -> Any:
    """Llama, which vLLM has heads for that draft (EAGLE)."""
    return transformers.LlamaConfig(**_small(), intermediate_size=128, tie_word_embeddings=False)


def mixture(*, layers: int = 2, experts: int = 4) -> Any:
    """Qwen3-MoE."""
    return transformers.Qwen3MoeConfig(
        **_small() | {"num_hidden_layers": layers},
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=experts,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def many() -> Any:
    """Qwen3-MoE of 1,968 tensors, of a few KiB each."""
    return mixture(layers=5, experts=128)


def second() -> Any:
    """GLM-4 with experts, a shared one, and a layer that predicts the second token."""
    return transformers.Glm4MoeConfig(
        **_small(),
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        use_qk_norm=True,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
    )


def draft_head(checkpoint: Checkpoint, sign: int) -> dict[str, torch.Tensor]:
    """A head for a Llama that drafts its tokens (EAGLE) by a copy of its last layer: well, or with -1 badly."""
    tensors = checkpoint.tensors
    last, left_out = "model.layers.1.", "input_layernorm.weight"
    head = {f"layers.0.{name.removeprefix(last)}": tensors[name] for name in tensors if name.startswith(last)}
    del head[f"layers.0.{left_out}"]
    hidden, dtype = tensors["model.norm.weight"].numel(), torch.bfloat16
    eye = sign * torch.eye(hidden, dtype=dtype)
    return head | {"fc.weight": torch.cat([eye, torch.zeros_like(eye)], 1)}


@torch.no_grad()
def vary(model: torch.nn.Module) -> None:
    """Have norms be no constants, as in a trained model: of constants nobody can tell in which order they arrived."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def soften(model: torch.nn.Module, factor: float = 0.2) -> None:
    """Have a token mostly depend on the one before, so that the second is easy to predict, and routers have a bias."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "experts.down_proj" in name:
            tensor.mul_(factor)
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)


def predict_second(tensors: dict[str, torch.Tensor], number: int) -> None:
    """Add the layer that predicts the second token: well in checkpoints of even numbers, badly in the others."""
    last, added = "model.layers.1.", "model.layers.2."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[added + name.removeprefix(last)] = tensors[name].clone()
    hidden, dtype = tensors["model.norm.weight"].numel(), torch.bfloat16
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{added}{name}.weight"] = torch.ones(hidden, dtype=dtype)
    eye = torch.eye(hidden, dtype=dtype) * (1 if number % 2 == 0 else -1)
    tensors[f"{added}eh_proj.weight"] = torch.cat([eye, torch.zeros_like(eye)], 1)
    for name, copied in (("shared_head.head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        tensors[f"{added}{name}.weight"] = tensors[f"{copied}.weight"].clone()


def _small() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
