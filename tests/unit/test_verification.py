"""Verify what was loaded: a worker that was handed other bytes than were staged says so before they can be served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
import torch

from cpe_daemon.config import Config
from cpe_daemon.core.fold import ROW_BYTES, WEIGHTS, key, mix, modulo
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.slots import Mark, Reached, Replay
from cpe_daemon.errors import VerificationError
from cpe_daemon.wire.messages import Abort, Begin, Finish, Load, StepDone, StepFailed, TensorPart
from inference_plugins.assembly import Place
from inference_plugins.steps import Step, Steps
from tests.unit.fake_node import FakeNode, number

OLD, NEW = VersionId("m", "r", 1), VersionId("m", "r", 2)
BYTES = bytes(range(8))


def fold(name: str, word: bytes) -> int:
    """Of a tensor of eight bytes."""
    return mix(modulo(int.from_bytes(word, "little") * WEIGHTS[0] + key(name, 0)))


FOLD = modulo(fold("a", BYTES) + fold("b", BYTES))
BEGIN = Begin(7, NEW, 2, 16, FOLD)
LOADS = [Load(7, seq, 0, [TensorPart(name, "uint8", (8,), 0, 8, 0)]) for seq, name in enumerate("ab")]


class FakeLoader:
    """Holds the old version, and takes what comes."""

    def __init__(self) -> None:
        self.content: VersionId | None = OLD
        self.touched = False
        self.asleep = False
        self.starting = False

    def halt(self) -> int:
        return 0

    def pause(self, seconds: float, passes: int | None = None) -> None: ...

    def expect(self, tensors: Sequence[TensorSpec]) -> None: ...

    def begin(self) -> None: ...

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Place | None]:
        return [None] * len(tensors)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.touched = True

    def finish(self, version: VersionId) -> None:
        self.content, self.touched = version, False

    def abandon(self, reason: str) -> None:
        self.abandoned = reason

    def resume(self) -> None: ...

    def sleep(self, seconds: float) -> None: ...

    def rouse(self) -> None: ...

    def wake_up(self, *, kept: bool) -> None: ...


class OneSlot:
    """A slot with one row, of which a tensor takes eight bytes."""

    device = torch.device("cpu")

    def __init__(self, data: bytes = BYTES) -> None:
        self._content = torch.frombuffer(bytearray(data.ljust(ROW_BYTES, b"\xee")), dtype=torch.uint8)

    def slot(self, index: int) -> torch.Tensor:
        return self._content

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        yield

    def mark(self) -> Mark:
        return Reached()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        raise NotImplementedError

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def steps(loader: FakeLoader) -> Steps:
    return Steps(loader)


def carry_out(steps: Steps, *todo: Step, slot: OneSlot | None = None) -> StepDone | StepFailed:
    """The last answer; those before have to be good."""
    *before, last = [answer for step in todo for answer in steps.carry_out(step, slot or OneSlot())]
    assert all(isinstance(answer, StepDone) for answer in before)
    return last


@pytest.mark.parametrize("expected", [FOLD, None], ids=["verified", "not-asked-for"])
def test_what_was_staged_is_taken(steps: Steps, loader: FakeLoader, expected: int | None) -> None:
    done = carry_out(steps, Begin(7, NEW, 2, 16, expected), *LOADS, Finish(7))
    assert isinstance(done, StepDone)
    assert (loader.content, loader.touched) == (NEW, False)


def test_one_flipped_bit_fails_the_version_before_the_loader_finishes_it(steps: Steps, loader: FakeLoader) -> None:
    carry_out(steps, BEGIN, LOADS[0])
    carry_out(steps, LOADS[1], slot=OneSlot(bytes([BYTES[0] ^ 16]) + BYTES[1:]))
    failed = carry_out(steps, Finish(7))
    assert isinstance(failed, StepFailed)
    assert failed.error.code == VerificationError.code == "verification"
    assert f"{FOLD:016x}" in failed.error.message
    assert "m@r#2 came here with other bytes than were staged" in failed.error.message
    assert (loader.content, loader.touched) == (OLD, True)


def test_what_a_round_folded_is_forgotten_with_it(steps: Steps, loader: FakeLoader) -> None:
    carry_out(steps, BEGIN, LOADS[0], Abort(7, "an engine failed"))
    done = carry_out(steps, BEGIN, *LOADS, Finish(7), BEGIN, *LOADS, Finish(7))
    assert isinstance(done, StepDone)


def test_bytes_of_the_wrong_tensor_fail_the_version(steps: Steps) -> None:
    """Each has the bytes of the other: their sum is the same, and neither is what it was."""
    exchanged = modulo(fold("a", BYTES) + fold("b", BYTES[::-1]))
    carry_out(steps, Begin(7, NEW, 2, 16, exchanged))
    carry_out(steps, LOADS[0], slot=OneSlot(BYTES[::-1]))
    assert isinstance(carry_out(steps, LOADS[1], Finish(7)), StepFailed)


@pytest.mark.parametrize(
    ("device", "verifies"),
    [
        ({}, False),
        ({"kind": "cuda"}, True),
        ({"kind": "cuda", "verify": False}, False),
        ({"verify": True}, True),
        ({"verify": "auto"}, False),
    ],
)
def test_verify_is_on_where_there_are_gpus_unless_it_is_set(device: dict[str, Any], verifies: bool) -> None:
    assert Config.model_validate({"device": device}).device.verifies is verifies


@pytest.mark.parametrize("fold", [(1 << 64) - 1, None], ids=["folded", "not-folded"])
async def test_workers_are_told_the_fold_of_a_version_that_has_one(fold: int | None) -> None:
    with structlog.testing.capture_logs():
        async with FakeNode.running() as node:
            worker = node.worker("a")
            version = node.stage(number(1))
            version.fold = fold
            await node.until(lambda: version.state == "live")
    assert [command.fold for command in worker.commands if isinstance(command, Begin)] == [fold]
    assert version.report is not None
    assert version.report.engines["a"].verified is (fold is not None)


async def test_engine_that_was_handed_other_bytes_is_counted_as_such() -> None:
    with structlog.testing.capture_logs():
        async with FakeNode.running() as node:
            node.worker("a").script["finish"] = lambda _: VerificationError("other bytes than were staged")
            version = await node.publish(number(1))
            assert version.state == "failed"
            assert node.metrics.snapshot()['cpe_engine_failures_total{code="verification"}'] >= 1
