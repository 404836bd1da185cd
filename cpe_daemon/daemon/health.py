"""Whether the daemon does its work: what the watchdog is fed by, and what a probe of liveness is told.

Asked on the event loop, so whoever gets an answer knows that the loop goes round. An engine in doubt or a full arena is
no matter of health: restarting the daemon would mend neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from cpe_daemon.observe.labels import COPIES

log = structlog.get_logger(__name__)


class Health:
    """What may be wrong with the daemon itself. Belongs to the event loop.

    Args:
        copying: by what they are for (`COPIES`), the age in seconds of the oldest copy in flight (0.0: none is).
        stuck_seconds: a copy that is older is stuck.
    """

    def __init__(self, copying: Mapping[str, Callable[[], float]], *, stuck_seconds: float) -> None:
        self._copying = copying
        self._stuck_seconds = stuck_seconds
        self._stuck: frozenset[str] = frozenset()

    def ages(self) -> dict[str, float]:
        """Seconds for which the oldest copy of each kind has been in flight."""
        return {what: age() for what, age in self._copying.items()}

    def reasons(self) -> list[str]:
        """Why the daemon is not well, each in a line; empty if it is. Logged once, when it begins and when it ends."""
        stuck = {what: seconds for what, seconds in self.ages().items() if seconds > self._stuck_seconds}
        for what in stuck.keys() - self._stuck:
            log.error("daemon.stuck", copies=what, seconds=stuck[what], limit_seconds=self._stuck_seconds)
        for what in self._stuck - stuck.keys():
            log.warning("daemon.goes_on", copies=what)
        self._stuck = frozenset(stuck)
        return [
            f"a copy {COPIES[what]} has been in flight for {seconds:.0f} s"
            f" (deadlines.stuck_seconds: {self._stuck_seconds:g})"
            for what, seconds in sorted(stuck.items())
        ]
