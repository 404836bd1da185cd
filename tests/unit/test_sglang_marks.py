"""Which elements of parameters were written, and a reload that believes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cpe_daemon.errors import EngineError
from inference_plugins.sglang import marks as module
from inference_plugins.sglang.marks import Marks
from inference_plugins.sglang.reload import Reload, load_marked, never_loaded

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BYTES = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES, torch.int32])
def test_mark_is_left_until_all_is_written(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 8, dtype=torch.float32).to(dtype)
    marks = Marks([("w", tensor)])
    marks.set()
    (count, total), *others = marks.left().values()
    assert count == total > 0
    assert not others
    tensor[:2].copy_(torch.ones(2, 8))
    assert marks.left() == {"w": (total // 2, total)}
    tensor[2:].copy_(torch.ones(2, 8))
    assert marks.left() == {}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_mark_is_no_number(dtype: torch.dtype) -> None:
    """A model that is not whole computes nothing."""
    tensor = torch.zeros(8, dtype=torch.float32).to(dtype)
    Marks([("w", tensor)]).set()
    assert tensor.float().isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_element_that_is_missing_is_found(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    marks = Marks([("w", tensor)])
    marks.set()
    tensor.view(-1)[:7] = 1
    tensor.view(-1)[8:] = 1
    assert marks.left() == {"w": (1, 15)}


def test_numbers_that_a_model_may_have_are_no_marks() -> None:
    """Those that arithmetic makes when it goes wrong are among them."""
    strange = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45])
    for dtype in FLOATS:
        tensor = torch.zeros(7, dtype=dtype)
        marks = Marks([("w", tensor)])
        marks.set()
        tensor.copy_(strange)
        assert marks.left() == {}
    every = torch.arange(-128, 128).to(torch.int8)
    tensor = torch.zeros(256, dtype=torch.int8)
    marks = Marks([("w", tensor)])
    marks.set()
    tensor.copy_(every)
    assert marks.left() == {}


def test_parameter_that_is_not_contiguous() -> None:
    tensor = torch.zeros(6, 4, dtype=torch.bfloat16).t()
    marks = Marks([("w", tensor)])
    marks.set()
    tensor[1:] = 1
    assert marks.left() == {"w": (6, 24)}


def test_large_parameter_is_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 8)
    tensor = torch.zeros(7, 3, dtype=torch.bfloat16)
    marks = Marks([("w", tensor)])
    marks.set()
    tensor[:3] = 1
    assert marks.left() == {"w": (12, 21)}


def test_scalars_and_what_has_no_memory() -> None:
    scalar = torch.zeros((), dtype=torch.float32)
    nothing = [torch.zeros(0), torch.zeros(3, dtype=torch.bool), torch.zeros(3, device="meta")]
    odd = torch.zeros(3, dtype=torch.uint8)
    marks = Marks([("scalar", scalar), ("odd", odd), *((str(i), tensor) for i, tensor in enumerate(nothing))])
    marks.set()
    assert marks.left() == {"scalar": (1, 1)}
    assert odd.tolist() == [0, 0, 0]
    assert nothing[1].tolist() == [False] * 3


def test_model_without_parameters_has_no_marks() -> None:
    marks = Marks([])
    marks.set()
    assert marks.left() == {}


def test_kept_parameters_get_their_values_back_where_nothing_came() -> None:
    kept, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])
    defaults = Marks.keeping_small([("kept", kept), ("unknown", kept)]).defaults(["kept", "unknown", "none"])
    assert defaults.keys() == {"kept", "unknown"}
    marks = Marks([("kept", kept), ("other", other)], defaults)
    assert marks.defaults(defaults).keys() == {"kept"}
    marks.set()
    kept[1] = 9
    marks.restore()
    assert kept.tolist() == [1, 9, 3]
    assert other.isnan().all()


def test_only_small_parameters_are_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 4)
    small, large = torch.ones(4), torch.ones(5)
    marks = Marks.keeping_small([("small", small), ("large", large)])
    marks.set()
    assert large.tolist() == [1] * 5
    assert marks.left() == {"small": (4, 4)}
    marks.restore()
    assert small.tolist() == [1] * 4


# --- a reload --------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Loads what it knows the name of, as SGLang's models do; a scale is seldom in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(7.0), requires_grad=False)

    def load_weights(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        known = dict(self.named_parameters())
        for name, tensor in tensors:
            if name in known:
                known[name].copy_(tensor)


class Runner:
    """SGLang's, and its updater."""

    def __init__(self) -> None:
        self.model = Model()
        self.weight_updater = self
        self.calls: list[str] = []

    def begin_weight_update(self) -> None:
        self.calls.append("begin")

    def end_weight_update(self, *, run_post_load: bool) -> None:
        self.calls.append(f"end {run_post_load}")


