"""What other threads want done in a receiver's thread, between two rounds, each with a deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from cpe_daemon.errors import CpeError, DeadlineError, EngineError

log: Final = logging.getLogger(__name__)

_MARGIN_SECONDS: Final = 1.0

Work = Callable[[float], object]
"""Called with the seconds that are left."""


class _Errand:
    """One thing to do. ``done`` is set when it was, or has failed with ``error``."""

    def __init__(self, work: Work, seconds: float) -> None:
        self.work = work
        self.deadline = time.monotonic() + seconds
        self.done = threading.Event()
        self.error: CpeError | None = None


class Errands:
    """A queue of them. Any thread may put something into it; the receiver's thread does it.

    Args:
        wake: makes the receiver's thread look.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[_Errand] = deque()

    @property
    def due(self) -> bool:
        """Whether something is to be done."""
        return bool(self._waiting)

    def do(self, work: Work, seconds: float) -> None:
        """Have something done, and wait for it. Not from the receiver's own thread, which would wait for itself.

        Raises:
            DeadlineError: it was not done within ``seconds``, and will not be.
            CpeError: what it raised.
        """
        errand = _Errand(work, seconds)
        self._waiting.append(errand)
        self._wake()
        if not errand.done.wait(seconds):
            try:
                self._waiting.remove(errand)
            except ValueError:  # it is being done, within what is left of the time
                errand.done.wait(_MARGIN_SECONDS)
        if not errand.done.is_set():
            raise DeadlineError(f"the engine was busy with an update for {seconds:g} s")
        if errand.error is not None:
            raise errand.error

    def run(self) -> None:
        """Do all there is to be done; only in the receiver's thread."""
        while self._waiting:
            errand = self._waiting.popleft()
            try:
                errand.work(max(0.0, errand.deadline - time.monotonic()))
            except CpeError as error:
                errand.error = error
            except Exception as error:  # task boundary: told to who asked for it, and the link goes on
                log.exception("an errand failed in the engine")
                errand.error = EngineError(f"{type(error).__name__}: {error}")
            errand.done.set()
