"""Draft models in a real vLLM on the CPU: one version goes into the model and its draft.

How many of a draft's tokens are accepted tells which version it has: the model verifies them, so tokens do not. The
first model has experts, and a layer that predicts second tokens.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import (
    Checkpoint,
    Checkpoints,
    dense,
    draft_head,
    llama,
    predict_second,
    second,
    soften,
)
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Server, Trainer, started
from tests.vllm.test_servers import agree

LAYERS = "model.layers."
NAMES = [
    f"{LAYERS}{name}"
    for name in (
        "0.self_attn.k_proj.weight",
        "1.mlp.gate.e_score_correction_bias",
        "1.mlp.shared_experts.up_proj.weight",
        "1.mlp.experts.2.down_proj.weight",
        "2.eh_proj.weight",
        "2.self_attn.v_proj.weight",
        "2.mlp.gate.e_score_correction_bias",
        "2.mlp.experts.3.up_proj.weight",
    )
]
SEEDS = (176, 203)
"""Of models whose every choice is clear."""
MANY, FEW = 0.9, 0.5
"""Of a draft's tokens: more are accepted of one that has the model's version, fewer of another."""


@pytest.fixture(scope="module")
def pairs(place: Path) -> list[Checkpoint]:
    """Of the model ``second``."""
    made = Checkpoints(place / "second", second(), (23, 58), adjust=soften, complete=predict_second)
    return [made.make() for _ in range(2)]


@pytest.fixture(scope="module")
def publishing(daemon: Daemon) -> Iterator[Trainer]:
    trainer = Trainer(daemon, "second")
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def server(
    daemon: Daemon, publishing: Trainer, pairs: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[Server]:
    """It starts with what is on its disk."""
    settings = {"CPE_VLLM_START": "disk"}
    made = Server("second", daemon, pairs[0], all_faults, place, model="second", environment=settings)
    made._command += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1})]
    with started(made):
        yield made.ready()


@pytest.fixture(scope="module")
def first(server: Server) -> tuple[float, float]:
    """What becomes of the draft's tokens before any version came."""
    return accepted(server)


def accepted(server: Server) -> tuple[float, float]:
    """How many tokens the draft of a server says in one request, and how many of these are accepted."""
    before = counts(server)
    server.complete(tokens=40)
    drafted, taken = (after - known for after, known in zip(counts(server), before, strict=True))
    return drafted, taken


def counts(server: Server) -> tuple[float, float]:
    said = server.call("/metrics").decode()
    return number(said, "draft_tokens"), number(said, "accepted_tokens")


def number(said: str, name: str) -> float:
    found = re.search(rf"^vllm:spec_decode_num_{name}_total\{{.*\}} (\S+)$", said, re.MULTILINE)
    return float(found[1]) if found else 0.0


def part(server: Server) -> float:
    """Which part of a draft's tokens is accepted."""
    drafted, taken = accepted(server)
    return taken / drafted


# --- a layer of the same checkpoint ----------------------------------------------------------------------------------


def test_updates_of_a_model_and_its_draft(
    server: Server, publishing: Trainer, pairs: list[Checkpoint], first: tuple[float, float]
) -> None:
    agree(server, pairs[0])
    served = server.complete()
    for version in (1, 0, 1, 0):
        assert not publishing.publish(pairs[version]).behind
        agree(server, pairs[version])
        assert (accepted(server) == first) == (version == 0)
    assert server.complete() == served, "not bit by bit what it was"


@pytest.mark.parametrize("name", NAMES)
def test_failure_after_any_tensor_leaves_model_and_draft(
    server: Server,
    publishing: Trainer,
    pairs: list[Checkpoint],
    first: tuple[float, float],
    faults: Faults,
    name: str,
) -> None:
    publishing.publish(pairs[0])
    served = server.complete()
    faults.order("second", 0, f"after {name}", "fail")
    with pytest.raises(CpeError, match="the test wants this"):
        publishing.begin(pairs[1].tensors).live(timeout=LIVE_SECONDS)
    assert server.complete() == served, "not bit by bit what it was"
    assert accepted(server) == first


@pytest.mark.parametrize("name", NAMES)
def test_version_that_lacks_a_tensor_leaves_model_and_draft(
    server: Server, publishing: Trainer, pairs: list[Checkpoint], first: tuple[float, float], name: str
) -> None:
    publishing.publish(pairs[0])
    served = server.complete()
    poison = {key: tensor for key, tensor in pairs[1].tensors.items() if key != name}
    with pytest.raises(CpeError, match="not all tensors came of"):
        publishing.begin(poison).live(timeout=LIVE_SECONDS)
    assert server.complete() == served, "not bit by bit what it was"
    assert accepted(server) == first


