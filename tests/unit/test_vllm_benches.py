"""Modules whose weights vLLM packs: tensors are copied to where it packs them from, and it packs them."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.core.needs import Span
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import EngineError
from inference_plugins.learned.loading import spec_of
from tests.unit import fake_layerwise
from tests.unit.fake_layerwise import HIDDEN, PADDING, Embedding, Packing
from tests.unit.gated_worker import CPU, LONG
from tests.unit.vllm_worker import Padless, Worker, checkpoint

FUSED = ["q", "k", "v"]


class Removing:
    """Packs a weight, keeps that for itself, and lets the weight go."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.t().contiguous()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Keeping:
    """Keeps what was loaded for itself, and lets it go where others look for it."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.t()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Prying:
    """Packs a weight together with another module's."""

    def __init__(self, other: nn.Module) -> None:
        self._other: Any = other

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight * self._other.weight.sum(), requires_grad=False)


class Failing(Packing):
    """Fails when it is told to, having packed half of what it packs."""

    fails = False

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.fails:
            layer.weight = nn.Parameter(layer.weight[:1], requires_grad=False)
            raise ValueError("cannot pack")
        super().process_weights_after_loading(layer)


class Packed(Padless):
    """Has its fused module processed in some way."""

    qkv: Any

    def __init__(self, method: object = None) -> None:
        super().__init__()
        self.qkv.quant_method = method or Packing()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def pair(threads: ThreadPoolExecutor, model: Callable[[], Padless] = Packed) -> tuple[Worker, Worker]:
    """One that learns, and one that does not."""
    return Worker(threads, model=model()), Worker(threads, learns=False, model=model())


def teach(*workers: Worker, versions: int = 4) -> None:
    """All take the same versions, to the same parameters."""
    for number in range(1, versions + 1):
        assert all(worker.push(number, checkpoint(number)) for worker in workers)
        assert all(worker.model.values() == workers[0].model.values() for worker in workers)


def test_tensors_of_packed_modules_are_copied_without_the_loader(threads: ThreadPoolExecutor) -> None:
    worker, plain = pair(threads)
    teach(worker, plain)
    assert (worker.given, plain.given) == ([], list(checkpoint(0)))
    report = worker.learned.report
    assert (report.learned, report.made_over, report.unproven, report.kept) == (5, 3, 0, {})
    assert str(report) == "5 learned (3 to be made over), 0 unproven, 0 kept"
    assert worker.learned.modules == {"embed", "qkv", "norm"}
    assert not worker.benches.laid_out


@pytest.mark.parametrize("method", [Removing, Keeping])
def test_weight_that_kernels_keep_to_themselves_is_made_anew(
    threads: ThreadPoolExecutor, method: Callable[[], object]
) -> None:
    workers = pair(threads, lambda: Packed(method()))
    models: list[Any] = [worker.model for worker in workers]
    for worker, model in zip(workers, models, strict=True):
        worker.layerwise.record(model)
        model.qkv.quant_method.process_weights_after_loading(model.qkv)  # as vLLM does when it loads from disk
    for number in range(1, 6):
        assert all(worker.push(number, checkpoint(number)) for worker in workers)
        tensors = checkpoint(number)
        for model in models:
            assert torch.equal(model.qkv.packed, torch.cat([tensors[name] for name in FUSED]).t())
    assert workers[0].given == []
    assert not models[0].qkv.weight.numel()


def test_module_that_is_only_copied_needs_no_bench(threads: ThreadPoolExecutor) -> None:
    nothing = type("Nothing", (), {"process_weights_after_loading": lambda *_: None})
    worker, plain = pair(threads, lambda: Packed(nothing()))
    teach(worker, plain)
    assert worker.given == []
    assert (worker.learned.report.learned, worker.learned.report.made_over) == (5, 0)


