"""Models of these tests beside those of vLLM's."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.vllm.checkpoints import VOCABULARY


@torch.no_grad()
def vary(model: torch.nn.Module) -> None:
    """Have norms be no constants, as in a trained model: of constants nobody can tell in which order they arrived."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def many() -> Any:
    """Qwen3-MoE of 1,968 tensors, of a few KiB each."""
    return transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=128,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
