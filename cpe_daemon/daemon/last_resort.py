"""How a process ends that does not end by itself: a thread hangs in a copy, a read or a driver, and is waited for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Final

_SAYING_SECONDS: Final = 2.0
_STUCK_STATUS: Final = 1


class LastResort:
    """Ends the process when its time is up. The kernel takes the memory back.

    It has threads of its own, for then the event loop may hang, or be over: Python waits for threads after it. It is
    never called off, and ends with the process.

    Args:
        say: called in one of those threads, with the seconds that were not enough; may fail or hang.
    """

    def __init__(self, say: Callable[[float], None]) -> None:
        self._say = say
        self._armed = False

    def arm(self, seconds: float) -> None:
        """Give the process so long from now. The first time is what counts."""
        if not self._armed:
            self._armed = True
            _after(seconds, lambda: self._end(seconds))

    def _end(self, seconds: float) -> None:
        _after(_SAYING_SECONDS, lambda: os._exit(_STUCK_STATUS))
        try:
            self._say(seconds)
            sys.stderr.flush()
        finally:
            os._exit(_STUCK_STATUS)


def _after(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()
