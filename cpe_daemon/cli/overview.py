"""A daemon's state on one screen, the most urgent first: for whoever watches a node at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cpe_daemon.cli.tables import (
    TRAINER_COLUMNS,
    VERSION_COLUMNS,
    bootstrap_text,
    engine_columns,
    entries,
    journal_text,
    push_text,
    rollback_text,
    section,
    table,
    version_text,
)
from cpe_daemon.cli.text import bytes_text, plain_text, seconds_text

_BAR_COLUMNS: Final = 24
_FAILURES: Final = 8
_GONE: Final = ("evicted", "failed")


def overview(status: Mapping[str, Any], *, now: datetime, fold: bool) -> RenderableType:
    """Make one screen of a status. ``fold``: what is too long goes on in the next line, rather than being cut."""
    return Group(*_parts(status, now, fold=fold))


def _parts(status: Mapping[str, Any], now: datetime, *, fold: bool) -> Iterator[RenderableType]:
    daemon = section(status, "daemon")
    yield Text(
        f"{now:%H:%M:%S}  {plain_text(daemon.get('node'))}: cpe-daemon {plain_text(daemon.get('version'))},"
        f" pid {plain_text(daemon.get('pid'))}, up {seconds_text(daemon.get('uptime_seconds'))}",
        style="bold",
        no_wrap=not fold,
        overflow="ellipsis",
    )
    yield _gauges(status)
    if said := [text for text in (journal_text(status), bootstrap_text(status)) if text]:
        yield Text("\n".join(said), style="yellow")
    failures = list(_failures(status))[:_FAILURES]
    if failures:
        yield table("Failures", failures, {"of": "of", "what": "what"}, fold=True)
    engines = entries(status, "engines")
    columns = {name: of for name, of in engine_columns(status).items() if name != "error"}
    yield table(f"Engines{_by_state(engines)}", engines, columns, fold=fold)
    trainers = entries(status, "trainers")
    if trainers:
        yield table("Trainers", trainers, TRAINER_COLUMNS, fold=fold)
    versions = [version for version in entries(status, "versions") if version.get("state") not in _GONE]
    yield table("Versions", versions, {n: of for n, of in VERSION_COLUMNS.items() if n != "error"}, fold=fold)


def _gauges(status: Mapping[str, Any]) -> RenderableType:
    """The push, the readiness and the arena, each in a line."""
    grid = Table.grid(padding=(0, 2))
    current = section(section(status, "push"), "round")
    grid.add_row(
        Text("push", style="bold"), _bar(current.get("loaded_bytes"), current.get("nbytes")), push_text(status)
    )
    if rollbacks := rollback_text(status):
        grid.add_row(Text("rollback", style="bold"), "", rollbacks)
    arena = section(status, "arena")
    size, free = arena.get("size_bytes"), arena.get("free_bytes")
    used = size - free if isinstance(size, int) and isinstance(free, int) else None
    grid.add_row(
        Text("arena", style="bold"),
        _bar(used, size),
        f"{bytes_text(used)} of {bytes_text(size)} used, {bytes_text(arena.get('largest_free_bytes'))} free in one run",
    )
    readiness = section(status, "readiness")
    if readiness:
        said = [*entries(readiness, "reasons"), *entries(readiness, "warnings")]
        why = "; ".join(plain_text(reason.get("message")) for reason in said)
        ready = bool(readiness.get("ready"))
        grid.add_row(
            Text("ready", style="bold"), Text("yes" if ready else "no", style="green" if ready else "yellow"), Text(why)
        )
    return grid


def _bar(done: object, total: object) -> RenderableType:
    if not isinstance(done, int) or not isinstance(total, int) or total <= 0:
        return ""
    return ProgressBar(total=total, completed=done, width=_BAR_COLUMNS, complete_style="cyan", finished_style="cyan")


def _by_state(engines: list[Mapping[str, Any]]) -> str:
    """How many engines are in each state."""
    counts: dict[str, int] = {}
    for engine in engines:
        state = plain_text(engine.get("state"))
        counts[state] = counts.get(state, 0) + 1
    return f": {', '.join(f'{count} {state}' for state, count in sorted(counts.items()))}" if counts else ""


def _failures(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What is wrong with engines now, and what went wrong with versions, the last first."""
    for engine in entries(status, "engines"):
        if engine.get("error"):
            yield {"of": f"engine {engine.get('engine')}", "what": engine["error"]}
    for version in reversed(entries(status, "versions")):
        if version.get("error"):
            yield {"of": version_text(version), "what": version["error"]}
