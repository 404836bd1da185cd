"""The demo's parts: its model is Qwen3's, its slices are Megatron's, its steps an optimizer's, and it fits the host."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from cpe_daemon.config import load_config
from cpe_daemon.demo import memory, run
from cpe_daemon.demo.architecture import (
    QWEN3_600M,
    SMALL,
    Architecture,
    parameters,
    read_config,
    shared_dimension,
)
from cpe_daemon.demo.checkpoint import INDEX_NAME, write_config, write_weights
from cpe_daemon.demo.digests import digest_of
from cpe_daemon.demo.engine import local_tensors
from cpe_daemon.demo.memory import Sizes, choose, needed_bytes
from cpe_daemon.demo.options import Options
from cpe_daemon.demo.processes import Process, Talker, config_text
from cpe_daemon.demo.scene import compare
from cpe_daemon.demo.trainer import LEARNING_RATE, Trainer, slice_of
from cpe_daemon.errors import DeadlineError, ManifestError, MisuseError, PeerLostError, ResourceError

ROOT = Path(__file__).parent.parent.parent
TINY = Architecture(2, 64, 128, 4, 2, 32, 1024)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of TINY."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_config(directory, TINY)
    write_weights(directory, TINY, 0, lambda done, total: None)
    return directory


# --- the model -------------------------------------------------------------------------------------------------------


def real_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """What transformers makes of a config.json, by name; tied weights once."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", [QWEN3_600M, SMALL, QWEN3_600M.scaled(0.1)])
def test_architecture_has_the_names_and_shapes_of_the_real_model(architecture: Architecture) -> None:
    ours = {spec.name: spec.shape for spec in architecture.specs()}
    assert ours == real_shapes(architecture.config())
    assert {spec.dtype for spec in architecture.specs()} == {"bfloat16"}


def test_architecture_has_the_size_of_the_real_model() -> None:
    assert parameters(QWEN3_600M) == 596_049_920
    assert QWEN3_600M.nbytes == 1_192_099_840
    assert len(list(QWEN3_600M.specs())) == 310


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 1.0])
def test_architecture_scales_in_proportion(fraction: float) -> None:
    scaled = QWEN3_600M.scaled(fraction)
    assert scaled.nbytes == pytest.approx(fraction * QWEN3_600M.nbytes, rel=0.2, abs=30e6)
    assert scaled.vocab_size % 2 == 0
    assert QWEN3_600M.scaled(1.0) == QWEN3_600M


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("model.embed_tokens.weight", 0),
        ("model.layers.3.self_attn.q_proj.weight", 0),
        ("model.layers.3.self_attn.k_proj.weight", 0),
        ("model.layers.3.self_attn.v_proj.weight", 0),
        ("model.layers.3.self_attn.o_proj.weight", 1),
        ("model.layers.3.mlp.gate_proj.weight", 0),
        ("model.layers.3.mlp.up_proj.weight", 0),
        ("model.layers.3.mlp.down_proj.weight", 1),
        ("model.layers.3.self_attn.q_norm.weight", None),
        ("model.layers.3.self_attn.k_norm.weight", None),
        ("model.layers.3.input_layernorm.weight", None),
        ("model.layers.3.post_attention_layernorm.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_slicing_is_megatrons(name: str, dim: int | None) -> None:
    assert shared_dimension(name) == dim


def test_slices_of_all_ranks_make_up_the_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    for spec in TINY.specs():
        whole = torch.rand(spec.shape, generator=generator).to(torch.bfloat16)
        parts = [slice_of(spec.name, whole, rank, 2) for rank in range(2)]
        assert {tuple(part.shape) for part in parts} == {TINY.local_shape(spec, 2)}
        dim = shared_dimension(spec.name)
        assert torch.equal(parts[0] if dim is None else torch.cat(parts, dim), whole)


def test_engine_begins_with_other_weights_on_every_rank(checkpoint: Path) -> None:
    trainer = Trainer(0)
    trainer.load(checkpoint)
    ranks = [local_tensors(TINY, 2, seed) for seed in (1000, 1001)]
    for name, tensor in trainer.tensors.items():
        digests = {digest_of(rank[name]) for rank in ranks}
        assert len(digests) == 2
        assert digest_of(slice_of(name, tensor, 0, 2)) not in digests


# --- the checkpoint --------------------------------------------------------------------------------------------------


def test_checkpoint_has_shards_an_index_and_a_config(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX_NAME).read_text())
    held: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in checkpoint.glob("model-*-of-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= {name: (path.name, tuple(file.get_tensor(name).shape)) for name in file.keys()}  # noqa: SIM118
    assert {name: file for name, (file, _) in held.items()} == index["weight_map"]
    assert {name: shape for name, (_, shape) in held.items()} == {spec.name: spec.shape for spec in TINY.specs()}
    assert index["metadata"]["total_size"] == TINY.nbytes
    assert len(set(index["weight_map"].values())) > 1
    assert read_config(checkpoint) == TINY


def test_checkpoint_is_one_that_transformers_loads(checkpoint: Path) -> None:
    from transformers import Qwen3ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, found = Qwen3ForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    trainer = Trainer(0)
    trainer.load(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trainer.tensors[name]), name


def test_config_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ManifestError, match="num_hidden_layers"):
        read_config(tmp_path)


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_step_changes_most_tensors_by_no_more_than_an_optimizer_does(checkpoint: Path) -> None:
    trainer = Trainer(0)
    trainer.load(checkpoint)
    before = {name: tensor.clone() for name, tensor in trainer.tensors.items()}
    trainer.step()
    changed = [name for name, tensor in trainer.tensors.items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) / 2
    for name, tensor in trainer.tensors.items():
        moved = (tensor.float() - before[name].float()).abs().max().item()
        assert moved <= 2 * LEARNING_RATE, name
    again = {name: tensor.clone() for name, tensor in trainer.tensors.items()}
    trainer.step()
    assert any(not torch.equal(trainer.tensors[name], again[name]) for name in changed)


