"""The conformance kit finds what a plugin does wrong: the example's loader, broken in one way after another."""

# mypy: disable-error-code="misc"
# The example is imported from its file, as its reader has it: its classes are not known to a checker.

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import EngineError, ManifestError
from inference_plugins.testing import SCENARIOS, ConformanceError, LoaderWorker, Plugin, check

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """A module of the examples."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = example("tiny_plugin")
Loader: Any = tiny.TinyLoader


class Keeps(Loader):
    """Copies when all has come."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.kept = [*getattr(self, "kept", []), *tensors]

    def finish(self, version: VersionId) -> None:
        kept, self.kept = self.kept, []
        super().load(kept)
        super().finish(version)


class KeepsForGood(Loader):
    """Serves out of the slot."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().load(tensors)
        self._engine.weights.update(tensors)


class MissesNothing(Loader):
    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        pass

    def finish(self, version: VersionId) -> None:
        self.content, self.touched = version, False


class TakesAnyShape(MissesNothing):
    """Takes as much as there is room for."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            held = self._engine.weights[name].view(-1)
            self.touched = True
            count = min(held.numel(), tensor.numel())
            held[:count].copy_(tensor.reshape(-1)[:count])


class TakesBytes(MissesNothing):
    """Copies bytes, whatever they are of."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            held = self._engine.weights[name].view(-1).view(torch.uint8)
            self.touched = True
            came = tensor.reshape(-1).view(torch.uint8)[: held.numel()]
            held[: len(came)].copy_(came)


class GoesByPlace(MissesNothing):
    """Believes that tensors come in the order in which it has them."""

    def begin(self) -> None:
        self.left = list(self._engine.weights)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in tensors:
            self.touched = True
            self._engine.weights[self.left.pop(0)].view(-1).copy_(tensor.reshape(-1))


class HidesWrites(Loader):
    """Says that nothing was touched."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().load(tensors)
        self.touched = False


class ServesWhenAbandoned(Loader):
    def abandon(self, reason: str) -> None:
        self.resume()


class ServesWhenFinished(Loader):
    def finish(self, version: VersionId) -> None:
        super().finish(version)
        self.resume()


class NeverPauses(Loader):
    def pause(self, seconds: float, passes: int | None = None) -> None:
        pass


class PausesOnce(Loader):
    def pause(self, seconds: float, passes: int | None = None) -> None:
        if not self.serving and self.content is not None:
            raise EngineError("it is paused")
        super().pause(seconds)


class ResumesOnce(Loader):
    def resume(self) -> None:
        if self.serving and self.content is not None:
            raise EngineError("it serves")
        super().resume()


class IgnoresPasses(Loader):
    """Pauses at once, whatever runs."""

    def pause(self, seconds: float, passes: int | None = None) -> None:
        self.serving = False

    def resume(self) -> None:
        self.serving = True


class RefusesAtRandom(Loader):
    """Raises what is no answer."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        try:
            super().expect(tensors)
        except ManifestError:
            raise EngineError("no") from None


class PausesToLook(Loader):
    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        self.pause(1.0)
        super().expect(tensors)


class ForgetsWhatItHolds(Loader):
    def resume(self) -> None:
        super().resume()
        self.content = None


class RemembersTheLastUpdate(Loader):
    """What came in an update that was given up counts as come."""

    def begin(self) -> None:
        pass


class LoadsOnce(Loader):
    """Takes nothing by a name that it has had, as a loader does that deletes what it has used up."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.had: set[str] = getattr(self, "had", set())
        if self.had & {name for name, _ in tensors}:
            raise EngineError("it is loaded")
        super().load(tensors)
        self.had |= {name for name, _ in tensors}