def test_version_without_any_tensor_of_the_draft_leaves_it(
    server: Server, publishing: Trainer, pairs: list[Checkpoint]
) -> None:
    """As of a trainer that does not train it: the model verifies what it says."""
    without = {key: tensor for key, tensor in pairs[1].tensors.items() if not key.startswith(f"{LAYERS}2.")}
    assert not publishing.begin(without).live(timeout=LIVE_SECONDS).behind
    agree(server, pairs[1])


# --- a draft with a checkpoint of its own ----------------------------------------------------------------------------


def test_draft_of_a_checkpoint_of_its_own(daemon: Daemon, all_faults: Faults, place: Path) -> None:
    """A copy of the model: all that it says is accepted, if both have the same version."""
    made = Checkpoints(place / "apart", dense(), (50, 73))
    old, new = made.make(), made.make()
    shutil.copytree(old.path, place / "apart" / "draft")
    settings = {"CPE_VLLM_START": "disk"}
    server = Server("apart", daemon, old, all_faults, place, model="apart", environment=settings)
    speculative = {"method": "draft_model", "model": str(place / "apart" / "draft"), "num_speculative_tokens": 2}
    server._command += ["--speculative-config", json.dumps(speculative)]
    trainer = Trainer(daemon, "apart")
    try:
        with started(server):
            agree(server.ready(), old)
            assert part(server) > MANY
            for checkpoint in (new, old, new):
                assert not trainer.begin(both(checkpoint)).live(timeout=LIVE_SECONDS).behind
                agree(server, checkpoint)
                assert part(server) > MANY
            assert not trainer.begin(old.tensors).live(timeout=LIVE_SECONDS).behind
            agree(server, old)
            assert part(server) < FEW, "the draft has the version before"
            lacking = both(new)
            del lacking["draft_model.model.norm.weight"]
            with pytest.raises(CpeError, match=r"not all tensors came of model\.norm"):
                trainer.begin(lacking).live(timeout=LIVE_SECONDS)
            agree(server, old)
            wide = both(new)
            wide["draft_model.lm_head.weight"] = torch.cat([wide["draft_model.lm_head.weight"]] * 2)
            with pytest.raises(CpeError, match=r"draft_model\.lm_head\.weight is \["):
                trainer.begin(wide).live(timeout=LIVE_SECONDS)
    finally:
        trainer.close()


def both(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """A version for a model, and for a copy of it as its draft."""
    return checkpoint.tensors | {f"draft_model.{name}": tensor for name, tensor in checkpoint.tensors.items()}


# --- a head that drafts (EAGLE) --------------------------------------------------------------------------------------


def test_eagle_head_of_a_checkpoint_of_its_own(daemon: Daemon, all_faults: Faults, place: Path) -> None:
    """It shares the model's embedding and output, and has one layer: a good one, or one that drafts nonsense."""
    made = Checkpoints(place / "eagle", llama(), SEEDS, adjust=functools.partial(soften, factor=0.005))
    models = [made.make(), made.make()]
    heads = {sign: draft_head(models[0], sign) for sign in (1, -1)}
    directory = place / "eagle" / "head"
    config = llama()
    config.num_hidden_layers, config.architectures = 1, ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    save_file({name: tensor.clone() for name, tensor in heads[1].items()}, directory / "model.safetensors")
    settings = {"CPE_VLLM_START": "disk"}
    server = Server("eagle", daemon, models[0], all_faults, place, model="eagle", environment=settings)
    speculative = {"method": "eagle", "model": str(directory), "num_speculative_tokens": 1}
    server._command += ["--speculative-config", json.dumps(speculative)]
    trainer = Trainer(daemon, "eagle")

    def version(model: int, sign: int) -> dict[str, torch.Tensor]:
        return models[model].tensors | {f"draft_model.{name}": tensor for name, tensor in heads[sign].items()}

    try:
        with started(server):
            agree(server.ready(), models[0])
            well, seen = part(server), []
            for model, sign in ((0, -1), (0, 1), (1, -1), (0, 1)):
                assert not trainer.begin(version(model, sign)).live(timeout=LIVE_SECONDS).behind
                agree(server, models[model])
                seen.append(part(server))
            assert well > FEW > seen[0], (well, seen)
            assert seen[1] == seen[3] == well, (well, seen)
            for lacks in ("draft_model.fc.weight", "draft_model.layers.0.self_attn.k_proj.weight"):
                lacking = version(1, -1)
                del lacking[lacks]
                with pytest.raises(CpeError, match="not all tensors came of"):
                    trainer.begin(lacking).live(timeout=LIVE_SECONDS)
                agree(server, models[0])
                assert part(server) == well
    finally:
        trainer.close()
