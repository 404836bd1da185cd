"""``python -m benchmarks.push --device cuda``: pushes into engines on GPUs, beside the bytes over all links at once."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.gpu.node import ANSWER_SECONDS, START_SECONDS, Node, Setting, engine_each, one_engine
from cpe_daemon.core.buckets import cut
from cpe_daemon.demo.processes import Talker
from cpe_daemon.devices.cuda.driver import driver
from cpe_daemon.devices.cuda.gpus import find
from cpe_daemon.errors import ConfigError
from cpe_daemon.wire.reports import VersionReport

LARGE_BYTES: Final = 30_000_000_000
"""A larger version is published once and pushed again and again: the host has no room for two."""

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_TABLE_SLOTS: Final = (1, 2, 3, 8, 16, 32)
_TABLE_UPDATES: Final = 3

Tell = Callable[[], None]
"""Called after each update."""


@dataclass(frozen=True, slots=True)
class Update:
    """One update, as the daemon measured it.

    Attributes:
        seconds: from staged to live.
        stopped_seconds: for how long the engine that was paused longest did not serve.
        phases: the longest of any engine, by phase.
        stages: by stage, for how long it had anything to move.
        published_seconds: from the trainer's call to live; None for a version that is pushed again.
    """

    seconds: float
    stopped_seconds: float
    phases: Mapping[str, float]
    stages: Mapping[str, float]
    published_seconds: float | None = None


@dataclass(slots=True)
class Row:
    """What was measured of one setting: the first update by itself, the others beside the floor."""

    setting: Setting
    first: Update
    updates: list[Update] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    back_seconds: list[float] = field(default_factory=list)
    slots: int = 0
    """That the daemon had on a GPU."""
    extra_bytes: int = 0
    """Memory of a GPU that its workers took beside their weights."""

    @property
    def seconds(self) -> list[float]:
        """From staged to live, of each update."""
        return [update.seconds for update in self.updates]

    @property
    def floor(self) -> float:
        """The floor's median."""
        return statistics.median(self.floor_seconds)

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return report.ratio(self.seconds, self.floor_seconds)

    @property
    def first_ratio(self) -> float:
        """Of the first push to the floor's median."""
        return self.first.seconds / self.floor

    @property
    def paused(self) -> float:
        """For how long engines do not serve: the median."""
        return statistics.median([update.stopped_seconds for update in self.updates])

    @property
    def slots_bytes(self) -> int:
        """Memory of a GPU in slots."""
        return self.slots * self.setting.slot_bytes

    @property
    def published_ratio(self) -> float | None:
        """Publish to live, by the floors of both ways together; None if that was not measured."""
        seconds = [update.published_seconds for update in self.updates if update.published_seconds is not None]
        if not seconds or not self.back_seconds:
            return None
        return statistics.median(seconds) / (statistics.median(self.back_seconds) + self.floor)

    def median(self, kind: str) -> dict[str, float]:
        """The medians of ``phases`` or ``stages``, by name."""
        found: list[Mapping[str, float]] = [getattr(update, kind) for update in self.updates]
        names = dict.fromkeys(name for one in found for name in one)
        return {name: round(statistics.median([one.get(name, 0.0) for one in found]), 6) for name in names}


class FloorProcess(Talker):
    """The floor of a setting, in a process of its own; a context.

    Args:
        setting: what it is compared with.
        directory: for its log.
    """

    def __init__(self, setting: Setting, directory: Path) -> None:
        slots = setting.slots if isinstance(setting.slots, int) else 3
        command = ["-m", "benchmarks.gpu.floor", "--model", setting.model, "--gpus", ",".join(setting.gpus)]
        command += ["--slots", str(slots), "--slot-bytes", str(setting.slot_bytes)]
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__("the floor", command, directory / "floor.log")
        self._ready = False

    def run(self, *, back: bool = False) -> float:
        """Run once; return the seconds that it took."""
        if not self._ready:
            self.hear(START_SECONDS)
            self._ready = True
        self.tell({"back": back})
        return float(self.hear(ANSWER_SECONDS)["seconds"])


