"""Blocking work, all of it at once, and an end to waiting: what the kernel holds up is left behind in its thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def at_once(works: Sequence[Callable[[], T]], seconds: float) -> Iterator[tuple[int, T]]:
    """Yield (number, result) of each work as it ends, for at most ``seconds`` from now.

    Threads are used whose end the process does not wait for at its own.

    Args:
        works: must not raise; a thread in which one does says so on standard error, and yields nothing.
        seconds: works that take longer are not yielded.
    """
    done: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    deadline = time.monotonic() + seconds

    def carry_out(number: int, work: Callable[[], T]) -> None:
        done.put((number, work()))

    for number, work in enumerate(works):
        threading.Thread(target=carry_out, args=(number, work), name=f"cpe-doctor-{number}", daemon=True).start()
    for _ in works:
        try:
            yield done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return
