"""A mixture of experts, whose weights SGLang stacks, takes versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError
from tests.sglang.servers import Server
from tests.sglang.test_servers import agree
from tests.vllm.checkpoints import Checkpoints, mixture
from tests.vllm.servers import LIVE_SECONDS, Daemon, Faults, Trainer


def test_experts_take_versions_and_miss_every_part_of_one(daemon: Daemon, all_faults: Faults, place: Path) -> None:
    made = Checkpoints(place / "mixture", mixture(), (1, 108, 334))
    first, second, third = made.make(), made.make(), made.make()
    server = Server("experts", daemon, first, all_faults, place, model="experts")
    trainer = Trainer(daemon, "experts")
    try:
        trainer.publish(second)
        server.start()
        agree(server.ready(), second)
        for checkpoint in (third, first, second):
            assert not trainer.publish(checkpoint).behind
            agree(server, checkpoint)
        for part in ("gate_proj", "up_proj", "down_proj"):
            lacking = dict(third.tensors)
            del lacking[f"model.layers.1.mlp.experts.3.{part}.weight"]
            with pytest.raises(CpeError, match=r"not all tensors came of model\.layers\.1\.mlp\.experts\.w"):
                trainer.begin(lacking).live(timeout=LIVE_SECONDS)
            agree(server, second)
    finally:
        trainer.close()
        server.kill()
