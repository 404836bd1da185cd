"""``cpe wait``: wait until a version is live on a node."""

from __future__ import annotations

import json
import time
from typing import Final

import click

from cpe_daemon.cli.completion import complete_models
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, daemon_options, timeout_option
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.rollback import parse_model
from cpe_daemon.cli.text import plain_struct
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, PeerLostError

_ANSWER_SECONDS: Final = 5.0
"""Beyond the deadline, which the daemon keeps: its answer says how far the version is."""


@click.command("wait", short_help="Wait until a version is live.")
@click.argument("model", metavar="[MODEL[@RUN]]", default="", shell_complete=complete_models)
@click.option(
    "--version", "number", type=click.IntRange(0), required=True, metavar="N", help="That one, or a later one."
)
@daemon_options
@timeout_option(600.0, "How long to wait.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
@debug_option
def wait_command(model: str, number: int, daemon: DaemonAddress, timeout: float, as_json: bool) -> None:
    """Wait until version N of a run, or a later one, is live on a node, and print which.

    Fails at once if that version has failed there, and with status 5 when the time is over, saying how far it is. The
    daemon tells it when it happens; it may be restarted meanwhile. Without RUN: the newest run of the model. Without
    MODEL: the node's model, if it has one only.

    \b
    Examples:
      cpe wait --version 12 && run-the-evaluation
      cpe wait policy@run-7 --version 12 --timeout 60 --json
    """  # noqa: D301 - click wants the \b itself
    name, run = parse_model(model)
    with Conversation(daemon) as conversation:
        live = await_live(conversation, name, run, number, timeout)
    click.echo(json.dumps(plain_struct(live), indent=2) if as_json else str(live))


def await_live(conversation: Conversation, model: str, run: str, number: int, timeout: float) -> VersionId:
    """Return the version that is live: that one, or a later one of its run.

    Raises:
        DeadlineError: neither was in time.
        PeerLostError: no daemon is there.
        CpeError: the version has failed, or cannot be waited for.
    """
    from cpe_daemon.wire.messages import WaitReply, WaitRequest
    from cpe_daemon.wire.operator import WAIT_AGAIN_SECONDS

    until = time.monotonic() + timeout
    say_at, met = 0.0, False
    while (now := time.monotonic()) < until + _ANSWER_SECONDS:
        if now >= say_at and now < until:
            try:
                conversation.say(WaitRequest(number, until - now, model, run), min(until - now, _ANSWER_SECONDS))
                met = True
            except PeerLostError:
                if not met:
                    raise  # later it is being restarted
            say_at = time.monotonic() + WAIT_AGAIN_SECONDS
        next_at = say_at if say_at < until else until + _ANSWER_SECONDS
        message = conversation.hear(max(0.0, next_at - time.monotonic()))
        if isinstance(message, WaitReply):
            return message.version
    raise DeadlineError(f"the daemon at {conversation.endpoint} did not answer within {timeout:g} s")
