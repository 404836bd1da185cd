"""``cpe engine``: the engines that an operator counts on, and those that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from cpe_daemon.cli.completion import complete_engines, complete_kinds, complete_models
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, ask_status, daemon_options, timeout_option
from cpe_daemon.cli.failures import FailingGroup, debug_option

if TYPE_CHECKING:
    from cpe_daemon.wire.messages import Message

_KEYS: Final = (
    "engine",
    "kind",
    "model",
    "url",
    "world_size",
    "expected",
    "state",
    "ready",
    "content",
    "workers",
    "error",
)
_WAIT: Final = "How long to wait for the daemon."


@click.group("engine", cls=FailingGroup, short_help="Say which engines a node should have, and see them.")
@debug_option
def engine_command() -> None:
    """Say which engines a node should have, and see which it has.

    Engines need not be added to be served: their workers attach by themselves. An engine that is added is missed when
    it is not there: `cpe status` and the readiness probe say so, after a restart of the daemon too. And a worker that
    comes by its name, but is of another kind, model or world size, is refused.
    """


@engine_command.command("add", short_help="Expect an engine from now on.")
@click.argument("name")
@click.option(
    "--kind",
    required=True,
    shell_complete=complete_kinds,
    help="The plugin that it is served by: torch, vllm, sglang, or one of your own.",
)
@click.option(
    "--model", default="", shell_complete=complete_models, help="Whose versions it takes.  [default: it says]"
)
@click.option("--url", default="", metavar="URL", help="Its HTTP server, as in http://127.0.0.1:8000.")
@click.option("--world-size", type=click.IntRange(1), help="How many ranks it has.  [default: it says]")
@daemon_options
@timeout_option(15.0, _WAIT)
@debug_option
def add_command(
    name: str, kind: str, model: str, url: str, world_size: int | None, daemon: DaemonAddress, timeout: float
) -> None:
    """Expect engine NAME on this node from now on, after a restart of the daemon too.

    \b
    Examples:
      cpe engine add policy-0 --kind torch --model policy --world-size 8
      cpe engine add vllm-0 --kind vllm --model policy --url http://127.0.0.1:8000
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.wire.messages import EngineAdd, EngineSpec

    _have_done(EngineAdd(EngineSpec(name, kind, model, url, world_size or 0)), daemon, timeout)


@engine_command.command("remove", short_help="Expect an engine no longer.")
@click.argument("name", shell_complete=complete_engines)
@daemon_options
@timeout_option(15.0, _WAIT)
@debug_option
def remove_command(name: str, daemon: DaemonAddress, timeout: float) -> None:
    """Expect engine NAME no longer, and forget it. One that was killed, and was never added, is forgotten too.

    An engine that is attached goes on being served until it is stopped.
    """
    from cpe_daemon.wire.messages import EngineRemove

    _have_done(EngineRemove(name), daemon, timeout)


@engine_command.command("list", short_help="Show the engines that are there or expected.")
@daemon_options
@timeout_option(5.0, _WAIT)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, with keys as in `cpe status --help`.")
@debug_option
def list_command(daemon: DaemonAddress, timeout: float, as_json: bool) -> None:
    """Show the engines that are there or expected.

    \b
    Examples:
      cpe engine list
      cpe engine list --json | jq -r '.[] | select(.expected and (.ready | not)) | .engine'
    """  # noqa: D301 - click wants the \b itself
    status = ask_status(daemon, timeout)
    if as_json:
        click.echo(json.dumps([_chosen(engine) for engine in status.get("engines") or []], indent=2, default=str))
        return
    from cpe_daemon.cli.tables import show_engines

    show_engines(status)


def _chosen(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {key: engine.get(key) for key in _KEYS}


def _have_done(request: Message, daemon: DaemonAddress, timeout: float) -> None:
    """Have the daemon do something, and print what it says of it."""
    from cpe_daemon.wire.messages import Done

    with Conversation(daemon) as conversation:
        click.echo(conversation.ask(request, Done, timeout, "say that it is done").detail)
