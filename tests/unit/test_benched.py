"""Where tensors go whose modules are made over, round by round: benches come and go, wherever there is memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.errors import EngineError
from inference_plugins.assembly import Place
from inference_plugins.learned.benched import Benched
from inference_plugins.learned.benches import Shown, form_of
from inference_plugins.learned.record import Move

NBYTES = 64
MEMORY = torch.zeros(4, 2 * NBYTES, dtype=torch.uint8)
LIVE = 1 << 40


class Shelves:
    """Benches at places that a test chooses; notes what is done."""

    def __init__(self) -> None:
        self.at = {"one": 0, "two": 1}
        self.done: list[str] = []

    def showing(self, shown: Shown) -> contextlib.AbstractContextManager[object]:
        raise NotImplementedError

    def lay_out(self, module: str) -> Mapping[str, torch.Tensor]:
        self.done.append(f"lay out {module}")
        return {f"{module}.weight": MEMORY[self.at[module]]}

    def make_over(self, module: str) -> None:
        self.done.append(f"make over {module}")


@pytest.fixture
def shelves() -> Shelves:
    return Shelves()


@pytest.fixture
def benched(shelves: Shelves) -> Benched:
    """Two halves of a module's weight, and its bias, which is on no bench; another module, and a tensor for both."""
    made = Benched(shelves)
    moves: dict[str, list[Move]] = {
        "left": [move("one", 0)],
        "right": [move("one", NBYTES)],
        "bias": [Move("one.bias", Rectangle(8, 0, 8))],
        "other": [move("two", 0)],
        "plain": [Move("three.weight", Rectangle(0, 0, 8))],
    }
    modules = {name: {its[0].parameter.partition(".")[0]} for name, its in moves.items()}
    forms = {name: {f"{name}.weight": form_of(MEMORY[0])} for name in shelves.at}
    made.learn(forms, moves, modules, {"one.bias": LIVE, "three.weight": 2 * LIVE})
    made.begin()
    return made


def move(module: str, start: int) -> Move:
    return Move(f"{module}.weight", Rectangle(start, 0, NBYTES), bench=True)


def place(shelf: int, start: int = 0) -> Place:
    return Place(MEMORY[shelf].data_ptr() + start, NBYTES)


def test_module_is_made_over_once_when_all_of_its_tensors_came(benched: Benched, shelves: Shelves) -> None:
    assert benched.place("left") == place(0)
    benched.make_over()
    assert benched.place("bias") == Place(LIVE + 8, 8)
    assert benched.place("other") == place(1)
    benched.make_over()
    assert shelves.done == ["lay out one", "lay out two", "make over two"]
    assert benched.place("right") == place(0, NBYTES)
    benched.make_over()
    benched.make_over()
    assert shelves.done[3:] == ["make over one"]


def test_module_has_its_bench_when_what_is_on_none_comes_first(benched: Benched, shelves: Shelves) -> None:
    benched.place("bias")
    benched.make_over()
    assert shelves.done == ["lay out one"]


def test_places_follow_the_benches(benched: Benched, shelves: Shelves) -> None:
    for shelf in (0, 0, 2, 3, 0):
        shelves.at["one"] = shelf
        benched.begin()
        assert benched.place("left") == place(shelf)
        assert benched.place("right") == place(shelf, NBYTES)
        assert benched.place("bias") == Place(LIVE + 8, 8)
        assert benched.place("other") == place(1)


def test_round_that_was_given_up_leaves_nothing_to_make_over(benched: Benched, shelves: Shelves) -> None:
    benched.place("left")
    benched.begin()
    benched.make_over()
    assert shelves.done == ["lay out one"]
    benched.place("left")
    benched.place("right")
    benched.make_over()
    assert "make over one" not in shelves.done, "its bias is still to come"


def test_bench_of_another_form_is_refused(benched: Benched, monkeypatch: pytest.MonkeyPatch) -> None:
    wide: Any = {"one.weight": torch.zeros(3 * NBYTES, dtype=torch.uint8)}
    monkeypatch.setattr(Shelves, "lay_out", lambda *_: wide)
    with pytest.raises(EngineError, match="what is made over for one has another form than it had"):
        benched.place("left")


def test_only_tensors_of_modules_that_are_made_over_are_its_own(benched: Benched) -> None:
    assert [name in benched for name in ("left", "bias", "plain")] == [True, True, False]
