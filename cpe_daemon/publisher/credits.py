"""How many chunks a link may have in flight, and where in the landing ring they lie. Pure: locking is the caller's."""

from __future__ import annotations

from collections import deque


class Credits:
    """``count`` credits. Credit ``i`` is the place at ``i * chunk_bytes`` of the landing ring, where there is one.

    Each is held by a stream from `take` to `give_back`; a place is never handed out twice meanwhile, so that no bytes
    are overwritten before the daemon has said that it copied them.
    """

    def __init__(self, count: int, chunk_bytes: int, *, ring: bool) -> None:
        self.chunk_bytes = chunk_bytes
        self._ring = ring
        self._free = deque(range(count))
        self._held: dict[int, int] = {}  # credit -> stream, oldest first

    def take(self, stream: int) -> int | None:
        """Return a credit's offset in the ring (-1 where there is no ring), or None if all are held."""
        if not self._free:
            return None
        credit = self._free.popleft()
        self._held[credit] = stream
        return credit * self.chunk_bytes if self._ring else -1

    def give_back(self, stream: int, ring_offset: int) -> bool:
        """A chunk is done; False if the daemon speaks of a chunk that is not in flight."""
        if ring_offset < 0:
            credit = next((credit for credit, holder in self._held.items() if holder == stream), -1)
        else:
            credit = ring_offset // self.chunk_bytes
        if self._held.get(credit) != stream or (ring_offset >= 0) != self._ring:
            return False
        del self._held[credit]
        self._free.append(credit)
        return True

    def held(self, stream: int) -> int:
        """How many a stream holds."""
        return sum(1 for holder in self._held.values() if holder == stream)
