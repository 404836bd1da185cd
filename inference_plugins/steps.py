"""A worker's part in a round, step by step: buckets out of slots into a `Loader`, which is what a plugin implements.

Whatever the engine raises becomes the answer to the step; nothing is raised across the link. A GPU may still load one
bucket while the next is issued: each is answered when its slot may be overwritten.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.devices.slots import Mark, Slots
from cpe_daemon.errors import CpeError, EngineError, VerificationError
from cpe_daemon.wire.messages import Abort, Begin, Expect, Finish, Load, Pause, Resume, StepDone, StepFailed
from cpe_daemon.wire.reports import ErrorInfo
from inference_plugins.assembly import Assembly, Place
from inference_plugins.fold import Folder

log: Final = logging.getLogger(__name__)

_WARM_BYTES: Final = 4096
_WARM_ROWS: Final = 16

Step = Pause | Begin | Load | Finish | Abort | Resume
"""What the daemon asks for in a round."""

Answer = StepDone | StepFailed


class Loader(Protocol):
    """What an engine's plugin implements; called from the receiver's thread, in the order of the methods."""

    content: VersionId | None
    """The version that the weights are, whole; None before the first."""

    touched: bool
    """Whether the weights may be a mixture: true from the first write of an update until `finish` has returned."""

    def pause(self, seconds: float) -> None:
        """Keep the engine from serving, from between two forward passes on. Does nothing if it is paused already.

        Raises:
            DeadlineError: it did not come to rest within ``seconds``.
        """
        ...

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Raise if a version of these tensors cannot be loaded; called while the engine may serve, changes nothing.

        Raises:
            ManifestError: says which tensors are missing, unknown, or of another dtype or shape.
        """
        ...

    def begin(self) -> None:
        """Make ready for the tensors of a version; forget an update that was not finished."""
        ...

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Place | None]:
        """Say where in the memory of ``device`` the bytes of each of these belong.

        They are about to be copied there, and count as loaded. The receiver copies them itself, by address, a tensor
        that comes in several parts as these come. None: the tensor cannot be written in this way, and is given to
        `load`, whole.
        """
        ...

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load whole tensors. They are views of memory that is reused soon after this has returned.

        On a GPU that is when what was issued on torch's current stream has been done.
        """
        ...

    def finish(self, version: VersionId) -> None:
        """Every tensor has been given: post-process, and raise unless each one that was expected came."""
        ...

    def resume(self) -> None:
        """Let the engine serve. Does nothing if it does."""
        ...


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
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._update: Begin | None = None
        self._before: tuple[int, VersionId | None] | None = None
        """The last round that was begun here, and what the engine held before it."""
        self._expected: list[TensorSpec] = []
        self._misfit: tuple[int, CpeError] | None = None
        """The last round whose version does not fit this engine, and why."""
        self._assembly = Assembly()
        self._folder = Folder()
        self._loaded = 0
        self._loading: deque[_Loading] = deque()

    def expect(self, message: Expect) -> None:
        """Compare what is to come with what the engine holds, as soon as all of it is announced."""
        if message.first == 0:
            self._expected = []
        self._expected += message.tensors
        if len(self._expected) < message.total:
            return
        expected, self._expected, self._misfit = self._expected, [], None
        try:
            self._loader.expect(expected)
        except CpeError as error:
            self._misfit = (message.round, error)
        except Exception as error:  # task boundary: what the engine raises is reported, never raised across the link
            log.exception("expect failed in the engine")
            self._misfit = (message.round, EngineError(f"{type(error).__name__}: {error}"))

    def carry_out(self, step: Step, slots: Slots | None) -> list[Answer]:
        """Do one step, and return what is to be answered by now, whatever happens.

        A bucket that a GPU still loads is answered later: see `settle`. Other steps wait for all of them.

        Args:
            step: of a round.
            slots: those that are open; only `Load` needs them.
        """
        began = time.monotonic()
        if isinstance(step, Load):
            failed = self._attempt(step, lambda: self._loading.append(self._load(step, slots, began)))
            return self.settle() if failed is None else [*self.settle_all(), failed]
        answers = self.settle_all()
        failed = self._attempt(step, lambda: self._do(step))
        touched = isinstance(step, Abort) and self._changed(step.round)
        done = StepDone(step.round, _name(step), seconds=time.monotonic() - began, touched=touched)
        return [*answers, failed or done]

    @property
    def loading(self) -> bool:
        """Whether buckets are still to be answered."""
        return bool(self._loading)

    def settle(self, at_least: int = 0) -> list[Answer]:
        """Return what is to be answered to the buckets that have been loaded since; wait for the first ``at_least``."""
        answers = list[Answer]()
        while self._loading and (len(answers) < at_least or self._loading[0].mark.reached):
            load, began, tensors, mark = self._loading.popleft()
            failed = self._attempt(load, mark.wait)
            self._loaded += 0 if failed else tensors
            answers.append(failed or StepDone(load.round, _name(load), load.seq, time.monotonic() - began))
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
        self._loaded = 0
        self._assembly.clear()
        self._folder.begin()

    def _attempt(self, step: Step, work: Callable[[], object]) -> StepFailed | None:
        """Do something of a step; return what is to be answered if it fails."""
        try:
            work()
        except CpeError as error:
            return StepFailed(step.round, _name(step), ErrorInfo(error.code, error.message), getattr(step, "seq", 0))
        except Exception as error:  # task boundary: what the engine raises is reported, never raised across the link
            log.exception("%s failed in the engine", _name(step))
            info = ErrorInfo(EngineError.code, f"{type(error).__name__}: {error}")
            return StepFailed(step.round, _name(step), info, getattr(step, "seq", 0))
        return None

    def _do(self, step: Step) -> None:
        match step:
            case Pause():
                self._loader.pause(step.deadline_seconds)
            case Begin():
                self.forget()
                if self._misfit is not None and self._misfit[0] == step.round:
                    raise self._misfit[1]
                self._loader.begin()
                self._update, self._before = step, (step.round, self._loader.content)
            case Finish():
                self._finish(step)
            case Abort():
                self.forget()
            case Resume():
                self._resume(step)

    def _changed(self, round: int) -> bool:
        """Whether the weights are no longer what they were before a round: a mixture, or its version whole."""
        begun, held = self._before or (0, None)
        return self._loader.touched or (begun == round and held != self._loader.content)

    def _load(self, load: Load, slots: Slots | None, began: float) -> _Loading:
        if self._update is None or load.round != self._update.round:
            raise EngineError(f"a bucket of round {load.round}, which was not begun here")
        if slots is None:
            raise EngineError(f"a bucket of round {load.round}, and no slots are open here")
        begun = [TensorSpec(part.name, part.dtype, part.shape) for part in load.parts if part.tensor_offset == 0]
        with slots.loading():
            if self._update.fold is not None:
                self._folder.add(load.seq, load.parts, slots.slot(load.slot))
            places = self._loader.place(begun, slots.device) if begun else []
            tensors = self._assembly.take(load.parts, slots.slot(load.slot), places, slots.copy)
            if tensors:
                self._loader.load(tensors)
            return _Loading(load, began, self._assembly.placed + len(tensors), slots.mark())

    def _finish(self, finish: Finish) -> None:
        begun = self._update
        if begun is None or finish.round != begun.round:
            raise EngineError(f"round {finish.round} was not begun here")
        if self._loaded != begun.tensors:
            raise EngineError(f"{self._loaded} of {begun.tensors} tensors came")
        if begun.fold is not None and (fold := self._folder.result()) != begun.fold:
            raise VerificationError(
                f"{begun.version} came here with other bytes than were staged (their fold is {fold:016x}, not"
                f" {begun.fold:016x}); it must not be served"
            )
        self._loader.finish(begun.version)
        self.forget()

    def _resume(self, resume: Resume) -> None:
        if self._loader.touched:
            raise EngineError("the weights may be a mixture of versions; not resuming")
        if resume.content != self._loader.content:
            held, named = self._loader.content or "no version", resume.content or "no version"
            raise EngineError(f"the weights are {held}, not {named}; not resuming")
        self._loader.resume()


def _name(step: Step) -> str:
    """By which an answer refers to a step."""
    return str(step.__struct_config__.tag)
