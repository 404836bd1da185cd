"""The chunks of one contribution that links send straight from the trainer's tensors."""

from __future__ import annotations

import threading
import time
from collections import deque

import zmq

from cpe_daemon.publisher.in_place import SMALL_BYTES, InPlace


class Straight:
    """Which chunks those are, and the frames that were made of them. Thread-safe.

    The trainer's threads put chunks in, and take those back that they have copied instead; the links' threads ask for
    frames. After `close` nobody gets any more, and when `released` says so too, nothing refers to the tensors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[int, InPlace | None] = {}
        """By offset; None where it was not sent everywhere, and will not be."""
        self._trackers: deque[zmq.MessageTracker] = deque()

    def put(self, offset: int, chunk: InPlace) -> None:
        """A chunk may be sent from where it lies."""
        with self._lock:
            self._chunks[offset] = chunk

    def at(self, offset: int) -> InPlace | None:
        """The chunk at an offset; None if it was not put in, or was taken back. Any thread."""
        return self._chunks.get(offset)

    def take_back(self, offset: int) -> None:
        """A chunk lies in the staging as well: send it from there."""
        with self._lock:
            del self._chunks[offset]

    def frames(self, offset: int) -> list[zmq.Frame] | None:
        """Frames of the chunk at ``offset``, for one message; None if it lies in the staging; none after `close`."""
        with self._lock:
            if offset not in self._chunks:
                return None
            chunk = self._chunks[offset]
            if chunk is None:
                return []
            made = [zmq.Frame(part, copy=part.nbytes < SMALL_BYTES, track=True) for part in chunk.parts]
            while self._trackers and self._trackers[0].done:
                self._trackers.popleft()
            self._trackers += [frame.tracker for frame in made if not frame.tracker.done]
            return made

    def close(self) -> None:
        """Let no more frames be made."""
        with self._lock:
            self._chunks = dict.fromkeys(self._chunks)

    def released(self, timeout: float) -> bool:
        """After `close`: wait until every frame was sent or dropped.

        Returns False if for ``timeout`` seconds none was.
        """
        deadline = time.monotonic() + timeout
        while self._trackers:
            try:
                self._trackers[0].wait(max(0.0, deadline - time.monotonic()))
            except zmq.NotDone:
                return False
            self._trackers.popleft()
            deadline = time.monotonic() + timeout
        return True
