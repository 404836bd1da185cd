"""What a torch engine's tensors are written to: every dtype and layout in place, and nothing that does not fit."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.devices.rows import copying
from cpe_daemon.errors import EngineError, ManifestError
from inference_plugins.assembly import Place, Placement
from inference_plugins.torch.learning import make_target
from inference_plugins.torch.targets import CallbackTarget, Slicer, Slicing, Target, TensorTarget
from tests.unit.tensor_zoo import DTYPES, bytes_of, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def target_of(
    target: Any, *, slicing: Slicing | None = None, rank: int = 0, world_size: int = 1, ignore: tuple[str, ...] = ()
) -> Target:
    return make_target(target, Slicer(slicing, rank, world_size), ignore)


@pytest.fixture(params=[True, False], ids=["by address", "by torch"], autouse=True)
def by_address(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the target is on the slots' device, so that its places are copied to by address. All holds either way."""
    monkeypatch.setattr(sys.modules[__name__], "ASK_FOR_PLACES", request.param)
    return bool(request.param)


ASK_FOR_PLACES = True
CPU = torch.device("cpu")


def update(target: Target, tensors: Mapping[str, Tensor]) -> list[str]:
    """What an update does; returns what it brought nothing for."""
    target.begin()
    left = put(target, tensors) if ASK_FOR_PLACES else list(tensors.items())
    parts = target.cut(left)
    with torch.no_grad():
        for name, part in parts:
            target.write(name, part)
    return target.missing()


def put(target: Target, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Copy what has a place as the receiver does, by address; returns the rest."""
    left = []
    places = target.place([spec_of(name, tensor) for name, tensor in tensors.items()], CPU)
    for (name, tensor), place in zip(tensors.items(), places, strict=True):
        if place is None:
            left.append((name, tensor))
        elif isinstance(place, Place):
            ctypes.memmove(place.address, bytes_of(tensor)[place.start :], place.nbytes)
        else:
            copying(place)(tensor.contiguous().data_ptr())
    return left


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


# --- values and layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (0,), (4, 0, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_is_written_bit_by_bit(dtype: str, shape: tuple[int, ...]) -> None:
    place = tensor_of(dtype, *shape)
    held = {"w": place}
    new = tensor_of(dtype, *shape, seed=1)
    address = place.data_ptr()
    assert update(target_of(held), {"w": new}) == []
    assert bytes_of(held["w"]) == bytes_of(new)
    assert held["w"].data_ptr() == address


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.zeros(t.shape[0] * 2, t.shape[1], dtype=t.dtype)[::2],
        lambda t: torch.zeros(t.shape[0], t.shape[1] + 7, dtype=t.dtype)[:, 3:-4],
        lambda t: torch.zeros(1000, dtype=t.dtype).as_strided(t.shape, (100, 3), 17),
    ],
    ids=["transposed", "every other row", "a column range", "strided"],
)
def test_place_need_not_be_contiguous(layout: Callable[[Tensor], Tensor]) -> None:
    new = torch.arange(30.0).reshape(5, 6)
    place = layout(torch.zeros(5, 6))
    around = place.untyped_storage().nbytes()
    assert update(target_of({"w": place}), {"w": new}) == []
    assert torch.equal(place, new)
    assert place.untyped_storage().nbytes() == around


def test_bytes_around_a_strided_place_are_left_alone() -> None:
    whole = torch.zeros(6, 6)
    update(target_of({"w": whole[1:5:2, 2:4]}), {"w": torch.ones(2, 2)})
    assert whole.sum() == 4.0


def test_parameters_keep_their_identity_and_their_gradients() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight
    layer(torch.ones(3)).sum().backward()
    gradient = layer.weight.grad
    new = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    assert update(target_of(layer), new) == []
    assert layer.weight is before
    assert layer.weight.grad is gradient
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, new["weight"])


def test_buffers_are_written_and_those_that_are_not_saved_are_not_expected() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.zeros(2))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    model = Model()
    assert update(target_of(model), {"scale": torch.ones(2)}) == []
    assert torch.equal(model.get_buffer("scale"), torch.ones(2))
    assert torch.equal(model.get_buffer("cache"), torch.zeros(2))


def test_tensors_made_in_inference_mode_are_written() -> None:
    with torch.inference_mode():
        layer = nn.Linear(3, 2)
        held = {"w": torch.zeros(2)}
    assert update(target_of(layer), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}) == []
    assert update(target_of(held), {"w": torch.ones(2)}) == []
    assert layer.weight.sum() == 6.0
    assert held["w"].sum() == 2.0


def test_written_values_do_not_follow_the_slot() -> None:
    """What is given is a view of memory that is reused as soon as it was written."""
    held, slot = {"w": torch.zeros(4)}, torch.ones(4)
    update(target_of(held), {"w": slot})
    slot.zero_()
    assert torch.equal(held["w"], torch.ones(4))


def test_module_that_has_moved_is_looked_up_anew() -> None:
    layer = nn.Linear(2, 2, bias=False)
    target = target_of(layer)
    update(target, {"weight": torch.ones(2, 2)})
    layer.weight = nn.Parameter(torch.zeros(2, 2))
    update(target, {"weight": torch.full((2, 2), 3.0)})
    assert torch.equal(layer.weight, torch.full((2, 2), 3.0))


def test_change_is_counted_as_torch_counts_its_own() -> None:
    """Whoever looks at a tensor's version, as autograd does, sees that it is another one."""
    place = torch.zeros(3)
    before = place._version
    update(target_of({"w": place}), {"w": torch.ones(3)})
    assert place._version > before


@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda t: torch.zeros(2, 3, dtype=t.dtype).imag])
def test_place_that_is_no_plain_bytes_is_written_by_value(view: Callable[[Tensor], Tensor]) -> None:
    place = view(torch.zeros(2, 3, dtype=torch.complex64))
    new = torch.arange(6.0).reshape(2, 3).to(place.dtype) * (1j if place.is_complex() else 1)
    assert update(target_of({"w": place}), {"w": new}) == []
    assert torch.equal(place, new)


