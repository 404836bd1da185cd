"""A worker's part in a round, without a link: what it answers to the steps, and what it says of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from msgspec.structs import replace

from cpe_daemon.core.needs import Needs
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.memory import copy
from cpe_daemon.devices.slots import Mark, Replay, Slots
from cpe_daemon.errors import DeadlineError, ManifestError
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    Expect,
    Finish,
    Halt,
    Load,
    Pause,
    Resume,
    StepDone,
    StepFailed,
    TensorPart,
)
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.assembly import Place
from inference_plugins.learned.needs import Needed
from inference_plugins.steps import Answer, Step, Steps

OLD, NEW = VersionId("m", "r", 1), VersionId("m", "r", 2)
DIGEST = bytes([1]) * 16
LOAD = Load(7, 0, 0, [TensorPart("w", "float32", (2,), 0, 8, 0)])


class FakeLoader:
    """Notes what it is asked; raises ``error`` when loading."""

    def __init__(self) -> None:
        self.content: VersionId | None = OLD
        self.touched = False
        self.asleep = False
        self.starting = False
        self.abandoned = ""
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.misfit: Exception | None = None
        self.memory: dict[str, torch.Tensor] = {}
        """Where tensors are placed."""
        self.passes: int | None = None
        """After which it was to pause."""
        self.devices: set[str] = set()
        """On which they were to be."""

    def halt(self) -> int:
        self.calls.append("halt")
        return 41

    def pause(self, seconds: float, passes: int | None = None) -> None:
        self.calls.append("pause")
        self.passes = passes
        if seconds == 0:
            raise DeadlineError("busy")

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        self.calls.append(f"expect {len(tensors)}")
        if self.misfit is not None:
            raise self.misfit

    def begin(self) -> None:
        self.calls.append("begin")

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> list[Place | None]:
        self.devices.add(str(device))
        if not self.memory:
            return [None] * len(tensors)
        self.calls += [f"place {tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors]
        self.touched = True
        held = [self.memory.get(tensor.name) for tensor in tensors]
        return [None if here is None else Place(here.data_ptr(), here.nbytes) for here in held]

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.touched |= bool(tensors)
        if self.error is not None:
            raise self.error
        self.calls += [f"{name} {tensor.tolist()}" for name, tensor in tensors]

    def finish(self, version: VersionId) -> None:
        self.content, self.touched = version, False

    def abandon(self, reason: str) -> None:
        self.abandoned = reason

    def resume(self) -> None:
        self.calls.append("resume")

    def sleep(self, seconds: float) -> None:
        self.asleep = True

    def rouse(self) -> None:
        raise NotImplementedError

    def wake_up(self, *, kept: bool) -> None:
        self.asleep = False


class FakeSlots:
    """One slot, which holds two floats, on a GPU that does what it is asked when that is waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.loads = False
        """Whether copies may be issued now."""
        self.queue: list[tuple[int, int, int]] = []
        """What is to be copied."""
        self.idle = False
        """Whether the GPU has done everything, as it says."""
        self.failure: Exception | None = None
        """Of the GPU; comes out when it is waited for."""
        self._content = torch.tensor([1.5, -2.0]).view(torch.uint8)

    def slot(self, index: int) -> torch.Tensor:
        return self._content

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        self.loads = True
        try:
            yield
        except BaseException:
            self.run(len(self.queue))
            raise
        finally:
            self.loads = False

    def mark(self) -> Mark:
        assert self.loads, "nobody knows what is to be marked"
        return FakeMark(self, len(self.queue))

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        assert self.loads, "nobody waits for this copy"
        self.queue.append((destination, source, nbytes))

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        def issue(base: int) -> None:
            for destination, source, nbytes, *_ in rectangles:
                self.copy(destination, base + source, nbytes)

        return issue

    def run(self, copies: int) -> None:
        """Do the first of what was issued, as if the GPU had come this far."""
        for run in self.queue[:copies]:
            copy(*run)

    def close(self) -> None:
        raise NotImplementedError


