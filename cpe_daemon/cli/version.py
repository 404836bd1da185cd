"""``cpe version``: what is installed here."""

from __future__ import annotations

import json

import click

from cpe_daemon import __version__
from cpe_daemon.cli.failures import debug_option


@click.command("version", short_help="Show what is installed here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: version, protocol, oldest_protocol.")
@debug_option
def version_command(as_json: bool) -> None:
    """Print the version and the protocols that it speaks."""
    from cpe_daemon.wire.messages import OLDEST_PROTOCOL, PROTOCOL

    if as_json:
        told = {"version": __version__, "protocol": PROTOCOL, "oldest_protocol": OLDEST_PROTOCOL}
        click.echo(json.dumps(told, indent=2))
        return
    spoken = f"{PROTOCOL}" if PROTOCOL == OLDEST_PROTOCOL else f"{OLDEST_PROTOCOL} to {PROTOCOL}"
    click.echo(f"cpe-daemon {__version__} (protocol {spoken})")
