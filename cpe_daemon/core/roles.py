"""What a key may be allowed to do."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What the holder of a key is to the daemon. A key may have several."""

    TRAINER = "trainer"
    """Publishes versions: replaces the weights that engines serve."""

    OPERATOR = "operator"
    """Sees the state of everything, and decides about pushes and engines."""

    PEER = "peer"
    """The daemon of another node."""
