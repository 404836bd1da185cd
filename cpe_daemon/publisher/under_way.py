"""One contribution on its way over one link. Belongs to the link's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cpe_daemon.publisher.delivery import Delivery
from cpe_daemon.publisher.straight import Straight

_FIRST_WINDOW: Final = 2
"""Chunks that are sent straight before the daemon has acknowledged any."""


@dataclass(slots=True, eq=False)
class Stream:
    """How far it is.

    ``staged`` holds its bytes if the link's thread is to send them by itself. The first ``staged_bytes`` of them are
    there, but for chunks that are sent ``straight`` from the tensors. While one of that kind is next, no more than
    ``window`` are on their way, which grows as they are acknowledged: the trainer has to wait for them.
    """

    number: int
    delivery: Delivery
    moved_at: float
    staged: memoryview | None = None
    staged_bytes: int = 0
    straight: Straight | None = None
    window: int = _FIRST_WINDOW
    opened: bool = False
    sent_bytes: int = 0
    unacked: int = 0
    digests: bytes | None = None
    fold: int | None = None
    sealed: bool = False

    @property
    def waiting(self) -> bool:
        """Whether the daemon owes an answer."""
        return not self.opened or self.unacked > 0 or (self.sealed and self.delivery.comparing)

    def sendable(self, chunk_bytes: int) -> int:
        """Bytes of the next chunk, if it may be sent now, or 0."""
        if self.staged is None:
            return 0
        nbytes = min(chunk_bytes, len(self.staged) - self.sent_bytes)
        if self.sent_bytes + nbytes > self.staged_bytes:
            return 0
        if self.unacked >= self.window and self.straight is not None and self.straight.at(self.sent_bytes) is not None:
            return 0
        return nbytes

    def acknowledged(self) -> None:
        """The daemon has one more of its chunks."""
        self.unacked -= 1
        self.window += 1
