"""When engines are to be asked to pause: how full the slots shall be by then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

_FILLED_MEANWHILE: Final = 2.0
"""Slots that fill while an engine stops, where nobody knows better."""

_MARGIN: Final = 1.0
"""Slots that may fill while an engine stops more slowly than the last time: links that wait for it cost as much of the
push as an engine that waits for a slot costs of the pause, and stops are not all alike."""


class Prefill(NamedTuple):
    """When engines are asked to pause: so many seconds after so many slots were full."""

    slots: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What the last round of an engine showed.

    Attributes:
        starved: whether it waited for buckets, mostly; what is supposed before the first round.
        stop_seconds: from the request to pause until it had loaded its first bucket; 0.0: not known.
        fill_seconds: from one slot that was filled to the next, while slots were free; 0.0: not known.
    """

    starved: bool = True
    stop_seconds: float = 0.0
    fill_seconds: float = 0.0

    @property
    def filled_meanwhile(self) -> float:
        """How many slots could be filled while the engine stops."""
        if not (self.stop_seconds and self.fill_seconds):
            return _FILLED_MEANWHILE
        return self.stop_seconds / self.fill_seconds

    def prefill(self, slots: int, buckets: int) -> Prefill:
        """How full the slots are to be when the engine is asked to pause.

        All that shorten the pause: it is shorter only for engines that load faster than slots fill. But while an engine
        stops the links have to have something to do, so what fills meanwhile is not waited for, unless all the version
        is in slots before: the last slot is to be full when the first one is free again, and not earlier. Since an
        engine may take longer this time, it is asked `_MARGIN` slots before that would do.
        """
        if self.starved and slots >= buckets:
            return Prefill(buckets)
        if not self.starved:
            return Prefill(0)
        more, full = math.modf(max(0.0, slots - self.filled_meanwhile - _MARGIN))
        return Prefill(int(full), more * self.fill_seconds)


def slowest(paces: list[Pace]) -> Pace:
    """What to expect of several engines that are paused together; ``paces`` is not empty."""
    return Pace(
        any(pace.starved for pace in paces),
        max(pace.stop_seconds for pace in paces),
        max(pace.fill_seconds for pace in paces),
    )
