"""An SGLang worker that learns how its model loads does what is promised, in rounds by the loader and by copies."""

from __future__ import annotations

import dataclasses

import pytest

from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.sglang.reload import Reload
from inference_plugins.testing import SCENARIOS, Plugin, Scenario
from tests.unit.test_conformance_gated import ELSEWHERE, FakeRunner, Worker, plugin, wake_up

LEARNED: list[int] = []
"""How many tensors each worker knew the ways of when it was closed."""


class LearningWorker(Worker):
    """What it has learned its loader leaves out."""

    loader_type = SglangLoader

    def reload(self) -> Reload:
        self.learned = learned = LearnedLoading(lambda: tensors_of(self.model))
        return Reload(FakeRunner(self.model), lambda: learned.modules)

    def close(self) -> None:
        super().close()
        assert self.learned is not None
        LEARNED.append(self.learned.report.learned)


def learning() -> Plugin[Worker]:
    return dataclasses.replace(
        plugin(LearningWorker), close=lambda worker: worker.close(), sleep=Worker.sleep, wake_up=wake_up
    )


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_loader_that_learns_conforms(scenario: Scenario) -> None:
    assert bool(scenario.run(learning())) is (scenario.name in ELSEWHERE - {"asleep"})


def test_scenarios_have_rounds_without_the_loader() -> None:
    """Otherwise they would say nothing of copies."""
    LEARNED.clear()
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.name == "module_groups"]
    assert scenario.run(learning()) == ""
    (learned,) = LEARNED
    assert learned == len(learning().checkpoint(0))
