"""The links of trainers: what is taken for one is given back if it does not come about."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from cpe_daemon.config import Config
from cpe_daemon.errors import MisuseError, ResourceError
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.wire.messages import PROTOCOL, TrainerHello


class FullHandoff:
    """Out of descriptors."""

    path = Path("handoff.sock")

    def offer(self, *_: object) -> bytes:
        raise ResourceError("no descriptor is left")


def test_trainer_that_cannot_be_taken_leaves_nothing(runtime_dir: Path, no_leaks: None) -> None:
    trainers = Trainers(
        config=Config.model_validate({"runtime_dir": runtime_dir}),
        generation="g",
        boot_id="this host",
        handoff=cast("HandoffServer", FullHandoff()),
        metrics=Metrics(),
        clock=lambda: 0.0,
    )
    hello = trainers.handlers()[TrainerHello]
    for model, run in (("a b", "r"), ("m", "r\n")):
        with pytest.raises(MisuseError, match="no blanks"):
            hello(b"peer", TrainerHello(PROTOCOL, model, run, 0, 1), [])
    with pytest.raises(ResourceError, match="no descriptor"):
        hello(b"peer", TrainerHello(PROTOCOL, "m", "r", 0, 1, boot_id="this host"), [])
    assert not list(trainers)
