"""In a real vLLM all that is packed for kernels is learned, experts and linear layers alike; without a daemon."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.vllm.checkpoints import Checkpoints, mixture, vary
from tests.vllm.servers import PYTHON, ROOT, START_SECONDS, Daemon, Faults, variables


@pytest.mark.essential
def test_everything_that_is_packed_is_copied_to_the_same_bits(daemon: Daemon, all_faults: Faults, place: Path) -> None:
    made = Checkpoints(place / "packing", mixture(), adjust=vary)
    versions = [made.make(served=False) for _ in range(3)]
    environment = variables("packing", daemon, all_faults) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_PLUGINS": "none"}
    command = [str(PYTHON), "-m", "tests.vllm.packing", *[str(version.path) for version in versions]]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    said = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    assert len(said) == 2, done.stderr[-4000:]
    loaded, copied = said
    assert copied["held"] == loaded["held"]
    tensors = len(versions[0].tensors)
    norms = sum(name.endswith("norm.weight") for name in versions[0].tensors)
    assert (copied["learned"], copied["kept"], copied["given"]) == (tensors, {}, [])
    assert copied["made_over"] == tensors - norms
    assert len(loaded["given"]) == tensors