def test_bench_is_there_no_longer_than_its_tensors_come(threads: ThreadPoolExecutor) -> None:
    worker, _ = pair(threads)
    teach(worker)
    held = threads.submit(worker.gate.hold, LONG)
    worker.loader.begin()
    before = worker.model.qkv.weight
    seen = []
    for name, tensor in checkpoint(9).items():
        worker._bring(name, tensor.clone(), fails=False)
        seen.append((name, sorted(worker.benches._names[module] for module in worker.benches.laid_out)))
    worker.loader.finish(VersionId("m", "r", 9))
    held.result(LONG)
    assert seen == [("embed", []), ("q", ["qkv"]), ("k", ["qkv"]), ("v", []), ("norm", [])]
    assert worker.model.qkv.weight is before, "the kernels' memory stays"


def test_rank_says_which_part_it_needs_of_a_tensor_that_is_packed(threads: ThreadPoolExecutor) -> None:
    class Second(Packed):
        """Of two ranks: its rows are the later ones."""

        def load_weights(self, tensors: Sequence[tuple[str, Tensor]]) -> set[str]:
            return super().load_weights([(n, t[HIDDEN:] if n in FUSED else t) for n, t in tensors])

    def whole(number: int) -> dict[str, Tensor]:
        return {n: torch.cat([t.flip(0), t]) if n in FUSED else t for n, t in checkpoint(number).items()}

    workers = pair(threads, Second)
    for number in range(1, 6):
        assert all(worker.push(number, whole(number)) for worker in workers)
        assert workers[0].model.values() == workers[1].model.values()
    assert workers[0].given == []
    needed = workers[0].loader.needs(CPU)
    assert needed is not None
    nbytes = HIDDEN * HIDDEN * 4
    assert Span(nbytes, nbytes) in [span for kind in needed.told.kinds for span in kind]
    assert needed.parted >= set(FUSED)


@pytest.mark.parametrize("turned", [False, True])
def test_bias_that_is_not_packed_comes_before_its_module_is_made_over(
    threads: ThreadPoolExecutor, turned: bool
) -> None:
    """Its place is in the model itself, where the loader writes it at once."""

    class Biased(Packed):
        def __init__(self) -> None:
            super().__init__()
            self.qkv.bias = nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)

        def load_weights(self, tensors: Sequence[tuple[str, Tensor]]) -> set[str]:
            for name, tensor in tensors:
                if name == "bias":
                    getattr(self.qkv.bias, "weight_loader", fake_layerwise.load)(self.qkv.bias, tensor)
            return super().load_weights([pair for pair in tensors if pair[0] != "bias"])

    workers = pair(threads, Biased)
    for number in range(1, 7):
        bias = {"bias": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(number))}
        version = bias | checkpoint(number) if turned else checkpoint(number) | bias
        assert all(worker.push(number, version) for worker in workers)
        assert workers[0].model.values() == workers[1].model.values()
    assert workers[0].given == []
    assert workers[0].learned.report.made_over == 3


def test_order_of_tensors_does_not_matter(threads: ThreadPoolExecutor) -> None:
    workers = pair(threads)
    for number in range(1, 6):
        turned = dict(sorted(checkpoint(number).items(), key=lambda item: item[0] in FUSED))
        assert all(worker.push(number, turned) for worker in workers)
        assert workers[0].model.values() == workers[1].model.values()
    assert workers[0].given == []


@pytest.mark.parametrize("fails_at", checkpoint(0))
def test_failed_update_leaves_no_module_on_a_bench(threads: ThreadPoolExecutor, fails_at: str) -> None:
    worker, plain = pair(threads)
    teach(worker, plain)
    assert not worker.push(9, checkpoint(9), fails_at=fails_at)
    assert worker.loader.touched
    assert not worker.benches.laid_out
    assert all(not parameter.is_meta for parameter in worker.model.parameters())
    assert worker.push(10, checkpoint(4)), "what was live before"
    assert worker.given == [], "the rollback is copied as well"
    assert worker.model.values() == plain.model.values()


