"""Rounds over loaders that are learned, with everything that can go wrong in between: in the end it is the version."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.core.plan import Gpu, Topology
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import VersionId, align
from cpe_daemon.devices.memory import copy
from cpe_daemon.devices.rows import copying
from cpe_daemon.devices.slots import Mark, Reached, Replay
from cpe_daemon.errors import EngineError
from cpe_daemon.wire.messages import Abort, Begin, Expect, Finish, Load, Pause, Resume, StepDone, TensorPart
from inference_plugins.learned.loading import spec_of
from inference_plugins.steps import Step, Steps
from inference_plugins.torch.learning import LearningTarget, make_target
from inference_plugins.torch.loader import TorchLoader
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Slicer
from tests.unit.loaders import MODELS, Engine, checkpoint, engine_of
from tests.unit.planning import make_plan, whole
from tests.unit.tensor_zoo import bytes_of

SLOT_BYTES = 2048
SECONDS = 5.0


class HostSlots:
    """One slot in host memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.content = torch.zeros(SLOT_BYTES, dtype=torch.uint8)

    def slot(self, index: int) -> Tensor:
        return self.content

    def loading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return Reached()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        copy(destination, source, nbytes)

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        return copying(rectangles)

    def close(self) -> None:
        raise NotImplementedError


class Worker:
    """A worker of an engine whose loader fails when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failing_in = -1
        """Tensors that the loader takes before it fails; negative: it does not."""
        made = make_target(self.load, Slicer(None, 0, 1), (), engine.parameters)
        assert isinstance(made, LearningTarget)
        self.target = made
        self.loader = TorchLoader(made, ServingLock(SECONDS), threading.Condition())
        self.steps = Steps(self.loader)
        self.slots = HostSlots()

    def load(self, name: str, tensor: Tensor) -> None:
        self.failing_in -= 1
        if self.failing_in == 0:
            half = tensor.narrow(0, 0, max(tensor.shape[0] // 2, 1))
            with contextlib.suppress(RuntimeError, IndexError):
                self.engine.load(name, half)
            raise ValueError("the engine cannot")
        self.engine.load(name, tensor)

    def do(self, step: Step) -> bool:
        return all(isinstance(answer, StepDone) for answer in self.steps.carry_out(step, self.slots))

    def push(self, number: int, tensors: Mapping[str, Tensor], *, buckets: int = 1 << 30) -> bool:
        """A round; whether it was finished. It is given up after so many buckets."""
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        self.steps.expect(Expect(number, 0, len(specs), specs))
        assert self.do(Pause(number, SECONDS))
        version = VersionId("m", "r", number)
        assert self.do(Begin(number, version, len(specs), sum(tensor.nbytes for tensor in tensors.values())))
        for count, (load, content) in enumerate(planned(number, tensors)):
            self.slots.content[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            good = count < buckets and self.do(load)
            self.slots.content.fill_(0xEE)
            if not good:
                assert self.do(Abort(number, "given up"))
                return False
        return self.do(Finish(number)) and self.do(Resume(number, version))


def planned(round: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Load, bytes]]:
    """A version's buckets as they are planned, and what their slot holds; some tensors are larger than that."""
    arena, placed = bytearray(), []
    for name, tensor in tensors.items():
        placed.append(whole(spec_of(name, tensor), len(arena)))
        arena += bytes_of(tensor).ljust(align(tensor.nbytes), b"\0")
    plan = make_plan(placed, slot_bytes=SLOT_BYTES, topology=Topology((Gpu("g"),), peer_access=False))
    for seq, bucket in enumerate(plan.buckets):
        content = bytearray(SLOT_BYTES)
        for item in bucket.pulls[0]:
            piece = arena[item.address : item.address + item.nbytes]
            content[item.slot_offset : item.slot_offset + item.nbytes] = piece
        specs = [placed[part.tensor].spec for part in bucket.parts]
        parts = [
            TensorPart(spec.name, spec.dtype, spec.shape, part.tensor_offset, part.nbytes, part.slot_offset)
            for part, spec in zip(bucket.parts, specs, strict=True)
        ]
        yield Load(round, seq, 0, parts), bytes(content)


def held(engine: Engine) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in engine.parameters.items()}


