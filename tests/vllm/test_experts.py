"""A mixture of experts in a real vLLM on the CPU, whose kernels read weights that vLLM packed for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import Checkpoint, Checkpoints, mixture
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Server, Trainer
from tests.vllm.test_servers import agree

LAYER = "model.layers.0."
EXPERTS = [f"mlp.experts.{number}.{name}_proj" for number in range(4) for name in ("gate", "up", "down")]
NAMES = [f"{LAYER}{name}.weight" for name in [*EXPERTS, "mlp.gate", "self_attn.k_proj", "post_attention_layernorm"]]
NAMES += ["model.layers.1.mlp.experts.3.down_proj.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def mixtures(place: Path) -> list[Checkpoint]:
    """Of the model ``mixture``; the first is on the servers' disks."""
    made = Checkpoints(place / "mixture", mixture(), (1, 108, 334))
    return [made.make() for _ in range(3)]


@pytest.fixture(scope="module")
def experts_trainer(daemon: Daemon) -> Iterator[Trainer]:
    """Of the model ``mixture``."""
    started = Trainer(daemon, "mixture")
    yield started
    started.close()


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def server(
    request: pytest.FixtureRequest,
    daemon: Daemon,
    experts_trainer: Trainer,
    mixtures: list[Checkpoint],
    all_faults: Faults,
    place: Path,
) -> Iterator[Server]:
    """Starts with what is on its disk if the daemon holds no version yet, and with the last one that was live else."""
    ranks, settings = request.param, {"CPE_VLLM_START": "disk"}
    name = f"experts-{ranks}"
    made = Server(name, daemon, mixtures[0], all_faults, place, ranks=ranks, model="mixture", environment=settings)
    try:
        made.start()
        yield made.ready()
    finally:
        made.kill()


def live(trainer: Trainer, mixtures: list[Checkpoint]) -> Checkpoint:
    """What the server holds."""
    return trainer.live or mixtures[0]


def other(trainer: Trainer, mixtures: list[Checkpoint]) -> Checkpoint:
    return next(checkpoint for checkpoint in mixtures if checkpoint is not live(trainer, mixtures))


def test_three_updates_of_experts(server: Server, experts_trainer: Trainer, mixtures: list[Checkpoint]) -> None:
    agree(server, live(experts_trainer, mixtures))
    for checkpoint in (mixtures[1], mixtures[2], mixtures[0]):
        assert not experts_trainer.publish(checkpoint).behind
        agree(server, checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_failure_after_any_tensor_of_experts_leaves_what_was_served(
    server: Server, experts_trainer: Trainer, mixtures: list[Checkpoint], faults: Faults, name: str
) -> None:
    """On the last rank only: the others had the version whole by then, or a part of it."""
    before = live(experts_trainer, mixtures)
    served = server.complete()
    faults.order(server.engine, int(server.engine[-1]) - 1, f"after {name}", "fail")
    with pytest.raises(CpeError, match="the test wants this"):
        experts_trainer.begin(other(experts_trainer, mixtures).tensors).live(timeout=LIVE_SECONDS)
    assert server.complete() == served, "not bit by bit what it was"
    agree(server, before)


@pytest.mark.parametrize("name", NAMES)
def test_version_that_lacks_a_tensor_of_experts_leaves_what_was_served(
    server: Server, experts_trainer: Trainer, mixtures: list[Checkpoint], name: str
) -> None:
    served = server.complete()
    poison = {key: tensor for key, tensor in other(experts_trainer, mixtures).tensors.items() if key != name}
    with pytest.raises(CpeError, match="not all tensors came of"):
        experts_trainer.begin(poison).live(timeout=LIVE_SECONDS)
    assert server.complete() == served, "not bit by bit what it was"


def test_experts_of_another_shape_are_refused(
    server: Server, experts_trainer: Trainer, mixtures: list[Checkpoint]
) -> None:
    poison = dict(other(experts_trainer, mixtures).tensors)
    name = f"{LAYER}mlp.experts.1.up_proj.weight"
    poison[name] = torch.cat([poison[name]] * 2)
    with pytest.raises(CpeError, match=re.escape(f"{name} is [")):
        experts_trainer.begin(poison).live(timeout=LIVE_SECONDS)
    agree(server, live(experts_trainer, mixtures))


def test_experts_take_the_next_good_version(
    server: Server, experts_trainer: Trainer, mixtures: list[Checkpoint]
) -> None:
    new = other(experts_trainer, mixtures)
    assert not experts_trainer.publish(new).behind
    agree(server, new)
