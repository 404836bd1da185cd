"""A vLLM worker's part in a round: its gate, in which vLLM's own thread waits, and its loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import DeadlineError, EngineError, ManifestError
from inference_plugins import gated as module
from inference_plugins.disk import shapes_on_disk
from inference_plugins.gate import Gate
from inference_plugins.vllm.loader import VllmLoader

VERSION = VersionId("m", "r", 1)
LONG, SHORT = 10.0, 0.02
PAIR = [("w", torch.ones(2))]


class FakeReload:
    """Notes what it is asked; fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = ""

    def _note(self, what: str) -> None:
        self.calls.append(what)
        if self.fails == what:
            raise RuntimeError(f"{what} failed")

    def begin(self) -> None:
        self._note("begin")

    def load(self, tensors: Any) -> None:
        self._note("load " + " ".join(name for name, _ in tensors))

    def finish(self) -> None:
        self._note("finish")

    def undo(self) -> None:
        self._note("undo")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Nobody stays in it when the test is over."""
    made = Gate()
    yield made
    made.release("over")


@pytest.fixture
def model() -> FakeReload:
    return FakeReload()


@pytest.fixture
def loader(gate: Gate, model: FakeReload) -> VllmLoader:
    models: Any = [model]
    return VllmLoader(lambda: models, torch.device("cpu"), gate, needs_version=False)


@pytest.fixture
def held(gate: Gate, threads: ThreadPoolExecutor) -> Callable[[], Future[str]]:
    """Has vLLM's thread come into the gate; gives what it is told when it goes."""

    def come() -> Future[str]:
        future = threads.submit(gate.hold, LONG)
        gate.await_held(LONG)
        return future

    return come


def touched(loader: VllmLoader) -> bool:
    """A call, for a checker takes what it has seen once for granted; so for the others."""
    return loader.touched


def is_held(gate: Gate) -> bool:
    return gate.held


def serves(loader: VllmLoader) -> bool:
    return loader.serving


def starts(loader: VllmLoader) -> bool:
    return loader.starting


# --- the gate --------------------------------------------------------------------------------------------------------


def test_gate_holds_until_it_is_released(gate: Gate, held: Callable[[], Future[str]]) -> None:
    assert not is_held(gate)
    thread = held()
    assert is_held(gate)
    assert not thread.done()
    gate.release("finished")
    assert thread.result(LONG) == "finished"
    assert not is_held(gate)


def test_gate_is_not_held_from_its_release_on(gate: Gate, held: Callable[[], Future[str]]) -> None:
    """Also while vLLM's thread has not run yet: it may go at any moment."""
    thread = held()
    gate.release("finished")
    assert not is_held(gate)
    with pytest.raises(EngineError, match="did not enter"):
        gate.await_held(SHORT)
    assert thread.result(LONG) == "finished"


def test_gate_lets_go_at_the_deadline(gate: Gate) -> None:
    assert gate.hold(SHORT) == "deadline"
    assert not is_held(gate)
    with pytest.raises(EngineError, match=r"did not enter update_weights within 0\.02 s"):
        gate.await_held(SHORT)


def test_release_of_an_empty_gate_does_nothing(gate: Gate, held: Callable[[], Future[str]]) -> None:
    gate.release("early")
    thread = held()
    assert is_held(gate)
    gate.release("finished")
    assert thread.result(LONG) == "finished"


# --- an update -------------------------------------------------------------------------------------------------------


def test_update_loads_finishes_and_lets_go(
    loader: VllmLoader, model: FakeReload, gate: Gate, held: Callable[[], Future[str]]
) -> None:
    for _ in range(2):
        model.calls.clear()
        thread = held()
        loader.begin()
        assert not touched(loader)
        loader.load(PAIR)
        assert touched(loader)
        loader.load([("x", torch.ones(1)), ("y", torch.ones(1))])
        assert not thread.done()
        loader.finish(VERSION)
        assert thread.result(LONG) == "finished"
        assert model.calls == ["undo", "begin", "load w", "load x y", "finish"]
        assert loader.content == VERSION
        assert not touched(loader)


def test_draft_model_is_given_everything_too(gate: Gate, held: Callable[[], Future[str]]) -> None:
    models: Any = [FakeReload(), FakeReload()]
    loader = VllmLoader(lambda: models, torch.device("cpu"), gate, needs_version=False)
    held()
    loader.begin()
    loader.load(PAIR)
    loader.finish(VERSION)
    assert models[0].calls == models[1].calls == ["undo", "begin", "load w", "finish"]


