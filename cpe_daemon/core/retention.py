"""Whether there is room to keep the version before the live one: what an operator is told if there is not."""

from __future__ import annotations

_GIB = 1 << 30


def shortage(model: str, nbytes: int, arena_bytes: int, quota_bytes: int = 0) -> str:
    """Say what follows if an arena, or a quota, cannot hold two versions of a model; "" if it can.

    Args:
        model: whose versions they are.
        nbytes: what one takes in the arena.
        arena_bytes: its size.
        quota_bytes: what the model may have of it; 0: all.
    """
    quota = 0 < quota_bytes < arena_bytes
    room_bytes = quota_bytes if quota else arena_bytes
    if 2 * nbytes <= room_bytes:
        return ""
    what, setting = ("quota", f"models.{model}.quota_bytes") if quota else ("arena", "arena.size_bytes")
    return (
        f"the {what} of {_size(room_bytes)} cannot hold two versions of {model}, of {_size(nbytes)} each: N-1 cannot be"
        " kept, and while one is live the next has no room; a failed push can be restored, and a version rolled back,"
        f" only by publishing it anew. Set {setting} to {_size(2 * nbytes)} at least, or better"
        f" {_size(3 * nbytes)}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB // 10 else f"{nbytes} bytes"
