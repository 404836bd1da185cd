"""``cpe demo``: a trainer, a daemon and engines on this machine."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

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
    help="Leave the checkpoint and the logs there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
@debug_option
@click.pass_context
def demo_command(
    ctx: click.Context, small: bool, scale: float, versions: int, keep: Path | None, as_json: bool
) -> None:
    """Watch a live update: a trainer publishes versions of a model, and an engine takes them while it serves.

    Each version's tensors are then compared, bit by bit, in the engine's own memory. The model has Qwen3-0.6B's
    names and shapes (1.2 GB, about 8 GB of memory in all) and random weights. Needs no GPU and no network;
    everything is gone afterwards.

    \b
    Examples:
      cpe demo --small
      cpe demo --versions 10 --keep ./demo
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.demo import Options, run

    if small and ctx.get_parameter_source("scale") is not ParameterSource.DEFAULT:
        raise click.UsageError("give either --small or --scale: each says how large the model is")
    ctx.exit(run(Options(small=small, scale=scale, versions=versions, keep=keep, as_json=as_json)))
