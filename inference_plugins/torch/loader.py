"""Applies updates to a torch engine's target while its serving lock is shut and its GPUs are at rest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Final

import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.assembly import Placement
from inference_plugins.learned.needs import Needed
from inference_plugins.torch.gpus import come_to_rest
from inference_plugins.torch.learning import LearningTarget
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Target

_REST_SECONDS: Final = 30.0
"""How long a GPU may take to come to rest where no deadline is given; serving has stopped by then."""

_NAMED: Final = 10
_MIXED: Final = "an update was begun and is not finished: the weights may be a mixture of versions"


class TorchLoader:
    """What a torch engine does with the steps of a round (see `inference_plugins.steps.Loader`).

    Args:
        target: what is written to.
        lock: shut while it is.
        changed: notified when ``serving`` changes, which is read under it.
        on_wake: has the engine take its memory back when it sleeps; None if it wakes up only by itself.
    """

    def __init__(
        self,
        target: Target,
        lock: ServingLock,
        changed: threading.Condition,
        on_wake: Callable[[], object] | None = None,
    ) -> None:
        self.content: VersionId | None = None
        self.touched = False
        self.asleep = self.starting = False
        self._on_wake = on_wake
        self.serving = False
        self._target = target
        self._lock = lock
        self._changed = changed
        self._resting: Set[torch.device] = frozenset()
        """GPUs that have come to rest since the lock was shut."""
        self._trouble: str | None = None
        """Why the last update failed, for whoever waits for the lock."""

    @property
    def report(self) -> LoadingReport | None:
        """How a function that was attached loads tensors, if that is learned."""
        if not isinstance(self._target, LearningTarget) or not self._target.learned.on:
            return None
        return self._target.learned.report.as_message()

    def needs(self, device: torch.device) -> Needed | None:
        """Which bytes are needed of tensors of which a function's ways were learned."""
        return self._target.learned.needs(device) if isinstance(self._target, LearningTarget) else None

    def halt(self) -> int:
        """Shut the lock for newcomers, and say how many forward passes were begun."""
        return self._lock.halt(self._reason())

    def pause(self, seconds: float, passes: int | None = None) -> None:
        """Shut the lock, and wait until the forward passes that were issued under it have run."""
        deadline = time.monotonic() + seconds
        was_open = self._lock.shut_because is None
        self._lock.shut(self._reason(), seconds, None if self.touched else passes)
        try:
            self._resting = self._target.gpus()
            come_to_rest(self._resting, deadline - time.monotonic())
        except CpeError:
            if was_open:
                self._lock.open()  # as a lock that could not be shut is left
            raise
        self._tell(serving=False)

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Compare a version's tensors with the target's."""
        self._trouble = None
        with self._explaining():
            self._target.expect(tensors)

    def begin(self) -> None:
        """Look the target's tensors up; GPUs that they have come to since the last time have to be at rest too."""
        self._lock.recount()  # all workers of the engine have come to rest at the same forward pass
        with self._explaining():
            self._target.begin()
            come_to_rest(self._target.gpus() - self._resting, _REST_SECONDS)

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
        """Say where they go; from now on the weights may be a mixture."""
        with self._explaining():
            places = self._target.place(tensors, device)
        if any(places):
            self._touch()
        return places

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Write tensors to the target, all of them or, if one does not fit, none."""
        with self._explaining():
            parts = self._target.cut(tensors)
            self._touch()
            for name, part in parts:
                self._target.write(name, part)

    @torch.no_grad()
    def finish(self, version: VersionId) -> None:
        """Check that everything came, and wait for what a callback may have issued on streams of its own."""
        with self._explaining():
            missing = self._target.missing()
            if missing:
                more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                raise EngineError(f"{version} brought nothing for {', '.join(missing[:_NAMED])}{more}")
            come_to_rest(self._target.unsettled(), _REST_SECONDS)
            self._target.prove()
        self.content = version
        self.touched = False
        self._trouble = None

    def abandon(self, reason: str) -> None:
        """What an update has written stays; the lock stays shut until another one is finished."""

    def resume(self) -> None:
        """Open the lock."""
        self._lock.open()
        self._tell(serving=True)

    def sleep(self, seconds: float) -> None:
        """Shut the lock as for an update; it stays shut until the engine is awake, and the daemon has resumed it."""
        self.asleep = True
        try:
            self.pause(seconds)
        except CpeError:
            self.asleep = False
            raise

    def rouse(self) -> None:
        """Call ``on_wake``."""
        if self._on_wake is None:
            raise EngineError("it is asleep, and was attached without on_wake")
        self._on_wake()

    def wake_up(self, *, kept: bool) -> None:
        """Weights that were not kept are as good as a mixture."""
        self.asleep = False
        if not kept:
            self.touched, self._trouble = True, "it slept, and its weights were not kept"
        self._lock.explain(self._reason())

    def _touch(self) -> None:
        """Weights change from now on."""
        if not self.touched:
            self.touched = True
            self._lock.explain(self._reason())

    def _reason(self) -> str:
        if self.asleep:
            return "it is asleep"
        reason = _MIXED if self.touched else "its weights are being updated, or it awaits the live version"
        return f"{reason}; last failure: {self._trouble}" if self._trouble else reason

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Keep the reason of a failure for whoever waits, and pass it on."""
        try:
            yield
        except Exception as error:  # task boundary: only noted here, and raised again
            self._trouble = str(error)
            self._lock.explain(self._reason())
            raise

    def _tell(self, *, serving: bool) -> None:
        with self._changed:
            self.serving = serving
            self._changed.notify_all()
