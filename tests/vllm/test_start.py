"""How a vLLM server starts: what it loads, what it waits for, and that it does not wait for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, START_SECONDS, Daemon, Faults, Server, Trainer, started
from tests.vllm.test_servers import agree


@pytest.fixture(scope="module")
def starting(
    daemon: Daemon, family: list[Checkpoint], tied_family: list[Checkpoint], all_faults: Faults, place: Path
) -> Iterator[dict[str, Server]]:
    """Servers that start on their own terms."""
    nowhere = {"CPE_ENGINES_SOCKET": str(place / "nowhere.sock"), "CPE_VLLM_START_SECONDS": "2"}
    disk = {"CPE_VLLM_START": "disk"}
    made = (
        Server("alone", daemon, family[0], all_faults, place, environment=nowhere),
        Server("tied", daemon, tied_family[0], all_faults, place, model="tied", environment=disk),
    )
    with started(*made) as servers:
        yield {server.engine: server for server in servers}


def test_start_without_a_daemon_fails_at_its_deadline(starting: dict[str, Server]) -> None:
    server = starting["alone"]
    assert server.wait(START_SECONDS) != 0
    said = server.log.read_text()
    assert "no version that may be served came within 2 s" in said
    assert "CPE_VLLM_START=any serves" in said


def test_tied_embedding_and_padded_vocabulary_and_a_start_from_disk(
    starting: dict[str, Server], daemon: Daemon, tied_family: list[Checkpoint]
) -> None:
    """The daemon holds no version of this model: what is on disk is served until one comes."""
    old, new = tied_family
    server = starting["tied"].ready()
    agree(server, old)
    trainer = Trainer(daemon, "tied")
    try:
        for checkpoint in (new, old, new):
            assert not trainer.publish(checkpoint).behind
            agree(server, checkpoint)
        lacking = dict(old.tensors)
        del lacking["model.embed_tokens.weight"]
        with pytest.raises(CpeError, match=r"not all tensors came of model\.embed_tokens"):
            trainer.begin(lacking).live(timeout=LIVE_SECONDS)
        agree(server, new)
    finally:
        trainer.close()
