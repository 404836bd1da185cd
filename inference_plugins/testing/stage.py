"""One engine on a stage: the steps of rounds as a daemon asks for them, and what must be true after each."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeVar

import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    CloseSlots,
    Expect,
    Finish,
    Halt,
    Load,
    Message,
    OpenSlots,
    Pause,
    Resume,
    StepDone,
    StepFailed,
    TensorPart,
    WorkerHello,
)
from inference_plugins.testing.daemon import ScriptedDaemon
from inference_plugins.testing.errors import ConformanceError, StepRefusedError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.version import GARBAGE, Version, bytes_of, slots_for_a_group, spec_of

SLOTS: Final = 2
_LOOK_SECONDS: Final = 0.1
_Kind = TypeVar("_Kind", bound=Message)
Spoilt = Mapping[int, Sequence[TensorPart]]


class Stage:
    """An engine that has attached and serves, and the daemon that it is attached to. A context manager.

    Whatever a step promises is looked at here, so that a scenario only says what happens. A slot is overwritten with
    garbage as soon as the worker has said that it may be.

    Args:
        plugin: what is tried.
        slot_bytes: of each of the two slots; 0: as large as the largest module group.
    """

    def __init__(self, plugin: Plugin[Any], slot_bytes: int = 0) -> None:
        self.plugin = plugin
        specs = [spec_of(name, tensor) for name, tensor in plugin.checkpoint(0).items()]
        self.slot_bytes = slot_bytes or slots_for_a_group(specs)
        self.needed = plugin.needed or max(specs, key=lambda spec: spec.nbytes).name
        self.overwrites = True
        """Whether a slot is overwritten at once."""
        self.round = 0
        self._directory = Path(tempfile.mkdtemp(prefix="cpe-"))
        self.daemon = ScriptedDaemon(self._directory)
        self._threads = ThreadPoolExecutor(1, "conformance")
        self._memory: SharedMemory | None = None
        self._made: Future[Any] | None = None
        self._numbers = 0

    def __enter__(self) -> Stage:
        try:
            self.daemon.start()
            self._made = self._threads.submit(self.plugin.make, self.daemon.endpoint)
            self.hello = self.await_hello()
            self.daemon.welcome()
            self.engine = self._made.result(self.plugin.patience_seconds)
            self.open_slots()
            if not self.serves and not self.hello.starting:  # it has siblings: these let it serve when all are there
                self.ask(Resume(0, self.hello.content))
        except BaseException:  # task boundary: nothing stays open, whatever kept the engine from coming
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._made is not None and self._made.done() and self._made.exception() is None:
                self.plugin.close(self._made.result())
        finally:
            self.daemon.stop()
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._drop_slots()
            shutil.rmtree(self._directory, ignore_errors=True)

    # --- what is said and heard --------------------------------------------------------------------------------------

    def expect(self, kind: type[_Kind], what: str) -> _Kind:
        """Wait for a message of the worker's.

        Raises:
            ConformanceError: it did not come in time.
        """
        message = self.daemon.expect(kind, self.plugin.patience_seconds)
        if message is None:
            raise ConformanceError(f"no {what} came within {self.plugin.patience_seconds:g} s")
        return message

    def await_hello(self) -> WorkerHello:
        """Wait for a worker that says hello; what ``make`` raised meanwhile is raised here."""
        waited = 0.0
        while waited < self.plugin.patience_seconds:
            if (hello := self.daemon.expect(WorkerHello, _LOOK_SECONDS)) is not None:
                return hello
            if self._made is not None and self._made.done():
                self._made.result()
            waited += _LOOK_SECONDS
        raise ConformanceError(f"no worker said hello within {self.plugin.patience_seconds:g} s")

    def ask(self, step: Any) -> StepDone:
        """Ask for one step, and await the answer.

        Raises:
            StepRefusedError: it failed.
            ConformanceError: it was not answered in time, or another one was.
        """
        name = str(step.__struct_config__.tag)
        self.daemon.say(step)
        return self._judged(self._answer(f"answer to {name}"), step.round, name)

    def refused(self, step: Any, why: str) -> StepRefusedError:
        """Ask for a step that has to fail.

        Raises:
            ConformanceError: it was done.
        """
        try:
            self.ask(step)
        except StepRefusedError as error:
            return error
        raise ConformanceError(f"{step.__struct_config__.tag} was done, {why}")

    def _answer(self, what: str) -> StepDone | StepFailed:
        message = self.expect(Message, what)
        if not isinstance(message, StepDone | StepFailed):
            raise ConformanceError(f"the worker said {message}, in place of an {what}")
        return message

    def _judged(self, answer: StepDone | StepFailed, round: int, name: str) -> StepDone:
        if (answer.round, answer.step) != (round, name):
            raise ConformanceError(f"{name} of round {round} was asked for, and {answer} came")
        if isinstance(answer, StepFailed):
            raise StepRefusedError(answer.step, answer.error)
        return answer

    # --- slots -------------------------------------------------------------------------------------------------------

    def open_slots(self) -> None:
        """Have the worker open new slots."""
        self._drop_slots()
        self._memory = SharedMemory.create("conformance-slots", SLOTS * self.slot_bytes)
        self._memory.seal_writes()
        self._slots: Sequence[torch.Tensor] = torch.frombuffer(self._memory.view, dtype=torch.uint8).split(
            self.slot_bytes
        )
        self.overwrite()
        self.ask(OpenSlots(1, self.daemon.offer(self._memory, self.slot_bytes), folds=True))

    def overwrite(self) -> None:
        """Fill all slots with garbage."""
        for slot in self._slots:
            slot.fill_(GARBAGE)

    def _drop_slots(self) -> None:
        self._slots = ()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # --- versions and rounds -----------------------------------------------------------------------------------------

    def version(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Version:
        """The next version: of these tensors, or of the plugin's own by the next seed."""
        self._numbers += 1
        return Version(self._numbers, tensors or self.plugin.checkpoint(self._numbers), self.slot_bytes)

    def push(self, version: Version, *, announced: bool = True, fits: bool = True) -> None:
        """One round from its question to its end; the engine holds the version and serves then.

        Args:
            version: what is loaded.
            announced: its tensors are told before the pause, as they are unless they are those of the version before.
            fits: its weights have to be the version's.

        Raises:
            StepRefusedError: a step failed; nothing was asked for after it.
        """
        self.round += 1
        if announced:
            self.check(version, self.round)
        self.pause()
        self.begin(version)
        self.load(version, range(len(version.buckets)))
        self.finish()
        self.resume(version.id)
        if fits:
            self.must_hold(version)

    def check(self, version: Version, number: int) -> None:
        """Ask whether a version fits; the engine goes on as it is."""
        served = self.serves
        self.daemon.say(Expect(number, 0, len(version.specs), version.specs))
        try:
            self.ask(Check(number))
        finally:
            if self.serves is not served:
                raise ConformanceError("it stopped or began to serve because it was asked whether a version fits")

    def pause(self) -> None:
        """Have it stop, as workers do whose siblings wait for them, if it has some."""
        passes = self.ask(Halt(self.round)).passes if self.hello.world_size > 1 else None
        self.ask(Pause(self.round, self.plugin.patience_seconds / 2, passes))
        self.must_not_serve("it was paused")

    def begin(self, version: Version) -> None:
        """Announce buckets."""
        begin = Begin(self.round, version.id, len(version.specs), version.nbytes, version.fold, version.digest)
        self.ask(begin)
        self.must_not_serve("an update was begun")

    def load(self, version: Version, buckets: Iterable[int], spoilt: Spoilt = MappingProxyType({})) -> None:
        """Have buckets loaded, as many at a time as there are slots.

        Args:
            version: whose.
            buckets: by number.
            spoilt: what is said of some of them in place of the truth.
        """
        due, free, loading = deque(buckets), deque(range(SLOTS)), dict[int, int]()
        failed: StepRefusedError | None = None
        while loading or (due and failed is None):
            while due and free and failed is None:
                seq, slot = due.popleft(), free.popleft()
                loading[seq] = slot
                version.fill(seq, self._slots[slot])
                self.daemon.say(Load(self.round, seq, slot, list(spoilt.get(seq, version.buckets[seq]))))
            answer = self._answer(f"answer to buckets {sorted(loading)}")
            if answer.seq not in loading:
                raise ConformanceError(f"buckets {sorted(loading)} were to be loaded, and {answer} came")
            slot = loading.pop(answer.seq)
            if self.overwrites:
                self._slots[slot].fill_(GARBAGE)
            free.append(slot)
            self.must_not_serve("buckets were loaded")
            try:
                self._judged(answer, self.round, "load")
            except StepRefusedError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def finish(self) -> None:
        """End the loading."""
        self.ask(Finish(self.round))
        self.must_not_serve("an update was finished, and it was not resumed yet")

    def resume(self, content: VersionId | None) -> None:
        """Let it serve."""
        self.ask(Resume(self.round, content))
        if not self.serves:
            raise ConformanceError("it was resumed, and does not serve")

    def give_up(self) -> bool:
        """Abort the round; whether the weights may be others than before it, as the worker says."""
        touched = self.ask(Abort(self.round, "the scenario gives it up")).touched
        self.must_not_serve("its round was given up")
        return touched

    def undo(self, held: Version) -> bool:
        """Give the round up, and have the engine serve what it held; True if that had to be loaded again.

        Raises:
            ConformanceError: it said that nothing was touched, and holds something else; or it can be resumed although
                its weights may be a mixture.
        """
        touched = self.give_up()
        if touched:
            self.must_refuse_to_resume(held)
            self.push(held)
        else:
            self.must_hold(held, "it said that no weight had been touched")
            self.resume(held.id)
        return touched

    def lose(self) -> WorkerHello:
        """Kill the daemon; return what the worker says to the next one, which has not answered yet."""
        self.daemon.stop()
        self.overwrite()
        self.daemon.start()
        self.hello = self.await_hello()
        return self.hello

    def sync(self) -> None:
        """Return when the worker has done all that it was told before."""
        self.ask(CloseSlots(2))
        self.open_slots()

    # --- what must be true -------------------------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Whether it may run forward passes now, as the plugin says."""
        return bool(self.plugin.serving(self.engine))

    def must_serve(self, when: str) -> None:
        """Raise unless it serves."""
        if not self.serves:
            raise ConformanceError(f"it does not serve, although {when}")

    def must_not_serve(self, when: str) -> None:
        """Raise if it serves."""
        if self.serves:
            raise ConformanceError(f"it serves, although {when}")

    def must_refuse_to_resume(self, version: Version) -> None:
        """Raise if it can be resumed with weights that may be a mixture."""
        self.refused(Resume(self.round, version.id), "although its weights may be a mixture")
        self.must_not_serve("its weights may be a mixture")

    def must_hold(self, version: Version, because: str = "it was loaded") -> None:
        """Raise unless its weights are a version's, bit by bit."""
        wrong = self.differences(version)
        if wrong:
            named = ", ".join(wrong[:10])
            raise ConformanceError(f"its weights are not those of {version}, although {because}: {named}")

    def differences(self, version: Version) -> list[str]:
        """What is not as it is when a version is loaded: its names, each with the reason."""
        found = self.plugin.weights(self.engine)
        wrong = []
        for name, wanted in self.plugin.expected(version.tensors).items():
            have = found.get(name)
            if have is None:
                wrong.append(f"{name} is not there")
            elif have.shape != wanted.shape:
                wrong.append(f"{name} is {list(have.shape)}, not {list(wanted.shape)}")
            elif not torch.equal(bytes_of(have), bytes_of(wanted.to(have.dtype))):
                wrong.append(f"{name} has other values")
        return wrong
