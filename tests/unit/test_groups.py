"""Module groups by name: what engines' loaders need together has one key."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.groups import LEVELS, companion_key, fused_key, group_key, group_numbers, module_key
from tests.unit.model_names import COUNTS, MODELS, tensors_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        # decoders
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn"),
        ("model.layers.3.self_attn.k_norm.weight", "model.layers.3.self_attn"),
        ("model.layers.3.self_attn.sinks", "model.layers.3.self_attn"),
        ("model.layers.3.self_attn.indexer.wq_b.weight", "model.layers.3.self_attn"),
        ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp"),
        ("model.layers.3.input_layernorm.weight", "model.layers.3.input_layernorm"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h.11.attn"),
        ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "gpt_neox.layers.0.attention"),
        ("thinker.model.layers.7.self_attn.v_proj.bias", "thinker.model.layers.7.self_attn"),
        # experts
        ("model.layers.3.mlp.experts.17.down_proj.weight_scale_inv", "model.layers.3.mlp.experts.17"),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.layers.0.block_sparse_moe.experts.1"),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight",
         "decoder.layers.0.mlp.experts.local_experts.3"),
        ("model.layers.3.mlp.experts.gate_up_proj_blocks", "model.layers.3.mlp"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "model.layers.3.mlp"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "model.layers.3.mlp"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "model.layers.3.mlp"),
        # an expert that is a whole model: the last number that counts decides
        ("experts.2.layers.5.self_attn.q_proj.weight", "experts.2.layers.5.self_attn"),
        # mixers
        ("backbone.layers.9.mixer.A_log", "backbone.layers.9.mixer"),
        ("backbone.layers.9.mixer.conv1d.weight", "backbone.layers.9.mixer"),
        ("model.layers.2.linear_attn.in_proj_qkvz.weight", "model.layers.2.linear_attn"),
        ("model.layers.2.mamba.dt_bias", "model.layers.2.mamba"),
        ("layers.4.A_log", "layers.4"),
        # multi-token prediction
        ("model.layers.61.shared_head.head.weight", "model.layers.61.shared_head"),
        ("model.layers.61.eh_proj.weight", "model.layers.61.eh_proj"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn"),
        # layers of layers, and numbers inside of a layer
        ("stages.2.layers.17.attn.qkv.weight", "stages.2.layers.17.attn"),
        ("model.layers.0.self_attn.1.q_a_proj.weight", "model.layers.0.self_attn"),
        ("model.layers.0.mlps.0.gate_proj.weight", "model.layers.0.mlps"),
        ("unet.transformer_blocks.2.attn1.to_out.0.weight", "unet.transformer_blocks.2.attn1"),
        # vision towers, and what has no layers
        ("vision_tower.vision_model.encoder.layers.4.mlp.fc1.bias",
         "vision_tower.vision_model.encoder.layers.4.mlp"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3.attn"),
        ("visual.patch_embed.proj.weight", "visual.patch_embed.proj"),
        ("visual.merger.mlp.0.weight", "visual.merger.mlp.0"),
        ("visual.deepstack_merger_list.1.norm.weight", "visual.deepstack_merger_list.1.norm"),
        ("resampler.attn.q_proj.weight", "resampler.attn.qkv_proj"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("weight", ""),
        ("0.weight", "0"),
        ("", ""),
    ],
)  # fmt: skip
def test_group_key_names_the_submodule(name: str, group: str) -> None:
    assert group_key(name) == group


def test_group_key_does_not_take_a_number_inside_a_word_for_a_layer() -> None:
    assert group_key("model.layers.3.fc2.weight") == "model.layers.3.fc2"
    assert group_key("encoder.conv1.weight") == "encoder.conv1"
    assert group_key("model.layersx.3.a.b.weight") == "model.layersx.3.a"


def numbered(names: Sequence[str]) -> list[int]:
    """What `group_numbers` is to give, by the rule alone."""
    groups: dict[str, int] = {}
    return [groups.setdefault(group_key(name), len(groups)) for name in names]


COMPONENTS = (
    "model",
    "layers",
    "h",
    "experts",
    "local_experts",
    "0",
    "1",
    "17",
    "²",
    "٣",
    "w1",
    "self_attn",
    "weight",
    "",
)


@given(st.lists(st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=9).map(".".join), max_size=40))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_numbering_has_a_short_way_but_follows_the_rule(names: list[str]) -> None:
    assert group_numbers(names) == numbered(names)


@pytest.mark.parametrize("model", MODELS)
def test_numbering_a_models_tensors_follows_the_rule_in_any_order(model: str) -> None:
    names = [spec.name for spec in tensors_of(model, layers=3)]
    assert group_numbers(names) == numbered(names)
    random.Random(5).shuffle(names)
    assert group_numbers(names) == numbered(names)


@pytest.mark.parametrize(
    ("names", "level"),
    [
        (("l.self_attn.q_proj.weight", "l.self_attn.k_proj.bias", "l.self_attn.v_proj.weight"), fused_key),
        (("l.self_attn.q_a_proj.weight", "l.self_attn.kv_a_proj_with_mqa.weight_scale_inv"), fused_key),
        (("l.mlp.gate_proj.weight", "l.mlp.up_proj.weight_scale_inv"), fused_key),
        (("l.moe.experts.1.w1.weight", "l.moe.experts.1.w3.weight"), fused_key),
        (("l.linear_attn.in_proj_qkv.weight", "l.linear_attn.in_proj_z.weight"), fused_key),
        (("l.q_proj.qweight", "l.q_proj.qzeros", "l.q_proj.scales", "l.q_proj.g_idx"), companion_key),
        (
            ("l.q.weight_packed", "l.q.weight_scale", "l.q.weight_shape", "l.q.weight_zero_point"),
            companion_key,
        ),
        (("l.q.weight", "l.q.weight_scale_inv", "l.q.bias", "l.q.input_scale"), companion_key),
        (("l.q.weight", "l.q.weight_scale", "l.q.weight_scale_2", "l.q.input_scale"), companion_key),
        (("e.gate_up_proj_blocks", "e.gate_up_proj_scales", "e.gate_up_proj_bias"), companion_key),
        (("e.w13_weight", "e.w13_weight_scale", "e.w13_bias"), companion_key),
        (("a.in_proj_weight", "a.in_proj_bias"), companion_key),
    ],
)
def test_partners_stay_together_at_the_level(names: tuple[str, ...], level: object) -> None:
    for key in LEVELS[: LEVELS.index(level) + 1]:
        assert len({key(name) for name in names}) == 1


def test_finer_levels_part_what_is_not_needed_together() -> None:
    assert fused_key("l.self_attn.q_proj.weight") != fused_key("l.self_attn.o_proj.weight")
    assert module_key("l.self_attn.q_proj.weight") != module_key("l.self_attn.k_proj.weight")
    assert companion_key("e.gate_up_proj_scales") != companion_key("e.down_proj_scales")
    assert companion_key("m.A_log") != companion_key("m.D")


@pytest.mark.parametrize("model", MODELS)
def test_each_level_refines_the_one_before(model: str) -> None:
    for coarse, fine in pairwise(LEVELS):
        above: dict[str, set[str]] = defaultdict(set)
        for spec in tensors_of(model, layers=4):
            above[fine(spec.name)].add(coarse(spec.name))
        assert all(len(keys) == 1 for keys in above.values())


@pytest.mark.parametrize("model", MODELS)
def test_models_are_complete(model: str) -> None:
    """The lists that these tests rest on have as many tensors as the published checkpoints."""
    names = [spec.name for spec in tensors_of(model)]
    assert len(names) == len(set(names)) == COUNTS[model]
