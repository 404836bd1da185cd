"""What a trainer holds of a version that it published: wait for it, or look at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, DeadlineError, PublishError, from_code
from cpe_daemon.publisher.delivery import Bell, Delivery
from cpe_daemon.publisher.report import PublishReport

_ORDER: Final = ("failed", "opening", "comparing", "receiving", "staged", "pushing", "live")
_LONGEST_WAIT_SECONDS: Final = 3600.0  # of one wait: an infinite timeout is a float, but not one that waits take


class EndpointsFailedError(PublishError):
    """A version failed at one or more of several daemons; ``failures`` has the error of each, by endpoint."""

    def __init__(self, message: str, failures: Mapping[str, CpeError]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


def raise_failures(version: VersionId | str, failures: Mapping[str, CpeError], endpoints: int) -> None:
    """Raise what went wrong, if anything did.

    Raises:
        CpeError: of the error's own type, where there is one daemon only.
        EndpointsFailedError: naming every daemon that failed and why, where there are several.
    """
    if not failures:
        return
    if endpoints == 1:
        (error,) = failures.values()
        raise from_code(error.code, error.message)  # a new one: it may be raised often, and by several threads
    reasons = "; ".join(f"{endpoint}: {error.message}" for endpoint, error in failures.items())
    raise EndpointsFailedError(f"{version} failed at {len(failures)} of {endpoints} daemons: {reasons}", failures)


class Handle:
    """One published version at every daemon that it goes to. Thread-safe."""

    def __init__(self, version: VersionId, deliveries: Sequence[Delivery], bell: Bell) -> None:
        self.version = version
        self._deliveries = deliveries
        self._bell = bell

    @property
    def state(self) -> str:
        """The state at the daemon that is behind all others: "opening", "receiving", "staged", "pushing", "live".

        "failed" if it failed at any. "comparing" while a daemon that held the version before finds out whether this is
        the same; "retained" or "evicted" if it is, and another version has taken its place.
        """
        with self._bell.lock:
            states = ["live" if d.live else d.state for d in self._deliveries]
        return min(states, key=lambda state: _ORDER.index(state) if state in _ORDER else len(_ORDER))

    @property
    def held(self) -> list[str]:
        """The endpoints of the daemons that held this very version before it was published here: no bytes were sent."""
        with self._bell.lock:
            return [d.endpoint for d in self._deliveries if d.held and d.delivered]

    def staged(self, timeout: float = 600.0) -> None:
        """Wait until every daemon holds the whole version, verified; up to ``timeout`` seconds.

        With several daemons it waits for all of them, even if one fails before. A daemon that held it before has found
        the digests of all tensors equal by then.

        Raises:
            CpeError: what made it fail, rebuilt from the daemon's code: `DigestError` names the tensor.
            PublishError: it failed at some of several daemons; names them.
            DeadlineError: the time is over; names daemon, version and state.
        """
        self._wait(lambda delivery: delivery.staged, "staged", timeout)

    def live(self, timeout: float = 600.0) -> PublishReport:
        """Wait until the engines of every daemon serve the version; up to ``timeout`` seconds.

        Where a daemon held the version before, and it is live, this returns at once with the report of the push that
        made it so. If it was live before and another has taken its place (it is retained), no engine serves it and
        publishing it again has not changed that: this raises, and does not wait for a rollback.

        Raises:
            CpeError: what made it fail, as for `staged`.
            PublishError: it failed at some of several daemons; names them. Or it was live before, and is not any more.
            DeadlineError: the time is over; names daemon, version and state.
        """
        self._wait(lambda delivery: delivery.live, "live", timeout)
        held = self.held
        with self._bell.lock:
            reports = {d.endpoint: d.report for d in self._deliveries if d.report is not None}
        return PublishReport(self.version, reports, tuple(held))

    def _wait(self, reached: Callable[[Delivery], bool], goal: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._bell.lock:
            while pending := [d for d in self._deliveries if not reached(d) and d.error is None]:
                left = deadline - time.monotonic()
                if left <= 0:
                    where = ", ".join(f"{d.state} at {d.endpoint}{_all_here(d)}" for d in pending)
                    raise DeadlineError(f"{self.version} is not {goal} after {timeout:g} s: {where}")
                self._bell.changed.wait(min(left, _LONGEST_WAIT_SECONDS))
            failures = {d.endpoint: d.error for d in self._deliveries if d.error is not None and not reached(d)}
        raise_failures(self.version, failures, len(self._deliveries))


def _all_here(delivery: Delivery) -> str:
    """Whose fault it is not, where a daemon waits for other ranks."""
    if delivery.state != "receiving" or not delivery.delivered:
        return ""
    return ", which has all of this rank's part (`wait_live` and `cpe wait` name the ranks that it waits for)"