def test_failed_processing_is_undone_and_the_loader_is_given_all_then(threads: ThreadPoolExecutor) -> None:
    worker, plain = pair(threads, lambda: Packed(Failing()))
    teach(worker, plain)
    method: Any = worker.model.qkv.quant_method
    method.fails = True
    assert not worker.push(9, checkpoint(9))
    assert worker.failure == "cannot pack"
    assert len(worker.model.qkv.weight) == 3 * HIDDEN
    method.fails = False
    assert worker.push(10, checkpoint(4))
    assert sorted(worker.given) == sorted(checkpoint(4))
    assert worker.model.values() == plain.model.values()
    teach(worker, plain)
    assert worker.given == []


def test_tensors_that_do_not_come_to_a_bench_are_missed(threads: ThreadPoolExecutor) -> None:
    worker, _ = pair(threads)
    teach(worker)
    before = worker.model.qkv.weight.clone()
    held = threads.submit(worker.gate.hold, LONG)
    worker.loader.begin()
    for name in ("embed", "q", "v", "norm"):
        worker._bring(name, checkpoint(9)[name].clone(), fails=False)
    with pytest.raises(EngineError, match="m@r#9 brought nothing for k"):
        worker.loader.finish(VersionId("m", "r", 9))
    worker.loader.abandon("incomplete")
    held.result(LONG)
    assert torch.equal(worker.model.qkv.weight, before), "half of it was packed"


def test_versions_with_faults_are_what_the_reload_makes_of_them(threads: ThreadPoolExecutor) -> None:
    rng, (worker, plain) = random.Random(7), pair(threads)
    replayed = 0
    for number in range(1, 21):
        fails_at = rng.choice(["", "", *checkpoint(0)])
        if fails_at and worker.loader.content is not None:
            assert not worker.push(100 * number, checkpoint(number), fails_at=fails_at)
            assert worker.push(100 * number + 1, checkpoint(number - 1))
            assert worker.model.values() == plain.model.values()
        if rng.random() < 0.1:
            worker.learned.forget("a fault")
        names = list(checkpoint(0))
        rng.shuffle(names)
        version = {name: checkpoint(number)[name] for name in names}
        assert worker.push(100 * number + 2, version)
        assert plain.push(number, version)
        assert worker.model.values() == plain.model.values()
        replayed += not worker.given
    assert replayed > 5


