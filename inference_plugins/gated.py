"""What a server's worker does with the steps of a round: reload its models, while the engine's own thread waits.

vLLM's and SGLang's alike: they differ in how a model is reloaded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import DeadlineError, EngineError, ManifestError
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.assembly import Placement
from inference_plugins.gate import Gate
from inference_plugins.learned import LearnedLoading
from inference_plugins.learned.needs import Needed

_ENTER_SECONDS: Final = 10.0
"""How long the engine's thread may take to come into the gate once the daemon has asked for that."""
_NAMED: Final = 10


class Reloading(Protocol):
    """A model whose weights are replaced, in the order of the methods; `undo` at any time, also when one has raised."""

    def begin(self) -> None:
        """Make ready for its tensors."""
        ...

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load whole tensors; nothing may refer to their memory when this returns."""
        ...

    def finish(self) -> None:
        """All have been given: complete the reload, or raise if some that are needed did not come."""
        ...

    def undo(self) -> None:
        """Leave the model such that a reload may begin; does nothing if none was begun."""
        ...


class GatedLoader:
    """The steps of rounds for one worker (see `inference_plugins.loader.Loader`); the receiver's thread calls them.

    Args:
        models: what is loaded, in this order: the model, and the draft model if there is one.
        device: where they are.
        gate: holds the engine's own thread.
        needs_version: it is not to serve what it loaded from disk.
        shapes: of tensors that it loaded from disk, by name, as far as they are known.
        learned: what is known of the first model's loader; None learns nothing. Not used where there are two models.
    """

    start_setting = "CPE_START"
    """By which an operator says what a worker may start with."""

    def __init__(
        self,
        models: Callable[[], Sequence[Reloading]],
        device: torch.device,
        gate: Gate,
        *,
        needs_version: bool,
        shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        learned: LearnedLoading | None = None,
    ) -> None:
        self.content: VersionId | None = None
        self.touched = False
        self.asleep = False
        self.starting = True
        self.serving = False
        self._needs_version = needs_version
        self._shapes = dict(shapes)
        """Of what is loaded."""
        self._coming: dict[str, tuple[int, ...]] = {}
        """Of what came in this update."""
        self._begun = False
        """Whether modules' parameters were taken away, to be loaded."""
        self.failure: str | None = None
        """Why the last update was not taken."""
        self._models = models
        self._learned = learned or LearnedLoading(dict, on=False)
        self._device = device
        self._gate = gate
        self._changed = threading.Condition()

    @property
    def report(self) -> LoadingReport | None:
        """How tensors are loaded, if that is learned."""
        return self._learned.report.as_message() if self._learned.on else None

    def needs(self, device: torch.device) -> Needed | None:
        """Which bytes are needed of tensors of which that was learned."""
        return self._learned.needs(device)

    def halt(self) -> int:
        """Nothing to count: a server pauses all its workers itself."""
        return 0

    def pause(self, seconds: float, passes: int | None = None) -> None:
        """Nothing to do here: the server was paused by its own API."""
        self._tell(serving=False)

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Compare shapes with those that were loaded before; the engine's loaders alone know which names they take.

        Many of them take their part of a tensor that is too large without a word.
        """
        wrong = [
            f"{spec.name} is {list(known)} here, {list(spec.shape)} in the version"
            for spec in tensors
            if (known := self._shapes.get(spec.name)) is not None and known != spec.shape
        ]
        if wrong:
            more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise ManifestError(f"{'; '.join(wrong[:_NAMED])}{more}")
        self._learned.expect(tensors)

    def begin(self) -> None:
        """Wait for the engine's thread; what an update before this one left behind is undone."""
        self._gate.await_held(_ENTER_SECONDS)
        self.failure = None
        self._coming.clear()
        self._undo()
        self._learned.on = self._learned.on and len(self._models()) == 1
        self._learned.begin()

    @torch.no_grad()
    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
        """Those tensors have a place of which the engine's loader is known to do nothing but copy them there."""
        if self._learned.modules:
            self._check_held()
        places = self._learned.place(tensors, device)
        if any(places):
            self.touched = True
            self._coming.update((spec.name, spec.shape) for spec in tensors)
        return places

    @torch.no_grad()
    def make_over(self) -> None:
        """Have the engine make of what was copied what its kernels want, module by module."""
        if self._learned.modules:
            self._check_held()
        self._learned.make_over()

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Give tensors to the loaders; from the first on the weights are a mixture."""
        self._check_held()
        if not self._begun:
            self._begun = self.touched = True
            for model in self._models():
                model.begin()
        if self._learned.modules and self._learned.stale:
            raise EngineError(f"{self._learned.stale}, which nobody announced")
        self._learned.observe(tensors, lambda: self._load(tensors))
        self._coming.update((name, tuple(tensor.shape)) for name, tensor in tensors)

    @torch.no_grad()
    def finish(self, version: VersionId) -> None:
        """Complete the reload, and let the engine's thread go."""
        self._check_held()
        if missing := self._learned.missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise EngineError(f"{version} brought nothing for {', '.join(missing[:_NAMED])}{more}")
        with self._here():
            self._rest()
            self._learned.finish(self._complete)
        self._shapes.update(self._coming)
        self.content, self.touched, self._begun = version, False, False
        self._gate.release("finished")

    def _load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for model in self._models():
            model.load(tensors)

    def _complete(self) -> None:
        """Complete the reload, if any module was not known to need none."""
        for model in self._models() if self._begun else ():
            model.finish()
        self._rest()

    def _rest(self) -> None:
        """Wait until a GPU has done what was issued: modules may be made over yet."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def abandon(self, reason: str) -> None:
        """An update ended that was not finished: leave models whole, and let the engine's thread go."""
        self.failure = reason
        self._undo()
        self._gate.release("abandoned")

    def resume(self) -> None:
        """The daemon says that what is held may be served; a server is resumed by its own API.

        Raises:
            EngineError: it starts, and is to wait for a version.
        """
        if self.content is None and self._needs_version:
            raise EngineError(f"it starts, and waits for a version ({self.start_setting})")
        self.starting = False
        self._tell(serving=True)
        self._gate.release("resumed")

    def sleep(self, seconds: float) -> None:
        """Not known here yet: a server sleeps by its own API."""
        raise EngineError(f"a worker of {self._gate.engine} cannot say that it sleeps")

    def rouse(self) -> None:
        """As `sleep`."""
        raise EngineError(f"a worker of {self._gate.engine} cannot be woken up by the daemon")

    def wake_up(self, *, kept: bool) -> None:
        """As `sleep`."""
        self.asleep = False

    def await_serving(self, seconds: float) -> None:
        """Wait, in the thread that starts the worker, until what it holds may be served.

        Raises:
            DeadlineError: it may not after ``seconds``; says what failed last, if anything did.
        """
        deadline = time.monotonic() + seconds
        while not self.serving:
            left = deadline - time.monotonic()
            if left <= 0:
                last = f"; the last update failed: {self.failure}" if self.failure else ""
                raise DeadlineError(f"no version that may be served came within {seconds:g} s{last}")
            self._gate.hold(left)
            with self._changed:
                self._changed.wait_for(lambda: self.serving, min(1.0, left))

    def _undo(self) -> None:
        """Put modules that were not complete back; also after a failure in the engine, which may fail in this too."""
        self._begun = False
        with self._here(), torch.no_grad():
            for model in self._models():
                model.undo()

    def _check_held(self) -> None:
        """The engine's thread may have left at its deadline; it would run the model while this writes to it.

        Raises:
            EngineError: it has.
        """
        if not self._gate.held:
            raise EngineError(f"{self._gate.engine}: {self._gate.call} has ended before the update")

    def _here(self) -> contextlib.AbstractContextManager[object]:
        """Have the thread work on the worker's GPU."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _tell(self, *, serving: bool) -> None:
        with self._changed:
            self.serving = serving
            self._changed.notify_all()
