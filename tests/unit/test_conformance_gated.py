"""The loader of vLLM's and SGLang's workers does what is promised, over the reloads of both and stand-ins for them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from inference_plugins.gate import Gate
from inference_plugins.gated import GatedLoader, Reloading
from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.sglang import reload as sglang
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.testing import SCENARIOS, LoaderWorker, Plugin, Scenario, Tensors, check
from inference_plugins.vllm.benches import ModelBenches
from inference_plugins.vllm.reload import Reload
from tests.unit.fake_layerwise import HIDDEN, FakeLayerwise, Module, Packing, load

ROWS = {"embed": 64, "first": 8, "second": 12, "norm": 1}
PACKED = {"embed", "second"}
SECONDS = 20.0


class Model(nn.Module):
    """Its tensors have the names of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in ROWS.items():
            self.add_module(name, Module(rows))

    def load_weights(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            parameter: Any = self.get_parameter(name)
            getattr(parameter, "weight_loader", load)(parameter, tensor)


class Worker(LoaderWorker):
    """A model, its loader, and the thread that the engine lends to updates: it is always in the gate, or on its way."""

    loader_type = GatedLoader
    learned: LearnedLoading | None = None

    def __init__(self, endpoint: str) -> None:
        self.model = Model()
        self.gate = Gate()
        models = [self.reload()]
        self.loader = self.loader_type(
            lambda: models, torch.device("cpu"), self.gate, needs_version=False, learned=self.learned
        )
        self._over = threading.Event()
        self._lent = threading.Thread(target=self._lend)
        self._lent.start()
        super().__init__(endpoint, self.loader, kind="gated")

    def reload(self) -> Reloading:
        raise NotImplementedError

    def _lend(self) -> None:
        while not self._over.is_set():
            self.gate.hold(SECONDS)

    def close(self) -> None:
        super().close()
        self._over.set()
        while self._lent.is_alive():  # it may have been about to come in again
            self.gate.release("over")
            self._lent.join(0.01)


class VllmWorker(Worker):
    def reload(self) -> Reloading:
        return Reload(self.model, "config", FakeLayerwise().functions)


class PackingWorker(Worker):
    """It has learned its loader, and packs what is copied to two of its modules."""

    def reload(self) -> Reloading:
        for name in PACKED:
            module: Any = self.model.get_submodule(name)
            module.quant_method = Packing()
        functions = FakeLayerwise().functions
        benches = ModelBenches(self.model, functions)
        self.learned = learned = LearnedLoading(lambda: tensors_of(self.model), benches=benches)
        reload = Reload(self.model, "config", functions, spared=lambda: learned.modules, benches=benches)
        with torch.no_grad():
            for seed in range(4):
                take(learned, reload, checkpoint(seed))
        return reload


def take(learned: LearnedLoading, reload: Reload, version: Mapping[str, torch.Tensor]) -> None:
    """Have a loader learned of a version that goes through it whole."""
    learned.begin()
    reload.begin()
    learned.observe([*version.items()], lambda: reload.load([*version.items()]))
    learned.finish(reload.finish)


def packed(version: Tensors) -> Tensors:
    """What becomes of a version that is packed."""
    return {name: t.float().flip(0) + 1 if name.partition(".")[0] in PACKED else t for name, t in version.items()}


class SglangWorker(Worker):
    def reload(self) -> Reloading:
        return sglang.Reload(FakeRunner(self.model))


class FakeRunner:
    """SGLang's, and its updater, of a model that no kernels need packed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weight_updater = self

    def begin_weight_update(self) -> None: ...

    def end_weight_update(self, *, run_post_load: bool) -> None: ...


def checkpoint(seed: int) -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(rows, HIDDEN, generator=generator) for name, rows in ROWS.items()}


def plugin(make: type[Worker]) -> Plugin[Worker]:
    return Plugin(
        make=make,
        close=Worker.close,
        weights=lambda worker: dict(worker.model.named_parameters()),
        serving=lambda worker: worker.loader.serving,
        checkpoint=checkpoint,
    )


class SleepingWorker(SglangWorker):
    """As an SGLang server has it sleep: its own loader's part."""

    loader_type = SglangLoader


def wake_up(worker: Worker, kept: bool) -> None:
    if not kept:
        with torch.no_grad():
            for parameter in worker.model.parameters():
                parameter.zero_()
    worker.wake_up(kept=kept)


def test_sglang_loader_that_sleeps_conforms() -> None:
    sleeping = dataclasses.replace(plugin(SleepingWorker), sleep=Worker.sleep, wake_up=wake_up)
    assert check(sleeping, only=("asleep", "module_groups")) == {"asleep": "", "module_groups": ""}


ELSEWHERE = {"busy", "asleep"}
"""The server pauses, and sleeps, by its own API."""


@pytest.mark.parametrize("make", [VllmWorker, SglangWorker])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_gated_loader_conforms(scenario: Scenario, make: type[Worker]) -> None:
    assert bool(scenario.run(plugin(make))) is (scenario.name in ELSEWHERE)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_gated_loader_that_has_modules_made_over_conforms(scenario: Scenario) -> None:
    def make(endpoint: str) -> PackingWorker:
        worker = PackingWorker(endpoint)
        report = worker.loader.report
        assert report is not None
        assert report.learned == len(ROWS)
        return worker

    packing = dataclasses.replace(plugin(PackingWorker), make=make, expected=packed)
    assert bool(scenario.run(packing)) is (scenario.name in ELSEWHERE)
