"""What became of a published version, daemon by daemon and engine by engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cpe_daemon.core.types import VersionId
from cpe_daemon.wire.reports import EngineReport, VersionReport

_HEADINGS = ("engine", "outcome", "size", "rate", "phases")


@dataclass(frozen=True, slots=True)
class PublishReport:
    """A version that went live; ``nodes`` has each daemon's own report by its endpoint. ``str()`` is a table."""

    version: VersionId
    nodes: Mapping[str, VersionReport]

    @property
    def engines(self) -> dict[str, EngineReport]:
        """Every engine's report by its name: outcome, phases in seconds, nbytes, gigabytes_per_second.

        An engine that several daemons serve together is there once for each, as ``name@endpoint``.
        """
        names = [name for node in self.nodes.values() for name in node.engines]
        return {
            name if names.count(name) == 1 else f"{name}@{endpoint}": report
            for endpoint, node in self.nodes.items()
            for name, report in node.engines.items()
        }

    @property
    def behind(self) -> dict[str, EngineReport]:
        """The engines that do not serve the version: those that failed, kept what they held, or lack a rank."""
        return {name: report for name, report in self.engines.items() if report.outcome != "updated"}

    @property
    def nbytes(self) -> int:
        """Bytes of the version."""
        return max((node.nbytes for node in self.nodes.values()), default=0)

    @property
    def stage_seconds(self) -> float:
        """From the first byte to whole and verified, at the slowest daemon."""
        return max((node.stage_seconds for node in self.nodes.values()), default=0.0)

    @property
    def push_seconds(self) -> float:
        """From staged to live, at the slowest daemon."""
        return max((node.push_seconds for node in self.nodes.values()), default=0.0)

    def __str__(self) -> str:
        lines = [
            f"{self.version} live at {endpoint}: {node.tensors} tensors, {size_text(node.nbytes)},"
            f" staged in {node.stage_seconds:.3f} s, pushed in {node.push_seconds:.3f} s"
            for endpoint, node in self.nodes.items()
        ]
        return "\n".join([*lines, *engine_lines(self.engines)])


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
    if report.error is not None:
        phases = f"{phases}; {report.error.code}: {report.error.message}".lstrip("; ")
    rate = f"{size_text(report.gigabytes_per_second * 1e9)}/s" if report.gigabytes_per_second else "-"
    return (name, report.outcome, size_text(report.nbytes), rate, phases)
