"""How the demo looks: a line and a bar for each step on standard error, the result on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPE_COLUMNS: Final = 120


@dataclass(frozen=True, slots=True)
class Row:
    """One published version. ``changed`` and ``compared`` count tensors; ``different`` names those that differ."""

    version: int
    source: str
    changed: int
    stage_seconds: float
    pause_seconds: float
    push_seconds: float
    gigabytes_per_second: float
    compared: int
    different: list[str]

    @property
    def identical(self) -> bool:
        """Whether every rank holds exactly the trainer's bytes."""
        return not self.different


@dataclass(slots=True)
class Result:
    """The demo's outcome."""

    model: str
    tensors: int
    nbytes: int
    ranks: int
    rows: list[Row] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0

    @property
    def identical(self) -> bool:
        """Whether every version arrived bit by bit."""
        return all(row.identical for row in self.rows)


class Step:
    """What is being done now; call it with bytes done and bytes in all."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.detail = ""
        """What to say of it when it is done."""

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        self._progress.update(self._task, completed=done, total=total)


class Screen:
    """Where it all is shown. With ``quiet`` only the result is."""

    def __init__(self, *, quiet: bool) -> None:
        self._steps = Console(stderr=True, highlight=False, quiet=quiet)

    def say(self, text: str) -> None:
        """Write a line."""
        self._steps.print(text, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show that something is under way, and, when it is done, how long it took."""
        began = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        quiet = self._steps.quiet or not self._steps.is_terminal
        with Progress(*columns, console=self._steps, transient=True, disable=quiet) as progress:
            step = Step(progress, progress.add_task(title, total=None))
            yield step
        detail = f": {step.detail}" if step.detail else ""
        self.say(f"[green]done[/]  {title}{detail} [dim]({time.monotonic() - began:.1f} s)[/]")


def show_table(result: Result) -> None:
    """Print the versions on standard output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("version", "published from", "changed"):
        table.add_column(name)
    for name in ("staged s", "pause s", "push s", "GB/s"):
        table.add_column(name, justify="right")
    table.add_column("bit-identical")
    for row in result.rows:
        table.add_row(
            str(row.version),
            row.source,
            f"{row.changed} of {result.tensors}",
            *(f"{seconds:.2f}" for seconds in (row.stage_seconds, row.pause_seconds, row.push_seconds)),
            f"{row.gigabytes_per_second:.2f}",
            f"[green]yes, {row.compared} of {row.compared}[/]"
            if row.identical
            else f"[red]NO, {len(row.different)} of {row.compared} differ[/]",
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)
    console.print(table)
    count = len(result.rows)
    console.print(
        f"{count} version{'s' if count > 1 else ''} of {result.nbytes / 1e9:.2f} GB into {result.ranks} ranks"
        f" that served meanwhile ({result.passes} forward passes), in {result.seconds:.0f} s.",
        soft_wrap=True,
    )


def show_json(result: Result) -> None:
    """Print everything on standard output, for a script."""
    document: dict[str, Any] = {**asdict(result), "identical": result.identical}
    for entry, row in zip(document["rows"], result.rows, strict=True):
        entry["identical"] = row.identical
    document["versions"] = document.pop("rows")
    print(json.dumps(document, indent=2))
