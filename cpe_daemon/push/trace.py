"""A record of what each stage did when, for one who looks at a push closely: Chrome trace events, which Perfetto opens.

Nothing is recorded unless ``cpe serve --trace FILE`` asks for it. The last slices are kept, and written when the daemon
ends.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from cpe_daemon.errors import ConfigError

KEPT: Final = 1 << 16
"""Slices that are kept, the last ones: some hundred pushes of a large model to a node of eight GPUs."""

_PROCESS: Final = 1
T = TypeVar("T")
_MICROSECONDS: Final = 1e6


@dataclass(frozen=True, slots=True)
class Slice:
    """One thing that went on, from ``begin`` to ``end``, in seconds of the trace's clock."""

    track: str
    name: str
    begin: float
    end: float
    details: dict[str, object]


class Trace:
    """The last slices, by track. Belongs to the event loop.

    What goes through one track is carried out one after another, in the order in which it was asked for: so are copies
    of one kind into one GPU, and the loads of one worker. A slice therefore begins when it was asked for or when the
    one before it ended, whichever is later.

    Args:
        clock: seconds, monotonic.
        kept: how many slices; older ones are forgotten.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, kept: int = KEPT) -> None:
        self.slices: deque[Slice] = deque(maxlen=kept)
        self._clock = clock
        self._ended: dict[str, float] = {}

    async def during(self, work: Awaitable[T], track: str, name: str, **details: object) -> T:
        """Await ``work``, and record it if it ends well."""
        asked = self._clock()
        done = await work
        self.add(track, name, asked, **details)
        return done

    def add(self, track: str, name: str, asked: float, **details: object) -> None:
        """Record what was asked for at ``asked`` and has ended now."""
        now = self._clock()
        begin = max(asked, self._ended.get(track, asked))
        self._ended[track] = now
        self.slices.append(Slice(track, name, begin, now, details))

    def events(self) -> dict[str, Any]:
        """All of it as the JSON object format of Chrome's trace events; times in microseconds."""
        tracks = {track: number for number, track in enumerate(sorted({kept.track for kept in self.slices}), start=1)}
        named = [_meta("process_name", 0, "cpe-daemon"), *(_meta("thread_name", tracks[t], t) for t in tracks)]
        return {
            "displayTimeUnit": "ms",
            "traceEvents": named
            + [
                {
                    "ph": "X",
                    "pid": _PROCESS,
                    "tid": tracks[kept.track],
                    "name": kept.name,
                    "ts": round(kept.begin * _MICROSECONDS, 3),
                    "dur": round((kept.end - kept.begin) * _MICROSECONDS, 3),
                    "args": kept.details,
                }
                for kept in self.slices
            ],
        }


@contextlib.contextmanager
def recording(path: Path | None) -> Iterator[Trace | None]:
    """A trace that is written to ``path`` when the context ends; None where there is no path. Not for the event loop.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        file = path.open("a")  # now, for a daemon that cannot write it at its end has recorded for nothing
    except OSError as error:
        raise ConfigError(f"cannot write the trace to {path}: {error.strerror or error}") from None
    with file:
        trace = Trace()
        try:
            yield trace
        finally:
            with contextlib.suppress(OSError):  # a pipe holds nothing
                file.truncate(0)  # what was there stays until there is something in its place
            json.dump(trace.events(), file)


def _meta(kind: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": track, "name": kind, "args": {"name": name}}
