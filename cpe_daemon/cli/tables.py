"""A daemon's state as tables. It comes over the wire: nothing in it is trusted to be there, or to be text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpe_daemon.cli.text import bytes_text, plain_text, seconds_text

_PIPE_COLUMNS: Final = 200
"""Width where there is no terminal to ask: wide enough to cut nothing that `grep` might look for."""

_COLOURS: Final[Mapping[str, str]] = {
    "live": "green",
    "current": "green",
    "yes": "green",
    "pushing": "cyan",
    "updating": "cyan",
    "starting": "cyan",
    "receiving": "cyan",
    "failed": "red",
    "quarantined": "red",
    "unknown": "yellow",
    "no": "yellow",
}

_WHOLE: Final = ("staged", "pushing", "live")
_GONE: Final = ("evicted", "failed")

Columns = Mapping[str, str | Callable[[Mapping[str, Any]], object]]
"""By heading: the key of an entry, or what is made of the entry."""


def show_status(status: Mapping[str, Any], *, counters: bool = False) -> None:
    """Print a daemon's state on standard output; ``counters``: and what it has counted."""
    console(sys.stdout).print(Group(*_parts(status), *(_counters(status) if counters else ())))


def console(file: TextIO) -> Console:
    """Make a console for what a daemon says: its text is shown as it is."""
    return Console(file=file, width=columns(file), highlight=False, emoji=False, markup=False)


def columns(file: TextIO) -> int | None:
    """How wide tables are: as a terminal is (None), else as COLUMNS says, else wide enough for most."""
    said = os.environ.get("COLUMNS", "")
    if file.isatty():
        return None
    return int(said) if said.isascii() and said.isdigit() and int(said) else _PIPE_COLUMNS


def show_engines(status: Mapping[str, Any]) -> None:
    """Print the engines that a daemon knows or expects on standard output."""
    console(sys.stdout).print(table("", entries(status, "engines"), _LISTED_COLUMNS))