def by_the_loader(worker: Engine, model: str, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    engine = engine_of(MODELS[model], worker.rank, worker.world_size)
    for name, tensor in tensors.items():
        engine.load(name, tensor)
    return held(engine)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_twenty_versions_with_faults_are_what_the_loader_makes_of_them(model: str, world_size: int) -> None:
    rng = random.Random(f"{model} {world_size}")
    for rank in range(world_size):
        worker = Worker(engine_of(MODELS[model], rank, world_size))
        replayed, good = 0, checkpoint(MODELS[model], 0)
        assert worker.push(1, good)
        for number in range(2, 22):
            version = checkpoint(MODELS[model], number)
            fault = rng.choice(["", "", "", "engine", "given up", "moved", "relearn"])
            worker.failing_in = rng.randrange(1, 12) if fault == "engine" else -1
            if fault == "moved":
                worker.engine.move(rng.choice([*worker.engine.parameters]))
            if fault == "relearn":
                worker.target.learned.forget("a fault")
            worker.engine.loaded.clear()
            buckets = rng.randrange(4) if fault == "given up" else 1 << 30
            if not worker.push(10 * number, version, buckets=buckets):
                worker.failing_in = -1
                assert worker.push(10 * number + 1, good)  # what it held before, as a daemon restores it
                assert held(worker.engine) == by_the_loader(worker.engine, model, good)
                assert worker.push(10 * number + 2, version)
            good = version
            replayed += not worker.engine.loaded
            assert held(worker.engine) == by_the_loader(worker.engine, model, version), (number, fault)
        assert replayed > 3


def test_loader_that_quantises_one_module_is_called_for_that_one_only() -> None:
    engine = engine_of(MODELS["qwen3"])
    worker = Worker(engine)
    plain = engine.load

    def load(name: str, tensor: Tensor) -> None:
        if "layers.1.mlp.down_proj" in name:
            engine.loaded.append(name)
            engine.parameters[name].copy_((tensor.float() / 3).round() * 3)
        else:
            plain(name, tensor)

    engine.load = load  # type: ignore[method-assign]  # another engine
    for number in range(1, 5):
        engine.loaded.clear()
        assert worker.push(number, checkpoint(MODELS["qwen3"], number))
    assert engine.loaded == ["model.layers.1.mlp.down_proj.weight"]
    report = worker.target.learned.report
    assert (report.learned, report.unproven, sum(report.kept.values())) == (
        len(checkpoint(MODELS["qwen3"], 0)) - 1,
        0,
        1,
    )


def test_function_that_is_not_to_be_learned_is_always_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPE_LEARNED", "off")
    worker = Worker(engine_of(MODELS["llama tied"]))
    for number in range(1, 4):
        worker.engine.loaded.clear()
        version = checkpoint(MODELS["llama tied"], number)
        assert worker.push(number, version)
        assert len(worker.engine.loaded) == len(version)


def test_update_does_not_fail_where_nothing_can_be_learned_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(engine_of(MODELS["qwen3"]))
    monkeypatch.setattr(worker.target.learned._comparison, "judge", lambda *_: 1 / 0)
    for number in range(1, 4):
        worker.engine.loaded.clear()
        version = checkpoint(MODELS["qwen3"], number)
        assert worker.push(number, version)
        assert len(worker.engine.loaded) == len(version)
    assert held(worker.engine) == by_the_loader(worker.engine, "qwen3", version)


@pytest.mark.parametrize("target", [nn.Linear(2, 2), {"a": torch.zeros(2)}, 7])
def test_only_a_function_writes_to_something_else(target: Any) -> None:
    with pytest.raises(EngineError, match="writes_to goes with a function"):
        make_target(target, Slicer(None, 0, 1), (), {"a": torch.zeros(2)})


def test_module_is_written_to_with_its_buffers() -> None:
    module = nn.BatchNorm1d(3)
    target = make_target(lambda name, tensor: None, Slicer(None, 0, 1), (), module)
    assert isinstance(target, LearningTarget)
    assert set(target._parameters()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_slice_that_a_function_is_given_is_learned_of_the_whole() -> None:
    place, given = torch.zeros(24, 8), list[str]()

    def load(name: str, tensor: Tensor) -> None:
        given.append(name)
        place.copy_(tensor)

    target = make_target(load, Slicer({"w": 1}, 1, 3), (), {"w": place})
    loader = TorchLoader(target, ServingLock(SECONDS), threading.Condition())
    worker = Steps(loader)
    slots = HostSlots()
    for number in (1, 2):
        tensor = torch.randn(24, 24, generator=torch.Generator().manual_seed(number))[:21]
        tensors = {"w": torch.cat([tensor, torch.randn(3, 24)])[:, :24].contiguous()}
        slots.content = torch.zeros(4096, dtype=torch.uint8)
        slots.content[: tensors["w"].nbytes] = tensors["w"].view(-1).view(torch.uint8)
        part = TensorPart("w", "float32", (24, 24), 0, tensors["w"].nbytes, 0)
        version = VersionId("m", "r", number)
        steps: list[Step] = [Pause(number, SECONDS), Begin(number, version, 1, part.nbytes), Load(number, 0, 0, [part])]
        for step in [*steps, Finish(number), Resume(number, version)]:
            (answer,) = worker.carry_out(step, slots)
            assert isinstance(answer, StepDone), answer
        assert torch.equal(place, tensors["w"][:, 8:16])
    assert given == ["w"]
