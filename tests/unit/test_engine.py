"""What an engine is meant for, and what is known of its weights."""

from __future__ import annotations

from typing import Any

import pytest

from cpe_daemon.core.lifecycle import EngineEvent
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.wire.messages import WorkerHello


def engine(model: str) -> Engine:
    def no_driver(name: str, workers: object) -> Any:
        return None

    return Engine(WorkerHello(1, "e", "torch", 0, 1, "incarnation", model=model), no_driver)


def test_engine_takes_the_model_that_it_named() -> None:
    assert engine("a").takes("a")
    assert not engine("a").takes("b")


@pytest.mark.parametrize("begun", [EngineEvent.REPORT, EngineEvent.BEGIN])
def test_engine_that_named_no_model_keeps_to_the_first_that_it_held(begun: EngineEvent) -> None:
    unnamed = engine("")
    assert unnamed.takes("a")
    assert unnamed.takes("b")
    held = VersionId("a", "run", 1)
    if begun is EngineEvent.REPORT:
        unnamed.change(EngineEvent.REPORT, content=held)
    else:
        unnamed.change(EngineEvent.REPORT)
        assert unnamed.takes("b")
        unnamed.change(EngineEvent.BEGIN)
        unnamed.change(EngineEvent.COMPLETE, content=held)
    unnamed.change(EngineEvent.LOSE)
    assert unnamed.takes("a")
    assert not unnamed.takes("b")
