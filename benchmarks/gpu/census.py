"""What a process has of its host, and all processes of the GPUs: counted from outside, to tell whether it grows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from cpe_daemon.devices.cuda.driver import driver

_PROC: Final = Path("/proc")
_STATUS: Final = {"Threads": "threads", "VmPin": "pinned KiB", "VmLck": "locked KiB"}
_LOOK_SECONDS: Final = 0.25
_MIB: Final = 1 << 20
_GPU_SLACK_MIB: Final = 64
"""Drivers and torch take a GPU's memory in pieces of 2 to 20 MiB."""


class Counter:
    """Counts what one process has, and what all have of some GPUs.

    Args:
        pid: of the process.
        gpus: UUIDs; names of another kind have nothing to count.
    """

    def __init__(self, pid: int, gpus: Sequence[str] = ()) -> None:
        self._directory = _PROC / str(pid)
        self._gpus: dict[int, int] = {}
        """Contexts by the driver's number."""
        if any(gpu.startswith("GPU-") for gpu in gpus):
            for device in driver().devices():
                if driver().uuid(device) in gpus:
                    self._gpus[device] = driver().retain(device)

    def count(self) -> dict[str, int]:
        """Count now."""
        counts = {"descriptors": len(list((self._directory / "fd").iterdir()))}
        for line in (self._directory / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in _STATUS:
                counts[_STATUS[name]] = int(value.split()[0])
        counts["shared KiB"] = sum(self._shared()) // 1024
        for device, context in self._gpus.items():
            driver().use(context)
            counts[f"GPU {device} MiB"] = (driver().total_bytes(device) - driver().free_bytes()) // _MIB
        return counts

    def _shared(self) -> Iterator[int]:
        """Bytes of each mapping of shared memory: all that is pinned is in one, and the kernel may not count that."""
        for line in (self._directory / "maps").read_text().splitlines():
            if "/memfd:" in line:
                begin, end = line.split()[0].split("-")
                yield int(end, 16) - int(begin, 16)

    def settled(self, before: Mapping[str, int], seconds: float) -> dict[str, int]:
        """Count until nothing is more than before, or ``seconds`` are over: what has ended is taken down bit by bit."""
        deadline = time.monotonic() + seconds
        while grown(before, now := self.count()) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return now


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Names of what there is more of than before."""
    return [
        name
        for name, count in after.items()
        if count > before[name] + (_GPU_SLACK_MIB if name.startswith("GPU") else 0)
    ]
