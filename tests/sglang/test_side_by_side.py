"""A vLLM and an SGLang server on one daemon: one publish updates both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang.servers import Server
from tests.sglang.test_servers import agree
from tests.vllm import servers as vllm
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import Daemon, Trainer
from tests.vllm.test_servers import agree as vllm_agrees


@pytest.fixture
def neighbour(daemon: Daemon, trainer: Trainer, family: list[Checkpoint], place: Path) -> Iterator[vllm.Server]:
    """A vLLM server of the same model."""
    if not vllm.PYTHON.exists():
        pytest.skip("needs .venv-vllm beside .venv-sglang: `make test-vllm` makes it")
    faults = vllm.Faults(place / "vllm-faults")
    server = vllm.Server("neighbour", daemon, family[0], faults, place, own_routes=True)
    try:
        server.start()
        yield server.ready()
    finally:
        server.kill()


def test_one_publish_updates_vllm_and_sglang(
    one: Server, neighbour: vllm.Server, trainer: Trainer, family: list[Checkpoint]
) -> None:
    assert trainer.live is not None
    agree(one, trainer.live)
    vllm_agrees(neighbour, trainer.live)
    for checkpoint in family:
        report = trainer.publish(checkpoint)
        assert {report.engines[name].outcome for name in ("one", "neighbour")} == {"updated"}
        agree(one, checkpoint)
        vllm_agrees(neighbour, checkpoint)
