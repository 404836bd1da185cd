"""``cpe version``: what is installed here."""

from __future__ import annotations

import click

from cpe_daemon import __version__
from cpe_daemon.cli.failures import debug_option


@click.command("version", short_help="Show what is installed here.")
@debug_option
def version_command() -> None:
    """Print the version and the protocols that it speaks."""
    from cpe_daemon.wire.messages import OLDEST_PROTOCOL, PROTOCOL

    spoken = f"{PROTOCOL}" if PROTOCOL == OLDEST_PROTOCOL else f"{OLDEST_PROTOCOL} to {PROTOCOL}"
    click.echo(f"cpe-daemon {__version__} (protocol {spoken})")
