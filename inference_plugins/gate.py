"""Keeps an engine's own thread inside a weight update while the receiver's thread loads.

A server (vLLM, SGLang) runs no forward pass while its thread is in the call that updates weights, whatever it is asked
for, and nothing is loaded but then. At start the thread that builds the worker waits in the same way.
"""

from __future__ import annotations

import threading

from cpe_daemon.errors import EngineError


class Gate:
    """One worker's. Thread-safe.

    Args:
        engine: whose thread it holds, for messages.
        call: in which that thread comes here.
    """

    def __init__(self, engine: str = "the engine", call: str = "update_weights") -> None:
        self.engine = engine
        self.call = call
        self._changed = threading.Condition()
        self._held = False
        self._awaited = False
        """Whether somebody has found the engine's thread here."""
        self._outcome: str | None = None

    def hold(self, seconds: float, idle_seconds: float | None = None) -> str:
        """Stay here until `release`; the engine's thread calls it.

        Args:
            seconds: its deadline.
            idle_seconds: go after this time already if nobody has awaited it until then; None: stay.

        Returns:
            What `release` said; "deadline" if it did not come in time.
        """
        with self._changed:
            self._held, self._awaited, self._outcome = True, False, _unknown()
            self._changed.notify_all()
            if idle_seconds is not None and not self._changed.wait_for(self._released_or_awaited, idle_seconds):
                self._held = False
                return "deadline"
            self._changed.wait_for(self._released, seconds)
            self._held = False
            return "deadline" if self._outcome is None else self._outcome

    def await_held(self, seconds: float) -> None:
        """Wait until the engine's thread is here.

        Raises:
            EngineError: it did not come within ``seconds``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._held and self._outcome is None, seconds):
                raise EngineError(f"{self.engine} did not enter {self.call} within {seconds:g} s")
            self._awaited = True
            self._changed.notify_all()

    @property
    def held(self) -> bool:
        """Whether the engine's thread is here, and stays."""
        with self._changed:
            return self._held and self._outcome is None

    def _released(self) -> bool:
        return self._outcome is not None

    def _released_or_awaited(self) -> bool:
        return self._awaited or self._outcome is not None

    def release(self, outcome: str) -> None:
        """Let the engine's thread go; does nothing if it is not here."""
        with self._changed:
            if self._held:
                self._outcome = outcome
                self._changed.notify_all()


def _unknown() -> str | None:
    """No outcome yet."""
    return None
