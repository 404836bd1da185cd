"""Engines that could not be reached for a round are given the live version later, as soon as they can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import DeadlineError, PeerLostError
from cpe_daemon.push.arrival import starts
from cpe_daemon.push.participant import Participant

log = structlog.get_logger(__name__)

_FIRST_PAUSE: Final = 5.0
_LONGEST_PAUSE: Final = 60.0


class Retries:
    """Tries again for engines that serve on what they held, since their server or a worker did not answer in time.

    A server that is still starting is such an engine: its workers are there before its API is. Belongs to the event
    loop.

    Args:
        again: has an engine be given the live version, unless it holds that already.
    """

    def __init__(self, again: Callable[[Engine], None]) -> None:
        self._again = again
        self._pauses: dict[str, float] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    def look(self, participants: Iterable[Participant]) -> None:
        """After a round: try again for those that need it, later each time, and for the others no more."""
        for participant in participants:
            engine = participant.engine
            if (timer := self._timers.pop(engine.name, None)) is not None:
                timer.cancel()
            late = isinstance(participant.error, PeerLostError | DeadlineError)
            if participant.outcome != "kept" or not late or engine.asleep or self._closed:
                self._pauses.pop(engine.name, None)
                continue
            if starts(engine):
                self._pauses.pop(engine.name, None)  # its server will soon be there
            pause = self._pauses[engine.name] = min(2 * self._pauses.get(engine.name, _FIRST_PAUSE / 2), _LONGEST_PAUSE)
            self._timers[engine.name] = asyncio.get_running_loop().call_later(pause, self._try, engine)
            log.info("engine.retried_later", engine=engine.name, seconds=pause)

    def close(self) -> None:
        """Try nothing more, whatever a round that is under way still comes to."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _try(self, engine: Engine) -> None:
        self._timers.pop(engine.name, None)
        if engine.complete:
            self._again(engine)
