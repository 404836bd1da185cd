"""The examples that update a vLLM, as their readers run them.

Last in their order, as tests of one model's trainer cannot come after: the examples' runs supersede it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import ROOT, Daemon, Server, Trainer

STEP = re.compile(r"^step (\d): reward \d\.\d+, .*, the server generates (.*)$", re.MULTILINE)
PUBLISHED_SECONDS = 120


def example(*words: object, **environment: str) -> str:
    """Run one; it has to end well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PUBLISHED_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_example_puts_a_checkpoint_into_running_servers(
    one: Server, trainer: Trainer, family: list[Checkpoint], daemon: Daemon, ranks: int
) -> None:
    """By itself, and by torchrun."""
    torchrun = () if ranks == 1 else ("-m", "torch.distributed.run", "--nproc-per-node", ranks)
    checkpoint = family[ranks]
    terms = (checkpoint.path, daemon.runtime_dir, "--model", "policy", "--version", ranks)
    said = example(*torchrun, "examples/update.py", *terms)
    assert f"policy@update#{ranks} live at" in said
    assert len(re.findall(r"^staged after \d+\.\d\d s, live \d+\.\d\d s later$", said, re.MULTILINE)) == 1
    assert one.tokens() == checkpoint.tokens


def test_example_learns_from_what_the_server_makes_of_its_policy(
    one: Server, family: list[Checkpoint], daemon: Daemon
) -> None:
    before = one.tokens()
    terms = (family[1].path, daemon.runtime_dir, one.url, "--steps", 2, "--rate", 0.03)
    said = example("examples/rl_loop.py", *terms, VLLM_API_KEY=daemon.key)
    steps = STEP.findall(said)
    assert [number for number, _ in steps] == ["1", "2"]
    assert all(agrees.startswith("as the policy") for _, agrees in steps)
    assert one.tokens() != before