def test_begin_waits_for_vllms_thread(loader: VllmLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTER_SECONDS", SHORT)
    with pytest.raises(EngineError, match="did not enter"):
        loader.begin()
    assert not touched(loader)


@pytest.mark.parametrize("fails", ["begin", "load w", "finish"])
def test_failure_leaves_it_touched_and_is_undone(
    loader: VllmLoader, model: FakeReload, gate: Gate, held: Callable[[], Future[str]], fails: str
) -> None:
    thread = held()
    loader.begin()
    model.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        update(loader)
    assert touched(loader)
    assert loader.content is None
    assert not thread.done()
    model.calls.clear()
    loader.abandon("it failed")
    assert model.calls == ["undo"]
    assert thread.result(LONG) == "abandoned"
    assert loader.failure == "it failed"
    assert touched(loader), "modules that were whole have new values"

    model.fails = ""
    held()
    loader.begin()
    update(loader)
    assert not loader.failure
    assert not touched(loader)


def update(loader: VllmLoader) -> None:
    loader.load(PAIR)
    loader.finish(VERSION)


def test_nothing_is_written_once_vllms_thread_has_gone(loader: VllmLoader, model: FakeReload, gate: Gate) -> None:
    """At its deadline: it may run the model."""
    assert gate.hold(SHORT) == "deadline"
    with pytest.raises(EngineError, match="update_weights has ended before the update"):
        loader.load(PAIR)
    with pytest.raises(EngineError, match="update_weights has ended before the update"):
        loader.finish(VERSION)
    assert model.calls == []
    assert not touched(loader)


def test_abandon_without_an_update_changes_nothing(loader: VllmLoader, model: FakeReload) -> None:
    loader.abandon("another engine failed")
    assert not touched(loader)
    assert loader.content is None


def test_every_tensor_goes_to_vllms_loaders(loader: VllmLoader) -> None:
    specs = [TensorSpec("w", "float32", (2,)), TensorSpec("x", "float32", (1,))]
    assert list(loader.place(specs, torch.device("cpu"))) == [None, None]
    loader.expect(specs)
    assert loader.halt() == 0


# --- shapes ----------------------------------------------------------------------------------------------------------


def of(**shapes: tuple[int, ...]) -> list[TensorSpec]:
    return [TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items()]


def test_version_of_other_shapes_than_on_disk_is_refused(gate: Gate) -> None:
    shapes = {"w": (2, 4), "x": (3,)}
    loader = VllmLoader(list, torch.device("cpu"), gate, needs_version=True, shapes=shapes)
    loader.expect(of(w=(2, 4), x=(3,), new=(7,)))
    with pytest.raises(ManifestError, match=r"^w is \[2, 4\] here, \[4, 4\] in the version; x is \[3\] here, \[\] in"):
        loader.expect(of(w=(4, 4), x=()))


def test_version_of_other_shapes_than_the_last_is_refused(loader: VllmLoader, held: Callable[[], Future[str]]) -> None:
    loader.expect(of(w=(9,)))
    held()
    loader.begin()
    loader.load(PAIR)
    loader.expect(of(w=(9,)))
    loader.finish(VERSION)
    loader.expect(of(w=(2,)))
    with pytest.raises(ManifestError, match=r"^w is \[2\] here, \[9\] in the version$"):
        loader.expect(of(w=(9,)))


def test_shapes_of_an_update_that_failed_count_for_nothing(loader: VllmLoader, held: Callable[[], Future[str]]) -> None:
    held()
    loader.begin()
    loader.load(PAIR)
    loader.abandon("it failed")
    held()
    loader.begin()
    loader.load([("x", torch.ones(1))])
    loader.finish(VERSION)
    loader.expect(of(w=(9,), x=(1,)))


def test_ten_differences_are_named(gate: Gate) -> None:
    names = [f"t{number}" for number in range(12)]
    loader = VllmLoader(list, torch.device("cpu"), gate, needs_version=True, shapes=dict.fromkeys(names, (1,)))
    with pytest.raises(ManifestError, match=r"; t9 is \[1\] here, \[2\] in the version; and 2 more$"):
        loader.expect(of(**dict.fromkeys(names, (2,))))


def test_shapes_are_read_from_all_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    assert shapes_on_disk(str(tmp_path)) == {"a": (2, 3), "b": (), "c": (4,)}


def test_model_that_is_not_on_disk_has_no_shapes(tmp_path: Path) -> None:
    assert shapes_on_disk("Qwen/Qwen3-0.6B") == shapes_on_disk(str(tmp_path)) == {}


def test_file_that_is_none_gives_no_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert shapes_on_disk(str(tmp_path)) == {}
    assert "not compared" in caplog.text


def test_sleep_is_refused(loader: VllmLoader) -> None:
    with pytest.raises(EngineError, match="cannot say that it sleeps"):
        loader.sleep(SHORT)
    with pytest.raises(EngineError, match="cannot be woken up by the daemon"):
        loader.rouse()


# --- the start -------------------------------------------------------------------------------------------------------


def test_start_waits_until_what_is_held_may_be_served(
    loader: VllmLoader, gate: Gate, threads: ThreadPoolExecutor
) -> None:
    start = threads.submit(loader.await_serving, LONG)
    gate.await_held(LONG)
    assert starts(loader)
    loader.resume()
    assert start.result(LONG) is None
    assert serves(loader)
    assert not starts(loader)


def test_start_takes_a_version_and_fails_first_if_that_does(
    gate: Gate, model: FakeReload, threads: ThreadPoolExecutor
) -> None:
    models: Any = [model]
    loader = VllmLoader(lambda: models, torch.device("cpu"), gate, needs_version=True)
    start = threads.submit(loader.await_serving, LONG)
    gate.await_held(LONG)
    with pytest.raises(EngineError, match="waits for a version"):
        loader.resume()
    loader.abandon("a bad version")
    loader.begin()  # it is in the gate again by itself
    update(loader)
    assert not serves(loader)
    loader.resume()
    assert start.result(LONG) is None
    assert loader.content == VERSION


def test_start_ends_at_its_deadline_and_says_what_failed(loader: VllmLoader) -> None:
    loader.abandon("not all tensors came of norm")
    with pytest.raises(DeadlineError, match=r"within 0\.02 s; the last update failed: not all tensors came of norm$"):
        loader.await_serving(SHORT)


def test_pause_makes_it_not_serving(loader: VllmLoader) -> None:
    loader.resume()
    assert serves(loader)
    loader.pause(SHORT)
    assert not serves(loader)
    assert not starts(loader)