def test_digest_is_of_the_values_in_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert digest_of(tensor.t()) == digest_of(tensor.t().contiguous()) != digest_of(tensor)
    spoilt = tensor.clone()
    spoilt.view(torch.uint8).view(-1)[17] ^= 1
    assert digest_of(spoilt) != digest_of(tensor)


def test_comparison_names_what_differs_or_is_on_one_side_only() -> None:
    same = {"a": "1", "b": "2"}
    assert compare([same, same], [same, same]) == ([], 4)
    assert compare([same, {"a": "1", "b": "X"}], [same, same]) == (["rank 1 b"], 4)
    assert compare([{"a": "1"}], [same]) == (["rank 0 b"], 2)
    assert compare([same], [{"a": "1"}]) == (["rank 0 b"], 2)


# --- the host --------------------------------------------------------------------------------------------------------


def test_daemon_is_configured_as_configs_demo_yaml_says(tmp_path: Path) -> None:
    shipped = load_config(ROOT / "configs" / "demo.yaml", environ={})
    file = tmp_path / "config.yaml"
    file.write_text(config_text(Path("/tmp/x"), Sizes.of(QWEN3_600M)))
    ours = load_config(file, environ={})
    assert (ours.arena, ours.device) == (shipped.arena, shipped.device)
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    assert settings.keys() == {"arena", "device"}


@pytest.mark.parametrize("architecture", [TINY, SMALL, *(QWEN3_600M.scaled(2.0**-n) for n in range(6))])
def test_daemon_has_room_for_two_versions_and_several_buckets(architecture: Architecture, tmp_path: Path) -> None:
    sizes = Sizes.of(architecture)
    assert sizes.arena_bytes > 2 * architecture.nbytes + 256 * len(list(architecture.specs()))
    assert architecture.nbytes > 2 * sizes.slot_bytes or architecture is TINY
    (tmp_path / "config.yaml").write_text(config_text(Path("/tmp/x"), sizes))
    load_config(tmp_path / "config.yaml", environ={})


def test_model_shrinks_to_what_the_host_bears(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "is_in_memory", lambda directory: False)
    for free in (64e9, 8e9, 4e9, 2.2e9, 1.5e9):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: int(free))
        chosen, why = choose(Options(), 2, tmp_path)
        assert needed_bytes(chosen, 2) <= free
        assert (chosen == QWEN3_600M) == (why == "")
    assert "a smaller model than asked for" in why
    monkeypatch.setattr(memory, "available_bytes", lambda: int(1e9))
    with pytest.raises(ResourceError, match=r"takes 1\.\d GB of memory .* this host has 1\.0 GB"):
        choose(Options(), 2, tmp_path)


def test_memory_file_systems_are_recognised() -> None:
    assert memory.is_in_memory(Path("/dev/shm"))
    assert not memory.is_in_memory(Path("/proc/self"))


def test_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(MisuseError, match="is not empty"):
        run(Options(small=True, keep=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- processes -------------------------------------------------------------------------------------------------------


def test_process_that_ended_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = "import sys; sys.stderr.write('one\\nno such luck\\n'); sys.exit(3)"
    with Talker("the child", ["-c", child], tmp_path / "log") as process:
        with pytest.raises(
            PeerLostError, match=r"the child ended with status 3; its last words:\n  one\n  no such luck"
        ):
            process.hear(30.0)
        process.tell({"ask": "anything"})
        with pytest.raises(PeerLostError, match="no such luck"):
            process.hear(30.0)


def test_process_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with (
        Talker("the child", ["-c", "input()"], tmp_path / "log") as process,
        pytest.raises(DeadlineError, match=r"the child said nothing for 0\.1 s"),
    ):
        process.hear(0.1)


def test_process_without_an_end_is_ended(tmp_path: Path) -> None:
    child = "import signal; signal.pause()"
    with Process("the child", ["-c", child], tmp_path / "log") as process:
        process.check()
    with pytest.raises(PeerLostError, match=f"status {-15}"):
        process.check()
