"""``cpe demo``: a trainer, a daemon and engines on this machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import click

from cpe_daemon.cli.failures import debug_option


@click.command("demo", short_help="Watch a live update on this machine.")
@click.option("--small", is_flag=True, help="A model of some megabytes, over in seconds.")
@click.option(
    "--scale",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Fraction of Qwen3-0.6B to make up.",
)
@click.option("--versions", type=click.IntRange(1), default=3, show_default=True, help="How many versions to publish.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Leave logs and files there.",
)
@debug_option
@click.pass_context
def demo_command(ctx: click.Context, small: bool, scale: float, versions: int, keep: Path | None) -> None:
    """Watch a live update: a trainer publishes versions of a model, and engines take them while they serve.

    Needs no GPU and no network; everything is gone afterwards.

    \b
    Examples:
      cpe demo --small
      cpe demo --versions 10 --keep ./demo
    """  # noqa: D301 - click wants the \b itself
    demo = importlib.import_module("cpe_daemon.demo")
    ctx.exit(demo.run(SimpleNamespace(small=small, scale=scale, versions=versions, keep=keep)))
