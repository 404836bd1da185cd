"""A vLLM worker's models: what goes into the one that is served, what into its draft, and what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.errors import EngineError
from inference_plugins.gated import Reloading
from inference_plugins.vllm import compat
from inference_plugins.vllm.compat import draft_of, pack_experts_again
from inference_plugins.vllm.parts import Draft, Target
from inference_plugins.vllm.reload import Reload
from tests.unit.fake_layerwise import HIDDEN, FakeLayerwise, Module, Plain


class Router(Module):
    """As those of mixtures of experts: a weight, and a bias that no count has."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def layerwise() -> FakeLayerwise:
    return FakeLayerwise()


class Pair:
    """A model and its draft, which shares the embedding with it; ``apart``: has a checkpoint of its own."""

    def __init__(self, layerwise: FakeLayerwise, *, apart: bool) -> None:
        embed, self.shared = Module(2), Module(1)
        self.model = Plain(embed=embed, body=Module(1), head=self.shared, choosy=True)
        self.draft = Plain(embed=embed, more=Module(1), last=Module(3), head=self.shared, choosy=True)
        target = Reload(self.model, "config", layerwise.functions)
        reload = Reload(self.draft, "draft", layerwise.functions, target.modules)
        self.parts: list[Reloading] = [Target(target), Draft(reload, apart=apart)]

    def update(self, tensors: list[tuple[str, Tensor]]) -> None:
        for part in self.parts:
            part.begin()
        for pair in tensors:
            for part in self.parts:
                part.load([pair])
        for part in self.parts:
            part.finish()

    def undo(self) -> None:
        for part in self.parts:
            part.undo()

    @property
    def values(self) -> dict[str, float]:
        parameters = [*self.model.named_parameters(), *self.draft.named_parameters()]
        return {name.partition(".")[0]: parameter[0, 0].item() for name, parameter in parameters}


def whole(value: float, prefix: str = "") -> list[tuple[str, Tensor]]:
    """A version; the draft's tensors begin with ``prefix``."""
    rows = {"embed": 2, "body": 1, "head": 1, f"{prefix}more": 1, f"{prefix}last": 3}
    return [(f"{name}.weight", torch.full((count, HIDDEN), value)) for name, count in rows.items()]


SAME = {"embed": 2.0, "body": 2.0, "head": 2.0, "more": 2.0, "last": 2.0}


# --- a draft in the model's checkpoint -------------------------------------------------------------------------------


def test_draft_of_the_same_checkpoint_takes_its_own(layerwise: FakeLayerwise) -> None:
    pair = Pair(layerwise, apart=False)
    for value in (3.0, 2.0):
        pair.update(whole(value))
    assert pair.values == SAME
    assert layerwise.finalized == ["config", "draft"] * 2


@pytest.mark.parametrize("last", [0, -1], ids=["first", "last"])
def test_what_is_shared_is_the_models(layerwise: FakeLayerwise, last: int) -> None:
    """A checkpoint may have it once more under a name of the draft's, before or after: the draft leaves it alone."""
    pair = Pair(layerwise, apart=False)
    own = pair.draft
    own.add_module("copied", pair.shared)
    tensors = whole(2)
    tensors.insert(last % len(tensors) + (last < 0), ("copied.weight", torch.full((1, HIDDEN), 9.0)))
    pair.update(tensors)
    assert pair.values == SAME
    assert not hasattr(pair.shared.weight, "weight_loader")


@pytest.mark.parametrize("name", ["more", "last"])
def test_draft_that_is_not_whole_fails(layerwise: FakeLayerwise, name: str) -> None:
    pair = Pair(layerwise, apart=False)
    with pytest.raises(EngineError, match=f"not all tensors came of {name} "):
        pair.update([entry for entry in whole(3) if not entry[0].startswith(name)])
    pair.undo()
    assert not any(parameter.is_meta for parameter in [*pair.model.parameters(), *pair.draft.parameters()])
    pair.update(whole(2))
    assert pair.values == SAME


def test_draft_that_nothing_came_for_stays(layerwise: FakeLayerwise, caplog: pytest.LogCaptureFixture) -> None:
    """As of a trainer that does not know of it."""
    pair = Pair(layerwise, apart=False)
    pair.update(whole(3))
    for _ in range(2):
        pair.update(whole(2)[:3])
    assert pair.values == SAME | {"more": 3, "last": 3}
    assert caplog.text.count("versions have no tensors for the draft model: it stays as it is") == 1