def measure(setting: Setting, directory: Path, updates: int, tell: Tell = lambda: None) -> Row:
    """Bring a node up, update it, and run the floor as often, in turn; what engines hold is compared every time."""
    with FloorProcess(setting, directory) as floor, Node(setting, directory / "node") as node:
        row = Row(setting, _update(node, first=True))
        tell()
        floor.run()
        for _ in range(updates):
            row.floor_seconds.append(floor.run())
            if setting.source:
                row.back_seconds.append(floor.run(back=True))
            row.updates.append(_update(node, row=row))
            tell()
        row.slots = max(int(gpu["slots"]) for gpu in node.status()["device"]["gpus"])
    return row


def _update(node: Node, *, first: bool = False, row: Row | None = None) -> Update:
    """Update once: engines hold nothing of any version before, and the whole of one afterwards."""
    node.poison()
    before = node.metrics()
    published = node.publish() if first or node.setting.versions > 1 else None
    pushed: VersionReport = published.report if published else node.push_again()
    after = node.metrics()
    extra = node.check()
    if row is not None:
        row.extra_bytes = max(row.extra_bytes, *extra.values())
    stopped = after.since(before, "cpe_update_duration_seconds_sum", "engine", phase="stopped")
    engines = [engine.phases for engine in pushed.engines.values()]
    return Update(
        seconds=pushed.push_seconds,
        stopped_seconds=max(stopped.values(), default=0.0),
        phases={name: max(phases.get(name, 0.0) for phases in engines) for phases in engines for name in phases},
        stages=after.since(before, "cpe_stage_seconds_total", "stage"),
        published_seconds=published.seconds if published else None,
    )


def run(asked: argparse.Namespace, directory: Path) -> None:
    """Measure what was asked for, and print."""
    setting = setting_of(asked)
    if asked.table == "pause":
        _run_table(setting, directory, asked.updates)
        return
    with progress(f"{setting.model}, {len(setting.gpus)} GPUs", asked.updates + 1) as tell:
        row = measure(setting, directory, asked.updates, tell)
    show(row)
    report.finish(plain(row))


def setting_of(asked: argparse.Namespace) -> Setting:
    """What was asked for, on the GPUs that are there."""
    gpus = gpus_of(asked.device, asked.gpus)
    setting = Setting(
        device=asked.device,
        model=asked.model,
        gpus=gpus,
        engines=engine_each(gpus) if asked.engines == "each" else one_engine(gpus),
        slots=asked.slots,
        slot_bytes=asked.slot_bytes,
        source=gpus[0] if asked.source == "gpu" else "",
        serve=_serve_arguments(asked),
    )
    return replace(setting, versions=1 if setting.architecture.nbytes > LARGE_BYTES else 2)


def _serve_arguments(asked: argparse.Namespace) -> tuple[str, ...]:
    settings = [argument for setting in asked.settings for argument in ("--set", setting)]
    return (*settings, *(("--trace", str(asked.trace.absolute())) if asked.trace else ()))


def gpus_of(device: str, count: int) -> tuple[str, ...]:
    """Return the UUIDs of ``count`` GPUs of this host, or the names of sets of slots.

    Raises:
        ConfigError: there are not so many.
    """
    if device != "cuda":
        return tuple(f"shm-{number}" for number in range(count))
    gpus = tuple(found.gpu.uuid for found in find(driver()))
    if len(gpus) < count:
        raise ConfigError(f"--gpus {count}: this host has {len(gpus)}")
    return gpus[:count]


