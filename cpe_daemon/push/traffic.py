"""What all rounds together have moved, stage by stage."""

from __future__ import annotations

from collections.abc import Callable

from cpe_daemon.core.plan import Bucket, Transfers
from cpe_daemon.core.tally import Tally
from cpe_daemon.push.trace import Trace


class Traffic:
    """The tallies of a push's stages, over all GPUs and engines. Belongs to the event loop.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.fetch = Tally(clock)
        """From the arena into slots."""
        self.exchange = Tally(clock)
        """Between the slots of several GPUs."""
        self.load = Tally(clock)
        """Out of slots, by the engines; its bytes are counted as each engine has them."""
        self.trace: Trace | None = None
        """Records what goes on, if somebody asked for that."""

    def fetching(self, bucket: Bucket, transfers: Transfers) -> int:
        """Bytes of a bucket that come from the arena: what all its slots hold, but for what they have of each other."""
        if transfers is bucket.sliced:
            return sum(copy.nbytes for copies in transfers.pulls for copy in copies)
        return len(transfers.pulls) * bucket.nbytes - self.exchanging(transfers)

    def exchanging(self, transfers: Transfers) -> int:
        """Bytes of a bucket that GPUs give each other."""
        return sum(copy.nbytes for copies in transfers.exchanges for copy in copies)