def test_place_of_a_subclass_is_written_by_its_own_rules() -> None:
    class Counting(torch.Tensor):
        copies = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.copies += func is torch.Tensor.copy_
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's

    place = torch.zeros(3).as_subclass(Counting)
    update(target_of({"w": place}), {"w": torch.ones(3)})
    assert (Counting.copies, place.sum().item()) == (1, 3.0)


# --- places ----------------------------------------------------------------------------------------------------------


def place_of(target: Target, name: str, tensor: Tensor) -> Placement | None:
    """Where a target wants a tensor of a version copied; None: it has to be given it."""
    target.begin()
    (place,) = target.place([spec_of(name, tensor)], CPU)
    return place


@pytest.mark.parametrize("rank", range(3))
def test_place_of_a_rank_s_rows_is_its_own_tensor(rank: int) -> None:
    new, held = torch.arange(24.0).reshape(6, 4), {"w": torch.zeros(2, 4)}
    place = place_of(target_of(held, slicing={"w": 0}, rank=rank, world_size=3), "w", new)
    assert place == Place(held["w"].data_ptr(), 2 * 4 * 4, rank * 2 * 4 * 4)


@pytest.mark.parametrize("rank", range(3))
def test_place_of_a_rank_s_columns_is_rows_of_bytes(rank: int) -> None:
    new, held = torch.arange(24.0).reshape(4, 6), {"w": torch.zeros(4, 2)}
    place = place_of(target_of(held, slicing={"w": 1}, rank=rank, world_size=3), "w", new)
    assert place == (Rectangle(held["w"].data_ptr(), rank * 2 * 4, 2 * 4, 4, 2 * 4, 6 * 4),)


def test_place_of_every_other_row_is_rows_of_bytes() -> None:
    held = torch.zeros(8, 6)[::2]
    assert place_of(target_of({"w": held}), "w", torch.ones(4, 6)) == (Rectangle(held.data_ptr(), 0, 24, 4, 48, 24),)


@pytest.mark.parametrize(
    "place",
    [torch.zeros(6, 4).t(), torch.zeros(4, 6, dtype=torch.complex64).conj(), torch.zeros(1, 6).expand(4, 6)],
    ids=["transposed", "conjugated", "repeated"],
)
def test_what_is_no_plain_copy_has_no_place(place: Tensor) -> None:
    target = target_of({"w": place})
    assert place_of(target, "w", torch.empty(4, 6, dtype=place.dtype)) is None
    assert target.missing() == ["w"]


