"""How a contribution leaves through sockets: from its tensors while the links keep up, else from a copy of them.

The trainer waits until its tensors may change: until the links have sent what they send from them, and the rest is
copied. What they have not sent of the copy then, they send while the trainer goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from cpe_daemon.errors import DeadlineError, PublishError
from cpe_daemon.publisher.delivery import Bell
from cpe_daemon.publisher.folding import Folding
from cpe_daemon.publisher.in_place import InPlace
from cpe_daemon.publisher.outgoing import BATCHES, Lane, NobodyLeftError, Progress
from cpe_daemon.publisher.patience import Patience
from cpe_daemon.publisher.sources import Contribution
from cpe_daemon.publisher.staging import Staging
from cpe_daemon.publisher.straight import Straight
from cpe_daemon.publisher.stream import Pouring, pour
from cpe_daemon.publisher.window import Window

log = logging.getLogger(__name__)


class _Sink:
    """Chunks into staging, or left where they lie; told to the links as soon as all before them are ready too."""

    in_order = True

    def __init__(self, staging: Staging, staged: memoryview, lanes: Sequence[Lane]) -> None:
        self._staging = staging
        self._staged = staged
        self._lanes = lanes
        self._bell = lanes[0].delivery.bell
        self._chunk_bytes = chunk_bytes_of(lanes)
        credits = min(lane.session.welcome.credits for lane in lanes)
        self._ahead_bytes = max(1, credits // 2) * self._chunk_bytes
        self._batch = max(1, credits // BATCHES)
        self._most_parts = _most_parts(lanes)
        self._straight = Straight()
        self._patience = Patience(len(staged), time.monotonic())  # guarded by the bell's lock
        self._chunks = 0
        self._upto = 0  # this, and what follows, are guarded by the lock
        self._ready: dict[int, int] = {}  # chunks behind a gap: where each begins and ends
        self._lock = threading.Lock()

    def most_parts(self) -> int:
        """As many as every daemon takes, as long as all links keep up; waits for them while they do.

        Raises:
            NobodyLeftError: every daemon has failed.
        """
        if not self._most_parts:
            return 0
        with self._bell.lock:
            while sent := self._sent():
                if (left := self._patience.left(min(sent), time.monotonic())) <= 0:
                    return 0
                if self._upto - min(sent) < self._ahead_bytes:
                    break
                self._bell.moved.wait(left)
        return self._most_parts

    def lies(self, offset: int, chunk: InPlace, seconds: float) -> None:
        """Have the links send the chunk from where it lies."""
        self._straight.put(offset, chunk)
        with self._bell.lock:
            self._patience.digested(len(chunk), seconds)
        self.filled(offset, len(chunk))

    def window(self, offset: int, nbytes: int) -> Window:
        """The chunk's place.

        Raises:
            NobodyLeftError: every daemon has failed.
        """
        with self._bell.lock:
            self._sent()
        return self._staging.window(offset, nbytes)

    def filled(self, offset: int, nbytes: int) -> None:
        """Have what is ready by now sent to every daemon."""
        with self._lock:
            self._ready[offset] = offset + nbytes
            while self._upto in self._ready:
                self._upto = self._ready.pop(self._upto)
                in_time = self._chunks % self._batch == 0  # the first one at once; the last is followed by the seal
                self._chunks += 1
                for lane in self._lanes:
                    # One that has more than a batch to send is woken by the daemon's acknowledgements.
                    starving = self._upto - lane.delivery.sent_bytes <= self._batch * self._chunk_bytes
                    lane.feed(self._staged, self._upto, self._straight, hurry=in_time and starving)

    def settle(self) -> None:
        """Return when every chunk was sent or copied: copy what the links are too slow for.

        Raises:
            NobodyLeftError: every daemon has failed.
        """
        while (offset := self._behind()) is not None:
            if (chunk := self._straight.at(offset)) is not None:
                chunk.copy_to(self._staging.window(offset, len(chunk)).address)
                self._straight.take_back(offset)
            for lane in self._lanes:
                lane.session.hurry()

    def close(self, timeout: float) -> None:
        """Have no link read the tensors any more, and wait for what was sent from them to be gone.

        Raises:
            DeadlineError: for ``timeout`` seconds none of it was sent or dropped.
        """
        self._straight.close()
        if not self._straight.released(timeout):
            raise DeadlineError(f"{self._lanes[0].delivery.version} was not sent from its tensors in {timeout:g} s")

    def _behind(self) -> int | None:
        """Wait while the links keep up; return the first chunk to copy when they do not, None when all are gone.

        Raises:
            NobodyLeftError: every daemon has failed.
        """
        with self._bell.lock:
            while True:
                sent = self._sent()
                offset = min(sent, default=self._upto)
                while offset < self._upto and self._straight.at(offset) is None:
                    offset += self._chunk_bytes
                if offset >= self._upto:
                    return None
                if (left := self._patience.left(min(sent), time.monotonic())) <= 0:
                    return offset
                self._bell.changed.wait(left)

    def _sent(self) -> list[int]:
        """How many bytes each daemon was sent that has not failed, and did not hold the version before.

        Call with the bell's lock held.

        Raises:
            NobodyLeftError: every one has failed.
        """
        left = [lane.delivery for lane in self._lanes if lane.delivery.error is None]
        if not left:
            raise NobodyLeftError
        return [delivery.sent_bytes for delivery in left if not delivery.held]


def chunk_bytes_of(lanes: Sequence[Lane]) -> int:
    """The size of chunks that suits every daemon."""
    return min(lane.session.welcome.chunk_bytes for lane in lanes)


def _most_parts(lanes: Sequence[Lane]) -> int:
    """How many frames of a chunk all daemons take; 0 if a ring is among them, or they have different grids."""
    if any(lane.session.landing for lane in lanes) or len({lane.session.welcome.chunk_bytes for lane in lanes}) > 1:
        return 0
    return min(lane.session.welcome.chunk_frames for lane in lanes)


def stage_and_send(
    contribution: Contribution,
    staging: Staging,
    staged: memoryview,
    lanes: Sequence[Lane],
    pouring: Pouring,
    timeout: float,
    folding: Folding | None = None,
) -> None:
    """Have a contribution sent, and seal it; ``staged`` is the room that ``staging`` reserved for a copy of it.

    ``folding`` folds it, if that was announced.

    Returns when its tensors may change, or every daemon has failed. What the source raises is raised, and the version
    is given up.

    Raises:
        DeadlineError: for ``timeout`` seconds nothing was sent that has to be before.
    """
    sink = _Sink(staging, staged, lanes)
    complete = False
    try:
        fold = folding() if folding is not None else None
        digests = pour(contribution, sink, chunk_bytes_of(lanes), pouring, sink)
        for lane in lanes:
            lane.seal(digests, fold)
        sink.settle()
        complete = True
    except NobodyLeftError:
        complete = True
    finally:
        if not complete:
            for lane in lanes:
                lane.abandon(PublishError(f"{lane.delivery.version} was interrupted while its tensors were read"))
        sink.close(timeout)


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