@dataclass
class FakeMark:
    """Behind the first ``copies`` of what a GPU was asked for."""

    slots: FakeSlots
    copies: int

    @property
    def reached(self) -> bool:
        return self.slots.idle

    def wait(self) -> None:
        self.slots.run(self.copies)
        if self.slots.failure is not None:
            raise self.slots.failure


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def steps(loader: FakeLoader) -> Steps:
    return Steps(loader)


def do(steps: Steps, *todo: Step) -> StepDone:
    """Carry steps out, and return the last answer; all have to succeed."""
    answers = [answered(steps, step) for step in todo]
    assert all(isinstance(answer, StepDone) for answer in answers), answers
    assert isinstance(answers[-1], StepDone)
    return answers[-1]


def answered(steps: Steps, step: Step, slots: Slots | None = None) -> Answer:
    """Carry a step out, wait until it is done, and return the answer."""
    (answer,) = steps.carry_out(step, slots or FakeSlots()) or steps.settle_all()
    return answer


def refused(steps: Steps, step: Step) -> str:
    """The reason for which a step is refused."""
    answer = answered(steps, step)
    assert isinstance(answer, StepFailed), answer
    return answer.error.message


def test_round_is_carried_out(steps: Steps, loader: FakeLoader) -> None:
    done = do(steps, Pause(7, 1.0), Begin(7, NEW, 1, 8), LOAD, Finish(7), Resume(7, NEW))
    assert (done.round, done.step) == (7, "resume")
    assert loader.calls == ["pause", "begin", "w [1.5, -2.0]", "resume"]
    assert loader.content == NEW


class LearningLoader(FakeLoader):
    """One that learns."""

    report = LoadingReport(learned=1, kept={"converted to float32": 2}, digest="d")


def test_finish_alone_tells_how_an_engine_that_learns_loads() -> None:
    steps = Steps(LearningLoader())
    for step in (Pause(7, 1.0), Begin(7, NEW, 1, 8), LOAD, Finish(7), Resume(7, NEW)):
        told = do(steps, step).loading
        assert told == (LearningLoader.report if isinstance(step, Finish) else None)


def test_engine_that_learns_nothing_tells_nothing(steps: Steps) -> None:
    assert do(steps, Begin(7, NEW, 1, 8), LOAD, Finish(7)).loading is None


HALVES = [Load(7, half, 0, [TensorPart("split", "float32", (4,), 8 * half, 8, 0)]) for half in (0, 1)]


def test_tensors_are_loaded_in_their_places(steps: Steps, loader: FakeLoader) -> None:
    loader.memory = {"split": torch.zeros(4), "w": torch.zeros(2)}
    do(steps, Begin(7, NEW, 2, 24), *HALVES, LOAD, Finish(7))
    assert loader.calls == ["begin", "place split float32 [4]", "place w float32 [2]"]
    assert loader.memory["split"].tolist() == [1.5, -2.0, 1.5, -2.0]
    assert loader.memory["w"].tolist() == [1.5, -2.0]
    assert loader.content == NEW


class MakingLoader(FakeLoader):
    """Makes other tensors of those that it has."""

    def make_over(self) -> None:
        self.calls.append(f"make over {[tensor.tolist() for tensor in self.memory.values()]}")


def test_modules_are_made_over_when_all_that_began_to_come_has_come() -> None:
    loader = MakingLoader()
    loader.memory = {"split": torch.zeros(4), "w": torch.zeros(2)}
    slots, steps = FakeSlots(), Steps(loader)
    slots.copy = copy  # type: ignore[method-assign]  # at once, as a CPU does
    todo: list[Step] = [Begin(7, NEW, 2, 24), *HALVES, LOAD, Finish(7)]
    for step in todo:
        answered(steps, step, slots)
    assert loader.calls == [
        "begin",
        "place split float32 [4]",
        "make over [[1.5, -2.0, 1.5, -2.0], [0.0, 0.0]]",
        "place w float32 [2]",
        "make over [[1.5, -2.0, 1.5, -2.0], [1.5, -2.0]]",
    ]


