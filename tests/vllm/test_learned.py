"""A real vLLM that learns its loaders, as it does for users: the other tests order faults after tensors that they load.

Its two workers may pack their matrices for the CPU's kernels: which ones, and whether at all, depends on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import Checkpoint, Checkpoints, dense
from tests.vllm.servers import LIVE_SECONDS, ROOT, Daemon, Faults, Server, Trainer, started
from tests.vllm.test_servers import LAYER, agree

SEEDS = (30, 195, 227)
COPIED = f"{LAYER}input_layernorm.weight"
PACKED = f"{LAYER}self_attn.k_proj.weight"
TENSORS = 25
TEACHING = 4
"""Versions after which all is learned that can be."""


@torch.no_grad()
def vary(model: torch.nn.Module) -> None:
    """Give norms weights that differ: of what holds one number over and over, nobody can see where it goes."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1, 0.1)


@pytest.fixture(scope="module")
def versions(place: Path) -> list[Checkpoint]:
    """Of the model ``learned``."""
    made = Checkpoints(place / "learned", dense(), SEEDS, adjust=vary)
    return [made.make() for _ in SEEDS]


@pytest.fixture(scope="module")
def publishing(daemon: Daemon) -> Iterator[Trainer]:
    """Of the model ``learned``."""
    trainer = Trainer(daemon, "learned")
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def learner(
    daemon: Daemon, publishing: Trainer, versions: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[Server]:
    """It starts with the live version."""
    publishing.publish(versions[1])
    settings = {"CPE_LEARNED": "on"}
    server = Server("learner", daemon, versions[0], all_faults, place, ranks=2, model="learned", environment=settings)
    with started(server):
        yield server.ready()


def loading(daemon: Daemon) -> dict[str, Any]:
    """What `cpe status --json` says of how it loads."""
    (engine,) = [engine for engine in daemon.status()["engines"] if engine["engine"] == "learner"]
    found: dict[str, Any] = engine["loading"]
    return found


@pytest.mark.essential
def test_versions_are_right_while_loaders_are_learned_and_after(
    learner: Server, publishing: Trainer, versions: list[Checkpoint], daemon: Daemon
) -> None:
    agree(learner, versions[1])
    for number in range(TEACHING + 3):
        checkpoint = versions[number % 3]
        assert not publishing.publish(checkpoint).behind
        agree(learner, checkpoint)
    said = loading(daemon)
    assert (said["learned"], said["unproven"], said["kept"]) == (TENSORS, 0, {})


@pytest.mark.essential
def test_status_says_how_many_tensors_are_learned(learner: Server, daemon: Daemon) -> None:
    command = [sys.executable, "-m", "cpe_daemon", "status", "--to", daemon.front]
    wide = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=60, check=True)
    (line,) = [line for line in done.stdout.splitlines() if re.search(r"\blearner\b", line) and " of " in line]
    assert loading(daemon)["learned"] == TENSORS
    assert f" {TENSORS} of {TENSORS} " in line, done.stdout


@pytest.mark.essential
@pytest.mark.parametrize("name", [COPIED, PACKED])
def test_version_that_lacks_a_tensor_leaves_what_was_served(
    learner: Server, publishing: Trainer, versions: list[Checkpoint], name: str
) -> None:
    """Whether it would be copied, or go through vLLM's loaders."""
    before = publishing.live
    assert before is not None
    new = next(checkpoint for checkpoint in versions if checkpoint is not before)
    poison = {key: tensor for key, tensor in new.tensors.items() if key != name}
    with pytest.raises(CpeError):
        publishing.begin(poison).live(timeout=LIVE_SECONDS)
    agree(learner, before)
    assert not publishing.publish(new).behind
    agree(learner, new)


@pytest.mark.parametrize("name", [COPIED, PACKED])
def test_version_of_another_shape_is_refused(
    learner: Server, publishing: Trainer, versions: list[Checkpoint], name: str
) -> None:
    before = publishing.live
    assert before is not None
    poison = dict(next(checkpoint for checkpoint in versions if checkpoint is not before).tensors)
    poison[name] = torch.cat([poison[name]] * 2)
    with pytest.raises(CpeError, match=re.escape(f"{name} is [")):
        publishing.begin(poison).live(timeout=LIVE_SECONDS)
    agree(learner, before)
