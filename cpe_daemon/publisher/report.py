"""What became of a published version, daemon by daemon and engine by engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cpe_daemon.core.types import VersionId
from cpe_daemon.wire.reports import EngineReport, VersionReport, engine_lines, size_text


@dataclass(frozen=True, slots=True)
class PublishReport:
    """A version that went live; ``nodes`` has each daemon's own report by its endpoint. ``str()`` is a table.

    ``held`` names those that held it already when it was published: their reports are of the push before.
    """

    version: VersionId
    nodes: Mapping[str, VersionReport]
    held: tuple[str, ...] = ()

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
        return {name: report for name, report in self.engines.items() if report.outcome not in ("updated", "current")}

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
            + (" (held there already: nothing was sent)" if endpoint in self.held else "")
            for endpoint, node in self.nodes.items()
        ]
        notes = [f"{endpoint}: {node.note}" for endpoint, node in self.nodes.items() if node.note]
        return "\n".join([*lines, *notes, *engine_lines(self.engines)])
