"""The lock between a torch engine's forward passes and its updates."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from cpe_daemon.errors import DeadlineError, EngineError


class ServingLock:
    """Held by whoever runs a forward pass; shut while weights change, or while they are in doubt.

    Any number of threads may hold it at once, and a thread may hold it several times: an update waits until all have
    let go, and keeps newcomers out meanwhile. Whoever waits is told why when the wait ends in an error.

    Args:
        timeout: seconds that ``with lock:`` waits for a shut lock.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._holders: dict[int, int] = {}
        self._reason: str | None = "it is not attached to a daemon yet"
        self._passes = 0
        """Forward passes that were begun since the last `recount`."""
        self._last: int | None = None
        """While it is being shut: forward passes up to this one may begin still."""

    @property
    def shut_because(self) -> str | None:
        """Why nobody may serve now; None if everybody may."""
        return self._reason

    def acquire(self, timeout: float | None = None) -> None:
        """Begin a forward pass.

        Args:
            timeout: seconds to wait; the lock's own if None.

        Raises:
            EngineError: the lock was shut all that time; says why.
        """
        limit = self._timeout if timeout is None else timeout
        me = threading.get_ident()
        with self._changed:
            if me not in self._holders:
                if not self._changed.wait_for(self._may_begin, limit):
                    raise EngineError(f"not serving for {limit:g} s: {self._reason}")
                self._passes += 1
                if self._passes == self._last:
                    self._changed.notify_all()
            self._holders[me] = self._holders.get(me, 0) + 1

    def release(self) -> None:
        """End a forward pass.

        Raises:
            RuntimeError: this thread does not hold the lock.
        """
        me = threading.get_ident()
        with self._changed:
            held = self._holders.get(me, 0)
            if not held:
                raise RuntimeError("release of a serving lock that this thread does not hold")
            if held > 1:
                self._holders[me] = held - 1
            else:
                del self._holders[me]
                self._changed.notify_all()

    def __enter__(self) -> ServingLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _may_begin(self) -> bool:
        return self._reason is None or (self._last is not None and self._passes < self._last)

    def halt(self, reason: str) -> int:
        """Keep newcomers out, wait for nobody, and return how many forward passes were begun since `recount`."""
        with self._changed:
            self._reason = self._reason or reason
            return self._passes

    def recount(self) -> None:
        """Count forward passes from here on, as all workers of the engine do at the same forward pass."""
        with self._changed:
            self._passes = 0

    def shut(self, reason: str, timeout: float, passes: int | None = None) -> None:
        """Keep newcomers out and wait until all holders have let go; on failure the lock is as it was before.

        Args:
            reason: told to newcomers.
            timeout: seconds.
            passes: let newcomers in until so many forward passes were begun, for half of that time at most: the other
                workers of the engine have begun them, and wait there for this one. Where a worker was restarted, its
                count is not theirs, and what does not come must not be waited for any longer.

        Raises:
            DeadlineError: somebody held it for ``timeout`` seconds.
        """
        began = time.monotonic()
        with self._changed:
            before, self._reason = self._reason, reason
            if passes is not None:
                self._last = passes
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._passes >= passes, timeout / 2)
                self._last = None
            if not self._changed.wait_for(lambda: not self._holders, began + timeout - time.monotonic()):
                self._reason = before
                self._changed.notify_all()
                waited = time.monotonic() - began
                raise DeadlineError(f"a forward pass held the serving lock for more than {waited:.1f} s")

    def explain(self, reason: str) -> None:
        """Change the reason of a shut lock."""
        with self._changed:
            if self._reason is not None:
                self._reason = reason

    def open(self) -> None:
        """Let everybody serve."""
        with self._changed:
            self._reason = None
            self._changed.notify_all()
