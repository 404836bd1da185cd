"""How a vLLM server starts: what it loads, what it waits for, and that it does not wait for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, START_SECONDS, Daemon, Faults, Server, Trainer
from tests.vllm.test_servers import agree


def test_start_without_a_daemon_fails_at_its_deadline(
    daemon: Daemon, family: list[Checkpoint], all_faults: Faults, place: Path
) -> None:
    nowhere = {"CPE_ENGINES_SOCKET": str(place / "nowhere.sock"), "CPE_VLLM_START_SECONDS": "2"}
    server = Server("alone", daemon, family[0], all_faults, place, environment=nowhere)
    try:
        server.start()
        assert server.wait(START_SECONDS) != 0
    finally:
        server.kill()
    said = server.log.read_text()
    assert "no version that may be served came within 2 s" in said
    assert "CPE_VLLM_START=any serves" in said


def test_experts_and_a_tied_embedding_and_a_start_from_disk(
    daemon: Daemon, mixtures: list[Checkpoint], all_faults: Faults, place: Path
) -> None:
    """The daemon holds no version of this model: what is on disk is served until one comes."""
    settings = {"CPE_VLLM_START": "disk"}
    server = Server("moe", daemon, mixtures[0], all_faults, place, model="mixture", environment=settings)
    trainer = Trainer(daemon, "mixture")
    try:
        server.start()
        agree(server.ready(), mixtures[0])
        for checkpoint in (mixtures[1], mixtures[0], mixtures[1]):
            assert not trainer.publish(checkpoint).behind
            agree(server, checkpoint)
        lacking = dict(mixtures[0].tensors)
        del lacking["model.layers.1.mlp.experts.2.up_proj.weight"]
        with pytest.raises(CpeError, match="not all tensors came of"):
            trainer.begin(lacking).live(timeout=LIVE_SECONDS)
        agree(server, mixtures[1])
    finally:
        trainer.close()
        server.kill()
