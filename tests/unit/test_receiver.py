"""A worker's link to a scripted daemon: hellos, welcomes, holding, and parting."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from msgspec import structs

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.slots import Mark
from cpe_daemon.errors import BusyError, DeadlineError, EngineError, PeerError, PeerLostError
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Abort,
    Begin,
    Check,
    CloseSlots,
    Digested,
    ErrorReply,
    Farewell,
    Finish,
    Load,
    Message,
    OpenSlots,
    Pause,
    Ping,
    Pong,
    Resume,
    SlotSet,
    StepDone,
    StepFailed,
    TensorPart,
    Wake,
    WorkerBye,
    WorkerHello,
    WorkerState,
    WorkerWelcome,
)
from cpe_daemon.wire.reports import ErrorInfo
from inference_plugins import receiver as module
from inference_plugins.assembly import Place
from inference_plugins.receiver import Receiver
from inference_plugins.testing.daemon import ScriptedDaemon

STALE, FRESH = b"stale", b"fresh"
SLOTS = SlotSet("shm", "shm-0", 2, 4096, [b"token"])
_SECONDS = 30.0


class FakeTether:
    """The tie to a daemon that lives until it is said to be cut."""

    def __init__(self) -> None:
        self.cut = False

    def close(self) -> None:
        pass


class FakeMark:
    """What is issued is not done before somebody waits for it."""

    reached = False

    def wait(self) -> None:
        pass


class FakeSlots:
    """Slots in no memory that counts."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.open = True

    def slot(self, index: int) -> torch.Tensor:
        return torch.zeros(4096, dtype=torch.uint8)

    def loading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return FakeMark()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.open = False


class FakeLoader:
    """Notes whether it serves."""

    def __init__(self) -> None:
        self.content: VersionId | None = None
        self.touched = False
        self.asleep = False
        self.starting = False
        self.serving = False
        self.broken: dict[str, BaseException] = {}
        """What to raise, by method."""

    def halt(self) -> int:
        return 0

    def pause(self, seconds: float, passes: int | None = None) -> None:
        self._maybe_break("pause")
        self.serving = False

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        self._maybe_break("expect")

    def begin(self) -> None:
        self._maybe_break("begin")

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> list[Place | None]:
        self._maybe_break("place")
        return [None] * len(tensors)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.touched = True
        self._maybe_break("load")

    def finish(self, version: VersionId) -> None:
        self._maybe_break("finish")
        self.content, self.touched = version, False

    def abandon(self, reason: str) -> None:
        self.abandoned = reason

    def resume(self) -> None:
        self._maybe_break("resume")
        self.serving = True

    def sleep(self, seconds: float) -> None:
        self._maybe_break("sleep")
        self.serving, self.asleep = False, True

    def rouse(self) -> None:
        self._maybe_break("rouse")

    def wake_up(self, *, kept: bool) -> None:
        self.asleep, self.touched = False, self.touched or not kept

    def _maybe_break(self, method: str) -> None:
        if method in self.broken:
            raise self.broken[method]


