"""An SGLang worker that learns how its model loads does what is promised, in rounds by the loader and by copies."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.sglang.reload import Reload
from inference_plugins.testing import SCENARIOS, Plugin, Scenario
from tests.unit.test_conformance_gated import ELSEWHERE, FakeRunner, Worker, plugin, wake_up

LEARNED: list[int] = []
"""How many tensors each worker knew the ways of when it was closed."""


class LearningLoader(SglangLoader):
    """With what it learns of the worker's model."""

    def __init__(self, models: Any, device: torch.device, gate: Any, *, needs_version: bool) -> None:
        model: nn.Module = models()[0].model
        learned = LearnedLoading(lambda: tensors_of(model))
        models()[0].spares(learned)
        super().__init__(models, device, gate, needs_version=needs_version, learned=learned)
        self.learned = learned


class LearningReload(Reload):
    """Leaves out what is learned by then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        super().__init__(FakeRunner(model), lambda: self._learned.modules)

    def spares(self, learned: LearnedLoading) -> None:
        self._learned = learned


class LearningWorker(Worker):
    loader_type = LearningLoader  # type: ignore[assignment]  # its first model is of one kind

    def reload(self) -> LearningReload:
        return LearningReload(self.model)

    def close(self) -> None:
        super().close()
        LEARNED.append(self.loader.learned.report.learned)  # type: ignore[attr-defined]  # as this worker's has it


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
