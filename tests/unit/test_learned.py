"""Loaders are learned from what they do, replaced where that was proven, and left alone where it is no plain copy."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.devices.rows import copying
from inference_plugins.assembly import Place
from inference_plugins.learned import LearnedLoading, loading, switched_on
from inference_plugins.learned.loading import spec_of
from inference_plugins.learned.table import Table
from tests.unit.loaders import MODELS, Engine, Load, checkpoint, engine_of
from tests.unit.tensor_zoo import bytes_of

CPU = torch.device("cpu")

Checkpoint = Mapping[str, Tensor]


class Worker:
    """Goes through rounds as a plugin does: copies what has a place, and has the loader load the rest."""

    def __init__(self, parameters: Callable[[], Mapping[str, Tensor]] | Mapping[str, Tensor], load: Load) -> None:
        self.learned = LearnedLoading(parameters if callable(parameters) else lambda: parameters)
        self.load = load
        self.given: list[str] = []
        """What the loader was given in the last round."""

    def push(self, tensors: Checkpoint) -> int:
        """Returns how many tensors were copied without the loader."""
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        self.learned.expect(specs)
        return self.round(tensors, specs)

    def round(self, tensors: Checkpoint, specs: list[TensorSpec]) -> int:
        self.given = []
        self.learned.begin()
        for spec, place in zip(specs, self.learned.place(specs, CPU), strict=True):
            slot = tensors[spec.name].clone()
            if place is None:
                self.given.append(spec.name)
                self.learned.observe([(spec.name, slot)], partial(self.load, spec.name, slot))
            elif isinstance(place, Place):
                copying([Rectangle(place.address, place.start, place.nbytes)])(slot.data_ptr())
            else:
                copying(place)(slot.data_ptr())
            slot.view(torch.uint8).fill_(0xEE) if slot.dim() else slot.zero_()  # it is reused as soon as it was read
        self.learned.finish()
        return len(specs) - len(self.given)


def values(parameters: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in parameters.items()}


def loaded_by_hand(engine: Engine, tensors: Checkpoint, shape_name: str) -> dict[str, bytes]:
    other = engine_of(MODELS[shape_name], engine.rank, engine.world_size, expert_parallel=engine.expert_parallel)
    for name, tensor in tensors.items():
        other.load(name, tensor)
    return values(other.parameters)


# --- engines' loaders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_loaders_of_known_models_are_learned(model: str, world_size: int) -> None:
    """Within a round, or, where there are tensors of few elements, two."""
    shape = MODELS[model]
    rounds = 2 if shape.biases else 1
    for rank in range(world_size):
        engine = engine_of(shape, rank, world_size)
        worker = Worker(engine.parameters, engine.load)
        for number in range(rounds):
            assert worker.push(checkpoint(shape, number)) < len(checkpoint(shape, number))
        report = worker.learned.report
        assert (report.unproven, dict(report.kept)) == (0, {})
        for number in (5, 6):
            version = checkpoint(shape, number)
            assert worker.push(version) == len(version) == report.learned
            assert values(engine.parameters) == loaded_by_hand(engine, version, model)


def test_experts_of_other_ranks_are_learned_to_be_nothing() -> None:
    shape = MODELS["qwen3-moe"]
    engine = engine_of(shape, 1, 2, expert_parallel=True)
    worker = Worker(engine.parameters, engine.load)
    worker.push(checkpoint(shape, 1))
    version = checkpoint(shape, 2)
    assert worker.push(version) == len(version)
    assert values(engine.parameters) == loaded_by_hand(engine, version, "qwen3-moe")


def test_places_are_worked_out_only_when_more_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor that stays unproven, as a norm of ones, that would take longer than the copies in every round."""
    worked_out: list[bool] = []
    genuine = Table.usable

    def usable(table: Table, *, quiet: bool) -> object:
        worked_out.append(quiet)
        return genuine(table, quiet=quiet)

    monkeypatch.setattr(Table, "usable", usable)
    parameters = {"a.weight": torch.zeros(ROWS, COLUMNS), "b.weight": torch.zeros(ROWS, COLUMNS)}
    worker = Worker(parameters, lambda name, tensor: parameters[name].copy_(tensor))
    ones = {"b.weight": torch.ones(ROWS, COLUMNS)}
    for number in range(4):
        worker.push(version(number) | ones)
        assert worked_out == [True]
    assert worker.given == ["b.weight"]
    for number in range(4, 8):
        worker.push(version(number))
        assert worked_out == [True, True]
    assert worker.given == []


