"""How busy the machine was with other things while a benchmark ran: what its figures are worth."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_BUSY: Final = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, irq, softirq, and what the hypervisor gave to others."""

_MANY: Final = 0.05


class Bystanders:
    """Counts the processor time of everything but this process and its children, from when it is made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._others = _busy_seconds() - _own_seconds()

    def share(self) -> float:
        """The share of all processors that others have had; meant for when the children have ended."""
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, _busy_seconds() - _own_seconds() - self._others) / seconds


def remark(share: float) -> str:
    """Say it in a line."""
    so = "; repeat this on a machine that is idle" if share > _MANY else ""
    return f"other processes had {share:.0%} of the processors meanwhile{so}"


def _busy_seconds() -> float:
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(int(first[column]) for column in _BUSY) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
