"""How long a trainer waits for links that send from its tensors. Pure: the caller has the clock, and the lock."""

from __future__ import annotations

from typing import Final

_BEHIND_BYTES: Final = 64 << 20
"""What a link may fall behind before nobody waits for it any more: on a busy host threads do not run for a while."""
_LONGEST_SECONDS: Final = 0.25
_ENOUGH_BYTES: Final = 1 << 30
_SHARE: Final = 8
"""A link keeps up if it takes so many bytes a second, or a part of what a thread here digests: a copy is then faster by
not much, and a host where everything is slower has slower links too."""


class Patience:
    """Seconds that are left to wait: time takes them, and what the slowest link sends gives them back.

    They are never more than a link that just keeps up needs for ``_BEHIND_BYTES``, or for the contribution. Once they
    are used up the link is behind, until it has earned all of them again.

    Args:
        nbytes: of the contribution.
        now: seconds, monotonic.
    """

    def __init__(self, nbytes: int, now: float) -> None:
        self._nbytes = nbytes
        self._digested_bytes = 0
        self._digested_seconds = 0.0
        self._seen = now
        self._sent_bytes = 0
        self._behind = False
        self._left = self._most

    def digested(self, nbytes: int, seconds: float) -> None:
        """A thread took so long to digest so many bytes."""
        self._digested_bytes += nbytes
        self._digested_seconds += seconds

    def left(self, sent_bytes: int, now: float) -> float:
        """Seconds for which a link that has sent ``sent_bytes`` by ``now`` may be waited for; 0.0 if it is behind."""
        left = self._left - (now - self._seen) + max(0, sent_bytes - self._sent_bytes) / self._rate
        self._left = min(max(left, 0.0), self._most)
        self._seen, self._sent_bytes = now, sent_bytes
        if left <= 0.0:
            self._behind = True
        elif left >= self._most:
            self._behind = False
        return 0.0 if self._behind else self._left

    @property
    def _rate(self) -> float:
        """Bytes a second of a link that keeps up."""
        if not self._digested_seconds:
            return _ENOUGH_BYTES
        return min(_ENOUGH_BYTES, self._digested_bytes / self._digested_seconds / _SHARE)

    @property
    def _most(self) -> float:
        return min(_LONGEST_SECONDS, min(_BEHIND_BYTES, self._nbytes) / self._rate)
