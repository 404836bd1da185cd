"""A daemon's state as tables. It comes over the wire: nothing in it is trusted to be there, or to be text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

_PIPE_COLUMNS: Final = 200
"""Width where there is no terminal to ask: wide enough to cut nothing that `grep` might look for."""

_COLOURS: Final[Mapping[str, str]] = {
    "live": "green",
    "current": "green",
    "yes": "green",
    "pushing": "cyan",
    "updating": "cyan",
    "receiving": "cyan",
    "failed": "red",
    "quarantined": "red",
    "unknown": "yellow",
    "no": "yellow",
}

Cell = Callable[[Mapping[str, Any]], object]


def show_status(status: Mapping[str, Any]) -> None:
    """Print a daemon's state on standard output."""
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False, emoji=False
    )
    console.print(Group(*_parts(status)))


def bytes_text(value: object) -> str:
    """Write a size for a person, rounded: "1.50 GiB"."""
    if not isinstance(value, int | float):
        return _plain(value)
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def seconds_text(value: object) -> str:
    """Write a duration for a person, rounded: "152 ms", "3.2 s", "5 m 10 s", "2 d 3 h"."""
    if not isinstance(value, int | float):
        return _plain(value)
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    whole = int(value)
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return _plain(value)


def _parts(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield _summary(status)
    yield _table("Versions", _entries(status, "versions"), _VERSION_COLUMNS)
    yield _table("Engines", _entries(status, "engines"), _ENGINE_COLUMNS)
    yield _table("Trainers", _entries(status, "trainers"), _TRAINER_COLUMNS)
    counters = status.get("counters")
    moved = [
        {"name": name, "value": value}
        for name, value in (counters.items() if isinstance(counters, Mapping) else ())
        if isinstance(value, int | float) and value and not str(name).startswith("cpe_build_info")
    ]
    yield _table("Counters", moved, {"name": "name", "value": lambda row: f"{row['value']:.10g}"})


def _summary(status: Mapping[str, Any]) -> RenderableType:
    daemon, arena, device = (_section(status, name) for name in ("daemon", "arena", "device"))
    grid = Table.grid(padding=(0, 2))
    prefault = "" if arena.get("prefaulted", True) else ", not all of it touched yet"
    gpus = _entries(device, "gpus")
    slots = [f"{_plain(gpu.get('slots'))} × {bytes_text(gpu.get('slot_bytes'))}" for gpu in gpus]
    for name, value in (
        ("node", f"{_plain(daemon.get('node'))}, up {seconds_text(daemon.get('uptime_seconds'))}"),
        ("daemon", f"cpe-daemon {_plain(daemon.get('version'))}, protocol {_plain(daemon.get('protocol'))}"),
        ("process", f"{_plain(daemon.get('pid'))}, generation {_plain(daemon.get('generation'))}"),
        ("endpoints", "\n".join(_plain(endpoint) for endpoint in daemon.get("endpoints") or ["-"])),
        (
            "arena",
            f"{bytes_text(arena.get('free_bytes'))} free of {bytes_text(arena.get('size_bytes'))}"
            f" (largest run {bytes_text(arena.get('largest_free_bytes'))}){prefault}",
        ),
        ("device", f"{_plain(device.get('kind'))}, {len(gpus)} GPU, slots {', '.join(slots) or '-'}"),
    ):
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _table(title: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str | Cell]) -> RenderableType:
    rows = list(rows)
    if not rows:
        return Group("", Text(f"{title}: none", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (cell(row) if callable(cell) else row.get(cell) for cell in columns.values())
        table.add_row(*(_cell(value) for value in cells))
    return Group("", Text(title, style="bold"), table)


def _cell(value: object) -> Text:
    text = _plain(value)
    return Text(text, style=_COLOURS.get(text, ""))


def _plain(value: object) -> str:
    """Write a value without whatever would steer a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))


def _section(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = status.get(name)
    return section if isinstance(section, Mapping) else {}


def _entries(status: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = status.get(name)
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _version(row: Mapping[str, Any]) -> str:
    return f"{row.get('model')}@{row.get('run')}#{row.get('number')}"


def _workers(row: Mapping[str, Any]) -> str:
    present = sum(1 for worker in _entries(row, "workers") if worker.get("present"))
    return f"{present} of {row.get('world_size')}"


_VERSION_COLUMNS: Final[Mapping[str, str | Cell]] = {
    "version": _version,
    "state": "state",
    "size": lambda row: bytes_text(row.get("nbytes")),
    "tensors": "tensors",
    "ranks": lambda row: f"{_plain(row.get('ranks_sealed'))} of {_plain(row.get('world_size'))}",
    "age": lambda row: seconds_text(row.get("age_seconds")),
    "error": "error",
}
_ENGINE_COLUMNS: Final[Mapping[str, str | Cell]] = {
    "engine": "engine",
    "kind": "kind",
    "model": "model",
    "state": "state",
    "ready": "ready",
    "content": "content",
    "workers": _workers,
    "last push": lambda row: seconds_text(row.get("last_push_seconds")),
    "error": "error",
}
_TRAINER_COLUMNS: Final[Mapping[str, str | Cell]] = {
    "trainer": lambda row: f"{row.get('model')}@{row.get('run')}",
    "rank": lambda row: f"{_plain(row.get('rank'))} of {_plain(row.get('world_size'))}",
    "transport": "transport",
    "sending": "version",
}
