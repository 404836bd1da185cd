"""What messages report: an error, and how a version came to be live. Immutable; they travel inside messages.

How they read is said here too, once for trainers and operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from cpe_daemon.core.types import VersionId

_HEADINGS: Final = ("engine", "outcome", "size", "rate", "phases")


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: the stable code of `cpe_daemon.errors` and one line for a person."""

    code: str
    message: str


class LoadingReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a worker's tensors are loaded: so many straight to where the engine's own loader was seen to put them.

    ``unproven`` are to be, once it is certain; ``kept`` are the loader's, by reason, the most frequent ones. ``digest``
    tells workers apart that load in different ways.
    """

    learned: int = 0
    unproven: int = 0
    kept: dict[str, int] = {}
    digest: str = ""


class EngineReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a round did to one engine.

    ``phases`` are seconds by phase; ``gigabytes_per_second`` is over the push. ``verified``: all its workers found that
    what they were handed is what was staged.
    """

    outcome: str
    phases: dict[str, float] = {}
    nbytes: int = 0
    gigabytes_per_second: float = 0.0
    error: ErrorInfo | None = None
    verified: bool = False


class VersionReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a version came to be live on a node. Seconds are wall time at the daemon.

    ``note`` is a line for a person, where there is more to say.
    """

    version: VersionId
    nbytes: int
    tensors: int
    stage_seconds: float = 0.0
    push_seconds: float = 0.0
    engines: dict[str, EngineReport] = {}
    note: str = ""


def engine_lines(engines: Mapping[str, EngineReport]) -> list[str]:
    """What a push did to each engine as the lines of a table; none if there is no engine."""
    if not engines:
        return []
    rows = [_HEADINGS, *(_row(name, report) for name, report in engines.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size_text(nbytes: float) -> str:
    """Write bytes for a person, in powers of ten as rates are: "2.00 GB"."""
    size, units = nbytes, ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    if not size:
        return "-"
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def _row(name: str, report: EngineReport) -> tuple[str, ...]:
    phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in report.phases.items())
    if report.outcome == "current":
        phases = "holds it already"
    if report.error is not None:
        phases = f"{phases}; {report.error.code}: {report.error.message}".lstrip("; ")
    rate = f"{size_text(report.gigabytes_per_second * 1e9)}/s" if report.gigabytes_per_second else "-"
    return (name, report.outcome, size_text(report.nbytes), rate, phases)
