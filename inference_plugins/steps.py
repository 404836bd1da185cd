"""A worker's part in a round, step by step: buckets out of slots into an engine's `Loader`.

Whatever the engine raises becomes the answer to the step; nothing is raised across the link. A GPU may still load one
bucket while the next is issued: each is answered when its slot may be overwritten.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from cpe_daemon.core.needs import Needs
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.slots import Mark, Slots
from cpe_daemon.errors import CpeError, EngineError, VerificationError
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    CloseSlots,
    Expect,
    Finish,
    Halt,
    Load,
    OpenSlots,
    Pause,
    Resume,
    StepDone,
    StepFailed,
    Wake,
)
from cpe_daemon.wire.reports import ErrorInfo, LoadingReport
from inference_plugins.assembly import Assembly
from inference_plugins.fold import Folder
from inference_plugins.held import Held
from inference_plugins.loader import Learning, Loader, MakingOver, Needing

log: Final = logging.getLogger(__name__)

_WARM_BYTES: Final = 4096
_WARM_ROWS: Final = 16
_ASLEEP: Final = "it is asleep"
_PAUSE_AGAIN_SECONDS: Final = 5.0
"""How long an engine that serves already is given to stop, when its round fails in the end."""

Step = Check | Halt | Pause | Begin | Load | Finish | Abort | Resume
"""What the daemon asks for in a round, and `Check` outside of one too."""

Answer = StepDone | StepFailed


class _Loading(NamedTuple):
    """A bucket that was issued, since when, and what is reached when it is loaded."""

    load: Load
    began: float
    tensors: int
    """That are whole with it."""
    mark: Mark


class Steps:
    """Carries out the steps of rounds. Belongs to the receiver's thread.

    Args:
        loader: the engine.
        loaded: the version that it loaded last, and that one's digest.
    """

    def __init__(self, loader: Loader, loaded: tuple[VersionId | None, bytes] = (None, b"")) -> None:
        self._loader = loader
        self.held = Held(loader, loaded)
        self._update: Begin | None = None
        self._expected: list[TensorSpec] = []
        self._compared: tuple[int, CpeError | None] | None = None
        """What was last compared with this engine, by its number, and why it does not fit, if so."""
        self._told = ""
        """Why the version that was last compared does not fit, as the log has it; "" if it does."""
        self._resumed = 0
        """The last round after which the engine was let serve."""
        self.under_way = False
        """Whether the engine was paused for a round, and neither resumed nor told to forget it."""
        self._assembly = Assembly()
        self._folder = Folder()
        self._loaded = self._loaded_bytes = 0
        self._loading: deque[_Loading] = deque()
        self._named: str | None = None
        """Which needs the daemon goes by in this round; see `Begin.needs`."""
        self._parted: frozenset[str] = frozenset()
        """Tensors of which slots may hold less than all."""

    def expect(self, message: Expect) -> None:
        """Compare what is to come with what the engine holds, as soon as all of it is announced."""
        if message.first == 0:
            self._expected = []
        self._expected += message.tensors
        if len(self._expected) < message.total:
            return
        expected, self._expected = self._expected, []
        self._compared = message.round, self._misfit(expected)

    def _misfit(self, tensors: Sequence[TensorSpec]) -> CpeError | None:
        """Why a version of these tensors cannot be loaded."""
        if self._update is not None or self._loader.asleep:
            return EngineError(f"round {self._update.round} is being loaded here" if self._update else _ASLEEP)
        try:
            self._loader.expect(tensors)
        except CpeError as error:
            if error.message != self._told:
                log.warning("a version does not fit this engine, which does not get it: %s", error.message)
            self._told = error.message
            return error
        except Exception as error:  # task boundary: what the engine raises is reported, never raised across the link
            log.exception("expect failed in the engine")
            return EngineError(f"{type(error).__name__}: {error}")
        self._told = ""
        return None

    def carry_out(self, step: Step, slots: Slots | None) -> list[Answer]:
        """Do one step, and return what is to be answered by now, whatever happens.

        A bucket that a GPU still loads is answered later: see `settle`. Other steps wait for all of them.

        Args:
            step: of a round.
            slots: those that are open; only `Load` needs them.
        """
        began = time.monotonic()
        if isinstance(step, Load):
            failed = self.attempt(step, lambda: self._loading.append(self._load(step, slots, began)))
            return self.settle() if failed is None else [*self.settle_all(), failed]
        answers = self.settle_all()
        passes = list[int]()
        failed = self.attempt(step, lambda: passes.append(self._do(step)))
        if failed is not None:
            return [*answers, failed]
        touched = isinstance(step, Abort) and self.held.changed(step.round)
        whole, needs = self._compare_needs(step, slots)
        seconds = time.monotonic() - began
        name, loading = name_of(step), self._report() if isinstance(step, Finish) else None
        done = StepDone(step.round, name, 0, seconds, touched, sum(passes), loading, whole, needs)
        return [*answers, done]

    def _compare_needs(self, step: Step, slots: Slots | None) -> tuple[bool, Needs | None]:
        """Compare what is needed with what the daemon goes by, at the beginning and at the end of an update.

        Returns:
            At the beginning, whether all bytes are needed although the daemon may send fewer; at the end, what is
            needed next time, if the daemon does not know.
        """
        if isinstance(step, Begin):
            self._named, self._parted = step.needs, frozenset()
        elif not isinstance(step, Finish):
            return False, None
        if self._named is None:
            return False, None
        needed = self._loader.needs(slots.device) if slots is not None and isinstance(self._loader, Needing) else None
        digest = needed.told.digest if needed is not None else ""
        if isinstance(step, Finish):
            return False, needed.told if needed is not None and digest != self._named else None
        if needed is not None and digest == self._named:
            self._parted = needed.parted
        return bool(self._named) and digest != self._named, None

    def _report(self) -> LoadingReport | None:
        return self._loader.report if isinstance(self._loader, Learning) else None

    @property
    def loading(self) -> bool:
        """Whether buckets are still to be answered."""
        return bool(self._loading)

    def settle(self, at_least: int = 0) -> list[Answer]:
        """Return what is to be answered to the buckets that have been loaded since; wait for the first ``at_least``."""
        answers = list[Answer]()
        while self._loading and (len(answers) < at_least or self._loading[0].mark.reached):
            load, began, tensors, mark = self._loading.popleft()
            failed = self.attempt(load, mark.wait)
            if failed is None:
                self._loaded += tensors
                self._loaded_bytes += sum(part.nbytes for part in load.parts)
            answers.append(failed or StepDone(load.round, name_of(load), load.seq, time.monotonic() - began))
        return answers

    def settle_all(self) -> list[Answer]:
        """Wait for all buckets that are being loaded, and return what is to be answered."""
        return self.settle(len(self._loading))

    def warm_up(self, slots: Slots) -> None:
        """Fold and copy what is in a slot, whatever it is: CUDA loads a kernel at its first use, which takes long."""
        with slots.loading():
            self._folder.warm_up(slots.slot(0))
            for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
                rows = slots.slot(0)[:_WARM_BYTES].view(dtype).view(_WARM_ROWS, -1)
                part = rows[:, : rows.shape[1] // 2]
                torch.empty(part.shape, dtype=dtype, device=slots.device).copy_(part)
            slots.mark().wait()

    def forget(self) -> None:
        """Forget an update that was not finished."""
        self._update = None
        self._loaded = self._loaded_bytes = 0
        self._assembly.clear()
        self._folder.begin()

    def drop(self, reason: str) -> None:
        """Give the round up, and have the engine do so; nobody awaits an answer, whatever it raises."""
        self.attempt(Abort(0, reason), lambda: self._abandon(reason))

    def _abandon(self, reason: str) -> None:
        self.forget()
        self.under_way = False
        self._loader.abandon(reason)

    def attempt(self, step: Step | OpenSlots | CloseSlots | Wake, work: Callable[[], object]) -> StepFailed | None:
        """Do something of a step; return what is to be answered if it fails."""
        try:
            work()
        except CpeError as error:
            if not isinstance(step, Check):  # `expect` has said it
                log.warning("%s failed: %s", name_of(step), error.message)
            return StepFailed(step.round, name_of(step), ErrorInfo(error.code, error.message), getattr(step, "seq", 0))
        except Exception as error:  # task boundary: what the engine raises is reported, never raised across the link
            log.exception("%s failed in the engine", name_of(step))
            info = ErrorInfo(EngineError.code, f"{type(error).__name__}: {error}")
            return StepFailed(step.round, name_of(step), info, getattr(step, "seq", 0))
        return None

    def _do(self, step: Step) -> int:
        """Carry a step out; returns the forward passes that `Halt` asks for, and 0 for all others."""
        if self._loader.asleep and not isinstance(step, Abort):
            raise EngineError(_ASLEEP)
        match step:
            case Check():
                self._check(step.round)
            case Halt():
                self.under_way = True
                return self._loader.halt()
            case Pause():
                self.under_way = True
                self._loader.pause(step.deadline_seconds, step.passes)
            case Begin():
                self.forget()
                self._check(step.round, announced=False)
                self._loader.begin()
                self.held.begin(step.round)
                self._update = step
            case Finish():
                self._finish(step)
            case Abort():
                self._abort(step)
            case Resume():
                self._resume(step)
        return 0

    def _check(self, number: int, *, announced: bool = True) -> None:
        """Raise if the version that was announced by a number does not fit, or, if one must have been, none was."""
        compared, misfit = self._compared or (0, None)
        if compared == number and misfit is not None:
            raise misfit
        if compared != number and announced:
            raise EngineError(f"nothing was announced here as {number}")

    def _abort(self, abort: Abort) -> None:
        """Forget the round; a worker that serves already stops again, for others of its engine may not follow."""
        self._abandon(abort.reason)
        if self._resumed == abort.round:
            self._loader.pause(_PAUSE_AGAIN_SECONDS)

    def _load(self, load: Load, slots: Slots | None, began: float) -> _Loading:
        if self._update is None or load.round != self._update.round:
            raise EngineError(f"a bucket of round {load.round}, which was not begun here")
        if self._loader.asleep:
            raise EngineError(_ASLEEP)
        if slots is None:
            raise EngineError(f"a bucket of round {load.round}, and no slots are open here")
        begun = [TensorSpec(part.name, part.dtype, part.shape) for part in load.parts if part.tensor_offset == 0]
        with slots.loading():
            if self._update.fold is not None:
                self._folder.add(load.seq, load.parts, slots.slot(load.slot))
            places = self._loader.place(begun, slots.device) if begun else []
            if self._parted and (lost := [s.name for s, at in zip(begun, places, strict=True) if at is None]):
                self._check_whole(lost)
            tensors = self._assembly.take(load.parts, slots.slot(load.slot), places, slots, load.seq)
            if tensors:
                self._loader.load(tensors)
            loading = _Loading(load, began, self._assembly.placed + len(tensors), slots.mark())
            if isinstance(self._loader, MakingOver) and not self._assembly.parted:
                self._loader.make_over()
            return loading

    def _check_whole(self, names: Sequence[str]) -> None:
        """Raise if a tensor is about to be given to the engine of which only a part was sent."""
        if parted := self._parted.intersection(names):
            raise EngineError(f"only a part of {min(parted)} was sent, which the engine needs whole by now")

    def _finish(self, finish: Finish) -> None:
        begun = self._update
        if begun is None or finish.round != begun.round:
            raise EngineError(f"round {finish.round} was not begun here")
        if self._loaded != begun.tensors:
            raise EngineError(f"{self._loaded} of {begun.tensors} tensors came")
        if self._loaded_bytes != begun.nbytes:
            raise EngineError(f"{self._loaded_bytes} of {begun.nbytes} bytes came")
        if begun.fold is not None and (fold := self._folder.result()) != begun.fold:
            raise VerificationError(
                f"{begun.version} came here with other bytes than were staged (their fold is {fold:016x}, not"
                f" {begun.fold:016x}); it must not be served"
            )
        self._loader.finish(begun.version)
        self.held.loaded = begun.version, begun.digest
        self.forget()

    def _resume(self, resume: Resume) -> None:
        if self._loader.touched:
            raise EngineError("the weights may be a mixture of versions; not resuming")
        if resume.content != self._loader.content:
            held, named = self._loader.content or "no version", resume.content or "no version"
            raise EngineError(f"the weights are {held}, not {named}; not resuming")
        self._loader.resume()
        self._resumed, self.under_way = resume.round, False


def name_of(step: Step | OpenSlots | CloseSlots | Wake) -> str:
    """By which an answer refers to a step."""
    return str(step.__struct_config__.tag)