@pytest.mark.parametrize("count", range(1, 5))
def test_failure_after_any_tensor_is_undone_in_both(layerwise: FakeLayerwise, count: int) -> None:
    pair = Pair(layerwise, apart=False)
    for part in pair.parts:
        part.begin()
    for entry in whole(9)[:count]:
        for part in pair.parts:
            part.load([entry])
    pair.undo()
    assert not any(info.can_load() for info in layerwise.infos.values())
    pair.update(whole(2))
    assert pair.values == SAME


# --- a draft with a checkpoint of its own ----------------------------------------------------------------------------


def test_draft_apart_takes_tensors_by_their_prefix(layerwise: FakeLayerwise) -> None:
    pair = Pair(layerwise, apart=True)
    pair.update(whole(2, "draft_model."))
    assert pair.values == SAME


def test_draft_apart_with_names_as_the_models(layerwise: FakeLayerwise) -> None:
    model, draft = Plain(body=Module(1)), Plain(body=Module(1))
    target = Reload(model, None, layerwise.functions)
    own = Reload(draft, None, layerwise.functions, target.modules)
    parts: list[Reloading] = [Target(target), Draft(own, apart=True)]
    for part in parts:
        part.begin()
        part.load([("body.weight", torch.ones(1, HIDDEN)), ("draft_model.body.weight", torch.full((1, HIDDEN), 5.0))])
    for part in parts:
        part.finish()
    assert [parameter[0, 0].item() for one in (model, draft) for parameter in one.parameters()] == [1, 5]


