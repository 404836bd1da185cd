"""``cpe push``: have a daemon push a version that it holds into engines of its node."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from cpe_daemon.cli.completion import complete_engines, complete_versions
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, daemon_options, timeout_option
from cpe_daemon.cli.failures import debug_option
from cpe_daemon.errors import DeadlineError, EngineError, PeerLostError

if TYPE_CHECKING:
    from cpe_daemon.wire.messages import PushRequest, RollbackRequest
    from cpe_daemon.wire.reports import VersionReport

Show = Callable[[Mapping[str, Any]], None]
"""Told the daemon's status now and then."""

_VERSION: Final = re.compile(r"(?P<model>[^#@](?:[^#]*?[^#@])??)(@(?P<run>[^@#]+))?(#(?P<number>[0-9]{1,18}))?")
_LOOK_SECONDS: Final = 0.25
_ANSWER_SECONDS: Final = 5.0
"""A daemon that is there answers a question in less, whatever it is busy with."""


@click.command("push", short_help="Push a version into engines, or into engines again.")
@click.argument("version", metavar="[MODEL[@RUN][#NUMBER]]", default="", shell_complete=complete_versions)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_engines,
    help="Into this engine, whatever it is thought to hold. May be repeated.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Push nothing and pause nobody: ask every engine whether the version fits it. Fails unless it fits all.",
)
@daemon_options
@timeout_option(600.0, "How long to wait; the daemon goes on with it afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@debug_option
def push_command(
    version: str, engines: tuple[str, ...], dry_run: bool, daemon: DaemonAddress, timeout: float, as_json: bool
) -> None:
    """Push a version that the daemon holds, the newest that is staged and waits, or else the live one.

    Without --engine it goes into all engines of its model, but for those that hold it already. A version that waits
    (push.automatic: false) is live afterwards if any engine took it; otherwise it goes on waiting. The live version is
    pushed again to engines that are quarantined or behind. Without MODEL: the node's model, if it has one only.

    \b
    Examples:
      cpe push
      cpe push policy@run-7#12
      cpe push policy --engine vllm-0 --engine vllm-1
      cpe push --dry-run policy

    \b
    Outcomes:
      updated   serves the version              failed   in doubt, and paused
      current   held it already                 lost     a worker of it ended
      kept      serves what it held before      absent   workers of it are not attached
      taken back  serves what it held before, for others had failed (push.partial: rollback)
      asleep    gets the live version when it wakes up (push.asleep: defer)
    With --dry-run: fits, differs, absent, asleep, or unanswered.
    """  # noqa: D301 - click wants the \b itself
    from cpe_daemon.wire.messages import PushRequest

    request = PushRequest(*parse_version(version), engines, dry_run)
    with Conversation(daemon) as conversation, spinner() as show:
        report = await_report(conversation, request, timeout, show)
    if dry_run:
        print_report(report, good=("fits",), otherwise="does not fit every engine", as_json=as_json)
    else:
        print_report(report, as_json=as_json)


def parse_version(version: str) -> tuple[str, str, int]:
    """Return model, run and number; "" and -1 for what is not said."""
    if not version:
        return "", "", -1
    found = _VERSION.fullmatch(version)
    if found is None:
        raise click.BadParameter(f"{version!r} is not MODEL, MODEL@RUN#NUMBER or MODEL#NUMBER", param_hint="VERSION")
    return found["model"], found["run"] or "", int(found["number"] or -1)


def await_report(
    conversation: Conversation, request: PushRequest | RollbackRequest, timeout: float, show: Show
) -> VersionReport:
    """Ask for a push, and return what came of it. Meanwhile ``show`` is told how far it is.

    Raises:
        DeadlineError: it did not end in time, and goes on.
        PeerLostError: the daemon is gone, or was restarted meanwhile.
        CpeError: the daemon refuses.
    """
    from cpe_daemon.wire.messages import PushReply, StatusReply, StatusRequest

    deadline = time.monotonic() + timeout
    conversation.say(request, min(timeout, _ANSWER_SECONDS))
    generation, look_at = "", 0.0
    while (now := time.monotonic()) < deadline:
        if now >= look_at:
            conversation.say(StatusRequest(), _ANSWER_SECONDS)
            look_at = now + _LOOK_SECONDS
        message = conversation.hear(min(_LOOK_SECONDS, deadline - now))
        if isinstance(message, PushReply):
            return message.report
        if isinstance(message, StatusReply):
            said = str(message.status.get("daemon", {}).get("generation"))
            if generation not in ("", said):
                raise PeerLostError(f"the daemon at {conversation.endpoint} was restarted before it had answered")
            generation = said
            show(message.status)
    raise DeadlineError(
        f"the push did not end within {timeout:g} s; the daemon at {conversation.endpoint} goes on with it: `cpe status"
        " --watch` shows how far it is"
    )


@contextlib.contextmanager
def spinner() -> Iterator[Show]:
    """Show how far the daemon is on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.text import Text

    from cpe_daemon.cli.tables import push_text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda status: None
        return
    with console.status(Text("asking the daemon")) as line:
        yield lambda status: line.update(Text(push_text(status)))


def print_report(
    report: VersionReport,
    *,
    good: Collection[str] = ("updated", "current", "asleep"),
    otherwise: str = "is not in every engine",
    as_json: bool,
) -> None:
    """Print what a push did.

    Args:
        report: the daemon's.
        good: the outcomes that are as they should be.
        otherwise: what is said of the version if any engine's is another.
        as_json: print it for programs.

    Raises:
        EngineError: the version is not in every engine; names those, and why.
    """
    from cpe_daemon.cli.text import plain_struct, plain_text
    from cpe_daemon.wire.reports import engine_lines, size_text

    behind = {name: one for name, one in report.engines.items() if one.outcome not in good}
    if as_json:
        click.echo(json.dumps(plain_struct(report), indent=2))
    else:
        click.echo(
            f"{report.version}: {report.tensors} tensors, {size_text(report.nbytes)}, {report.push_seconds:.3f} s"
        )
        for line in engine_lines(report.engines):
            click.echo(plain_text(line))
    if report.note:
        click.echo(f"note: {report.note}", err=True)
    elif not report.engines:
        model = report.version.model
        click.echo(f"note: no engine of {model} is attached; the first that attaches gets it", err=True)
    if behind:
        why = "; ".join(
            f"{name} ({one.outcome}): {one.error.message if one.error else ''}" for name, one in behind.items()
        )
        raise EngineError(f"{report.version} {otherwise}: {why}")