def test_slot_may_be_filled_again_while_modules_are_made_over() -> None:
    """On a GPU: what is issued for that comes after the mark that is waited for."""
    loader = MakingLoader()
    loader.memory = {"w": torch.zeros(2)}
    slots, steps = FakeSlots(), Steps(loader)
    answered(steps, Begin(7, NEW, 1, 8), slots)
    made = torch.zeros(2)
    loader.make_over = lambda: slots.copy(made.data_ptr(), loader.memory["w"].data_ptr(), 8)  # type: ignore[method-assign]
    assert steps.carry_out(LOAD, slots) == []
    assert steps.settle_all()
    assert (loader.memory["w"].tolist(), made.tolist()) == ([1.5, -2.0], [0.0, 0.0])


def test_tensor_without_a_place_is_loaded_whole(steps: Steps, loader: FakeLoader) -> None:
    loader.memory = {"w": torch.zeros(2)}
    do(steps, Begin(7, NEW, 2, 24), *HALVES, LOAD, Finish(7))
    assert loader.calls[2:] == ["split [1.5, -2.0, 1.5, -2.0]", "place w float32 [2]"]


def test_tensor_in_its_place_whose_end_is_missing_did_not_come(steps: Steps, loader: FakeLoader) -> None:
    loader.memory = {"split": torch.zeros(4)}
    do(steps, Begin(7, NEW, 1, 16), HALVES[0])
    assert refused(steps, Finish(7)) == "0 of 1 tensors came"
    assert do(steps, Abort(7, "a sibling failed")).touched


def test_places_are_asked_for_on_the_device_of_the_slots(steps: Steps, loader: FakeLoader) -> None:
    class FarSlots(FakeSlots):
        device = torch.device("cuda", 3)

    do(steps, Begin(7, NEW, 1, 8))
    assert isinstance(answered(steps, LOAD, FarSlots()), StepDone)
    assert loader.devices == {"cuda:3"}


def test_answer_waits_for_the_gpu(steps: Steps, loader: FakeLoader) -> None:
    """The slot is filled anew as soon as the daemon has the answer."""
    loader.memory = {"w": torch.zeros(2)}
    slots = FakeSlots()
    do(steps, Begin(7, NEW, 1, 8))
    assert (steps.carry_out(LOAD, slots), steps.loading) == ([], True)
    assert (steps.settle(), loader.memory["w"].tolist()) == ([], [0.0, 0.0])
    (answer,) = steps.settle(1)
    assert isinstance(answer, StepDone)
    assert (answer.round, answer.step, answer.seq, steps.loading) == (7, "load", 0, False)
    assert loader.memory["w"].tolist() == [1.5, -2.0]


def test_bucket_is_issued_while_the_one_before_is_loaded(steps: Steps, loader: FakeLoader) -> None:
    """A GPU that always has the next one queued does not wait for messages."""
    loader.memory = {"split": torch.zeros(4)}
    slots = FakeSlots()
    do(steps, Begin(7, NEW, 1, 16))
    assert [steps.carry_out(half, slots) for half in HALVES] == [[], []]
    assert len(slots.queue) == 2
    (first,) = steps.settle(1)
    assert (first.seq, steps.loading) == (0, True)
    finished = steps.carry_out(Finish(7), slots)
    assert [(answer.step, answer.seq) for answer in finished] == [("load", 1), ("finish", 0)]
    assert all(isinstance(answer, StepDone) for answer in finished)
    assert loader.memory["split"].tolist() == [1.5, -2.0, 1.5, -2.0]