def test_place_is_looked_up_anew_where_memory_has_changed() -> None:
    """An address that was good once is the worst that there is: between updates, and within one."""
    layer, new = nn.Linear(4, 2, bias=False), torch.ones(2, 4)
    target = target_of(layer)
    first = place_of(target, "weight", new)
    assert place_of(target, "weight", new) == first
    kept = layer.weight.data
    layer.weight.data = torch.zeros(2, 4)
    second = place_of(target, "weight", new)
    assert second == Place(layer.weight.data_ptr(), 32)
    assert second != first
    layer.weight.data = kept
    assert target.place([spec_of("weight", new)], CPU) == [first]
    layer.weight = nn.Parameter(torch.zeros(4, 2).t())
    assert place_of(target, "weight", new) is None
    layer.weight = nn.Parameter(torch.zeros(3, 4))
    target.begin()
    with pytest.raises(ManifestError, match=r"weight is \[3, 4\] here, \[2, 4\] in the version"):
        target.place([spec_of("weight", new)], CPU)


def test_place_is_on_the_device_that_it_was_asked_for() -> None:
    """A daemon that is restarted may come back with slots somewhere else."""
    new, held = torch.ones(2, 4), {"w": torch.zeros(2, 4)}
    target, spec = target_of(held), spec_of("w", new)
    target.begin()
    for _ in range(2):
        assert target.place([spec], torch.device("cuda", 0)) == [None]
        assert target.missing() == ["w"]
    assert target.place([spec], CPU) == [Place(held["w"].data_ptr(), 32)]
    assert target.place([spec], torch.device("cuda", 0)) == [None]


def test_place_is_for_the_dtype_and_shape_that_it_was_looked_up_for() -> None:
    target = target_of({"w": torch.zeros(2, 4)})
    assert place_of(target, "w", torch.ones(2, 4)) is not None
    for wrong in (torch.ones(4, 2), torch.ones(2, 4, dtype=torch.int32)):
        with pytest.raises(ManifestError, match="w is"):
            target.place([spec_of("w", wrong)], CPU)


def test_tensor_counts_as_written_once_its_place_was_asked_for() -> None:
    target = target_of({"w": torch.zeros(2), "v": torch.zeros(2)})
    assert place_of(target, "w", torch.ones(2)) is not None
    assert target.missing() == ["v"]
    target.begin()
    assert target.missing() == ["w", "v"]


def test_nothing_of_an_ignored_tensor_has_a_place() -> None:
    held = {"w": torch.zeros(2, 3)}
    target = target_of(held, ignore=("mtp.w",))
    place = place_of(target, "mtp.w", torch.ones(9))
    assert isinstance(place, Place)
    assert place.nbytes == 0
    assert target.missing() == ["w"]
    with pytest.raises(ManifestError, match="no tensor here is called u"):
        target.place([TensorSpec("u", "float32", (2, 3))], CPU)


def test_callback_is_given_every_tensor() -> None:
    assert place_of(target_of(lambda name, tensor: None), "w", torch.ones(4)) is None


def test_expecting_an_update_is_no_change(by_address: bool) -> None:
    """It is compared while the engine serves."""
    held = {"w": torch.zeros(2)}
    before = held["w"]._version
    target_of(held).expect([TensorSpec("w", "float32", (2,))])
    assert held["w"]._version == before


# --- tied weights ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("names", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.state_dict(), lambda m: dict(m.state_dict(keep_vars=True))])
def test_tied_weights_count_as_written_when_either_comes(names: tuple[str, ...], given: Callable[[Tied], Any]) -> None:
    """However they are attached: a state_dict has one tensor object for each name, over the same memory."""
    model = Tied()
    new = torch.arange(8.0).reshape(4, 2)
    assert update(target_of(given(model)), dict.fromkeys(names, new)) == []
    assert torch.equal(model.head.weight, new)
    assert torch.equal(model.embed.weight, new)


