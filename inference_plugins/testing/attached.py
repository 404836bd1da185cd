"""An engine that has attached to a scripted daemon: steps and their answers, slots, and hellos."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import torch

from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.wire.messages import Message, OpenSlots, Resume, StepDone, StepFailed, WorkerHello
from inference_plugins.testing.daemon import ScriptedDaemon
from inference_plugins.testing.errors import ConformanceError, StepRefusedError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.version import GARBAGE, slots_for_a_group, spec_of

SLOTS: Final = 2
_LOOK_SECONDS: Final = 0.1
_Kind = TypeVar("_Kind", bound=Message)


class Attached:
    """An engine that has attached and serves, and the daemon that it is attached to. A context manager.

    Args:
        plugin: what is tried.
        slot_bytes: of each of the two slots; 0: as large as the largest module group.
    """

    def __init__(self, plugin: Plugin[Any], slot_bytes: int = 0) -> None:
        self.plugin = plugin
        specs = [spec_of(name, tensor) for name, tensor in plugin.checkpoint(0).items()]
        self.slot_bytes = slot_bytes or slots_for_a_group(specs)
        self._directory = Path(tempfile.mkdtemp(prefix="cpe-"))
        self.daemon = ScriptedDaemon(self._directory)
        self._threads = ThreadPoolExecutor(1, "conformance")
        self._memory: SharedMemory | None = None
        self._made: Future[Any] | None = None

    def __enter__(self) -> Self:
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
        return self.judged(self.answer(f"answer to {name}"), step.round, name)

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

    def answer(self, what: str) -> StepDone | StepFailed:
        """Wait for the answer to a step; ``what``: in words."""
        message = self.expect(Message, what)
        if not isinstance(message, StepDone | StepFailed):
            raise ConformanceError(f"the worker said {message}, in place of an {what}")
        return message

    def judged(self, answer: StepDone | StepFailed, round: int, name: str) -> StepDone:
        """Return an answer that says that a step was done; raises as `ask` does."""
        if (answer.round, answer.step) != (round, name):
            raise ConformanceError(f"{name} of round {round} was asked for, and {answer} came")
        if isinstance(answer, StepFailed):
            raise StepRefusedError(answer.step, answer.error)
        return answer

    @property
    def serves(self) -> bool:
        """Whether it may run forward passes now, as the plugin says."""
        return bool(self.plugin.serving(self.engine))

    def lose(self) -> WorkerHello:
        """Kill the daemon; return what the worker says to the next one, which has not answered yet."""
        self.daemon.stop()
        self.overwrite()
        self.daemon.start()
        self.hello = self.await_hello()
        return self.hello

    # --- slots -------------------------------------------------------------------------------------------------------

    def open_slots(self) -> None:
        """Have the worker open new slots."""
        self._drop_slots()
        self._memory = SharedMemory.create("conformance-slots", SLOTS * self.slot_bytes)
        self._memory.seal_writes()
        self.slots: Sequence[torch.Tensor] = torch.frombuffer(self._memory.view, dtype=torch.uint8).split(
            self.slot_bytes
        )
        self.overwrite()
        self.ask(OpenSlots(1, self.daemon.offer(self._memory, self.slot_bytes), folds=True))

    def overwrite(self) -> None:
        """Fill all slots with garbage."""
        for slot in self.slots:
            slot.fill_(GARBAGE)

    def _drop_slots(self) -> None:
        self.slots = ()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
