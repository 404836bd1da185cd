"""How every benchmark reports: tables for people, and as the very last line of standard output one JSON object.

The object's keys: ``bench``; ``device`` or ``transport``; ``bytes``; ``seconds`` and ``floor_seconds``, lists of what
was measured; ``ratio``, of their medians. Where there is no floor, ``bench`` and ``seconds`` and what was counted. More
keys may follow.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_COLUMNS: Final = 160
"""Width where there is no terminal to ask: wide enough to cut nothing."""
_DIGITS: Final = 6


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Sequence[str] = ()) -> None:
    """Print a table on standard output.

    Args:
        title: the line above it.
        columns: headings; the first column is left-aligned, the others are for figures.
        rows: cells, as `str` writes them.
        notes: lines below it, for what a reader has to know to believe the figures.
    """
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(Text(title, style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"))


def compared(
    bench: str, *, nbytes: int, seconds: Sequence[float], floor_seconds: Sequence[float], **more: object
) -> dict[str, object]:
    """Make the last line of a benchmark that has a floor.

    Args:
        bench: its name.
        nbytes: bytes that each run moved.
        seconds: of each run of ours.
        floor_seconds: of each run of the floor.
        more: such as ``device`` or ``transport``.
    """
    return {
        "bench": bench,
        **more,
        "bytes": nbytes,
        "seconds": rounded(seconds),
        "floor_seconds": rounded(floor_seconds),
        "ratio": round(ratio(seconds, floor_seconds), 4),
    }


def finish(result: Mapping[str, object]) -> None:
    """Print the last line."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def ratio(seconds: Sequence[float], floor_seconds: Sequence[float]) -> float:
    """How many times the floor's median the median is."""
    return statistics.median(seconds) / statistics.median(floor_seconds)


def rounded(seconds: Iterable[float]) -> list[float]:
    """Seconds to the microsecond, beyond which they are noise."""
    return [round(value, _DIGITS) for value in seconds]


def spread(seconds: Sequence[float]) -> str:
    """Write runs as a median with their extremes: "0.312 s (0.301 to 0.350)"."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def rate(nbytes: int, seconds: Sequence[float]) -> str:
    """Write the rate of the median run: "3.81 GB/s"."""
    return f"{nbytes / statistics.median(seconds) / 1e9:.2f} GB/s"


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False, emoji=False)