def test_tensors_that_overlap_without_being_the_same_are_expected_apart() -> None:
    whole = torch.zeros(4, 2)
    held = {"all": whole, "first": whole[:2], "column": whole[:, 0], "flat": whole.view(-1)}
    target = target_of(held)
    target.begin()
    target.write("all", torch.ones(4, 2))
    assert target.missing() == ["first", "column", "flat"]


def test_tensors_without_bytes_are_expected_apart() -> None:
    held = {"a": torch.zeros(0), "b": torch.zeros(0), "meta": torch.zeros(2, device="meta")}
    target = target_of(held)
    target.begin()
    target.write("a", torch.zeros(0))
    assert target.missing() == ["b", "meta"]


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "w is torch.float32 here, torch.bfloat16 in the version"),
        (torch.zeros(3, 2), r"w is \[2, 3\] here, \[3, 2\] in the version"),
        (torch.zeros(6), r"w is \[2, 3\] here, \[6\] in the version"),
        (torch.zeros(1, 3), r"w is \[2, 3\] here, \[1, 3\] in the version"),
        (torch.zeros(()), r"w is \[2, 3\] here, \[\] in the version"),
    ],
    ids=["dtype", "transposed", "flat", "broadcastable", "0-dim"],
)
def test_tensor_that_does_not_fit_its_place_is_refused(tensor: Tensor, says: str) -> None:
    held = {"w": torch.full((2, 3), 7.0)}
    target = target_of(held)
    target.begin()
    with pytest.raises(ManifestError, match=says):
        target.cut([("w", tensor)])
    assert torch.equal(held["w"], torch.full((2, 3), 7.0))


def test_tensor_without_a_place_is_refused_unless_it_is_ignored() -> None:
    held = {"w": torch.zeros(2)}
    new = {"w": torch.ones(2), "mtp.w": torch.ones(9)}
    with pytest.raises(ManifestError, match=r"no tensor here is called mtp\.w"):
        update(target_of(held), new)
    assert torch.equal(held["w"], torch.zeros(2))
    assert update(target_of(held, ignore=("mtp.w",)), new) == []
    assert torch.equal(held["w"], torch.ones(2))


def test_first_ten_misfits_are_named_and_the_rest_counted() -> None:
    target = target_of({})
    target.begin()
    with pytest.raises(ManifestError, match=r"called t0; .* called t9; and 5 more$"):
        target.cut([(f"t{index}", torch.zeros(1)) for index in range(15)])


def test_missing_names_are_in_the_order_of_the_target() -> None:
    held = {name: torch.zeros(1) for name in "cab"}
    assert update(target_of(held), {"a": torch.ones(1)}) == ["c", "b"]


def test_each_update_begins_with_nothing_written() -> None:
    target = target_of({"w": torch.zeros(1)})
    assert update(target, {"w": torch.ones(1)}) == []
    target.begin()
    assert target.missing() == ["w"]


def test_what_is_no_tensor_in_a_dict_is_passed_over() -> None:
    held: dict[str, Any] = {"w": torch.zeros(1), "epoch": 3, "name": "policy"}
    assert update(target_of(held), {"w": torch.ones(1)}) == []


@pytest.mark.parametrize("thing", [None, 3, "model", [torch.zeros(1)], torch.zeros(1)])
def test_what_cannot_be_attached_is_refused(thing: object) -> None:
    with pytest.raises(EngineError, match=r"an nn\.Module, a dict of tensors or a callback is needed"):
        target_of(thing)


# --- what is compared before the pause -------------------------------------------------------------------------------


def test_expecting_compares_without_writing() -> None:
    held = {"w": torch.full((2,), 7.0), "v": torch.zeros(())}
    target = target_of(held)
    target.expect([TensorSpec("w", "float32", (2,)), TensorSpec("v", "float32", ())])
    assert torch.equal(held["w"], torch.full((2,), 7.0))
    with pytest.raises(ManifestError, match="the version brings nothing for v"):
        target.expect([TensorSpec("w", "float32", (2,))])
    with pytest.raises(ManifestError, match="no tensor here is called u"):
        target.expect([TensorSpec(name, "float32", (2,)) for name in ("w", "u")])


# --- tensor parallelism ----------------------------------------------------------------------------------------------

