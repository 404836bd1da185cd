"""Ctrl-C, SIGTERM and SIGHUP as exceptions, so that everything is cleaned up whatever ends the demo."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """A context in which the first of these signals raises and later ones are ignored: cleaning up takes seconds.

    Before `arm` it is only noted: an exception in the middle of importing torch may be swallowed, or become another.
    """

    def __init__(self) -> None:
        self._armed = False
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """Let signals raise from now on, and one that has come already at once; raises as `check`."""
        self._armed = True
        self.check()

    def check(self) -> None:
        """Raise if a signal came: an exception out of a handler may be swallowed by a destructor, for instance.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for the others, with the status that a shell expects.
        """
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            raise SystemExit(128 + self._received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received is None:
            self._received = number
            if self._armed:
                self.check()
