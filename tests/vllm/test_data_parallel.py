"""A server of two data-parallel engines behind one API takes versions as one.

Not with experts: on the CPU vLLM 0.32 cannot gather their inputs from engines (`all_gatherv` is not implemented there),
and ends at the first request.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError
from tests.integration.processes import until
from tests.vllm.checkpoints import Checkpoint
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Server, Trainer


def everywhere(server: Server) -> list[list[int]]:
    """The tokens of each of its engines."""
    return [server.complete(replica=replica)[0] for replica in range(2)]


def gone(daemon: Daemon, server: Server) -> bool:
    """Whether the daemon knows of no worker of a server. Until then a version that no other takes has failed."""
    return not any(one["workers"] for one in daemon.status()["engines"] if one["engine"] == server.engine)


def test_both_engines_of_a_server_take_a_version_in_one_round(
    daemon: Daemon, trainer: Trainer, family: list[Checkpoint], all_faults: Faults, faults: Faults, place: Path
) -> None:
    assert trainer.live is not None
    server = Server("twice", daemon, family[0], all_faults, place, replicas=2, own_routes=True)
    try:
        server.start()
        assert everywhere(server.ready()) == [trainer.live.tokens] * 2
        for checkpoint in (family[2], family[1]):
            assert trainer.publish(checkpoint).engines["twice"].outcome == "updated"
            assert everywhere(server) == [checkpoint.tokens] * 2
        lacking = {name: tensor for name, tensor in family[2].tensors.items() if name != "model.norm.weight"}
        with pytest.raises(CpeError, match=r"not all tensors came of model\.norm"):
            trainer.begin(lacking).live(timeout=LIVE_SECONDS)
        assert everywhere(server) == [family[1].tokens] * 2
        (engine,) = [one for one in daemon.status()["engines"] if one["engine"] == "twice"]
        assert [worker["rank"] for worker in engine["workers"]] == [0, 1]
    finally:
        server.kill()
    until(lambda: gone(daemon, server), "the daemon sees that the server has ended", LIVE_SECONDS)
    trainer.publish(family[2])