def test_buckets_that_are_loaded_are_answered_with_the_next_one(steps: Steps, loader: FakeLoader) -> None:
    """Their slots are free: the daemon need not wait until the GPU is idle."""
    loader.memory = {"split": torch.zeros(4)}
    do(steps, Begin(7, NEW, 1, 16))
    slots = FakeSlots()
    assert steps.carry_out(HALVES[0], slots) == []
    slots.idle = True
    assert [answer.seq for answer in steps.carry_out(HALVES[1], slots)] == [0, 1]


def test_bucket_that_cannot_be_issued_is_answered_after_those_before_it(steps: Steps, loader: FakeLoader) -> None:
    loader.memory = {"split": torch.zeros(4)}
    do(steps, Begin(7, NEW, 1, 16))
    slots = FakeSlots()
    assert steps.carry_out(HALVES[0], slots) == []
    done, failed = steps.carry_out(replace(HALVES[1], round=8), slots)
    assert (type(done), type(failed)) == (StepDone, StepFailed)


def test_loader_works_while_the_slots_wait_for_what_it_does(steps: Steps, loader: FakeLoader) -> None:
    """Its own operations have to go where the slots' do; a failure does not keep them from being waited for."""
    slots, seen = FakeSlots(), list[bool]()

    def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        seen.append(slots.loads)
        raise ValueError("no such layer")

    loader.load = load  # type: ignore[method-assign]
    do(steps, Begin(7, NEW, 1, 8))
    assert isinstance(answered(steps, LOAD, slots), StepFailed)
    assert (seen, slots.loads) == ([True], False)


def test_gpu_that_fails_while_it_loads_is_reported(steps: Steps, loader: FakeLoader) -> None:
    loader.memory = {"w": torch.zeros(2)}
    slots = FakeSlots()
    slots.failure = RuntimeError("CUDA error: unspecified launch failure")
    do(steps, Begin(7, NEW, 1, 8))
    answer = answered(steps, LOAD, slots)
    assert isinstance(answer, StepFailed)
    assert answer.error.message == "RuntimeError: CUDA error: unspecified launch failure"
    assert refused(steps, Finish(7)) == "0 of 1 tensors came"
    assert loader.touched


def test_bucket_is_refused_while_no_slots_are_open(steps: Steps) -> None:
    do(steps, Begin(7, NEW, 1, 8))
    (answer,) = steps.carry_out(LOAD, None)
    assert isinstance(answer, StepFailed)
    assert "no slots are open here" in answer.error.message


def test_version_that_does_not_fit_is_refused_at_its_beginning(steps: Steps, loader: FakeLoader) -> None:
    specs = [TensorSpec("w", "float32", (2,)), TensorSpec("b", "float32", (1,))]
    loader.misfit = ManifestError("no tensor here is called b")
    steps.expect(Expect(7, 0, 2, specs[:1]))
    assert loader.calls == []
    steps.expect(Expect(7, 1, 2, specs[1:]))
    assert loader.calls == ["expect 2"]
    assert refused(steps, Begin(7, NEW, 2, 12)) == "no tensor here is called b"
    assert not loader.touched
    do(steps, Begin(8, NEW, 1, 8))