RULE = {"column": 0, "row": 1, "last": -1}


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("rule", [RULE, RULE.get], ids=["mapping", "function"])
def test_each_rank_gets_its_part(rank: int, rule: Slicing) -> None:
    new = {
        "column": torch.arange(24.0).reshape(6, 4),
        "row": torch.arange(24.0).reshape(4, 6),
        "last": torch.arange(9.0).reshape(3, 3),
        "whole": torch.arange(3.0),
    }
    held = {"column": torch.zeros(2, 4), "row": torch.zeros(4, 2), "last": torch.zeros(3, 1), "whole": torch.zeros(3)}
    assert update(target_of(held, slicing=rule, rank=rank, world_size=3), new) == []
    assert torch.equal(held["column"], new["column"][2 * rank : 2 * rank + 2])
    assert torch.equal(held["row"], new["row"][:, 2 * rank : 2 * rank + 2])
    assert torch.equal(held["last"], new["last"][:, rank : rank + 1])
    assert torch.equal(held["whole"], new["whole"])


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 4), 0), ((4,), 1), ((4,), -2), ((), 0), ((), -1), ((4, 4), 2), ((4, 4), -3)]
)
def test_dimension_that_cannot_be_shared_is_refused(shape: tuple[int, ...], dim: int) -> None:
    for target in (
        target_of({"w": torch.zeros(shape)}, slicing={"w": dim}, world_size=2),
        target_of(lambda name, tensor: None, slicing={"w": dim}, world_size=2),
    ):
        target.begin()
        with pytest.raises(ManifestError, match=f"cannot be sliced along dimension {dim} for 2 ranks"):
            target.cut([("w", torch.zeros(shape))])


def test_part_of_a_wrong_size_says_what_it_was_cut_from() -> None:
    target = target_of({"w": torch.zeros(4, 4)}, slicing={"w": 0}, world_size=2)
    target.begin()
    with pytest.raises(ManifestError, match=r"w is \[4, 4\] here, \[2, 4\] \(cut from \[4, 4\]\) in the version"):
        target.cut([("w", torch.zeros(4, 4))])


def test_ignored_tensor_is_not_sliced() -> None:
    target = target_of({}, slicing={"odd": 0}, world_size=2, ignore=("odd",))
    assert update(target, {"odd": torch.zeros(3)}) == []


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callback_gets_this_rank_s_part() -> None:
    got: dict[str, list[float]] = {}
    target = target_of(lambda name, t: got.update({name: t.tolist()}), slicing={"w": 0}, rank=1, world_size=2)
    assert isinstance(target, CallbackTarget)
    assert update(target, {"w": torch.arange(4.0), "v": torch.arange(2.0)}) == []
    assert got == {"w": [2.0, 3.0], "v": [0.0, 1.0]}


def test_callback_that_raises_is_heard() -> None:
    def refuse(name: str, tensor: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="w"):
        update(target_of(refuse), {"w": torch.zeros(1)})


def test_module_is_no_callback_although_it_can_be_called() -> None:
    assert isinstance(target_of(nn.Linear(1, 1)), TensorTarget)


# --- what may be under way when the slots have been let go ----------------------------------------------------------


def on_a_gpu(target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    """As if it wrote to one."""
    monkeypatch.setattr(target, "gpus", lambda: {torch.device("cuda", 0)})
    return target


def test_gpus_are_waited_for_only_if_torch_has_copied(by_address: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target = on_a_gpu(target_of({"w": torch.zeros(4)}), monkeypatch)
    assert update(target, {"w": torch.ones(4)}) == []
    assert target.unsettled() == (set() if by_address else {torch.device("cuda", 0)})
    target.begin()
    assert target.unsettled() == set()


@pytest.mark.parametrize("learning", [False, True])
def test_gpus_are_waited_for_once_a_function_was_called(learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"w": torch.zeros(4)}
    writes_to = held if learning else None
    made = make_target(lambda name, part: held[name].copy_(part), Slicer(None, 0, 1), (), writes_to)
    target = on_a_gpu(made, monkeypatch)
    target.expect([TensorSpec("w", "float32", (4,))])
    assert update(target, {"w": torch.ones(4)}) == []
    assert target.unsettled() == {torch.device("cuda", 0)}
    target.begin()
    assert target.unsettled() == set()
