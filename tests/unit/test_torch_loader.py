"""What a torch engine's loader does between its target and its serving lock."""

from __future__ import annotations

import threading

import pytest
import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import DeadlineError, EngineError
from inference_plugins.torch.loader import TorchLoader
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Slicer, TensorTarget

OLD, NEW = VersionId("m", "r", 1), VersionId("m", "r", 2)
CPU = torch.device("cpu")
SHORT = 0.01


class Target(TensorTarget):
    """Two tensors; passes one over without a word if it is told to."""

    def __init__(self) -> None:
        self.held = {"a": torch.zeros(2), "b": torch.zeros(2).expand(2, 2)[0]}
        self.ignores = ""
        super().__init__(lambda: self.held, Slicer(None, 0, 1), ())

    def write(self, name: str, part: torch.Tensor) -> None:
        if name != self.ignores:
            super().write(name, part)


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def lock() -> ServingLock:
    return ServingLock(SHORT)


@pytest.fixture
def loader(target: Target, lock: ServingLock) -> TorchLoader:
    """Of an engine that serves."""
    made = TorchLoader(target, lock, threading.Condition())
    made.resume()
    return made


def load(loader: TorchLoader, *names: str) -> None:
    loader.pause(SHORT)
    loader.begin()
    loader.load([(name, torch.ones(2)) for name in names])
    loader.finish(NEW)


def why(lock: ServingLock) -> str:
    return lock.shut_because or "it is open"


def test_update_is_done_when_every_tensor_was_taken(loader: TorchLoader, target: Target) -> None:
    load(loader, "a", "b")
    assert (loader.content, loader.touched) == (NEW, False)
    assert target.held["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("ignored", ["a", "b"])
def test_update_of_which_a_tensor_was_not_taken_fails(ignored: str, loader: TorchLoader, target: Target) -> None:
    """Everything came, and the engine passed something over: it is not the version."""
    target.ignores = ignored
    with pytest.raises(EngineError, match=f"m@r#2 brought nothing for {ignored}"):
        load(loader, "a", "b")
    assert (loader.content, loader.touched) == (None, True)


def test_question_whether_a_version_fits_takes_nothing_for_loaded(loader: TorchLoader) -> None:
    """It may be asked at any time; what is asked about has not come."""
    loader.begin()
    loader.expect([TensorSpec(name, "float32", (2,)) for name in ("a", "b")])
    with pytest.raises(EngineError, match="brought nothing for a, b"):
        loader.finish(NEW)


# --- forward passes --------------------------------------------------------------------------------------------------


def test_passes_are_counted_anew_from_each_update(loader: TorchLoader, lock: ServingLock) -> None:
    for _ in range(3):
        with lock:
            pass
    assert loader.halt() == 3
    loader.pause(SHORT, 3)
    loader.begin()
    assert loader.halt() == 0
    loader.resume()
    with lock:
        pass
    assert loader.halt() == 1


def test_mixture_is_served_for_no_sibling_s_sake(loader: TorchLoader, lock: ServingLock) -> None:
    loader.pause(SHORT)
    loader.begin()
    loader.load([("a", torch.ones(2))])
    loader.pause(20.0, 1000)  # waits for no pass
    with pytest.raises(EngineError, match="mixture"):
        lock.acquire(SHORT)


# --- sleep -----------------------------------------------------------------------------------------------------------


def test_engine_that_sleeps_serves_nobody_until_it_is_resumed(loader: TorchLoader, lock: ServingLock) -> None:
    loader.sleep(SHORT)
    assert (loader.asleep, loader.serving, why(lock)) == (True, False, "it is asleep")
    loader.wake_up(kept=True)
    assert (loader.asleep, loader.touched, loader.serving) == (False, False, False)
    loader.resume()
    assert why(lock) == "it is open"


def test_weights_that_were_not_kept_are_no_version(loader: TorchLoader, lock: ServingLock) -> None:
    load(loader, "a", "b")
    loader.sleep(SHORT)
    loader.wake_up(kept=False)
    assert loader.touched
    assert "it slept, and its weights were not kept" in why(lock)


def test_engine_that_does_not_come_to_rest_stays_awake(loader: TorchLoader, lock: ServingLock) -> None:
    with lock, pytest.raises(DeadlineError):
        loader.sleep(SHORT)
    assert (loader.asleep, loader.serving, why(lock)) == (False, True, "it is open")


def test_engine_takes_its_memory_back_as_it_was_told_how(target: Target, lock: ServingLock) -> None:
    woken: list[bool] = []
    TorchLoader(target, lock, threading.Condition(), lambda: woken.append(True)).rouse()
    assert woken == [True]
    with pytest.raises(EngineError, match="attached without on_wake"):
        TorchLoader(target, lock, threading.Condition()).rouse()