def test_engine_says_itself_why_it_does_not_get_a_version(
    steps: Steps, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has just attached is paused for it; whoever looks at its log would see nothing else."""
    loader.misfit = ManifestError("no tensor here is called b")
    for number in (7, 8):
        steps.expect(Expect(number, 0, 0, []))
        answered(steps, Check(number))
    (said,) = (record.message for record in caplog.records)
    assert said == "a version does not fit this engine, which does not get it: no tensor here is called b"


def test_step_that_fails_is_in_the_engines_log(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    refused(steps, Finish(7))
    assert [record.message for record in caplog.records] == ["finish failed: round 7 was not begun here"]


def test_engine_that_raises_when_it_compares_is_reported(steps: Steps, loader: FakeLoader) -> None:
    loader.misfit = ValueError("broken")
    steps.expect(Expect(7, 0, 0, []))
    assert refused(steps, Begin(7, NEW, 0, 0)) == "ValueError: broken"


def test_question_whether_a_version_fits_is_answered_while_the_engine_serves(steps: Steps, loader: FakeLoader) -> None:
    steps.expect(Expect(-1, 0, 1, [TensorSpec("w", "float32", (2,))]))
    do(steps, Check(-1))
    loader.misfit = ManifestError("no tensor here is called w")
    steps.expect(Expect(-2, 0, 1, [TensorSpec("w", "float32", (2,))]))
    answer = answered(steps, Check(-2))
    assert isinstance(answer, StepFailed)
    assert (answer.round, answer.step, answer.error.code) == (-2, "check", "manifest")
    assert answer.error.message == "no tensor here is called w"
    assert loader.calls == ["expect 1", "expect 1"]
    assert not steps.under_way


def test_question_about_what_was_not_announced_is_refused(steps: Steps) -> None:
    assert refused(steps, Check(7)) == "nothing was announced here as 7"
    steps.expect(Expect(7, 0, 2, [TensorSpec("w", "float32", (2,))]))
    assert refused(steps, Check(7)) == "nothing was announced here as 7"


def test_nothing_is_compared_while_an_update_is_loaded(steps: Steps, loader: FakeLoader) -> None:
    """What a loader keeps of it would be taken for what has come."""
    do(steps, Begin(7, NEW, 1, 8))
    steps.expect(Expect(-1, 0, 0, []))
    assert refused(steps, Check(-1)) == "round 7 is being loaded here"
    assert loader.calls == ["begin"]


def test_halt_says_how_many_passes_were_begun_and_pause_after_which_to_stop(steps: Steps, loader: FakeLoader) -> None:
    assert do(steps, Halt(7)).passes == 41
    assert do(steps, Pause(7, 1.0, 42)).passes == 0
    assert loader.calls == ["halt", "pause"]
    assert loader.passes == 42


def test_round_is_under_way_from_the_pause_until_it_is_resumed_or_forgotten(steps: Steps) -> None:
    for last in (Resume(7, OLD), Abort(7, "a sibling failed")):
        do(steps, Halt(7))
        assert steps.under_way
        do(steps, Pause(7, 1.0))
        assert steps.under_way
        do(steps, last)
        assert not steps.under_way


def test_engine_that_serves_already_stops_again_when_its_round_fails(steps: Steps, loader: FakeLoader) -> None:
    """A sibling could not resume: what this one would serve alone, nobody knows to be the engine's."""
    do(steps, Begin(7, NEW, 1, 8), LOAD, Finish(7), Resume(7, NEW))
    loader.calls.clear()
    assert do(steps, Abort(7, "a sibling failed")).touched
    assert loader.calls == ["pause"]


def test_engine_that_serves_since_an_earlier_round_is_not_stopped_by_a_later_one(
    steps: Steps, loader: FakeLoader
) -> None:
    do(steps, Begin(7, NEW, 1, 8), LOAD, Finish(7), Resume(7, NEW))
    loader.calls.clear()
    do(steps, Abort(8, "nobody is left"))
    assert loader.calls == []


@pytest.mark.parametrize(
    "step", [Check(7), Halt(7), Pause(7, 1.0), Begin(7, NEW, 1, 8), LOAD, Finish(7), Resume(7, OLD)], ids=repr
)
def test_engine_that_is_asleep_refuses_whatever_touches_its_weights(
    step: Step, steps: Steps, loader: FakeLoader
) -> None:
    """The daemon may have sent it before it heard of that."""
    loader.asleep = True
    steps.expect(Expect(7, 0, 0, []))
    assert "asleep" in refused(steps, step) or isinstance(step, Load)
    assert loader.calls == []
    assert not steps.under_way
    assert do(steps, Abort(7, "it is asleep")).touched is False


def test_failure_is_answered_with_its_code(steps: Steps, loader: FakeLoader) -> None:
    answer = answered(steps, Pause(7, 0.0))
    assert isinstance(answer, StepFailed)
    assert (answer.step, answer.error.code) == ("pause", "deadline")
    do(steps, Begin(7, NEW, 1, 8))
    loader.error = ValueError("no such layer")
    assert refused(steps, LOAD) == "ValueError: no such layer"


def test_step_of_a_round_that_was_not_begun_is_refused(steps: Steps) -> None:
    assert "not begun" in refused(steps, LOAD)
    assert "not begun" in refused(steps, Finish(7))
    do(steps, Begin(6, NEW, 1, 8))
    assert "not begun" in refused(steps, LOAD)


def test_finish_without_every_tensor_is_refused(steps: Steps, loader: FakeLoader) -> None:
    do(steps, Begin(7, NEW, 2, 16), LOAD)
    assert refused(steps, Finish(7)) == "1 of 2 tensors came"
    assert loader.content == OLD


def test_finish_without_every_byte_is_refused(steps: Steps, loader: FakeLoader) -> None:
    do(steps, Begin(7, NEW, 1, 12), LOAD)
    assert refused(steps, Finish(7)) == "8 of 12 bytes came"
    assert loader.content == OLD
    do(steps, Begin(8, NEW, 1, 8), replace(LOAD, round=8), Finish(8))
    assert loader.content == NEW


def test_mixture_is_not_resumed(steps: Steps) -> None:
    do(steps, Begin(7, NEW, 1, 8), LOAD)
    assert "mixture" in refused(steps, Resume(7, OLD))


@pytest.mark.parametrize("named", [NEW, None])
def test_version_is_not_resumed_under_another_s_name(steps: Steps, loader: FakeLoader, named: VersionId | None) -> None:
    assert "the weights are m@r#1, not" in refused(steps, Resume(7, named))
    assert loader.calls == []
    do(steps, Resume(7, OLD))
    assert loader.calls == ["resume"]


def test_digest_is_that_of_the_version_that_was_loaded_last(steps: Steps, loader: FakeLoader) -> None:
    assert steps.held.digest == b""
    do(steps, Begin(7, NEW, 1, 8, digest=DIGEST), LOAD)
    assert steps.held.digest == b""
    do(steps, Finish(7))
    assert (loader.content, steps.held.digest, steps.held.loaded) == (NEW, DIGEST, (NEW, DIGEST))
    assert Steps(loader, steps.held.loaded).held.digest == DIGEST
    loader.content = OLD
    assert steps.held.digest == Steps(loader, steps.held.loaded).held.digest == b""


def test_digest_that_is_known_later_is_that_of_the_version_that_was_loaded_without(
    steps: Steps, loader: FakeLoader
) -> None:
    do(steps, Begin(7, NEW, 1, 8), LOAD)
    steps.held.learn(NEW, DIGEST)  # of an earlier loading of it: this one has not ended
    do(steps, Finish(7))
    assert steps.held.digest == b""
    steps.held.learn(OLD, DIGEST)
    assert steps.held.digest == b""
    steps.held.learn(NEW, DIGEST)
    assert steps.held.digest == DIGEST
    steps.held.learn(NEW, bytes(16))
    assert steps.held.digest == DIGEST


def test_digest_that_is_known_during_a_round_changes_no_weights(steps: Steps, loader: FakeLoader) -> None:
    do(steps, Begin(7, NEW, 1, 8), LOAD, Finish(7))
    do(steps, Begin(8, OLD, 1, 8))
    steps.held.learn(NEW, DIGEST)
    assert do(steps, Abort(8, "an engine failed")).touched is False
    do(steps, Begin(9, OLD, 1, 8), replace(LOAD, round=9), Finish(9))
    assert do(steps, Abort(9, "an engine failed")).touched is True


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([Pause(7, 1.0)], False, id="paused"),
        pytest.param([Begin(7, NEW, 1, 8)], False, id="begun"),
        pytest.param([Begin(7, NEW, 1, 8), LOAD], True, id="loading"),
        # The daemon may not know that it has finished: the answer came too late, or a sibling failed.
        pytest.param([Begin(7, NEW, 1, 8), LOAD, Finish(7)], True, id="finished"),
        pytest.param([Begin(7, OLD, 1, 8), LOAD, Finish(7)], False, id="finished-with-the-same"),
        pytest.param(
            [Begin(7, OLD, 1, 8, digest=DIGEST), LOAD, Finish(7)], True, id="finished-with-another-by-its-name"
        ),
        pytest.param([Begin(6, NEW, 0, 0), Finish(6), Pause(7, 1.0)], False, id="finished-an-earlier-round"),
    ],
)
def test_abort_tells_whether_the_weights_are_others_than_before(
    steps: Steps, before: list[Step], changed: bool
) -> None:
    assert do(steps, *before, Abort(7, "a sibling failed")).touched is changed