def test_module_on_a_bench_stays_there_while_others_are_reloaded(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm keeps the loader, which takes other modules' parameters away when it is given the first of its own."""
    plain_load = fake_layerwise.load

    def load(parameter: Tensor, loaded_weight: Tensor, shard: int | None = None) -> None:
        plain_load(parameter, loaded_weight, shard)
        if len(parameter) == 1:
            parameter.mul_(3)

    monkeypatch.setattr(fake_layerwise, "load", load)
    worker, plain = pair(threads)
    for number in range(1, 6):
        whole = checkpoint(number)
        version = {name: whole[name] for name in ("embed", "q", "norm", "k", "v")}
        assert all(one.push(number, version) for one in (worker, plain))
        assert worker.model.values() == plain.model.values()
    assert worker.given == ["norm"]
    assert dict(worker.learned.report.kept) == {"mul_": 1}


def test_arithmetic_before_the_packing_keeps_the_loader(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_load = fake_layerwise.load

    def load(parameter: Tensor, loaded_weight: Tensor, shard: int | None = None) -> None:
        plain_load(parameter, loaded_weight if shard != 1 else loaded_weight * 2, shard)

    monkeypatch.setattr(fake_layerwise, "load", load)
    worker, plain = pair(threads)
    teach(worker, plain)
    assert worker.given == FUSED
    assert sum(worker.learned.report.kept.values()) == 3


def test_packing_that_reads_other_modules_keeps_the_loader(threads: ThreadPoolExecutor) -> None:
    def entangled() -> Packed:
        model = Packed()
        model.qkv.quant_method = Prying(model.embed)
        return model

    worker, plain = pair(threads, entangled)
    teach(worker, plain)
    assert worker.given == ["embed", *FUSED], "what it reads has to be loaded before it"
    assert worker.learned.report.learned == 1


def test_packed_weight_that_others_read_keeps_the_loader(threads: ThreadPoolExecutor) -> None:
    """As attention makes something of a projection's weight, at the end of each reload."""
    workers = pair(threads)
    for worker in workers:
        worker.model.register_buffer("absorbed", torch.zeros(3 * HIDDEN, HIDDEN))
        finalize = worker.layerwise.finalize

        def reading(model: Any, config: Any, finalize: Any = finalize) -> None:
            finalize(model, config)
            model.absorbed.copy_(model.qkv.weight * 2)

        object.__setattr__(worker.layerwise.functions, "finalize", reading)
    for number in range(1, 6):
        assert all(worker.push(number, checkpoint(number)) for worker in workers)
        assert torch.equal(*[worker.model.get_buffer("absorbed") for worker in workers])
    assert workers[0].given == FUSED


def test_padded_module_keeps_the_loader(threads: ThreadPoolExecutor) -> None:
    def padded() -> Padless:
        model = Padless()
        wide: Any = Embedding(2 + PADDING // HIDDEN)
        wide.quant_method = Packing()
        model.embed = wide
        return model

    worker, plain = pair(threads, padded)
    teach(worker, plain)
    assert worker.given == ["embed"]


def test_constants_on_a_bench_stay_unproven(threads: ThreadPoolExecutor) -> None:
    worker, _ = pair(threads)
    for number in range(1, 6):
        version = checkpoint(number) | {name: torch.full((HIDDEN, HIDDEN), float(number)) for name in FUSED}
        assert worker.push(number, version)
    assert worker.given == FUSED
    assert worker.learned.report.unproven == 3
    assert worker.push(6, checkpoint(6))
    assert worker.push(7, checkpoint(7))
    assert worker.given == []


def test_bytes_that_arrive_on_a_bench_in_another_order_keep_the_loader(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By means that torch does not see, after the copy that it saw."""
    plain_load = fake_layerwise.load

    def load(parameter: Tensor, loaded_weight: Tensor, shard: int | None = None) -> None:
        plain_load(parameter, loaded_weight, shard)
        if shard == 2 and not parameter.is_meta:
            memory = (ctypes.c_float * parameter.numel()).from_address(parameter.data_ptr())
            memory[HIDDEN * HIDDEN], memory[-1] = memory[-1], memory[HIDDEN * HIDDEN]

    monkeypatch.setattr(fake_layerwise, "load", load)
    worker, plain = pair(threads)
    teach(worker, plain)
    assert worker.given == FUSED
    assert dict(worker.learned.report.kept) == {"other bytes": 3}


def test_bench_of_another_form_ends_the_round(threads: ThreadPoolExecutor) -> None:
    worker, plain = pair(threads)
    teach(worker, plain)
    genuine = worker.layerwise.materialize

    def transposed(module: nn.Module, info: Any) -> None:
        genuine(module, info)
        if module is worker.model.qkv:
            module.weight = nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)

    object.__setattr__(worker.layerwise.functions, "materialize", transposed)
    assert not worker.push(9, checkpoint(9))
    assert worker.failure == "what is made over for qkv has another form than it had"
    assert all(not parameter.is_meta for parameter in worker.model.parameters())
    object.__setattr__(worker.layerwise.functions, "materialize", genuine)
    assert worker.push(10, checkpoint(4))
    assert worker.given == list(checkpoint(0)), "learned anew"
    assert worker.model.values() == plain.model.values()


def test_tensor_of_a_packed_module_that_comes_to_another_device_ends_the_round(threads: ThreadPoolExecutor) -> None:
    """Its loader would write what is not packed where kernels take it for packed."""
    worker, plain = pair(threads)
    teach(worker, plain)
    held = threads.submit(worker.gate.hold, LONG)
    worker.loader.begin()
    with pytest.raises(EngineError, match="q comes to another device than it did"):
        worker.loader.place([spec_of("q", checkpoint(9)["q"])], torch.device("cuda"))
    worker.loader.abandon("another device")
    held.result(LONG)
    assert worker.push(10, checkpoint(4))
    assert worker.given == list(checkpoint(0)), "learned anew"
    assert worker.model.values() == plain.model.values()