class OneATime(Loader):
    """Takes the first tensor that it is given."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().load(tensors[:1])
        self._come |= {name for name, _ in tensors}


class SleepsBadly(Loader):
    """Has its weights when it wakes up, or believes so; ``lost``: they are not what they were."""

    def sleep(self, seconds: float) -> None:
        self.pause(seconds)
        self.asleep = True

    def wake_up(self, *, kept: bool) -> None:
        self.asleep = False


BROKEN: list[tuple[type[Any], str, str]] = [
    (Keeps, "module_groups", "has other values"),
    (KeepsForGood, "views_let_go", "it looks at the slots still"),
    (MissesNothing, "tensor_missing", "was taken for whole"),
    (TakesAnyShape, "wrong_shape", "and the version was taken"),
    (TakesBytes, "wrong_dtype", "has other values"),
    (GoesByPlace, "any_order", "has other values"),
    (HidesWrites, "aborted_at_each_bucket", "it said that no weight had been touched"),
    (HidesWrites, "daemon_lost", "it said so, and that nothing was touched"),
    (ServesWhenAbandoned, "aborted_at_each_bucket", "it serves, although its round was given up"),
    (ServesWhenAbandoned, "daemon_lost", "it serves, although its weights may be a mixture"),
    (ServesWhenFinished, "module_groups", "it was not resumed yet"),
    (NeverPauses, "module_groups", "it serves, although it was paused"),
    (PausesOnce, "paused_and_resumed_twice", "it is paused"),
    (ResumesOnce, "paused_and_resumed_twice", "it serves"),
    (IgnoresPasses, "busy", "although a forward pass was under way"),
    (RefusesAtRandom, "asked_while_serving", "by a ManifestError"),
    (PausesToLook, "asked_while_serving", "because it was asked"),
    (ForgetsWhatItHolds, "content_is_told", "and says"),
    (RemembersTheLastUpdate, "tensor_missing", "was taken for whole"),
    (LoadsOnce, "same_version_again", "it is loaded"),
    (OneATime, "one_bucket", "has other values"),
    (SleepsBadly, "asleep", "although its weights may be a mixture"),
]


def plugin(loader: type[Any]) -> Plugin[Any]:
    """The example's plugin with another loader."""

    class Worker(LoaderWorker):
        def __init__(self, endpoint: str) -> None:
            self.engine = tiny.TinyEngine()
            self.loader = loader(self.engine)
            super().__init__(endpoint, self.loader)

    conforming: Plugin[Any] = example("tiny_conformance").PLUGIN
    sleeps = issubclass(loader, SleepsBadly)
    return dataclasses.replace(
        conforming,
        make=Worker,
        sleep=(lambda worker: worker.sleep()) if sleeps else None,
        wake_up=(lambda worker, kept: worker.wake_up(kept=kept)) if sleeps else None,
        patience_seconds=5.0,
    )


@pytest.mark.parametrize(("loader", "scenario", "why"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_broken_is_found(loader: type[Any], scenario: str, why: str) -> None:
    (one,) = [known for known in SCENARIOS if known.name == scenario]
    with pytest.raises(ConformanceError, match=why):
        one.run(plugin(loader))


def test_example_conforms_and_leaves_nothing(no_leaks: None) -> None:
    outcomes = check(example("tiny_conformance").PLUGIN)
    assert list(outcomes) == [scenario.name for scenario in SCENARIOS]
    assert {name: why for name, why in outcomes.items() if why} == {
        "asleep": "Plugin.sleep and Plugin.wake_up are not given"
    }


class PassesOver(Loader):
    """Takes what it has a place for."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        super().expect([spec for spec in tensors if spec.name in self._engine.weights])

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().load([pair for pair in tensors if pair[0] in self._engine.weights])


class Converts(Loader):
    """Takes values of any dtype."""

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        super().expect([TensorSpec(spec.name, "float32", spec.shape) for spec in tensors])

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().load([(name, tensor.float()) for name, tensor in tensors])


@pytest.mark.parametrize(("loader", "scenario"), [(PassesOver, "tensor_unknown"), (Converts, "wrong_dtype")])
def test_what_an_engine_may_decide_is_left_to_it(loader: type[Any], scenario: str) -> None:
    assert check(plugin(loader), only=(scenario,)) == {scenario: ""}


def test_failures_are_told_together(no_leaks: None) -> None:
    with pytest.raises(
        ConformanceError, match=r"2 of 3 scenarios: aborted_at_each_bucket: .*\ndaemon_lost: "
    ) as raised:
        check(plugin(HidesWrites), only=("one_bucket", "aborted_at_each_bucket", "daemon_lost"))
    assert "one_bucket" not in raised.value.message


def test_engine_that_does_not_come_is_a_failure(no_leaks: None) -> None:
    def make(endpoint: str) -> Any:
        raise OSError("no such model")

    broken = dataclasses.replace(example("tiny_conformance").PLUGIN, make=make)
    with pytest.raises(ConformanceError, match="one_bucket: OSError: no such model"):
        check(broken, only=("one_bucket",))


def test_checkpoint_that_cannot_be_split_is_said(no_leaks: None) -> None:
    class Small(tiny.TinyEngine):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weights = {"w": torch.zeros(8)}

    class Worker(LoaderWorker):
        def __init__(self, endpoint: str) -> None:
            self.engine = Small()
            self.loader = Loader(self.engine)
            super().__init__(endpoint, self.loader)

    small = dataclasses.replace(
        example("tiny_conformance").PLUGIN, make=Worker, checkpoint=lambda seed: {"w": torch.full((8,), float(seed))}
    )
    with pytest.raises(ConformanceError, match="none can be split"):
        check(small, only=("split_tensors",))
