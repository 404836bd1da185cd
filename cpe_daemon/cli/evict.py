"""``cpe evict``: have a daemon let go of versions that nobody serves."""

from __future__ import annotations

import click

from cpe_daemon.cli.completion import complete_models
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, daemon_options, timeout_option
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.push import parse_version


@click.command("evict", short_help="Let go of versions that nobody serves.")
@click.argument("version", metavar="MODEL[@RUN][#NUMBER]", shell_complete=complete_models)
@daemon_options
@timeout_option(15.0, "How long to wait for the daemon.")
@debug_option
def evict_command(version: str, daemon: DaemonAddress, timeout: float) -> None:
    """Have the daemon let go of a version, or of all of a model's or a run's, and give their memory back.

    Refused, and nothing changes, while an engine holds one of them, or takes versions of a model whose live version is
    meant, and while one is on its way into engines. Numbers stay used up. For a model whose name was misspelt, and for
    room.

    A version that was live before the daemon was restarted, and is not here, is forgotten, unless an engine holds one
    of its model: engines that waited for it serve what they started with.

    \b
    Examples:
      cpe evict polciy                 all of a model that was published by mistake
      cpe evict policy@run-7#12        a retained version
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.wire.messages import Done, EvictRequest

    model, run, number = parse_version(version)
    if not model:
        raise click.BadParameter("name a model", param_hint="MODEL")
    with Conversation(daemon) as conversation:
        click.echo(conversation.ask(EvictRequest(model, run, number), Done, timeout, "evict it").detail)
