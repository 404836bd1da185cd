"""An SGLang scheduler whose loaders are learned: modules that only copies go to are neither marked nor loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import ManifestError
from inference_plugins.gate import Gate
from inference_plugins.learned import LearnedLoading, tensors_of
from inference_plugins.sglang.loader import SglangLoader
from inference_plugins.sglang.reload import Reload, load_marked
from tests.unit.gated_worker import CPU, GatedWorker

HIDDEN = 8
ROWS = {"embed": 12, "q": 8, "k": 4, "v": 4, "w0": 6, "w1": 6, "norm": 1}
PARTS = {"q": ("qkv", 0), "k": ("qkv", 8), "v": ("qkv", 12), "w0": ("experts", 0), "w1": ("experts", 6)}


class Part(nn.Module):
    def __init__(self, rows: int, *, scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, HIDDEN), requires_grad=False)
        if scale:
            self.scale = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)


class Model(nn.Module):
    """As SGLang's: fused modules, a head tied to the embedding by memory, and a scale that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.experts = Part(12), Part(16, scale=True), Part(12)
        self.norm, self.head = Part(1), Part(12)
        self.head.weight = nn.Parameter(self.embed.weight.data, requires_grad=False)
        self.absorbed: Tensor | None = None
        self.absorbs = False
        """Whether it makes something else of its norm, and keeps that."""

    def load_weights(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            module, first = PARTS.get(name, (name, 0))
            if hasattr(self, module):  # names that it does not know are passed over
                self.get_parameter(f"{module}.weight")[first : first + len(tensor)].copy_(tensor)
            if name == "norm" and self.absorbs:
                self.absorbed = self.norm.weight.clone()

    def values(self) -> dict[str, list[Any]]:
        found = {name: tensor.tolist() for name, tensor in self.state_dict().items()}
        return found | {"absorbed": [] if self.absorbed is None else self.absorbed.tolist()}


class Runner:
    """Its updater counts, and rotates the rows of experts for kernels if it is told to."""

    def __init__(self) -> None:
        self.model = Model()
        self.weight_updater = self
        self.begun = 0
        self.rotates = False

    def begin_weight_update(self) -> None:
        self.begun += 1

    def end_weight_update(self, *, run_post_load: bool) -> None:
        assert not run_post_load
        if self.rotates:
            self.model.experts.weight.copy_(self.model.experts.weight.roll(1, 0))


class Worker(GatedWorker):
    """With SGLang's own thread in the gate; its model was loaded from disk."""

    def __init__(self, threads: ThreadPoolExecutor, *, learns: bool = True) -> None:
        self.runner = Runner()
        self.model = self.runner.model
        load_marked(lambda model: model.load_weights(list(checkpoint(0).items())), self.model)
        self.learned = LearnedLoading(lambda: tensors_of(self.model), on=learns)
        reload = Reload(self.runner, lambda: self.learned.modules)
        gate = Gate("SGLang")
        loader = SglangLoader(lambda: [reload], CPU, gate, needs_version=False, learned=self.learned)
        super().__init__(loader, gate, threads)


def checkpoint(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(rows, HIDDEN, generator=generator) for name, rows in ROWS.items()}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def pair(threads: ThreadPoolExecutor) -> tuple[Worker, Worker]:
    """One that learns and one that does not."""
    return Worker(threads), Worker(threads, learns=False)


def agree(pair: tuple[Worker, Worker], number: int) -> None:
    """Have both take a version, and see that they hold the same."""
    worker, plain = pair
    assert worker.push(number, checkpoint(number)), worker.failure
    assert plain.push(number, checkpoint(number)), plain.failure
    assert worker.model.values() == plain.model.values()


def test_modules_that_are_only_copied_to_are_neither_marked_nor_loaded(pair: tuple[Worker, Worker]) -> None:
    worker, plain = pair
    for number in range(1, 6):
        agree(pair, number)
    assert worker.given == []
    assert plain.given == list(ROWS)
    begun = worker.runner.begun
    agree(pair, 6)
    assert worker.runner.begun == begun
    assert worker.model.qkv.scale.tolist() == [0.5] * 3
    report = worker.loader.report
    assert report is not None
    assert (report.learned, report.unproven, report.kept) == (len(ROWS), 0, {})
    assert plain.loader.report is None


def test_modules_that_are_made_into_something_else_keep_the_loader(pair: tuple[Worker, Worker]) -> None:
    for worker in pair:
        worker.runner.rotates = worker.model.absorbs = True
    for number in range(1, 6):
        agree(pair, number)
    worker, _ = pair
    assert worker.given == ["w0", "w1", "norm"]
    report = worker.loader.report
    assert report is not None
    assert report.kept == {"roll": 2, "copied from a parameter": 1}


@pytest.mark.parametrize("lost", ROWS)
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("announced", [False, True])
def test_any_missing_tensor_is_found_and_the_next_version_is_taken(
    pair: tuple[Worker, Worker], lost: str, rotates: bool, announced: bool
) -> None:
    """Also by a worker that was told nothing of the version's tensors beforehand."""
    worker, plain = pair
    for one in pair:
        one.runner.rotates = rotates
    for number in range(1, 4):
        agree(pair, number)
    lacking = {name: tensor for name, tensor in checkpoint(4).items() if name != lost}
    for one in pair:
        assert not one.push(4, lacking, announced=announced)
        assert one.loader.touched
        assert one.loader.content == VersionId("m", "r", 3)
    assert "not all tensors came of" in plain.failure
    assert "not all tensors came of" in worker.failure or f"brought nothing for {lost}" in worker.failure
    agree(pair, 5)


@pytest.mark.parametrize("fails_at", ROWS)
def test_round_that_is_given_up_leaves_no_trace_in_the_next(pair: tuple[Worker, Worker], fails_at: str) -> None:
    worker, _ = pair
    for number in range(1, 9):
        for one in pair:
            one.push(100 + number, checkpoint(100 + number), fails_at=fails_at)
        agree(pair, number)
    assert worker.given == []


def test_other_tensors_are_learned_anew(pair: tuple[Worker, Worker]) -> None:
    worker, plain = pair
    for number in range(1, 4):
        agree(pair, number)
    more = {**checkpoint(4), "unknown": torch.ones(2, 2)}
    assert worker.push(4, more)
    assert worker.given == list(more)
    assert plain.push(4, more)
    assert worker.model.values() == plain.model.values()
    with pytest.raises(ManifestError):
        worker.push(5, {**more, "q": torch.zeros(9, HIDDEN)})


def test_what_no_version_brings_is_restored_when_memory_was_given_away(pair: tuple[Worker, Worker]) -> None:
    worker, _ = pair
    for number in range(1, 4):
        agree(pair, number)
    for one in pair:
        one.loader.sleep(1.0)
        for parameter in one.model.parameters():
            parameter.fill_(7.0)
        one.loader.wake_up(kept=False)
    agree(pair, 4)
    assert worker.given == list(ROWS)
    assert worker.model.qkv.scale.tolist() == [0.5] * 3
    for number in range(5, 8):
        agree(pair, number)
    assert worker.given == []


def test_switched_off_nothing_is_learned(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads, learns=False)
    for number in range(1, 4):
        assert worker.push(number, checkpoint(number))
        assert worker.given == list(ROWS)
    assert worker.loader.report is None
