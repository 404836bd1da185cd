"""How much memory this host can still give: asked before it is taken, for the kernel promises more than it has.

Without asking, a daemon whose arena is larger than the host would be killed in the middle of its start, or have another
process killed in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cpe_daemon.errors import ResourceError

_GROUPS: Final = Path("/sys/fs/cgroup")


def require_bytes(nbytes: int, what: str) -> None:
    """Refuse to take memory that is not there.

    Args:
        nbytes: what is about to be taken.
        what: it is for, with the setting that says how much.

    Raises:
        ResourceError: names what is needed and what there is.
    """
    free = available_bytes()
    if nbytes > free:
        raise ResourceError(
            f"{what} needs {nbytes / 2**30:.2f} GiB of memory, and this host can give {free / 2**30:.2f} GiB"
        )


def available_bytes() -> int:
    """Memory that this process and its children can still take: of the host, and of the control groups it is in."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Of each control group (version 2) around this process: its limit, less what it cannot give back."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = _GROUPS / line[3:].strip("/")
                for directory in (group, *group.parents):
                    yield from _left_in(directory)


def _left_in(group: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text())  # "max" is no number: no limit
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(0, limit - int((group / "memory.current").read_text()) + int(stat["inactive_file"]))
