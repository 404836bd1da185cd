"""A vLLM worker whose loaders are learned: modules that only copies go to are left out of its reload."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import EngineError, ManifestError
from inference_plugins.learned.loading import spec_of
from inference_plugins.vllm.reload import Reload
from tests.unit.fake_layerwise import HIDDEN, FakeLayerwise
from tests.unit.gated_worker import LONG
from tests.unit.vllm_worker import Padless, Worker, checkpoint


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_modules_that_are_only_copied_to_are_not_reloaded(threads: ThreadPoolExecutor) -> None:
    worker, plain = Worker(threads), Worker(threads, learns=False)
    for number in range(1, 6):
        assert worker.push(number, checkpoint(number))
        assert plain.push(number, checkpoint(number))
        assert worker.model.values() == plain.model.values()
    assert plain.given == list(checkpoint(0))
    assert worker.given == []
    assert worker.learned.modules == {"embed", "qkv", "norm"}
    finalized = len(worker.layerwise.finalized)
    assert worker.push(6, checkpoint(6))
    assert len(worker.layerwise.finalized) == finalized


def test_modules_that_are_more_than_copied_to_are_reloaded_beside_the_others(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Worker(threads), Worker(threads, learns=False)
    for worker in workers:
        plain = worker.layerwise.process

        def process(module, info, plain=plain, norm=worker.model.norm):  # type: ignore[no-untyped-def]
            kernel = info.kernel_tensors[0]
            plain(module, info)
            if module is norm:
                kernel["weight"].mul_(3)

        worker.layerwise.process = process  # type: ignore[method-assign]  # a kernel that wants it so
    for number in range(1, 6):
        assert all(worker.push(number, checkpoint(number)) for worker in workers)
        assert workers[0].model.values() == workers[1].model.values()
    assert workers[0].given == ["norm"]
    assert dict(workers[0].learned.report.kept) == {"mul_": 1}
    assert not workers[0].reload._pending


def test_versions_with_faults_are_what_the_reload_makes_of_them(threads: ThreadPoolExecutor) -> None:
    rng, worker, plain = random.Random(5), Worker(threads), Worker(threads, learns=False)
    replayed = 0
    for number in range(1, 21):
        fails_at = rng.choice(["", "", *checkpoint(0)])
        if fails_at and worker.loader.content is not None:
            assert not worker.push(100 * number, checkpoint(number), fails_at=fails_at)
            assert all(not parameter.is_meta for parameter in worker.model.parameters())
            assert worker.push(100 * number + 1, checkpoint(number - 1))
            assert worker.model.values() == plain.model.values()
        if rng.random() < 0.1:
            worker.learned.forget("a fault")
        assert worker.push(100 * number + 2, checkpoint(number))
        assert plain.push(number, checkpoint(number))
        assert worker.model.values() == plain.model.values()
        replayed += not worker.given
    assert replayed > 5


def test_version_that_lacks_a_learned_tensor_is_not_taken(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads)
    for number in range(1, 5):
        assert worker.push(number, checkpoint(number))
    assert worker.given == []
    lacking = checkpoint(9)
    del lacking["k"]
    assert not worker.push(9, lacking)  # and another schema is not replayed: the reload says what is missing
    assert worker.given == list(lacking)
    assert worker.push(10, checkpoint(10))


def test_tensors_that_do_not_come_though_they_were_announced_are_missed(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads)
    for number in range(1, 5):
        assert worker.push(number, checkpoint(number))
    held = threads.submit(worker.gate.hold, LONG)
    worker.loader.begin()
    worker._bring("q", checkpoint(9)["q"].clone(), fails=False)
    with pytest.raises(EngineError, match="m@r#9 brought nothing for embed, k, v, norm"):
        worker.loader.finish(VersionId("m", "r", 9))
    assert worker.loader.touched
    worker.loader.abandon("incomplete")
    held.result(LONG)


def test_shapes_of_tensors_that_were_only_copied_are_remembered(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads)
    for number in range(1, 5):
        assert worker.push(number, checkpoint(number))
    with pytest.raises(ManifestError, match="q is"):
        worker.loader.expect([spec_of("q", torch.zeros(8, HIDDEN))])


def test_tensor_of_another_shape_that_nobody_announced_ends_the_round(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads)
    for number in range(1, 5):
        assert worker.push(number, checkpoint(number))
    held = threads.submit(worker.gate.hold, LONG)
    worker.loader.begin()
    with pytest.raises(EngineError, match="q has another dtype or shape, which nobody announced"):
        worker._bring("q", torch.zeros(8, HIDDEN), fails=False)
    worker.loader.abandon("another shape")
    held.result(LONG)


def test_second_model_ends_learning(threads: ThreadPoolExecutor) -> None:
    worker = Worker(threads)
    models = [worker.reload]
    worker.loader._models = lambda: models
    for number in range(1, 5):
        assert worker.push(number, checkpoint(number))
    assert worker.given == []
    models.append(Reload(Padless(), "config", FakeLayerwise().functions))
    assert worker.push(5, checkpoint(5))
    assert worker.given == list(checkpoint(0))