def test_tables_of_the_same_ways_have_the_same_digest() -> None:
    shape, digests = MODELS["qwen3"], set[str]()
    for rank in (0, 0, 1):
        engine = engine_of(shape, rank, 2)
        worker = Worker(engine.parameters, engine.load)
        worker.push(checkpoint(shape, rank))
        digests.add(worker.learned.report.digest)
    assert len(digests) == 2


# --- loaders of one parameter ----------------------------------------------------------------------------------------

ROWS, COLUMNS = 24, 24


def version(number: int) -> dict[str, Tensor]:
    """Two tensors of two modules."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in ("a.weight", "b.weight")}


class Pair:
    """Two parameters; ``way`` loads the first one, and the second is copied."""

    def __init__(self, way: Callable[[Tensor, Tensor], object], first: Tensor | None = None) -> None:
        self.way = way
        self.parameters = {
            "a.weight": torch.zeros(ROWS, COLUMNS) if first is None else first,
            "b.weight": torch.zeros(ROWS, COLUMNS),
        }
        self.worker = Worker(lambda: self.parameters, self.load)

    def load(self, name: str, tensor: Tensor) -> None:
        if name == "b.weight":
            self.parameters[name].copy_(tensor)
        else:
            self.way(self.parameters[name], tensor)

    def check(self, *, rounds: int = 4) -> None:
        """Whatever was learned, the parameters hold what the loader alone makes of it."""
        for number in range(rounds):
            self.worker.push(version(number))
            held = values(self.parameters)
            self.parameters["a.weight"].zero_()
            for name, tensor in version(number).items():
                self.load(name, tensor.clone())
            assert values(self.parameters) == held


PLAIN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda place, tensor: place.data.copy_(tensor),
    "assigned": lambda place, tensor: place.__setitem__(slice(None), tensor),
    "each row": lambda place, tensor: [row.copy_(tensor[at]) for at, row in enumerate(place)],
    "halves, exchanged": lambda place, tensor: [
        one.copy_(two) for one, two in zip(place.chunk(2), reversed(tensor.chunk(2)), strict=True)
    ],
    "columns, exchanged": lambda place, tensor: [
        one.copy_(two) for one, two in zip(place.split(8, 1), reversed(tensor.split(8, 1)), strict=True)
    ],
    "a clone": lambda place, tensor: place.copy_(tensor.clone()),
    "a slice of a clone": lambda place, tensor: place.narrow(1, 0, 8).copy_(tensor.clone().narrow(1, 8, 8)),
    "a clone of a slice": lambda place, tensor: place.narrow(1, 0, 8).copy_(tensor.narrow(1, 8, 8).contiguous()),
    "collected": lambda place, tensor: place.copy_(collected(tensor)),
    "and onto itself": lambda place, tensor: place.copy_(place.copy_(tensor)),
    "a clone, and that onto itself": lambda place, tensor: place.copy_(onto_itself(tensor.clone())),
    "a buffer, filled twice": lambda place, tensor: place.copy_(collected(tensor, twice=True)),
    "a buffer, by columns": lambda place, tensor: place.copy_(by_columns(tensor)),
    "at once": lambda place, tensor: torch._foreach_copy_(list(place.chunk(2)), list(tensor.chunk(2))),
    "the same dtype": lambda place, tensor: place.copy_(tensor.to(place.dtype)),
    "three dimensions": lambda place, tensor: place.view(4, 6, COLUMNS)[:, :3].copy_(tensor.view(4, 6, COLUMNS)[:, 3:]),
    "as bytes": lambda place, tensor: place.view(torch.uint8).copy_(tensor.view(torch.uint8)),
    "nothing": lambda place, tensor: None,
    "looked at": lambda place, tensor: (
        place.copy_(tensor) if tensor.shape == place.shape and tensor.is_contiguous() else 1
    ),
}


def onto_itself(tensor: Tensor) -> Tensor:
    return tensor.copy_(tensor)


def by_columns(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor)
    for first in (0, 16, 8):
        made[:, first : first + 8] = tensor[:, first : first + 8]
    return made


def collected(tensor: Tensor, *, twice: bool = False) -> Tensor:
    made = torch.empty_like(tensor)
    if twice:
        made[ROWS // 2 :] = tensor[: ROWS // 2]
    made[: ROWS // 2] = tensor[: ROWS // 2]
    made[ROWS // 2 :] = tensor[ROWS // 2 :]
    return made


@pytest.mark.parametrize("way", PLAIN)
def test_plain_copies_are_learned_however_they_are_written(way: str) -> None:
    pair = Pair(PLAIN[way])
    pair.check()
    assert pair.worker.given == []
    assert (pair.worker.learned.report.learned, pair.worker.learned.report.kept) == (2, {})


OTHER: dict[str, tuple[str, Callable[[Tensor, Tensor], object]]] = {
    "permuted": ("index", lambda place, tensor: place.copy_(tensor[torch.arange(ROWS).roll(1)])),
    "permuted rows of heads": (
        "order",
        lambda place, tensor: place.copy_(tensor.view(2, 12, COLUMNS).transpose(0, 1).reshape(ROWS, COLUMNS)),
    ),
    "transposed": ("order", lambda place, tensor: place.copy_(tensor.t())),
    "transposed, contiguous": ("order", lambda place, tensor: place.copy_(tensor.t().contiguous())),
    "transposed place": ("order", lambda place, tensor: place.t().copy_(tensor)),
    "flipped": ("flip", lambda place, tensor: place.copy_(tensor.flip(0))),
    "upsampled": (
        "repeat_interleave|index_select|expand|repeated",
        lambda place, tensor: place.copy_(tensor[:12].repeat_interleave(2, 0)),
    ),
    "expanded": ("repeated", lambda place, tensor: place.copy_(tensor[:1])),
    "arithmetic": ("mul", lambda place, tensor: place.copy_(tensor * 2)),
    "arithmetic in place": ("mul_|overwritten", lambda place, tensor: place.copy_(tensor).mul_(2)),
    "added": ("add_", lambda place, tensor: place.zero_().add_(tensor)),
    "rounded": ("converted to", lambda place, tensor: place.copy_(tensor.to(torch.bfloat16))),
    "put together": ("cat", lambda place, tensor: place.copy_(torch.cat([tensor[:12], tensor[12:]]))),
    "with padding": ("fill_|zero_", lambda place, tensor: (place[:12].copy_(tensor[:12]), place[12:].fill_(7))),
    "out of a padded buffer": ("zeros", lambda place, tensor: place.copy_(padded(tensor))),
    "by its values": ("item|_local_scalar_dense", lambda place, tensor: place.fill_(tensor[0, 0].item())),
    "by numpy": ("numpy", lambda place, tensor: place.copy_(torch.from_numpy(tensor.numpy().copy()))),
    "by lists": ("tolist", lambda place, tensor: place.copy_(torch.tensor(tensor.tolist()))),
    "looked through": ("abs", lambda place, tensor: (place.copy_(tensor), tensor.abs().max())),
    "written twice": ("written twice", lambda place, tensor: (place.copy_(tensor), place[:12].copy_(tensor[12:]))),
    "out of the other": (
        "copied from a parameter|clone",
        lambda place, tensor: (place[:12].copy_(tensor[:12]), place[12:].copy_(place[:12])),
    ),
    "copied out of its place": (
        "copied from a parameter",
        lambda place, tensor: (place.copy_(tensor), DERIVED.update(half=place[:12].clone())),
    ),
    "copied out of its place into memory that was there": (
        "copied from a parameter",
        lambda place, tensor: (place.copy_(tensor), DERIVED.setdefault("all", torch.zeros(ROWS, COLUMNS)).copy_(place)),
    ),
    "behind torch's back": ("other bytes", lambda place, tensor: (place.copy_(tensor), turned_in_place(place))),
}


def padded(tensor: Tensor) -> Tensor:
    made = torch.zeros(ROWS, COLUMNS)
    made[:12] = tensor[:12]
    return made


def turned_in_place(place: Tensor) -> object:
    """Unseen: nothing that is given to torch has a trace of it."""
    memory = ctypes.cast(ADDRESS[id(place)], ctypes.POINTER(ctypes.c_float * (ROWS * COLUMNS))).contents
    memory[0], memory[1] = memory[1], memory[0]
    return memory


ADDRESS: dict[int, int] = {}
DERIVED: dict[str, Tensor] = {}
"""What loaders make of parameters for kernels, as attention does of its projections; it has to be made again."""


@pytest.mark.parametrize("way", OTHER)
def test_what_is_no_plain_copy_is_left_to_the_loader(way: str) -> None:
    reason, load = OTHER[way]
    pair = Pair(load)
    place = pair.parameters["a.weight"]
    ADDRESS[id(place)] = place.data_ptr()
    pair.check()
    assert pair.worker.given == ["a.weight"]
    ((found, count),) = pair.worker.learned.report.kept.items()
    assert count == 1
    assert re.search(reason, found)


def test_loader_that_converts_is_left_to_itself() -> None:
    pair = Pair(lambda place, tensor: place.copy_(tensor), torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16))
    pair.check()
    assert dict(pair.worker.learned.report.kept) == {"converted to bfloat16": 1}


def test_tensor_that_goes_nowhere_is_left_to_a_loader_that_writes_other_things_itself() -> None:
    """Nobody can tell that it had no part in them."""
    pair = Pair(lambda place, tensor: place.copy_(torch.full((ROWS, COLUMNS), 3.0)))
    pair.check()
    assert pair.worker.given == ["a.weight"]
    assert (pair.worker.learned.report.unproven, pair.worker.learned.report.kept) == (1, {})


def test_memory_that_is_kept_beside_the_parameters_is_no_parameter() -> None:
    kept: list[Tensor] = []

    def keep(place: Tensor, tensor: Tensor) -> None:
        place.copy_(tensor)
        kept[:] = [tensor.clone()]

    pair = Pair(keep)
    pair.check()
    assert dict(pair.worker.learned.report.kept) == {"kept in other memory": 1}


def test_parameter_that_is_replaced_is_left_to_the_loader() -> None:
    pair = Pair(lambda place, tensor: setattr(place, "data", tensor.clone()))
    for number in range(3):
        pair.worker.push(version(number))
        assert pair.worker.given == ["a.weight", "b.weight"]  # and nothing is known of its memory in the next round
        assert torch.equal(pair.parameters["a.weight"], version(number)["a.weight"])


def test_tensor_that_is_copied_later_is_learned_a_round_later() -> None:
    """As loaders do that wait for all tensors of a module."""
    waiting: list[Tensor] = []

    def collect(place: Tensor, tensor: Tensor) -> None:
        waiting.append(tensor.clone())

    pair = Pair(collect)
    first = pair.parameters["a.weight"]

    def load(name: str, tensor: Tensor) -> None:
        pair.load(name, tensor)
        if name == "b.weight":
            first.copy_(waiting.pop())

    pair.worker.load = load
    given = []
    for number in range(4):
        pair.worker.push(version(number))
        given.append(len(pair.worker.given))
        assert torch.equal(first, version(number)["a.weight"])
    assert given == [2, 2, 0, 0]


def test_what_a_thread_of_the_loader_s_writes_ends_all_trust() -> None:
    """Nothing is seen of it: neither that the tensor was read, nor that the parameter was written."""

    def by_thread(place: Tensor, tensor: Tensor) -> None:
        thread = threading.Thread(target=lambda: place.copy_(tensor))
        thread.start()
        thread.join()

    pair = Pair(by_thread)
    pair.check()
    assert pair.worker.given == ["a.weight", "b.weight"]
    assert dict(pair.worker.learned.report.kept) == {"written unseen": 2}


def test_what_is_copied_from_nobody_knows_where_ends_all_trust_when_it_changes() -> None:
    made: list[Tensor] = []

    def by_thread(place: Tensor, tensor: Tensor) -> None:
        thread = threading.Thread(target=lambda: made.append(tensor * 2))
        thread.start()
        thread.join()
        place.copy_(made.pop())

    pair = Pair(by_thread)
    pair.check()
    assert pair.worker.given == ["a.weight", "b.weight"]
    assert sum(pair.worker.learned.report.kept.values()) == 2


def test_parameters_that_nothing_comes_for_are_seen_twice_before_anything_is_trusted() -> None:
    pair = Pair(PLAIN["copy_"])
    pair.parameters["rope.inv_freq"] = torch.arange(12.0)
    given = []
    for number in (0, 0, 1, 2):  # the same version again shows nothing
        pair.worker.push(version(number))
        given.append(len(pair.worker.given))
    assert given == [2, 2, 2, 0]


# --- modules ---------------------------------------------------------------------------------------------------------


def test_modules_are_learned_whole_or_not_at_all() -> None:
    parameters = {"a.weight": torch.zeros(ROWS, COLUMNS), "a.scale": torch.zeros(ROWS), "b.weight": torch.zeros(4, 8)}

    def load(name: str, tensor: Tensor) -> None:
        parameters[name].copy_(tensor * 2 if name == "a.scale" else tensor)

    worker = Worker(parameters, load)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        worker.push({name: torch.randn(place.shape, generator=generator) for name, place in parameters.items()})
    assert worker.given == ["a.weight", "a.scale"]
    assert dict(worker.learned.report.kept) == {"mul": 2}
    assert worker.learned.report.learned == 1


def test_two_tensors_at_one_place_are_left_to_the_loader() -> None:
    place = torch.zeros(ROWS, COLUMNS)
    worker = Worker({"head.weight": place}, lambda name, tensor: place.copy_(tensor))
    for number in range(3):
        worker.push(version(number))
        assert torch.equal(place, version(number)["b.weight"])
    assert worker.given == ["a.weight", "b.weight"]
    assert dict(worker.learned.report.kept) == {"written twice": 2}


# --- contents that show nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dull",
    [
        torch.ones(ROWS, COLUMNS),
        torch.arange(float(COLUMNS)).expand(ROWS, COLUMNS).contiguous(),
        torch.arange(float(ROWS)).unsqueeze(1).expand(ROWS, COLUMNS).contiguous(),
        torch.arange(float(ROWS)).unsqueeze(1) + torch.arange(float(COLUMNS)),
        torch.ones(ROWS * COLUMNS),
        torch.tensor([1.0, 2.0, 3.0]).repeat(200),
        torch.zeros(1),
        torch.tensor([3.0]),
        torch.tensor(2.5),
    ],
    ids=[
        "ones",
        "equal rows",
        "equal columns",
        "symmetric",
        "a vector of ones",
        "periodic",
        "zero",
        "one number",
        "scalar",
    ],
)
def test_contents_that_would_not_show_another_order_prove_nothing(dull: Tensor) -> None:
    place = torch.zeros(dull.shape)
    worker = Worker({"a.weight": place}, lambda name, tensor: place.copy_(tensor))
    for _ in range(3):
        assert worker.push({"a.weight": dull}) == 0
        assert (worker.learned.report.unproven, worker.learned.report.learned) == (1, 0)
    generator = torch.Generator().manual_seed(3)
    worker.push({"a.weight": torch.randn(dull.shape, generator=generator)})
    assert worker.push({"a.weight": dull}) == 1
    assert torch.equal(place, dull)


# --- relearning ------------------------------------------------------------------------------------------------------


def test_parameters_that_moved_are_learned_anew() -> None:
    pair = Pair(PLAIN["copy_"])
    assert [pair.worker.push(version(number)) for number in range(2)] == [0, 2]
    before = pair.parameters["a.weight"]
    pair.parameters["a.weight"] = torch.zeros(ROWS, COLUMNS)
    assert [pair.worker.push(version(number)) for number in (2, 3)] == [0, 2]
    assert torch.equal(before, version(1)["a.weight"])
    assert torch.equal(pair.parameters["a.weight"], version(3)["a.weight"])


def test_version_of_other_tensors_is_learned_anew() -> None:
    pair = Pair(PLAIN["nothing"])
    assert [pair.worker.push(version(number)) for number in range(3)] == [0, 0, 2]
    fewer = {"b.weight": version(5)["b.weight"]}
    assert pair.worker.push(fewer) == 0
    assert torch.equal(pair.parameters["b.weight"], fewer["b.weight"])


def test_tensor_of_another_shape_than_was_learned_has_no_place_though_nobody_announced_it() -> None:
    pair = Pair(lambda place, tensor: place.copy_(tensor[:ROWS]))
    assert [pair.worker.push(version(number)) for number in range(2)] == [0, 2]
    larger = version(2) | {"a.weight": torch.randn(2 * ROWS, COLUMNS)}
    pair.worker.round(larger, [spec_of(name, tensor) for name, tensor in larger.items()])
    assert pair.worker.given == ["a.weight", "b.weight"]
    assert torch.equal(pair.parameters["a.weight"], larger["a.weight"][:ROWS])
    assert pair.worker.push(larger) == 0
    assert pair.worker.push(larger) == 2


def test_what_was_learned_is_forgotten_when_somebody_says_so() -> None:
    pair = Pair(PLAIN["copy_"])
    assert [pair.worker.push(version(number)) for number in range(2)] == [0, 2]
    pair.worker.learned.forget("experts were placed anew")
    assert [pair.worker.push(version(number)) for number in range(2)] == [0, 2]


def test_place_is_on_the_device_that_it_was_learned_on() -> None:
    pair = Pair(PLAIN["copy_"])
    pair.worker.push(version(0))
    specs = [spec_of(name, tensor) for name, tensor in version(1).items()]
    pair.worker.learned.begin()
    assert pair.worker.learned.place(specs, torch.device("cuda", 0)) == [None, None]
    assert None not in pair.worker.learned.place(specs, CPU)


def test_round_that_fails_teaches_nothing() -> None:
    fails = [True]

    def load(place: Tensor, tensor: Tensor) -> None:
        place[:3].copy_(tensor[:3])
        if fails.pop():
            raise ValueError("no")
        place.copy_(tensor)

    pair = Pair(load)
    with pytest.raises(ValueError, match="no"):
        pair.worker.push(version(0))
    pair.way = PLAIN["copy_"]
    assert [pair.worker.push(version(number)) for number in (1, 2)] == [0, 2]
    assert torch.equal(pair.parameters["a.weight"], version(2)["a.weight"])


def test_loader_that_takes_too_long_to_watch_is_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(PLAIN["copy_"])
    monkeypatch.setattr(loading, "_WATCHING_SECONDS", -1.0)
    assert [pair.worker.push(version(number)) for number in range(3)] == [0, 0, 0]
    assert not pair.worker.learned.on
    assert torch.equal(pair.parameters["a.weight"], version(2)["a.weight"])


def test_nothing_is_learned_where_it_is_switched_off() -> None:
    place = torch.zeros(ROWS, COLUMNS)
    worker = Worker({"a.weight": place}, lambda name, tensor: place.copy_(tensor))
    worker.learned.on = False
    for number in range(3):
        assert worker.push({"a.weight": version(number)["a.weight"]}) == 0
        assert torch.equal(place, version(number)["a.weight"])
    assert worker.learned.report.learned == 0


@pytest.mark.parametrize(("value", "on"), [("", True), ("on", True), ("off", False), (" OFF ", False), ("0", False)])
def test_environment_switches_learning_off(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv("CPE_LEARNED", value)
    assert switched_on() is on
