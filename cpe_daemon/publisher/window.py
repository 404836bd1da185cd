"""Memory that one chunk is written to."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """Memory for one chunk. Whoever holds ``view`` keeps ``address`` valid.

    ``locked``: GPUs copy to it directly, as long as whoever gave the window out says so.
    """

    address: int
    view: memoryview
    locked: bool = False