def show(row: Row) -> None:
    """Print one setting's table."""
    setting, nbytes = row.setting, row.setting.architecture.nbytes
    ranks = " + ".join(f"TP={len(gpus)}" for gpus in setting.engines.values())
    publish = [u.published_seconds for u in row.updates if u.published_seconds is not None]
    report.show(
        f"Push of {nbytes / 1e9:.3f} GB ({setting.model}, bfloat16) on {setting.device}: {len(setting.gpus)} GPUs,"
        f" {ranks}, {row.slots} slots of {setting.slot_bytes / _MIB:g} MiB",
        ("", "seconds", "rate", "to the floor"),
        [
            ("staged to live", report.spread(row.seconds), report.rate(nbytes, row.seconds), f"{row.ratio:.3f}"),
            ("the first", f"{row.first.seconds:.3f} s", "", f"{row.first_ratio:.3f}"),
            ("not serving", f"{row.paused:.3f} s", "", f"{row.paused / row.floor:.3f}"),
            ("floor", report.spread(row.floor_seconds), report.rate(nbytes, row.floor_seconds), ""),
            *([("publish to live", report.spread(publish), report.rate(nbytes, publish), "")] if publish else []),
            *_back_rows(row, nbytes),
        ],
        notes=[
            f"medians of {len(row.seconds)}, with the least and the most; after every one each tensor of each engine"
            " was what was pushed, bit by bit",
            "phases: " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in row.median("phases").items()),
            "stages busy: " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in row.median("stages").items()),
            f"memory of a GPU: {row.slots_bytes / _GIB:.2f} GiB of slots, and {row.extra_bytes / _GIB:.2f} GiB that its"
            " workers took beside their weights",
        ],
    )


def _back_rows(row: Row, nbytes: int) -> Iterator[tuple[str, ...]]:
    if row.back_seconds and row.published_ratio is not None:
        rate = report.rate(nbytes, row.back_seconds)
        yield ("floor of the trainer's GPU", report.spread(row.back_seconds), rate, "")
        yield ("publish to live, by both floors", "", "", f"{row.published_ratio:.3f}")


def plain(row: Row) -> dict[str, object]:
    """The last line of one setting."""
    made = report.compared(
        "push",
        device=row.setting.device,
        nbytes=row.setting.architecture.nbytes,
        seconds=row.seconds,
        floor_seconds=row.floor_seconds,
        model=row.setting.model,
        gpus=len(row.setting.gpus),
        engines={name: len(gpus) for name, gpus in row.setting.engines.items()},
        slots=row.slots,
        slot_bytes=row.setting.slot_bytes,
        serve=list(row.setting.serve),
        first_seconds=round(row.first.seconds, 6),
        first_ratio=round(row.first_ratio, 4),
        paused_seconds=round(row.paused, 6),
        vram_bytes=row.slots_bytes + row.extra_bytes,
        phases=row.median("phases"),
        stages=row.median("stages"),
    )
    published = [update.published_seconds for update in row.updates if update.published_seconds is not None]
    if published:
        made["published_seconds"] = report.rounded(published)
    if row.published_ratio is not None:
        made |= {"back_seconds": report.rounded(row.back_seconds), "published_ratio": round(row.published_ratio, 4)}
    return made


# --- the pause against slots -----------------------------------------------------------------------------------------


def _run_table(setting: Setting, directory: Path, updates: int) -> None:
    """Measure with more and more slots, up to as many as hold the whole version; the daemon is new each time."""
    buckets = len(cut(list(setting.architecture.specs()), setting.slot_bytes).fillings)
    counts = [count for count in _TABLE_SLOTS if count < buckets] + [buckets]
    each = min(updates, _TABLE_UPDATES)
    with progress(f"{setting.model}, slots", len(counts) * (each + 1)) as tell:
        rows = [
            measure(replace(setting, slots=count, versions=1), directory / str(count), each, tell) for count in counts
        ]
    report.show(
        f"Pause of {setting.architecture.nbytes / 1e9:.3f} GB ({setting.model}) against slots of"
        f" {setting.slot_bytes / _MIB:g} MiB; {buckets} hold it whole",
        ("slots", "memory of a GPU", "staged to live", "to the floor", "not serving"),
        [
            (
                str(row.slots),
                f"{(row.slots_bytes + row.extra_bytes) / _GIB:.2f} GiB",
                report.spread(row.seconds),
                f"{row.ratio:.3f}",
                f"{row.paused:.3f} s",
            )
            for row in rows
        ],
        notes=[f"medians of {each} pushes of the live version again"],
    )
    report.finish({**plain(rows[-1]), "bench": "push-pause", "rows": [plain(row) for row in rows]})


@contextmanager
def progress(what: str, steps: int) -> Iterator[Tell]:
    """A bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda: bar.advance(task)