@pytest.mark.parametrize("begun", [False, True])
def test_engine_hears_that_a_round_was_given_up(steps: Steps, loader: FakeLoader, *, begun: bool) -> None:
    """Also of one that was not begun here: it may hold still for it already."""
    do(steps, Pause(7, 1.0), *([Begin(7, NEW, 1, 8)] if begun else []), Abort(7, "another engine failed"))
    assert loader.abandoned == "another engine failed"


def test_round_is_dropped_whatever_the_engine_raises(steps: Steps, loader: FakeLoader) -> None:
    def fail(reason: str) -> None:
        raise RuntimeError(reason)

    loader.abandon = fail  # type: ignore[method-assign]
    do(steps, Pause(7, 1.0))
    steps.drop("the daemon is gone")
    assert not steps.under_way


# --- what is needed --------------------------------------------------------------------------------------------------


class NeedingLoader(FakeLoader):
    """One that says what it needs."""

    needed: Needed | None = Needed(Needs("d", "s", [[]], b""), frozenset({"w"}))

    def needs(self, device: torch.device) -> Needed | None:
        return self.needed


@pytest.mark.parametrize(("named", "told"), [(None, False), ("", True), ("other", True), ("d", False)])
def test_what_is_needed_is_told_at_the_end_unless_the_daemon_knows_it(named: str | None, told: bool) -> None:
    loader = NeedingLoader()
    steps = Steps(loader)
    begun = do(steps, Pause(7, 1.0), Begin(7, NEW, 1, 8, needs=named))
    assert begun.whole == (named == "other")
    if named == "d":
        loader.needed = Needed(Needs("d", "s", [[]], b""), frozenset())  # the engine takes all of `w` below
        begun = do(steps, Begin(7, NEW, 1, 8, needs=named))
    done = do(steps, LOAD, Finish(7))
    assert (done.needs is not None) == told
    assert not done.whole


def test_worker_that_needs_more_than_it_said_asks_for_everything() -> None:
    loader = NeedingLoader()
    loader.needed = None
    steps = Steps(loader)
    assert do(steps, Begin(7, NEW, 1, 8, needs="d")).whole
    assert do(steps, LOAD, Finish(7)).needs is None


def test_tensor_that_was_sent_in_part_is_not_given_to_the_engine() -> None:
    loader = NeedingLoader()
    steps = Steps(loader)
    do(steps, Begin(7, NEW, 1, 8, needs="d"))
    assert "only a part of w was sent" in refused(steps, LOAD)
    assert loader.calls == ["begin"]
    do(steps, Begin(8, NEW, 1, 8, needs=""))
    do(steps, replace(LOAD, round=8), Finish(8))


def test_loader_that_cannot_say_what_it_needs_needs_everything(steps: Steps) -> None:
    assert do(steps, Begin(7, NEW, 1, 8, needs="d")).whole
    assert do(steps, LOAD, Finish(7)).needs is None
