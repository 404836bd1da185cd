"""What an engine's plugin implements: the engine as a worker's receiver sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.wire.reports import LoadingReport
from inference_plugins.assembly import Placement
from inference_plugins.learned.needs import Needed


class Loader(Protocol):
    """What an engine's plugin implements; called from the receiver's thread, in the order of the methods."""

    content: VersionId | None
    """The version that the weights are, whole; None before the first."""

    touched: bool
    """Whether the weights may be a mixture: true from the first write of an update until `finish` has returned."""

    starting: bool
    """Whether the engine has not served since its process began: true until the first `resume`, if at all."""

    asleep: bool
    """Whether their memory may belong to others: true from `sleep` until `wake_up`. Nothing may touch it meanwhile."""

    def halt(self) -> int:
        """Let no further forward pass begin; return how many were begun since the last `begin`. Waits for none of them.

        Called only for engines of several workers. `pause` or `resume` follows.
        """
        ...

    def pause(self, seconds: float, passes: int | None = None) -> None:
        """Keep the engine from serving, from between two forward passes on. Does nothing if it is paused already.

        Args:
            seconds: its deadline.
            passes: stop after this many forward passes, as `halt` counts them: siblings have begun as many, and wait
                there for this worker. None: as soon as may be.

        Raises:
            DeadlineError: it did not come to rest within ``seconds``.
        """
        ...

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Raise if a version of these tensors cannot be loaded; called while the engine may serve, changes nothing.

        It is asked at any time but between `begin` and `finish`.

        Raises:
            ManifestError: says which tensors are missing, unknown, or of another dtype or shape.
        """
        ...

    def begin(self) -> None:
        """Make ready for the tensors of a version; forget an update that was not finished."""
        ...

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> Sequence[Placement | None]:
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

    def abandon(self, reason: str) -> None:
        """The round was given up, whether anything was begun or not: leave the engine such that it could be resumed."""
        ...

    def resume(self) -> None:
        """Let the engine serve. Does nothing if it does."""
        ...

    def sleep(self, seconds: float) -> None:
        """Keep the engine from serving, as `pause` does, until it has woken up and `resume` is called."""
        ...

    def rouse(self) -> None:
        """Have an engine that sleeps take its memory back. Its weights may be gone; `wake_up` follows.

        Raises:
            EngineError: it cannot, or only by itself.
        """
        ...

    def wake_up(self, *, kept: bool) -> None:
        """It has its memory again; ``kept``: with the weights that were in it."""
        ...


@runtime_checkable
class Learning(Protocol):
    """What a `Loader` has besides if it learns how its engine loads (`inference_plugins.learned`)."""

    @property
    def report(self) -> LoadingReport | None:
        """How tensors are loaded by now; None if nothing is learned of this engine. Asked after each `finish`."""
        ...


@runtime_checkable
class MakingOver(Protocol):
    """What a `Loader` has besides if its engine makes other tensors of some that were loaded."""

    def make_over(self) -> None:
        """Do so with what is whole, asked for after a bucket; what is left is for `finish` to do.

        No tensor is left that `place` was asked for and of which a part is still to come. On a GPU their copies may be
        under way: what is issued on torch's current stream is done after them.
        """
        ...


@runtime_checkable
class Needing(Protocol):
    """What a `Loader` has besides if it can say which bytes it reads: the daemon may send it no others then."""

    def needs(self, device: torch.device) -> Needed | None:
        """Which bytes of a version of the tensors that came last are read from slots on ``device``; None: all.

        Asked after each `finish`, and after each `begin`: what it says then holds until the round is over.
        """
        ...
