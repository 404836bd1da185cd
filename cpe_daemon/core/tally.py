"""How much a stage has moved, and for how long it had anything to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Tally:
    """The traffic of one stage: plain numbers, which cost little to keep and are read when somebody asks.

    Seconds in which several transfers were in flight count once, so that bytes by seconds are the rate of the whole
    stage while it works. Belongs to one thread.

    Args:
        clock: seconds, monotonic.
    """

    __slots__ = ("_clock", "_in_flight", "_seconds", "_since", "nbytes")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.nbytes = 0
        """Bytes of every transfer that has ended well."""
        self._clock = clock
        self._seconds = 0.0
        self._since = 0.0
        self._in_flight = 0

    @property
    def seconds(self) -> float:
        """For how long one transfer or several were in flight, until now."""
        return self._seconds + (self._clock() - self._since if self._in_flight else 0.0)

    def begin(self) -> None:
        """A transfer begins."""
        if not self._in_flight:
            self._since = self._clock()
        self._in_flight += 1

    def end(self, nbytes: int) -> None:
        """A transfer has ended, and moved ``nbytes``: 0 if it failed."""
        self._in_flight -= 1
        self.nbytes += nbytes
        if not self._in_flight:
            self._seconds += self._clock() - self._since

    @contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """Count the context as a transfer."""
        self.begin()
        moved = 0
        try:
            yield
            moved = nbytes
        finally:
            self.end(moved)
