"""vLLM's layerwise reload as it is made safe: whatever fails in between, no parameter is left without its values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from cpe_daemon.errors import EngineError
from inference_plugins.vllm.reload import Reload
from tests.unit.fake_layerwise import Embedding, FakeLayerwise, Model, Module, tensors

ORDER = ("embed", "q", "k", "v", "norm")


@pytest.fixture
def layerwise() -> FakeLayerwise:
    return FakeLayerwise()


@pytest.fixture
def model() -> Model:
    """It serves a version whose values are all 1."""
    made = Model()
    for parameter in made.parameters():
        parameter.fill_(1)
    return made


@pytest.fixture
def reload(model: Model, layerwise: FakeLayerwise) -> Iterator[Reload]:
    with torch.no_grad():
        yield Reload(model, "config", layerwise.functions)


def addresses(model: Model) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def is_served(model: Model, value: float) -> None:
    """All of the checkpoint's values are one, and what no checkpoint has is as it was."""
    kept = {"attention.scale": [1.0], "rope.table": [1.0] * 3, "norm.table": [1.0] * 3}
    assert {name: found for name, found in model.values().items() if name in kept} == kept
    for name, found in model.values().items():
        if name not in kept:
            assert set(itertools.chain(*found)) == {value}, name


def fill(reload: Reload, value: float) -> None:
    reload.begin()
    for name, tensor in tensors(value).items():
        reload.load([(name, tensor)])
    reload.finish()


def test_values_are_written_where_kernels_read_them(reload: Reload, model: Model, layerwise: FakeLayerwise) -> None:
    before = addresses(model)
    for value in (2.0, 3.0):
        fill(reload, value)
        is_served(model, value)
        assert addresses(model) == before
    assert layerwise.finalized == ["config"] * 2
    assert not any(info.can_load() for info in layerwise.infos.values())


@pytest.mark.parametrize("order", list(itertools.permutations(("q", "k", "v", "embed"))), ids="".join)
def test_tensors_come_in_any_order_and_their_memory_is_used_again(
    reload: Reload, model: Model, order: tuple[str, ...]
) -> None:
    new = tensors(2)
    slot = torch.empty(64)
    reload.begin()
    for name in (*order, "norm"):
        view = slot[: new[name].numel()].view(new[name].shape)
        view.copy_(new[name])
        reload.load([(name, view)])
        slot.fill_(-1)
    reload.finish()
    is_served(model, 2)


def test_what_is_whole_at_once_is_not_cloned(reload: Reload, layerwise: FakeLayerwise, model: Model) -> None:
    """Only what waits is: here the first of three."""
    new = tensors(2)
    reload.begin()
    reload.load([("embed", new["embed"]), ("q", new["q"])])
    waiting = [bound.arguments["loaded_weight"] for _, bound in layerwise.info(model.qkv).loaded_weights]
    assert [tensor.data_ptr() == new["q"].data_ptr() for tensor in waiting] == [False]
    reload.load([("k", new["k"])])
    assert layerwise.info(model.qkv).loaded_weights[0][1].arguments["loaded_weight"] is waiting[0], "cloned twice"


@pytest.mark.parametrize("name", ORDER)
def test_version_that_lacks_a_tensor_is_not_finished(
    reload: Reload, model: Model, layerwise: FakeLayerwise, name: str
) -> None:
    reload.begin()
    reload.load([(key, tensor) for key, tensor in tensors(2).items() if key != name])
    module = "qkv" if name in "qkv" else name
    with pytest.raises(EngineError, match=f"not all tensors came of {module} "):
        reload.finish()
    assert not layerwise.finalized
    reload.undo()
    fill(reload, 3)
    is_served(model, 3)


def test_buffer_of_a_checkpoint_that_does_not_come_is_missed(layerwise: FakeLayerwise) -> None:
    """Not so one that is computed, as `Model.norm` has."""
    model = Model()
    model.norm = Module(1, buffer="persistent")
    reload = Reload(model, None, layerwise.functions)
    with torch.no_grad():
        reload.begin()
        reload.load(list(tensors(2).items()))
        with pytest.raises(EngineError, match=r"not all tensors came of norm \(4 of 7 elements\)$"):
            reload.finish()


