"""``cpe publish``: send a checkpoint of safetensors files to daemons, as a trainer would."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from cpe_daemon.cli.conversation import look_for_daemon
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.settings import KEY, LOCAL_DAEMON, SERVER_KEY, front_endpoint
from cpe_daemon.cli.text import plain_struct
from cpe_daemon.errors import DeadlineError, EngineError

if TYPE_CHECKING:
    from cpe_daemon.publisher import Handle, PublishReport

Progress = Callable[[int, int], None]

_CONNECT_SECONDS: Final = 10.0
_SEND_SECONDS: Final = 60.0
"""At most so long for a daemon to answer at all, and to take the next bytes: a person is waiting."""


@click.command("publish", short_help="Send a checkpoint to daemons.")
@click.argument("source", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option("--model", required=True, help="The model's name, as its engines know it.")
@click.option("--version", "number", type=click.IntRange(0), required=True, help="Grows within a run.")
@click.option("--run", default="manual", show_default=True, help="The trainer's run that numbers count in.")
@click.option("--to", "endpoints", multiple=True, metavar="ENDPOINT", help="A daemon. May be repeated.")
@LOCAL_DAEMON
@KEY
@SERVER_KEY
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose part DIR is.")
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="How many ranks have parts.")
@click.option(
    "--wait",
    type=click.Choice(["staged", "live", "none"]),
    default="live",
    show_default=True,
    help="staged: daemons hold it, verified. live: engines serve it. none: do not look.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for that.",
)
@click.option("--force", is_flag=True, help="Return to a run that another has superseded. Numbers grow all the same.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@debug_option
def publish_command(
    source: Path,
    model: str,
    number: int,
    run: str,
    endpoints: tuple[str, ...],
    runtime_dir: Path | None,
    key: Path | None,
    server_key: str | None,
    rank: int,
    world_size: int,
    wait: str,
    timeout: float,
    force: bool,
    as_json: bool,
) -> None:
    """Publish the safetensors of DIR (a directory, with or without an index, or one file) as a version.

    Without --to it goes to the daemon of this node. With several ranks, each publishes its own DIR.

    \b
    Examples:
      cpe publish ./step-700 --model qwen3 --version 7
      cpe publish ./step-700 --model qwen3 --version 7 --wait staged \\
          --to tcp://10.0.0.7:5555 --key run-7.key_secret --server-key daemon.key
      cpe publish ./best --model qwen3 --run run-7 --version 12 --force --json
    """  # noqa: D301 - click wants the \b itself
    if rank >= world_size:
        raise click.BadParameter(f"{rank} is not below --world-size {world_size}", param_hint="--rank")
    from cpe_daemon.publisher import Publisher
    from cpe_daemon.publisher.reach import endpoint_of

    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")  # what the publisher's threads say
    targets = [endpoint_of(name) for name in endpoints] or [front_endpoint(runtime_dir)]
    for target in targets:
        look_for_daemon(target)
    with Publisher(
        targets,
        model=model,
        run=run,
        rank=rank,
        world_size=world_size,
        connect_timeout=min(timeout, _CONNECT_SECONDS),
        send_timeout=min(timeout, _SEND_SECONDS),
        key=key,
        server_key=server_key,
    ) as publisher:
        with progress_bar(f"{model}@{run}#{number}") as progress:
            handle = publisher.publish(source, version=number, progress=progress, force=force)
            if wait != "none" or handle.state == "failed":
                handle.staged(timeout=timeout)
        report = _live(handle, timeout) if wait == "live" else None
    _show(report, handle, wait, as_json=as_json)


def _live(handle: Handle, timeout: float) -> PublishReport:
    """Wait until it is live; raises as `Handle.live` does."""
    try:
        return handle.live(timeout=timeout)
    except DeadlineError as error:
        if handle.state != "staged":
            raise
        hint = f"with push.automatic: false there, it waits for `cpe push {handle.version.model}`"
        raise DeadlineError(f"{error.message}; {hint}") from None


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show bytes, rate and time left on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: PublishReport | None, handle: Handle, wait: str, *, as_json: bool) -> None:
    version, reached = handle.version, "sent" if wait == "none" else wait
    if as_json:
        nodes = plain_struct({} if report is None else report.nodes)
        click.echo(
            json.dumps(
                {"version": plain_struct(version), "state": reached, "held": handle.held, "nodes": nodes}, indent=2
            )
        )
    else:
        click.echo(str(report or f"{version} is {reached}"))
    if handle.held:
        where = ", ".join(handle.held)
        click.echo(f"note: {where} held {version} already, with the same bytes: nothing was sent", err=True)
    if report is not None and not report.engines:
        click.echo(
            f"note: no engine of {version.model} is attached; the first that attaches gets it. If that is not the name"
            f" that you meant (`cpe status`), `cpe evict {version.model}` forgets it",
            err=True,
        )
    if report is not None and report.behind:
        why = "; ".join(
            f"{name} ({one.outcome}): {one.error.message if one.error else ''}" for name, one in report.behind.items()
        )
        raise EngineError(f"{version} is live, but not in every engine: {why}")
