"""Shapes by a model's configuration are those of its checkpoints, or none are said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference_plugins.disk import shapes_on_disk
from inference_plugins.vllm.architecture import shapes_by_config
from inference_plugins.vllm.snapshot import shapes

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def checkpoint(kind: str, place: Path, **more: Any) -> Any:
    """Write one, as transformers does; returns its configuration as whoever reads it has it."""
    config = getattr(transformers, f"{kind}Config")(**SMALL, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return transformers.AutoConfig.from_pretrained(place)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama", "Gemma2", "Mistral"])
def test_shapes_are_those_of_the_checkpoint(kind: str, tied: bool, tmp_path: Path) -> None:
    config = checkpoint(kind, tmp_path, tie_word_embeddings=tied)
    written, said = shapes_on_disk(str(tmp_path)), shapes_by_config(config)
    assert written
    assert {name: said.get(name) for name in written} == written


def test_what_is_said_of_experts_is_what_checkpoints_have(tmp_path: Path) -> None:
    """Where transformers keeps them otherwise than checkpoints do, nothing is said."""
    config = checkpoint("Qwen3Moe", tmp_path, **EXPERTS)
    written, said = shapes_on_disk(str(tmp_path)), shapes_by_config(config)
    assert not said or {name: said.get(name) for name in written} == written


@pytest.mark.parametrize(
    "config",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(architectures=None),
        SimpleNamespace(architectures=["NobodysForCausalLM"], model_type="nobodys"),
        SimpleNamespace(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),  # which cannot be made of that
    ],
)
def test_nothing_is_said_of_what_transformers_does_not_have(config: Any) -> None:
    assert shapes_by_config(config) == {}


def test_nothing_is_said_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    config = checkpoint("Qwen3", tmp_path)
    config.quantization_config = {"quant_method": "fp8"}
    assert shapes_by_config(config) == {}


def test_weights_that_are_made_up_have_the_shapes_of_their_configuration(tmp_path: Path) -> None:
    config = checkpoint("Qwen3", tmp_path)
    whole = shapes_on_disk(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    model = SimpleNamespace(model=str(tmp_path), hf_config=config)
    found = shapes(model, SimpleNamespace())
    assert {name: found[name] for name in whole} == whole