def test_draft_apart_that_nothing_came_for_stays(layerwise: FakeLayerwise, caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(layerwise, apart=True)
    pair.update(whole(2))
    assert pair.values == SAME | {"more": 0, "last": 0}
    assert "whose names would begin with draft_model.: it stays as it is" in caplog.text


def test_draft_apart_that_is_not_whole_fails(layerwise: FakeLayerwise) -> None:
    pair = Pair(layerwise, apart=True)
    with pytest.raises(EngineError, match="not all tensors came of last "):
        pair.update(whole(2, "draft_model.")[:-1])


# --- parameters that no count has ------------------------------------------------------------------------------------


@pytest.fixture
def gate(layerwise: FakeLayerwise) -> tuple[Plain, Reload]:
    model = Plain(gate=Router(2))
    return model, Reload(model, None, layerwise.functions)


def give(reload: Reload, value: float, *names: str) -> None:
    reload.begin()
    for name in names:
        reload.load([(f"gate.{name}", torch.full((2, HIDDEN) if name == "weight" else (2,), value))])
    reload.finish()


def test_bias_that_no_count_has_is_loaded(gate: tuple[Plain, Reload]) -> None:
    model, reload = gate
    for order in (("weight", "bias"), ("bias", "weight")):
        give(reload, 2, *order)
        assert {parameter.flatten()[0].item() for parameter in model.parameters()} == {2}
    assert all(not hasattr(parameter, "weight_loader") for parameter in model.parameters())


def test_bias_that_no_count_has_is_missed(gate: tuple[Plain, Reload]) -> None:
    _, reload = gate
    with pytest.raises(EngineError, match=r"not all tensors came of gate\.bias$"):
        give(reload, 2, "weight")
    with pytest.raises(EngineError, match="not all tensors came of gate "):
        give(reload, 2, "bias")
    give(reload, 3, "weight", "bias")


# --- weights that vLLM let go ----------------------------------------------------------------------------------------


def test_weight_that_was_let_go_has_room_while_it_is_loaded(layerwise: FakeLayerwise) -> None:
    made = Module(HIDDEN)
    layerwise.emptied.append(made)
    model = Plain(source=made, other=Module(1))
    made.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    reload = Reload(model, None, layerwise.functions)
    tensors = [("source.weight", torch.ones(HIDDEN, HIDDEN)), ("other.weight", torch.ones(1, HIDDEN))]
    for count in (0, 2, 0, 1, 2):
        reload.begin()
        for entry in tensors[:count]:
            reload.load([entry])
        if count == 2:
            reload.finish()
        else:
            reload.undo()
        assert made.weight.numel() == (0 if count != 1 else HIDDEN * HIDDEN)


# --- vLLM's own objects ----------------------------------------------------------------------------------------------


class UnquantizedMethod:
    """Makes its kernel once, as vLLM's of experts on the CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.moe_kernel: Any = SimpleNamespace(fused_experts=self.Experts(self.calls))

    class Experts:
        def __init__(self, calls: list[str]) -> None:
            self._calls = calls

        def process_weights_after_loading(self, layer: Any) -> None:
            self._calls.append("pack")

    def process_weights_after_loading(self, layer: Any) -> None:
        self.calls.append("process")


class QuantizedMethod(UnquantizedMethod):
    """Of quantised experts."""


def experts(method: Any) -> nn.Module:
    layer: Any = Module(1)
    layer.quant_method = method
    return Plain(experts=layer)


def test_experts_are_packed_after_they_are_processed_once_each() -> None:
    method: Any = UnquantizedMethod()
    model = experts(method)
    for _ in range(2):
        pack_experts_again(model)
    for _ in range(2):
        method.process_weights_after_loading(model)
    assert method.calls == ["process", "pack"] * 2


def test_experts_that_are_packed_by_themselves_are_left_alone() -> None:
    method: Any = UnquantizedMethod()
    method.moe_kernel, method.cpu_fused_moe = None, object()
    model = experts(method)
    pack_experts_again(model)
    method.process_weights_after_loading(model)
    assert method.calls == ["process"]


def test_experts_that_are_packed_in_another_way_are_refused() -> None:
    method: Any = UnquantizedMethod()
    method.moe_kernel = object()
    with pytest.raises(EngineError, match="packs the weights of experts in another way"):
        pack_experts_again(experts(method))
    with pytest.raises(EngineError, match="quantised experts in ways that were not tried"):
        pack_experts_again(experts(QuantizedMethod()))


def test_model_without_experts_is_left_alone() -> None:
    pack_experts_again(Plain(body=Module(1)))


def test_draft_that_misses_layers_in_a_call_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 0.26: each call has one bucket only."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    any_order = compat._any_order()
    with any_order():
        fail("MTP speculative decoding layer 61 weights missing from checkpoint. The checkpoint may")
    with pytest.raises(ValueError, match="no such tensor"), any_order():
        fail("no such tensor")


def fail(why: str) -> None:
    raise ValueError(why)


def worker(find: Any, config: object) -> Any:
    runner = SimpleNamespace() if find is None else SimpleNamespace(get_draft_model=find)
    return SimpleNamespace(
        model_runner=runner,
        vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=config)),
    )


class Worker:
    """As vLLM's: makes its transfer engine when its model is loaded."""

    def __init__(self, draft: nn.Module | None) -> None:
        found = worker(lambda: draft, "config")
        self.model_runner, self.vllm_config = found.model_runner, found.vllm_config

    def load_model(self) -> object:
        return Factory().create_engine()


class Factory:
    def create_engine(self) -> object:
        return compat.draft_model()


def test_draft_is_found_while_the_engine_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "vllm.v1.worker.gpu_worker"
    for name in ("vllm", "vllm.v1", "vllm.v1.worker", path):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[path])["Worker"] = Worker
    model = Module(1)
    assert Worker(model).load_model() == (model, "config")
    assert Worker(None).load_model() is None
    assert Factory().create_engine() is None, "nobody's worker"


def test_mla_on_a_cpu_with_amx_is_given_room_again() -> None:
    made: Any = nn.Module()
    made.kv_b_proj, made.is_amx_bmm_enabled = Module(HIDDEN), True
    source = made.kv_b_proj
    info = SimpleNamespace(restore_metadata=({"weight": source.weight.detach().to("meta")}, {}))
    assert compat._refill(made, lambda module: info) == []
    empty = source.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    assert compat._refill(made, lambda module: info) == [(source, "weight", empty)]
    assert source.weight.shape == (HIDDEN, HIDDEN)
    made.is_amx_bmm_enabled, source.weight = False, empty
    assert compat._refill(made, lambda module: info) == []


def test_draft_of_a_worker() -> None:
    model, config = Module(1), object()
    assert draft_of(worker(lambda: model, config)) == (model, config)
    assert draft_of(worker(lambda: None, config)) is None
    assert draft_of(worker(lambda: model, None)) is None
    assert draft_of(worker(None, config)) is None
    alone = worker(lambda: None, None)
    alone.vllm_config.speculative_config = None
    assert draft_of(alone) is None