class Daemon(ScriptedDaemon):
    """Says what the test wants, in terms that no hand-off is behind, and leaves pings to be seen."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, answers=False)

    def greet(self, token: bytes = FRESH, *, hold: bool = False) -> None:
        self.say(WorkerWelcome(PROTOCOL, "generation", 0.1, token, "nowhere", hold))


@pytest.fixture
def daemon(no_leaks: None, runtime_dir: Path) -> Iterator[Daemon]:
    with Daemon(runtime_dir) as started:
        yield started


@pytest.fixture
def tethers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTether]:
    """Those that were claimed; a stale token gets none."""
    claimed: list[FakeTether] = []

    def claim(path: str, token: bytes) -> tuple[int, FakeTether]:
        if token == STALE:
            raise PeerLostError("the token is void")
        claimed.append(FakeTether())
        return os.open(os.devnull, os.O_RDONLY), claimed[-1]

    monkeypatch.setattr(module, "claim", claim)
    return claimed


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeSlots]:
    """The slots that were opened; those of another GPU cannot be."""
    made: list[FakeSlots] = []

    def open_slots(slots: SlotSet, handoff: str) -> FakeSlots:
        if slots.gpu == "elsewhere":
            raise PeerError("elsewhere is not visible to this process")
        made.append(FakeSlots())
        return made[-1]

    monkeypatch.setattr(module, "open_slots", open_slots)
    return made


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def receiver(
    daemon: Daemon, tethers: list[FakeTether], loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Receiver]:
    """Not attached yet; it says hello once a minute, so that no test meets a hello that it does not expect."""
    monkeypatch.setattr(module, "_HELLO_EVERY_SECONDS", 60.0)
    monkeypatch.setattr(module, "_GOODBYE_SECONDS", 0.05)
    made = Receiver(daemon.endpoint, WorkerHello(PROTOCOL, "e", "torch", 0, 1, "i"), loader)
    yield made
    made.close()


class Running:
    """A receiver's thread."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._receiver.attach(_SECONDS)
        self._receiver.run(self._stop)

    def stop(self) -> None:
        self._stop.set()
        self._receiver.wake()
        self._thread.join(_SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def running(receiver: Receiver) -> Iterator[Running]:
    """The receiver, attaching and then serving the daemon in a thread."""
    started = Running(receiver)
    yield started
    started.stop()


def until(daemon: Daemon, look: Callable[[], bool]) -> None:
    """Take pings until something is so."""
    for _ in range(100):
        if look():
            return
        daemon.expect(Ping)
    pytest.fail("it never was so")


def test_void_welcome_is_passed_over_without_another_hello(
    daemon: Daemon, running: Running, tethers: list[FakeTether]
) -> None:
    """Another hello at once would make the welcome void that is on its way, and so on for ever."""
    assert daemon.expect(WorkerHello)
    daemon.greet(STALE)
    assert daemon.expect(WorkerHello, 0.3) is None
    daemon.greet(FRESH)
    assert daemon.expect(Ping)
    assert len(tethers) == 1


def test_why_a_welcome_was_void_is_told(daemon: Daemon, receiver: Receiver) -> None:
    outcome: list[Exception] = []

    def attach() -> None:
        try:
            receiver.attach(2.0)
        except PeerLostError as error:
            outcome.append(error)

    thread = threading.Thread(target=attach)
    thread.start()
    assert daemon.expect(WorkerHello)
    daemon.greet(STALE)
    thread.join(_SECONDS)
    assert [str(error) for error in outcome] == ["the token is void"]


def test_last_welcome_counts(daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    daemon.greet(hold=True)
    until(daemon, lambda: not loader.serving)
    assert len(tethers) == 2


@pytest.mark.parametrize(
    ("hold", "resumed", "serves"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_lost_daemon_leaves_a_held_engine_paused(
    daemon: Daemon,
    running: Running,
    tethers: list[FakeTether],
    loader: FakeLoader,
    hold: bool,
    resumed: bool,
    serves: bool,
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet(hold=hold)
    assert daemon.expect(Ping)
    if resumed:
        daemon.say(Resume(1))
        assert daemon.expect(StepDone)
    tethers[-1].cut = True
    assert daemon.expect(WorkerHello)
    assert loader.serving is serves
    daemon.greet()
    until(daemon, lambda: loader.serving)


def test_refusal_is_raised(daemon: Daemon, receiver: Receiver) -> None:
    refused = threading.Event()

    def attach() -> None:
        with pytest.raises(BusyError, match="taken"):
            receiver.attach(2.0)
        refused.set()

    thread = threading.Thread(target=attach)
    thread.start()
    assert daemon.expect(WorkerHello)
    daemon.say(ErrorReply(ErrorInfo("busy", "the rank is taken")))
    thread.join(_SECONDS)
    assert refused.is_set()


def test_goodbye_is_answered_before_the_slots_are_let_go(
    daemon: Daemon, receiver: Receiver, tethers: list[FakeTether], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()
    monkeypatch.setattr(module, "_GOODBYE_SECONDS", _SECONDS)
    monkeypatch.setattr(FakeTether, "close", lambda self: closed.set())

    def attach_and_close() -> None:
        receiver.attach(_SECONDS)
        receiver.close()

    thread = threading.Thread(target=attach_and_close)
    thread.start()
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(WorkerBye)
    assert not closed.is_set()
    daemon.say(Pong("generation"))
    thread.join(_SECONDS)
    assert closed.is_set()
    monkeypatch.setattr(receiver, "close", lambda: None)  # it is closed


@pytest.mark.parametrize("touched", [False, True])
def test_farewell_is_answered_by_a_goodbye_and_all_goes_on_as_it_was(
    daemon: Daemon,
    running: Running,
    tethers: list[FakeTether],
    loader: FakeLoader,
    touched: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    loader.touched, loader.serving = touched, not touched
    daemon.say(Farewell("it is upgraded"))
    assert daemon.expect(WorkerBye)
    daemon.say(Pong("generation"))
    hello = daemon.expect(WorkerHello)
    assert isinstance(hello, WorkerHello)
    assert hello.touched is touched
    assert loader.serving is not touched
    daemon.say(Farewell("it is upgraded"))  # it was still there, and takes nobody in
    daemon.greet()
    assert daemon.expect(Ping)
    assert loader.serving is not touched
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


def test_farewell_of_a_daemon_that_is_gone_is_not_answered(
    daemon: Daemon, running: Running, tethers: list[FakeTether]
) -> None:
    """As one finds it whose process was stopped for a while."""
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    tethers[-1].cut = True
    daemon.say(Farewell("it was upgraded"))
    assert daemon.expect(WorkerHello)  # nothing before it but pings
    daemon.greet()
    assert daemon.expect(Ping)


def test_daemon_that_takes_no_workers_is_named_by_who_cannot_attach(daemon: Daemon, receiver: Receiver) -> None:
    refused: list[str] = []

    def attach() -> None:
        with pytest.raises(PeerLostError) as raised:
            receiver.attach(2.0)
        refused.append(str(raised.value))

    thread = threading.Thread(target=attach)
    thread.start()
    assert daemon.expect(WorkerHello)
    daemon.say(Farewell("it is upgraded"))
    thread.join(_SECONDS)
    assert refused == [f"the daemon at {daemon.endpoint} takes no workers: it is upgraded"]


# --- an engine that raises -------------------------------------------------------------------------------------------

NEW = VersionId("m", "r", 2)
LOAD = Load(1, 0, 0, [TensorPart("w", "uint8", (4,), 0, 4, 0)])
ROUND: dict[str, Message] = {
    "pause": Pause(1, 1.0),
    "begin": Begin(1, NEW, 1, 4),
    "load": LOAD,
    "finish": Finish(1),
    "resume": Resume(1, NEW),
}


@pytest.mark.parametrize("error", [ValueError("no such layer"), EngineError("no such layer"), MemoryError()], ids=repr)
@pytest.mark.parametrize("broken", ROUND)
def test_what_the_engine_raises_is_answered_and_goes_no_further(
    broken: str,
    error: Exception,
    daemon: Daemon,
    running: Running,
    opened: list[FakeSlots],
    loader: FakeLoader,
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    loader.broken[broken] = error
    daemon.say(OpenSlots(1, SLOTS))
    assert daemon.expect(StepDone)
    for name, step in ROUND.items():
        daemon.say(step)
        if name == broken:
            break
        assert daemon.expect(StepDone)
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert (failed.step, failed.error.code) == (broken, "engine")
    assert failed.error.message.endswith(str(error))
    loader.broken.clear()
    daemon.say(Abort(1, "a worker failed"))
    assert daemon.expect(StepDone)
    assert daemon.expect(Ping)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), DeadlineError("a forward pass is running")], ids=repr)
def test_engine_that_cannot_hold_is_still_attached(
    error: Exception, daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    loader.broken["pause"] = error
    assert daemon.expect(WorkerHello)
    daemon.greet(hold=True)
    assert daemon.expect(Ping)
    daemon.say(Pause(1, 1.0))
    assert daemon.expect(StepFailed)


def test_engine_that_cannot_resume_is_still_attached(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    loader.broken["resume"] = RuntimeError("CUDA error")
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    tethers[-1].cut = True
    assert daemon.expect(WorkerHello)
    loader.broken.clear()
    daemon.greet()
    until(daemon, lambda: loader.serving)


# --- a daemon that comes back ----------------------------------------------------------------------------------------


def test_other_generation_means_another_daemon(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    """It knows nothing of this worker, and its slots are not those that are open here."""
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    daemon.say(Pong("generation"))
    assert daemon.expect(Ping)
    daemon.say(Pong("another"))
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    assert len(tethers) == 2
    assert loader.serving


def test_daemon_that_does_not_know_this_worker_hears_hello(
    daemon: Daemon, running: Running, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    daemon.say(ErrorReply(ErrorInfo("protocol", "say hello first")))
    assert daemon.expect(WorkerHello)
    daemon.greet()
    assert daemon.expect(Ping)
    assert len(tethers) == 2


def test_touched_engine_stays_paused_whatever_the_daemon_does(
    daemon: Daemon,
    running: Running,
    tethers: list[FakeTether],
    opened: list[FakeSlots],
    loader: FakeLoader,
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    for step in (OpenSlots(1, SLOTS), ROUND["pause"], ROUND["begin"], ROUND["load"]):
        daemon.say(step)
        assert daemon.expect(StepDone)
    tethers[-1].cut = True
    hello = daemon.expect(WorkerHello)
    assert isinstance(hello, WorkerHello)
    assert (hello.touched, hello.content) == (True, None)
    assert not loader.serving
    daemon.greet()
    assert daemon.expect(Ping)
    assert not loader.serving
    daemon.say(Resume(2))
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert "mixture" in failed.error.message
    assert not loader.serving


@pytest.mark.parametrize("late", [False, True])
def test_next_daemon_is_told_the_digest_of_what_is_held(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader, *, late: bool
) -> None:
    digest = bytes(range(16))
    hello = daemon.expect(WorkerHello)
    assert isinstance(hello, WorkerHello)
    assert (hello.content, hello.digest) == (None, b"")
    daemon.greet()
    for step in (Pause(1, 1.0), Begin(1, NEW, 0, 0, digest=b"" if late else digest), Finish(1)):
        daemon.say(step)
        assert daemon.expect(StepDone)
    if late:
        daemon.say(Digested(NEW, digest))
        daemon.say(Check(2))  # which is answered when that was heard
        assert daemon.expect(StepFailed)
    for _ in range(2):
        tethers[-1].cut = True
        hello = daemon.expect(WorkerHello)
        assert isinstance(hello, WorkerHello)
        assert (hello.content, hello.digest) == (NEW, digest)
        daemon.greet()
        assert daemon.expect(Ping)


def test_round_of_the_daemon_before_is_forgotten(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    for step in ("pause", "begin"):
        daemon.say(ROUND[step])
        assert daemon.expect(StepDone)
    tethers[-1].cut = True
    assert daemon.expect(WorkerHello)
    daemon.greet()
    daemon.say(LOAD)
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert "not begun" in failed.error.message
    assert not loader.touched


def test_garbage_of_the_daemon_s_is_passed_over(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    assert daemon.expect(WorkerHello)
    for garbage in (b"", b"garbage", encode(Ping()), encode(LOAD)[:-1]):
        daemon.say_raw(garbage)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    for garbage in (b"", b"garbage", encode(Ping()), encode(LOAD)[:-1]):
        daemon.say_raw(garbage)
    assert daemon.expect(Ping)
    assert loader.serving
    assert len(tethers) == 1


# --- slots -----------------------------------------------------------------------------------------------------------


def test_slots_are_opened_changed_and_closed(daemon: Daemon, running: Running, opened: list[FakeSlots]) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    for count in (1, 2):
        daemon.say(OpenSlots(count, SLOTS))
        assert daemon.expect(StepDone)
        assert [slots.open for slots in opened] == [False, True][-count:]
    daemon.say(CloseSlots(3))
    done = daemon.expect(StepDone)
    assert isinstance(done, StepDone)
    assert (done.round, done.step) == (3, "close_slots")
    daemon.say(CloseSlots(4))
    assert daemon.expect(StepDone)
    assert not any(slots.open for slots in opened)


def test_slots_that_cannot_be_opened_are_told_of_and_the_link_lives(
    daemon: Daemon, running: Running, opened: list[FakeSlots]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    daemon.say(OpenSlots(1, structs.replace(SLOTS, gpu="elsewhere")))
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert "not visible" in failed.error.message
    daemon.say(OpenSlots(2, SLOTS))
    assert daemon.expect(StepDone)


def test_slots_end_with_the_link(
    daemon: Daemon, running: Running, opened: list[FakeSlots], tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    daemon.say(OpenSlots(1, SLOTS))
    assert daemon.expect(StepDone)
    tethers[-1].cut = True
    assert daemon.expect(WorkerHello)
    assert not opened[0].open
    daemon.greet()
    assert daemon.expect(Ping)


# --- an engine that must not serve -----------------------------------------------------------------------------------


def test_held_engine_that_was_busy_is_paused_as_soon_as_it_can_be(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    """Until a version comes for it, which may be long after, it would serve what it must not."""
    loader.serving = True
    loader.broken["pause"] = DeadlineError("a forward pass is running")
    assert daemon.expect(WorkerHello)
    daemon.greet(hold=True)
    assert daemon.expect(Ping)
    assert loader.serving
    loader.broken.clear()
    until(daemon, lambda: not loader.serving)


def test_engine_that_was_resumed_is_not_paused_any_more(
    daemon: Daemon, running: Running, tethers: list[FakeTether], loader: FakeLoader
) -> None:
    loader.broken["pause"] = DeadlineError("a forward pass is running")
    assert daemon.expect(WorkerHello)
    daemon.greet(hold=True)
    assert daemon.expect(Ping)
    daemon.say(Resume(1))
    assert daemon.expect(StepDone)
    loader.broken.clear()
    for _ in range(3):
        assert daemon.expect(Ping)
    assert loader.serving


def test_worker_that_learns_where_its_engine_is_says_hello_anew(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    """It serves on meanwhile."""
    loader.content = NEW
    hello = daemon.expect(WorkerHello)
    assert isinstance(hello, WorkerHello)
    assert hello.url == ""
    daemon.greet()
    until(daemon, lambda: loader.serving)
    receiver.announce("unix:///v.sock", _SECONDS)
    assert daemon.expect(WorkerHello) == structs.replace(hello, url="unix:///v.sock", content=NEW)
    assert loader.serving
    daemon.greet()
    until(daemon, lambda: len(tethers) == 2)
    for _ in range(2):
        assert daemon.expect(Ping)
    assert loader.serving


# --- sleep -----------------------------------------------------------------------------------------------------------


def asked(receiver: Receiver, what: Callable[[], None]) -> threading.Thread:
    """Have another thread ask the receiver for something."""
    thread = threading.Thread(target=what)
    thread.start()
    return thread


def test_worker_that_goes_to_sleep_lets_its_slots_go_and_says_so(
    daemon: Daemon, receiver: Receiver, running: Running, opened: list[FakeSlots], loader: FakeLoader
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    daemon.say(OpenSlots(1, SLOTS))
    assert daemon.expect(StepDone)
    sleeping = asked(receiver, lambda: receiver.sleep(_SECONDS))
    assert daemon.expect(WorkerState) == WorkerState(True)
    assert not opened[0].open
    sleeping.join(_SECONDS)
    assert (loader.asleep, loader.serving) == (True, False)
    daemon.say(OpenSlots(2, SLOTS))
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert failed.error.message == "it is asleep"


@pytest.mark.parametrize("kept", [True, False])
def test_worker_that_wakes_up_says_what_it_holds_and_serves_when_it_is_told_to(
    kept: bool, daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    loader.content = NEW
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    asked(receiver, lambda: receiver.sleep(_SECONDS)).join(_SECONDS)
    assert daemon.expect(WorkerState)
    asked(receiver, lambda: receiver.wake_up(_SECONDS, kept=kept)).join(_SECONDS)
    assert daemon.expect(WorkerState) == WorkerState(False, NEW, not kept)
    assert daemon.expect(Ping)
    assert not loader.serving
    if kept:
        daemon.say(Resume(1, NEW))
        assert daemon.expect(StepDone)
        assert loader.serving


def test_worker_does_not_go_to_sleep_in_a_round(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    daemon.say(Pause(1, 1.0))
    assert daemon.expect(StepDone)
    sleeping = asked(receiver, lambda: receiver.sleep(_SECONDS))
    until(daemon, lambda: receiver._errands.due)
    daemon.say(Begin(1, NEW, 0, 0))
    assert daemon.expect(StepDone)
    daemon.say(Finish(1))
    assert daemon.expect(StepDone)
    assert not loader.asleep
    daemon.say(Resume(1, NEW))
    assert daemon.expect(StepDone)
    assert daemon.expect(WorkerState) == WorkerState(True, NEW)
    sleeping.join(_SECONDS)
    assert loader.asleep


def test_sleep_that_a_round_keeps_from_beginning_is_given_up(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    daemon.say(Pause(1, 1.0))
    assert daemon.expect(StepDone)
    with pytest.raises(DeadlineError, match=r"busy with an update for 0\.1 s"):
        receiver.sleep(0.1)
    daemon.say(Resume(1))
    assert daemon.expect(StepDone)
    assert daemon.expect(Ping)
    assert not loader.asleep


def test_engine_that_cannot_go_to_sleep_says_why_and_serves_on(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    for error in (DeadlineError("a forward pass is running"), ValueError("no such mode")):
        loader.broken["sleep"] = error
        with pytest.raises((DeadlineError, EngineError), match=str(error)):
            receiver.sleep(_SECONDS)
    assert (loader.asleep, loader.serving) == (False, True)


def test_worker_that_is_asleep_stays_so_through_a_restart_of_its_daemon(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    asked(receiver, lambda: receiver.sleep(_SECONDS)).join(_SECONDS)
    assert daemon.expect(WorkerState)
    tethers[-1].cut = True
    hello = daemon.expect(WorkerHello)
    assert isinstance(hello, WorkerHello)
    assert hello.asleep
    daemon.greet()
    assert daemon.expect(Ping)
    assert (loader.asleep, loader.serving) == (True, False)
    tethers[-1].cut = True
    assert daemon.expect(WorkerHello)
    waking = asked(receiver, lambda: receiver.wake_up(_SECONDS, kept=True))
    daemon.greet()
    assert daemon.expect(WorkerState) == WorkerState(False)
    waking.join(_SECONDS)
    assert not loader.serving


def test_worker_is_woken_up(
    daemon: Daemon, receiver: Receiver, running: Running, loader: FakeLoader, tethers: list[FakeTether]
) -> None:
    assert daemon.expect(WorkerHello)
    daemon.greet()
    until(daemon, lambda: loader.serving)
    daemon.say(Wake(1, 1.0))
    assert daemon.expect(StepDone)  # it is awake
    asked(receiver, lambda: receiver.sleep(_SECONDS)).join(_SECONDS)
    assert daemon.expect(WorkerState) == WorkerState(True)
    loader.broken["rouse"] = EngineError("it was attached without on_wake")
    daemon.say(Wake(2, 1.0))
    failed = daemon.expect(StepFailed)
    assert isinstance(failed, StepFailed)
    assert (failed.step, failed.error.message, loader.asleep) == ("wake", "it was attached without on_wake", True)
    loader.broken.clear()
    daemon.say(Wake(3, 1.0))
    assert daemon.expect(WorkerState) == WorkerState(False, None, touched=True)
    done = daemon.expect(StepDone)
    assert isinstance(done, StepDone)
    assert (done.round, done.step, loader.serving) == (3, "wake", False)
