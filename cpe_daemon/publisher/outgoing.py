"""How a contribution leaves straight into landing rings, while the trainer waits; `staged` has the other way."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cpe_daemon.core.fold import covers
from cpe_daemon.core.types import Shard
from cpe_daemon.devices.memory import copy
from cpe_daemon.errors import CpeError, DeadlineError, PublishError
from cpe_daemon.publisher.delivery import Bell, Delivery
from cpe_daemon.publisher.folding import Folding
from cpe_daemon.publisher.sending import Sending
from cpe_daemon.publisher.session import Session
from cpe_daemon.publisher.sources import Contribution
from cpe_daemon.publisher.straight import Straight
from cpe_daemon.publisher.stream import Pouring, digest, pour
from cpe_daemon.publisher.under_way import Stream
from cpe_daemon.publisher.window import Window

BATCHES: Final = 4
"""The links' threads are woken for every fourth of the credits: waking a thread, here and at the daemon, costs as much
CPU as copying some hundred KiB."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One daemon that a contribution goes to."""

    session: Session
    stream: Stream

    @property
    def sending(self) -> Sending:
        """The session's conversation about versions."""
        return self.session.sending

    @property
    def delivery(self) -> Delivery:
        """What is known of the version there."""
        return self.stream.delivery

    @classmethod
    def begin(
        cls, session: Session, delivery: Delivery, shards: list[Shard], force: bool, *, folded: bool = False
    ) -> Lane:
        """Announce a contribution to a daemon; ``folded``: the seal will bring its fold."""
        lane = cls(session, session.sending.begin(delivery))
        session.post(functools.partial(session.sending.open, lane.stream, shards, force, folded))
        return lane

    def feed(self, staged: memoryview, upto: int, straight: Straight | None = None, *, hurry: bool = True) -> None:
        """Have the first ``upto`` bytes of ``staged`` sent, but for the chunks that are to be sent ``straight``.

        Without ``hurry`` the link's thread does it when it wakes anyway.
        """
        self.session.post(functools.partial(self.sending.feed, self.stream, staged, upto, straight), hurry=hurry)

    def seal(self, digests: bytes, fold: int | None = None) -> None:
        """Seal it when all its bytes are sent; with its fold, if that was announced."""
        self.session.post(functools.partial(self.sending.seal, self.stream, digests, fold))

    def abandon(self, reason: CpeError) -> None:
        """Give it up."""
        self.delivery.fail(reason)
        self.session.post(functools.partial(self.sending.abandon, self.stream, reason))


class NobodyLeftError(Exception):
    """Every daemon has failed; what went wrong is in the deliveries."""


@dataclass(slots=True)
class _Places:
    """Where one chunk lies in the landing rings: written to the first, copied to the others."""

    at: list[tuple[Lane, int]] = field(default_factory=list)
    locked: bool = False

    def let_go(self) -> None:
        """No GPU writes there any more."""
        if self.locked:
            self.at[0][0].sending.let_go()


class RingSink:
    """Chunks into the landing rings of several daemons at once.

    Every thread waits for places in the same order of rings, so that none holds what another needs and waits for it.
    """

    in_order = False

    def __init__(self, lanes: Sequence[Lane], threads: int) -> None:
        self._lanes = lanes
        self._held: dict[int, _Places] = {}
        """By the chunk's offset."""
        self._batch = max(1, min(lane.session.welcome.credits for lane in lanes) // (BATCHES * threads))
        self._chunks = itertools.count(1)

    def window(self, offset: int, nbytes: int) -> Window:
        """Wait for a place in every ring whose daemon has not failed."""
        places = self._held[offset] = _Places()
        for lane in self._lanes:
            at = lane.sending.credit(lane.stream, lane.session.hurry)
            if at is not None:
                places.at.append((lane, at))
        if not places.at:
            raise NobodyLeftError
        lane, at = places.at[0]
        places.locked = lane.sending.hold()
        return lane.sending.window(at, nbytes)._replace(locked=places.locked)

    def filled(self, offset: int, nbytes: int) -> None:
        """Send the chunk to every daemon that has a place for it."""
        places = self._held[offset]
        (lane, first), *others = places.at
        for other, at in others:
            copy(other.sending.window(at, nbytes).address, lane.sending.window(first, nbytes).address, nbytes)
        del self._held[offset]
        places.let_go()
        hurry = next(self._chunks) % self._batch == 0
        for lane, at in places.at:
            chunk = functools.partial(lane.sending.chunk, lane.stream, offset, nbytes, at)
            lane.session.post(chunk, hurry=hurry)

    def refund(self) -> None:
        """Return the places that were not filled, when nobody writes to them any more."""
        for places in self._held.values():
            places.let_go()
            for lane, at in places.at:
                lane.sending.refund(lane.stream, at)
        self._held.clear()


def stream_into_rings(
    contribution: Contribution,
    lanes: Sequence[Lane],
    pouring: Pouring,
    timeout: float,
    bell: Bell,
    folding: Folding | None = None,
) -> None:
    """Write a contribution into the landing rings of all ``lanes``, which have the same chunk size; then seal it.

    Daemons that hold the version already are sent nothing but the seal. ``folding`` folds it, if that was announced.
    Returns when the last chunk is written, or every daemon has failed. What the source or ``progress`` raises is
    raised, and the version is given up.
    """
    complete = False
    try:
        fold = folding() if folding is not None else None
        _await_opened(lanes, timeout, bell)
        digests = _digests_of(contribution, lanes, pouring, folded=fold is not None)
        for lane in lanes:
            lane.seal(digests, fold)
        complete = True
    except NobodyLeftError:
        complete = True
    finally:
        if not complete:
            for lane in lanes:
                lane.abandon(PublishError(f"{lane.delivery.version} was interrupted while its tensors were read"))


def _digests_of(contribution: Contribution, lanes: Sequence[Lane], pouring: Pouring, *, folded: bool) -> bytes:
    """Send the bytes to whom they are new, and return their digests; none, if a fold is all that any daemon needs.

    Raises:
        NobodyLeftError: every daemon has failed.
    """
    new = [lane for lane in lanes if not lane.delivery.held and lane.delivery.error is None]
    held = [lane for lane in lanes if lane.delivery.comparing and lane.delivery.error is None]
    needless = folded and not held and all(lane.session.welcome.folds for lane in new) and covers(contribution.shards)
    if new:
        sink = RingSink(new, pouring.threads)
        try:
            return pour(contribution, sink, new[0].session.welcome.chunk_bytes, pouring, digested=not needless)
        except NobodyLeftError:
            if not held:
                raise
            pouring = replace(pouring, progress=lambda nbytes: None)  # it was told of these bytes
        finally:
            sink.refund()
    if not held:
        raise NobodyLeftError
    return digest(contribution, pouring)


def _await_opened(lanes: Sequence[Lane], timeout: float, bell: Bell) -> None:
    """Wait until every daemon has made room, or has failed."""
    deadline = time.monotonic() + timeout
    with bell.lock:
        while waiting := [lane for lane in lanes if not lane.delivery.opened and lane.delivery.error is None]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            bell.changed.wait(left)
    for lane in waiting:
        what = f"{lane.delivery.endpoint} made no room for {lane.delivery.version} in {timeout:g} s"
        lane.abandon(DeadlineError(what))
