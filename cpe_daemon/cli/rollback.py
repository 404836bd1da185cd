"""``cpe rollback``: have a daemon bring a version back that was live before."""

from __future__ import annotations

import re
from typing import Final

import click

from cpe_daemon.cli.completion import complete_retained_models, complete_retained_numbers
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, daemon_options_by, timeout_option
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.push import await_report, print_report, spinner

_MODEL: Final = re.compile(r"(?P<model>[^#@](?:[^#]*?[^#@])??)(@(?P<run>[^@#]+))?")


@click.command("rollback", short_help="Bring the version back that was live before.")
@click.argument("model", metavar="[MODEL[@RUN]]", default="", shell_complete=complete_retained_models)
@click.option(
    "--to",
    "number",
    type=click.IntRange(0),
    metavar="N",
    shell_complete=complete_retained_numbers,
    help="That version, rather than the one that was live last.",
)
@daemon_options_by("--at")
@timeout_option(600.0, "How long to wait; the daemon goes on with it afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@debug_option
def rollback_command(model: str, number: int | None, daemon: DaemonAddress, timeout: float, as_json: bool) -> None:
    """Push a retained version into all engines of its model: it costs one push, and no trainer is needed.

    The version that was live is retained in its place, so a second rollback takes the first one back; with --to,
    the second finds it done. If no engine takes it, what is live stays live. The trainer's next version goes live as
    ever: its numbers go on from the highest. Without MODEL: the node's model, if it has one only.

    \b
    Examples:
      cpe rollback
      cpe rollback policy@run-7 --to 11
      cpe rollback policy --at tcp://10.0.0.7:5555 --key alice.key_secret --server-key daemon.key
      cpe status                       which version it would go to

    \b
    Outcomes: as of `cpe push`.
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.wire.messages import RollbackRequest

    name, run = parse_model(model)
    request = RollbackRequest(name, run, -1 if number is None else number)
    with Conversation(daemon) as conversation, spinner() as show:
        report = await_report(conversation, request, timeout, show)
    print_report(report, as_json=as_json)


def parse_model(text: str) -> tuple[str, str]:
    """Return model and run; "" for what is not said.

    Raises:
        BadParameter: it is neither.
    """
    if not text:
        return "", ""
    found = _MODEL.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not MODEL or MODEL@RUN", param_hint="MODEL")
    return found["model"], found["run"] or ""