def disk(model: Any, weights: Any, *, device: str) -> str:
    """Loads a model from disk."""
    assert device == "cpu"
    model.load_weights(weights)
    return "loaded"


W = ("w", torch.ones(2, 3))
SCALE = ("scale", torch.tensor(5.0))


@pytest.fixture
def runner() -> Runner:
    """Its checkpoint on disk has no scale."""
    made = Runner()
    assert load_marked(disk, made.model, [W], device="cpu") == "loaded"
    return made


def values(runner: Runner) -> tuple[list[list[float]], float]:
    return runner.model.w.tolist(), float(runner.model.scale)


def test_what_no_checkpoint_has_keeps_its_value(runner: Runner) -> None:
    assert never_loaded(runner.model).counts == {"scale": 1}
    assert values(runner) == ([[1] * 3] * 2, 7)
    reload = Reload(runner)
    reload.begin()
    reload.load([("w", torch.full((2, 3), 2.0)), ("other", torch.ones(1))])
    reload.finish()
    assert values(runner) == ([[2] * 3] * 2, 7)
    assert runner.calls == ["begin", "end False"]


def test_what_a_version_has_beyond_the_disk_is_taken(runner: Runner) -> None:
    reload = Reload(runner)
    reload.begin()
    reload.load([W])
    reload.load([SCALE])
    reload.finish()
    assert values(runner) == ([[1] * 3] * 2, 5)


def test_reload_without_a_tensor_fails_and_leaves_no_number(runner: Runner) -> None:
    reload = Reload(runner)
    reload.begin()
    reload.load([("W", torch.ones(2, 3))])
    with pytest.raises(EngineError, match=r"^not all tensors came of w \(6 of 6 elements\)$"):
        reload.finish()
    assert runner.model.w.isnan().all()
    assert runner.calls == ["begin"]
    reload.undo()
    with pytest.raises(EngineError, match="no reload was begun"):
        reload.finish()
    reload.begin()
    reload.load([W])
    reload.finish()
    assert values(runner) == ([[1] * 3] * 2, 7)


def test_version_without_what_another_brought_has_the_default(runner: Runner) -> None:
    """Whether that other one was taken or not: what is served depends on the version alone."""
    reload = Reload(runner)
    for finished in (True, False):
        reload.begin()
        reload.load([W, SCALE])
        if finished:
            reload.finish()
        reload.undo()
        assert float(runner.model.scale) == 5
        reload.begin()
        reload.load([W])
        reload.finish()
        assert values(runner) == ([[1] * 3] * 2, 7)


def test_parameter_that_is_another_one_by_now_has_no_default(runner: Runner) -> None:
    runner.model.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    reload = Reload(runner)
    reload.begin()
    reload.load([W])
    with pytest.raises(EngineError, match=r"scale \(1 of 1 elements\)$"):
        reload.finish()


def test_reload_with_part_of_a_tensor_fails(runner: Runner) -> None:
    reload = Reload(runner)
    reload.begin()
    runner.model.w[0] = 1
    with pytest.raises(EngineError, match=r"w \(3 of 6 elements\)$"):
        reload.finish()


def test_ten_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    for index in range(12):
        runner.model.register_parameter(f"p{index}", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    reload = Reload(runner)
    reload.begin()
    reload.load([W, SCALE])
    with pytest.raises(EngineError, match=r"p0 \(1 of 1 elements\), .*p9 \(1 of 1 elements\) and 2 more$"):
        reload.finish()


def test_model_that_loaded_nothing_from_disk_needs_all(runner: Runner) -> None:
    dummy = Runner()
    reload = Reload(dummy)
    reload.begin()
    reload.load([W])
    with pytest.raises(EngineError, match="scale"):
        reload.finish()


def test_disk_is_marked_the_first_time_only(runner: Runner) -> None:
    """SGLang can load from disk again; what a version brought is not to be taken for what never comes."""
    load_marked(disk, runner.model, [SCALE], device="cpu")
    assert never_loaded(runner.model).counts == {"scale": 1}
    assert values(runner) == ([[1] * 3] * 2, 5)


def test_shared_parameter_of_two_models_is_written_by_either(runner: Runner) -> None:
    """A draft model's embedding is the target's."""
    draft = Runner()
    draft.model.w = runner.model.w
    reloads = [Reload(runner), Reload(draft)]
    each(reloads, lambda reload: reload.begin())
    each(reloads, lambda reload: reload.load([W, SCALE]))
    each(reloads, lambda reload: reload.finish())
    assert values(runner) == values(draft) == ([[1] * 3] * 2, 5)


def each(reloads: list[Reload], do: Callable[[Reload], None]) -> None:
    for reload in reloads:
        do(reload)