def test_padding_is_not_missed(layerwise: FakeLayerwise) -> None:
    model = Model()
    model.embed = Embedding(4)
    reload = Reload(model, None, layerwise.functions)
    with torch.no_grad():
        fill(reload, 2)
        assert model.embed.weight[:, 0].tolist() == [2, 2, 0, 0]
        reload.begin()
        reload.load([(name, tensor) for name, tensor in tensors(3).items() if name != "embed"])
        with pytest.raises(EngineError, match=r"not all tensors came of embed \(0 of 8 elements\)$"):
            reload.finish()


@pytest.mark.parametrize("rows", [2, 4], ids=["plain", "padded"])
def test_tied_module_is_loaded_with_the_one_whose_weight_it_shares(layerwise: FakeLayerwise, rows: int) -> None:
    """And what its kernels need of it is made anew."""
    model = Model()
    model.embed = Embedding(rows) if rows > 2 else Module(rows)
    model.head = Module(rows)
    model.head.weight = model.embed.weight
    reload = Reload(model, None, layerwise.functions)
    with torch.no_grad():
        for value in (2, 3):
            fill(reload, value)
            assert model.head.weight is model.embed.weight
            assert model.head.weight[:2].unique().tolist() == [value]
    assert layerwise.prepared == [model.head] * 2


def test_tied_module_is_missed_with_the_one_whose_weight_it_shares(layerwise: FakeLayerwise) -> None:
    model = Model()
    model.head = Module(2)
    model.head.weight = model.embed.weight
    reload = Reload(model, None, layerwise.functions)
    with torch.no_grad():
        reload.begin()
        reload.load([(name, tensor) for name, tensor in tensors(3).items() if name != "embed"])
        with pytest.raises(EngineError, match=r"came of embed \(0 of 8 elements\), head \(0 of 8 elements\)$"):
            reload.finish()
    assert layerwise.prepared == []


def test_names_at_most_ten_modules(layerwise: FakeLayerwise) -> None:
    model = Model()
    model.more = torch.nn.ModuleList(Model() for _ in range(4))
    reload = Reload(model, None, layerwise.functions)
    with torch.no_grad():
        reload.begin()
        with pytest.raises(EngineError, match=r"embed \(0 of 8 elements\), .* and 5 more$"):
            reload.finish()


@pytest.mark.parametrize("count", range(len(ORDER) + 1))
def test_undo_after_each_tensor_leaves_whole_modules(reload: Reload, model: Model, count: int) -> None:
    """Those that were whole keep what came; all others have what they had, and the next version is taken."""
    before = addresses(model)
    reload.begin()
    for name in ORDER[:count]:
        reload.load([(name, tensors(2)[name])])
    reload.undo()
    whole = {"embed": count >= 1, "qkv": count >= 4, "norm": False}  # its buffer is never loaded: only finish does it
    for name, done in whole.items():
        assert set(model.get_parameter(f"{name}.weight").flatten().tolist()) == {2.0 if done else 1.0}
    assert addresses(model) == before
    fill(reload, 3)
    is_served(model, 3)


@pytest.mark.parametrize("name", ORDER)
def test_failure_of_a_loader_is_undone(reload: Reload, model: Model, name: str) -> None:
    new = tensors(2)
    new[name] = torch.zeros(7, 7)
    reload.begin()
    with pytest.raises(ValueError, match="into"):
        reload.load(list(new.items()))
    reload.undo()
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    fill(reload, 3)
    is_served(model, 3)


def test_begin_undoes_what_was_left(reload: Reload, model: Model) -> None:
    reload.begin()
    reload.load([("q", tensors(2)["q"])])
    fill(reload, 3)
    is_served(model, 3)


def test_optional_scale_is_taken(reload: Reload, model: Model) -> None:
    reload.begin()
    reload.load([*tensors(2).items(), ("attention", torch.full((1,), 5.0))])
    reload.finish()
    assert model.attention.scale.tolist() == [5]
    fill(reload, 3)
    assert model.attention.scale.tolist() == [5]


def test_undo_of_nothing_does_nothing(reload: Reload, model: Model) -> None:
    reload.undo()
    is_served(model, 1)


def test_undo_gives_the_model_its_own_flag_back(reload: Reload, model: Model) -> None:
    flagged = vars(model)
    flagged["_do_torchao_reload"] = True
    reload.begin()
    assert flagged["_do_torchao_reload"] is False
    reload.undo()
    assert flagged["_do_torchao_reload"] is True