def _parts(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield _summary(status)
    if len(models := entries(status, "models")) > 1 or any(model.get("quota_bytes") for model in models):
        yield table("Models", models, MODEL_COLUMNS)
    yield table("Versions", entries(status, "versions"), VERSION_COLUMNS)
    yield table("Engines", entries(status, "engines"), engine_columns(status))
    yield table("Trainers", entries(status, "trainers"), TRAINER_COLUMNS)


def _counters(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    counters = status.get("counters")
    moved = [
        {"name": name, "value": value}
        for name, value in (counters.items() if isinstance(counters, Mapping) else ())
        if isinstance(value, int | float) and value and not str(name).startswith("cpe_build_info")
    ]
    yield table("Counters", moved, {"name": "name", "value": lambda row: f"{row['value']:.10g}"})


def _summary(status: Mapping[str, Any]) -> RenderableType:
    daemon, arena, device = (section(status, name) for name in ("daemon", "arena", "device"))
    grid = Table.grid(padding=(0, 2))
    prefault = "" if arena.get("prefaulted", True) else ", not all of it touched yet"
    gpus = entries(device, "gpus")
    slots = [f"{plain_text(gpu.get('slots'))} × {bytes_text(gpu.get('slot_bytes'))}" for gpu in gpus]
    readiness = section(status, "readiness")
    warnings, reasons = (
        [plain_text(entry.get("message")) for entry in entries(readiness, name)] for name in ("warnings", "reasons")
    )
    for name, value in (
        ("node", f"{plain_text(daemon.get('node'))}, up {seconds_text(daemon.get('uptime_seconds'))}"),
        ("daemon", f"cpe-daemon {plain_text(daemon.get('version'))}, protocol {plain_text(daemon.get('protocol'))}"),
        ("process", f"{plain_text(daemon.get('pid'))}, generation {plain_text(daemon.get('generation'))}"),
        ("endpoints", "\n".join(plain_text(endpoint) for endpoint in daemon.get("endpoints") or ["-"])),
        (
            "arena",
            f"{bytes_text(arena.get('free_bytes'))} free of {bytes_text(arena.get('size_bytes'))}"
            f" (largest run {bytes_text(arena.get('largest_free_bytes'))}){prefault}{_numa_text(arena)}",
        ),
        ("push", push_text(status)),
        *([("rollback", said)] if (said := rollback_text(status)) else []),
        *([("journal", said)] if (said := journal_text(status)) else []),
        *([("bootstrap", said)] if (said := bootstrap_text(status)) else []),
        ("device", f"{plain_text(device.get('kind'))}, {len(gpus)} GPU, slots {', '.join(slots) or '-'}"),
        *([("ready", "; ".join([plain_text(readiness.get("ready")), *reasons]))] if readiness else []),
        *([("warnings", "\n".join(warnings))] if warnings else []),
    ):
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _numa_text(arena: Mapping[str, Any]) -> str:
    nodes = [plain_text(node) for node in section(section(arena, "numa"), "node_bytes")]
    return f", striped over NUMA nodes {', '.join(nodes)}" if nodes else ""


def table(title: str, rows: Iterable[Mapping[str, Any]], columns: Columns, *, fold: bool = True) -> RenderableType:
    """Make a table of entries under a title; ``fold``: what is too long goes on in the next line."""
    rows = list(rows)
    if not rows:
        return Group("", Text(f"{title}: none", style="bold")) if title else Text("none")
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for row in rows:
        cells = (of(row) if callable(of) else row.get(of) for of in columns.values())
        made.add_row(*(cell(value) for value in cells))
    return Group("", Text(title, style="bold"), made) if title else made


def cell(value: object) -> Text:
    """Write a value in the colour of what it says."""
    text = plain_text(value)
    return Text(text, style=_COLOURS.get(text, ""))


def section(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a status, empty if it is not there."""
    section = status.get(name)
    return section if isinstance(section, Mapping) else {}


def entries(status: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return a list in a status, without what is no entry."""
    entries = status.get(name)
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def version_text(row: Mapping[str, Any]) -> str:
    """Name an entry's version."""
    return f"{row.get('model')}@{row.get('run')}#{row.get('number')}"


def _names(row: Mapping[str, Any], key: str) -> str:
    names = row.get(key)
    return ", ".join(plain_text(name) for name in names) if isinstance(names, list) else "-"


def _workers(row: Mapping[str, Any]) -> str:
    present = sum(1 for worker in entries(row, "workers") if worker.get("present"))
    return f"{present} of {row.get('world_size') or '?'}"


def newest(status: Mapping[str, Any], model: object) -> Mapping[str, Any] | None:
    """Return the version of a model that was staged last, whatever became of it; else what was live before.

    So does `cpe_engine_lag_versions`: an engine is behind a version that it failed to take.
    """
    known = [row for row in entries(status, "versions") if row.get("model") == model and _staged(row)]
    before = [row for row in entries(section(status, "journal"), "not_resident") if row.get("model") == model]
    return min(reversed(known), key=_since_staged) if known else before[-1] if before else None


def _staged(row: Mapping[str, Any]) -> bool:
    """Whether a version was whole here at any time; a daemon that does not say when tells by the state."""
    seconds = row.get("stage_seconds")
    return bool(seconds) if isinstance(seconds, int | float) else row.get("state") in _WHOLE


def _since_staged(row: Mapping[str, Any]) -> float:
    age, staging = row.get("age_seconds"), row.get("stage_seconds")
    if isinstance(age, int | float) and isinstance(staging, int | float):
        return age - staging
    return 0.0


def _of_bytes(row: Mapping[str, Any], text: str) -> str:
    """What is to be said of a version's bytes: nothing, once they are gone."""
    return "-" if row.get("state") in _GONE and not row.get("nbytes") else text


def journal_text(status: Mapping[str, Any]) -> str:
    """Say what the journal knows that is not here, and what is wrong with it; "" if that is nothing."""
    journal = section(status, "journal")
    lines = [
        f"{plain_text(version_text(row))} is live, not resident: publish it again or set bootstrap"
        for row in entries(journal, "not_resident")
    ]
    if journal.get("awaited"):
        lines.append(f"waits for {_names(journal, 'awaited')}, attached before the restart")
    if journal.get("error"):
        lines.append(f"NOT WRITTEN: {plain_text(journal['error'])}")
    return "\n".join(lines)


def bootstrap_text(status: Mapping[str, Any]) -> str:
    """Say what became of the bootstrap; "" if there is none."""
    bootstrap = section(status, "bootstrap")
    if bootstrap.get("state") in (None, "off"):
        return ""
    percent = f", {plain_text(bootstrap['percent'])}%" if "percent" in bootstrap else ""
    what = bootstrap.get("message") or bootstrap.get("version")
    return f"{plain_text(bootstrap.get('state'))}{percent}: {plain_text(what)}"


def lag_text(status: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    """By how many versions an engine is behind the newest that is staged; "-" if there is none."""
    version = newest(status, engine.get("model"))
    if version is None:
        return "-"
    wanted, held = version_text(version), str(engine.get("content") or "")
    if held == wanted:
        return "0"
    (run, _, number), (held_run, _, held_number) = wanted.rpartition("#"), held.rpartition("#")
    if run != held_run or not (number + held_number).isdecimal():
        return "another run" if held else "holds none"
    return str(max(0, int(number) - int(held_number)))


def push_text(status: Mapping[str, Any]) -> str:
    """Say in a line which push is in flight and what waits; "idle" if nothing does."""
    push = section(status, "push")
    current, parts = section(push, "round"), []
    if current:
        dropped = f" ({_names(current, 'dropped')} dropped)" if current.get("dropped") else ""
        parts.append(
            f"{plain_text(current.get('version'))} into {_names(current, 'engines')}{dropped}:"
            f" {plain_text(current.get('phase'))}, {bytes_text(current.get('loaded_bytes'))} of"
            f" {bytes_text(current.get('nbytes'))} loaded, {seconds_text(current.get('seconds'))}"
        )
    if push.get("waiting"):
        parts.append(f"{plain_text(push['waiting'])} more to come")
    if push.get("automatic") is False:
        held = [version_text(row) for row in entries(status, "versions") if row.get("state") == "staged"]
        parts += [f"{plain_text(version)} waits for `cpe push`" for version in held]
    return "; ".join(parts) or "idle"


def rollback_text(status: Mapping[str, Any]) -> str:
    """Say from which version to which a rollback would go, a model a line; "" if none is live."""
    return "\n".join(
        f"{plain_text(row.get('live'))} → {plain_text(row['to'])}"
        if row.get("to")
        else f"{plain_text(row.get('live'))}: nothing is retained"
        for row in entries(status, "rollback")
    )


def engine_columns(status: Mapping[str, Any]) -> Columns:
    """The columns of a table of engines."""
    return {
        "engine": "engine",
        "kind": "kind",
        "model": "model",
        "state": "state",
        "ready": "ready",
        "content": "content",
        "behind": lambda row: lag_text(status, row),
        "workers": _workers,
        "learned": _learned,
        "last push": lambda row: seconds_text(row.get("last_push_seconds") or None),
        "error": "error",
    }


def _learned(row: Mapping[str, Any]) -> str:
    """How many tensors are loaded without the engine's loader, of how many, and what keeps most of the others."""
    loading = row.get("loading")
    if not loading:
        return "-"
    kept: Mapping[str, int] = loading.get("kept", {})
    learned, unproven = loading.get("learned", 0), loading.get("unproven", 0)
    why = f" ({max(kept, key=lambda reason: kept[reason])})" if kept else ""
    return f"{learned} of {learned + unproven + sum(kept.values())}{why}"


def _received(row: Mapping[str, Any]) -> str:
    total = row.get("total_bytes")
    return f"{bytes_text(row.get('received_bytes'))} of {bytes_text(total)}" if total else "-"


MODEL_COLUMNS: Final[Columns] = {
    "model": "model",
    "used": lambda row: bytes_text(row.get("used_bytes")),
    "quota": lambda row: bytes_text(row.get("quota_bytes")) if row.get("quota_bytes") else "none",
    "kept for rollback": "versions",
}
VERSION_COLUMNS: Final[Columns] = {
    "version": version_text,
    "state": "state",
    "size": lambda row: _of_bytes(row, bytes_text(row.get("nbytes"))),
    "tensors": lambda row: _of_bytes(row, plain_text(row.get("tensors"))),
    "ranks": lambda row: _of_bytes(
        row, f"{plain_text(row.get('ranks_sealed'))} of {plain_text(row.get('world_size'))}"
    ),
    "age": lambda row: seconds_text(row.get("age_seconds")),
    "error": "error",
}
TRAINER_COLUMNS: Final[Columns] = {
    "trainer": lambda row: f"{row.get('model')}@{row.get('run')}",
    "rank": lambda row: f"{plain_text(row.get('rank'))} of {plain_text(row.get('world_size'))}",
    "transport": "transport",
    "sending": "version",
    "received": _received,
}
_LISTED_COLUMNS: Final[Columns] = {
    "engine": "engine",
    "kind": "kind",
    "model": "model",
    "expected": "expected",
    "state": "state",
    "ready": "ready",
    "content": "content",
    "workers": _workers,
    "url": "url",
    "error": "error",
}
