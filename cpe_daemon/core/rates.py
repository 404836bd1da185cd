"""How often peers may do something: a token bucket each. Pure: the clock is the caller's."""

from __future__ import annotations

from typing import Final

_MOST_PEERS: Final = 4096
_ROUNDING: Final = 1e-6
"""Of a token: sums of intervals are not exact."""


class Rates:
    """A token bucket for each peer, kept as one number: when its bucket will be full again.

    A peer whose bucket is full is the same as one that was never seen, so those are forgotten, and strangers who come
    and go cost no memory for long.

    Args:
        per_second: tokens that each bucket gains in a second.
        burst: tokens that a bucket holds; at least one.
        most_peers: buckets remembered; beyond these the oldest is forgotten, which refills it.
    """

    __slots__ = ("_full_at", "_interval", "_most", "_slack", "_swept_at")

    def __init__(self, per_second: float, burst: float, most_peers: int = _MOST_PEERS) -> None:
        self._interval = 1.0 / per_second
        self._slack = (max(burst, 1.0) - 1.0) * self._interval
        self._most = most_peers
        self._full_at: dict[bytes, float] = {}
        self._swept_at = float("-inf")

    def take(self, peer: bytes, now: float) -> bool:
        """Take a token of ``peer``'s at the time ``now``, in seconds; False if there is none."""
        full_at = self._full_at.get(peer)
        if full_at is None:
            self._make_room(now)
            full_at = now
        elif full_at - now > self._slack + self._interval * _ROUNDING:
            return False
        self._full_at[peer] = max(now, full_at) + self._interval
        return True

    def __len__(self) -> int:
        return len(self._full_at)

    def _make_room(self, now: float) -> None:
        """Forget full buckets, looked for once a second at most, or else the oldest."""
        if len(self._full_at) < self._most:
            return
        if now - self._swept_at >= 1.0:
            self._swept_at = now
            self._full_at = {peer: full_at for peer, full_at in self._full_at.items() if full_at > now}
        if len(self._full_at) >= self._most:
            del self._full_at[next(iter(self._full_at))]
