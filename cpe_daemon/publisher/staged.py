"""How a contribution leaves through host memory: it is copied there, and the links send it while the rest is copied.

The trainer waits for the copying only. What the links have not sent then, they send while it goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from cpe_daemon.errors import PublishError
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.publisher.outgoing import BATCHES, Lane, NobodyLeftError, Progress
from cpe_daemon.publisher.sources import Contribution
from cpe_daemon.publisher.staging import Staging
from cpe_daemon.publisher.stream import Pouring, pour
from cpe_daemon.publisher.window import Window

log = logging.getLogger(__name__)


class _Sink:
    """Chunks into staging, told to the links as soon as all before them are whole too."""

    in_order = True

    def __init__(self, staging: Staging, staged: memoryview, lanes: Sequence[Lane]) -> None:
        self._staging = staging
        self._staged = staged
        self._lanes = lanes
        self._batch = max(1, min(lane.session.welcome.credits for lane in lanes) // BATCHES)
        self._chunks = 0
        self._upto = 0  # this, and what follows, are guarded by the lock
        self._whole: dict[int, int] = {}  # chunks behind a gap: where each begins and ends
        self._lock = threading.Lock()

    def window(self, offset: int, nbytes: int) -> Window:
        """The chunk's place."""
        if all(lane.delivery.error is not None for lane in self._lanes):
            raise NobodyLeftError
        return self._staging.window(offset, nbytes)

    def filled(self, offset: int, nbytes: int) -> None:
        """Have what is whole by now sent to every daemon."""
        with self._lock:
            self._whole[offset] = offset + nbytes
            while self._upto in self._whole:
                self._upto = self._whole.pop(self._upto)
                hurry = self._chunks % self._batch == 0  # the first one at once; the last is followed by the seal
                self._chunks += 1
                for lane in self._lanes:
                    lane.feed(self._staged, self._upto, hurry=hurry)


def stage_and_send(
    contribution: Contribution, staging: Staging, staged: memoryview, lanes: Sequence[Lane], pouring: Pouring
) -> None:
    """Copy a contribution to ``staged``, the room that ``staging`` reserved, have it sent meanwhile, and seal it.

    Returns when the last byte is copied, or every daemon has failed. What the source raises is raised, and the version
    is given up.
    """
    chunk_bytes = min(lane.session.welcome.chunk_bytes for lane in lanes)
    complete = False
    try:
        digests = pour(contribution, _Sink(staging, staged, lanes), chunk_bytes, pouring)
        for lane in lanes:
            lane.seal(digests)
        complete = True
    except NobodyLeftError:
        complete = True
    finally:
        if not complete:
            for lane in lanes:
                lane.abandon(PublishError(f"{lane.delivery.version} was interrupted while its tensors were read"))


class Reporter:
    """A thread that tells of a staged contribution's progress, while the links send it.

    Args:
        total_bytes: of the contribution.
        lanes: the daemons that it goes to.
        progress: called by the thread whenever every daemon that is left has got more.
        bell: rings when a chunk goes out.
    """

    def __init__(self, total_bytes: int, lanes: Sequence[Lane], progress: Progress, bell: Bell) -> None:
        self._total_bytes = total_bytes
        self._lanes = lanes
        self._progress = progress
        self._bell = bell
        self._thread = threading.Thread(target=self._run, name="cpe-publish", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for its end up to ``timeout`` seconds; False if it did not come."""
        self._thread.join(max(timeout, 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._report()
        except Exception as error:  # task boundary: progress is the trainer's and may raise; nobody else would hear
            log.exception("giving a publish up")
            for lane in self._lanes:
                lane.abandon(PublishError(f"{lane.delivery.version} was given up: {error!r}"))

    def _report(self) -> None:
        """Tell of every step until all is sent, or no daemon is left: their deadlines end that at the latest."""
        told = 0
        while told < self._total_bytes:
            with self._bell.lock:
                while (done := self._done()) is not None and done <= told:
                    self._bell.moved.wait(1.0)
            if done is None:
                return
            self._progress(done, self._total_bytes)
            told = done

    def _done(self) -> int | None:
        """Bytes that every daemon that has not failed has been sent, or held before; None if all have failed."""
        left = [lane.delivery for lane in self._lanes if lane.delivery.error is None or lane.delivery.staged]
        return min((self._total_bytes if one.held else one.sent_bytes for one in left), default=None)
