"""One version on its way to one daemon: what is known of it, for those who wait for it.

Every field is guarded by the lock of `Bell`, which rings when one changes. Nothing here does I/O.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, PublishError, from_code
from cpe_daemon.wire.messages import VersionStatus
from cpe_daemon.wire.reports import VersionReport

STAGED_OR_LATER = frozenset({"staged", "pushing", "live", "retained", "evicted"})
REPLACED = frozenset({"retained", "evicted"})
LIVE_OR_LATER = frozenset({"live", "retained", "evicted"})
"""By the daemon's transition table only a version that went live is ever retained. One that is evicted was live too,
unless the daemon says an error: then a newer one took its place while it waited to be pushed."""


class Bell:
    """One lock for all that a publisher's threads share, with two conditions on it.

    ``changed``: a link, or a version's state, is another one. ``moved``: a chunk went on its way or arrived; those who
    wait for a version are not woken thousands of times for it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.moved = threading.Condition(self.lock)

    def ring(self) -> None:
        """Something changed; wakes everybody. Call with the lock held."""
        self.changed.notify_all()
        self.moved.notify_all()


@dataclass(slots=True, eq=False)
class Delivery:
    """What is known of one version at one daemon.

    ``state`` is the daemon's word for it; before the first status "opening", then "receiving", or "comparing" where the
    version is ``held`` already. ``delivered``: the daemon has every byte and the digests. ``error`` is set once, and
    ends the delivery.
    """

    endpoint: str
    version: VersionId
    nbytes: int
    tensors: int
    bell: Bell
    state: str = "opening"
    opened: bool = False
    held: bool = False
    """Whether the daemon held the version before, and no bytes are sent."""
    sent_bytes: int = 0
    delivered: bool = False
    staged: bool = False
    live: bool = False
    error: CpeError | None = None
    report: VersionReport | None = field(default=None)

    @property
    def settled(self) -> bool:
        """Whether no more bytes will be sent."""
        return self.delivered or self.error is not None

    @property
    def over(self) -> bool:
        """Whether nothing more is to be learnt."""
        return self.live or self.error is not None

    @property
    def comparing(self) -> bool:
        """Whether the daemon has yet to say that this is the version that it held before."""
        return self.held and not self.delivered

    def mark_opened(self, *, held: bool = False) -> None:
        """The daemon has room, and waits for the bytes; if it ``held`` the version before, for the digests alone."""
        with self.bell.lock:
            self.opened, self.held = True, held
            if self.state == "opening":
                self.state = "comparing" if held else "receiving"
            self.bell.ring()

    def mark_sent(self, nbytes: int) -> None:
        """So many bytes more went on their way."""
        with self.bell.lock:
            self.sent_bytes += nbytes
            self.bell.moved.notify_all()
            if self.sent_bytes >= self.nbytes:
                self.bell.changed.notify_all()

    def mark_delivered(self) -> None:
        """Every byte is acknowledged, and the seal is sent."""
        with self.bell.lock:
            self.delivered = True
            self.bell.ring()

    def fail(self, error: CpeError) -> None:
        """End it, unless it is over."""
        with self.bell.lock:
            if not self.over:
                self.error = error
                self.state = "failed"
                self.bell.ring()

    def confirm(self, status: VersionStatus) -> None:
        """The version is the one that the daemon held before: believe what it says of it, from now on.

        One that a newer version has replaced was live once, and is not served now: that is an error to whoever waits
        until it is live.
        """
        with self.bell.lock:
            self.staged = self.delivered = True
            if self.error is None and status.error is None and status.state in REPLACED:
                self.state = status.state
                self.error = PublishError(
                    f"{self.version} is {status.state} at {self.endpoint}: it was live there before, and another"
                    " version took its place; `cpe rollback` lets engines serve a retained version again"
                )
            self.bell.ring()
        self.take(status)

    def take(self, status: VersionStatus) -> None:
        """Believe the daemon; a later state implies the earlier ones, should their news be lost."""
        with self.bell.lock:
            if self.error is not None:
                return
            self.state = status.state
            if status.state in STAGED_OR_LATER:
                self.staged = self.delivered = True
            if status.state == "failed" or (status.error is not None and not self.live):
                self.error = self._error_of(status)
                self.state = "failed"
            elif status.state in LIVE_OR_LATER:
                self.live = True
                self.report = status.report or self.report or VersionReport(self.version, self.nbytes, self.tensors)
            self.bell.ring()

    def _error_of(self, status: VersionStatus) -> CpeError:
        if status.error is None:
            return PublishError(f"{self.version} failed at {self.endpoint}; the daemon gave no reason")
        return self.reported(status.error.code, status.error.message)

    def reported(self, code: str, message: str) -> CpeError:
        """Rebuild an error of the daemon's, naming daemon and version."""
        return from_code(code, f"{message} ({self.version} at {self.endpoint})")
