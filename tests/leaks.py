"""What this process holds: file descriptors, Python threads and shared memory, before and after a test."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_OF_MULTIPROCESSING = ("psm_", "sem.mp-", "sem.loky-")
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Holdings:
    """A snapshot; comparing two tells what was taken and not given back."""

    descriptors: frozenset[tuple[int, str]]
    """(number, what it points to): a number that was closed and taken again counts as another."""
    threads: frozenset[threading.Thread]
    shared_memory: frozenset[str]

    @classmethod
    def take(cls) -> Holdings:
        """Collect garbage, so that only what is still reachable counts, and look."""
        gc.collect()
        return cls(
            descriptors=frozenset(_descriptors()),
            threads=frozenset(threading.enumerate()),
            shared_memory=frozenset(_shared_memory()),
        )

    def added_by(self, after: Holdings) -> list[str]:
        """Name what `after` holds and this snapshot does not."""
        descriptors = sorted(after.descriptors - self.descriptors)
        threads = sorted(thread.name for thread in after.threads - self.threads)
        shared_memory = sorted(after.shared_memory - self.shared_memory)
        return [
            *(f"fd {number} -> {target}" for number, target in descriptors),
            *(f"thread {name}" for name in threads),
            *(f"/dev/shm/{name}" for name in shared_memory),
        ]

    def leaks(self, wait_seconds: float) -> list[str]:
        """Name what was not given back within `wait_seconds`; returns at once when all was.

        Threads that were told to stop may take a moment, and other processes use /dev/shm too.
        """
        deadline = time.monotonic() + wait_seconds
        while leaked := self.added_by(Holdings.take()):
            if time.monotonic() > deadline:
                return leaked
            time.sleep(_POLL_SECONDS)
        return []


def _shared_memory() -> list[str]:
    """What has a name there, but for what multiprocessing makes: nothing here uses that, and engines do."""
    names = os.listdir(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else []
    return [name for name in names if not name.startswith(_OF_MULTIPROCESSING)]


def _descriptors() -> list[tuple[int, str]]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listdir itself had open
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found
