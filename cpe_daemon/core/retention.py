"""Whether there is room to keep the version before the live one: what an operator is told if there is not."""

from __future__ import annotations

_GIB = 1 << 30


def shortage(model: str, nbytes: int, arena_bytes: int) -> str:
    """Say what follows if an arena cannot hold two versions of a model; "" if it can.

    Args:
        model: whose versions they are.
        nbytes: what one takes in the arena.
        arena_bytes: its size.
    """
    if 2 * nbytes <= arena_bytes:
        return ""
    return (
        f"the arena of {_size(arena_bytes)} cannot hold two versions of {model}, of {_size(nbytes)} each: N-1 cannot be"
        " kept, and while one is live the next has no room; a failed push can be restored, and a version rolled back,"
        f" only by publishing it anew. Set arena.size_bytes to {_size(2 * nbytes)} at least, or better"
        f" {_size(3 * nbytes)}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB // 10 else f"{nbytes} bytes"
