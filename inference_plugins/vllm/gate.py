"""Keeps vLLM's own thread inside a weight update while the receiver's thread loads.

vLLM runs no forward pass while a worker is in ``update_weights``, whatever its server is asked for, and nothing is
loaded but then. At start the thread that builds the worker waits in the same way.
"""

from __future__ import annotations

import threading

from cpe_daemon.errors import EngineError


class Gate:
    """One worker's. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._outcome: str | None = None

    def hold(self, seconds: float) -> str:
        """Stay here until `release`; vLLM's thread calls it.

        Returns:
            What `release` said; "deadline" if it did not come within ``seconds``.
        """
        with self._changed:
            self._held, self._outcome = True, _awaited()
            self._changed.notify_all()
            self._changed.wait_for(self._released, seconds)
            self._held = False
            return "deadline" if self._outcome is None else self._outcome

    def await_held(self, seconds: float) -> None:
        """Wait until vLLM's thread is here.

        Raises:
            EngineError: it did not come within ``seconds``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._held and self._outcome is None, seconds):
                raise EngineError(f"vLLM did not enter update_weights within {seconds:g} s")

    @property
    def held(self) -> bool:
        """Whether vLLM's thread is here, and stays."""
        with self._changed:
            return self._held and self._outcome is None

    def _released(self) -> bool:
        return self._outcome is not None

    def release(self, outcome: str) -> None:
        """Let vLLM's thread go; does nothing if it is not here."""
        with self._changed:
            if self._held:
                self._outcome = outcome
                self._changed.notify_all()


def _awaited() -> str | None:
    """No outcome yet."""
    return None
