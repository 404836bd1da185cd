"""An event loop whose time passes at once when there is nothing to do: deadlines of minutes in tests of milliseconds.

Threads take real time: while one of the loop's own pool works, virtual time stands still.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LOOK_SECONDS = 0.005


class _Selector(selectors.DefaultSelector):
    """Passes the time that the loop would wait, unless something happens that the loop has to see first."""

    passing: Callable[[float | None], bool]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        happened = super().select(0)
        while not happened and (timeout is None or timeout > 0) and not self.passing(timeout):
            happened = super().select(_LOOK_SECONDS)
        return happened


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs as ever; `time` is virtual."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.passing = self._pass
        self._now = 1000.0
        self._working = 0
        super().__init__(selector)

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: object) -> None:
        self._working -= 1

    def _pass(self, seconds: float | None) -> bool:
        """Let time pass, if nothing else can happen meanwhile; False if it cannot."""
        if self._working or seconds is None:
            return False
        self._now += seconds
        return True
