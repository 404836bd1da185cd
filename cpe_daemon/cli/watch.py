"""``cpe status --watch``: look at a daemon again and again, through its restarts, until interrupted."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from cpe_daemon.cli.conversation import Conversation, DaemonAddress
from cpe_daemon.errors import PeerError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Look = Mapping[str, Any] | PeerError
"""What a daemon said of itself, or why it could not be asked."""


def watch(daemon: DaemonAddress, *, interval: float, timeout: float, as_json: bool) -> None:
    """Show a daemon's state every ``interval`` seconds, until Ctrl-C: that is the way out, and no failure.

    On a terminal on a screen of its own, elsewhere one state after another with the time; as JSON one a line.

    Raises:
        CpeError: the daemon refuses to tell. That it is away, or does not answer within ``timeout``, is waited for.
    """
    from cpe_daemon.cli.tables import console

    out = console(sys.stdout)
    looks = _looks(daemon, interval, timeout)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(looks):
        if as_json:
            _print_json(looks)
        elif out.is_terminal:
            _show(looks, daemon, out)
        else:
            _print(looks, daemon, out)


def _looks(daemon: DaemonAddress, interval: float, timeout: float) -> Generator[Look, None, None]:
    """Ask again and again, over one link as long as that is answered: each link over tcp takes a handshake."""
    pause = threading.Event()
    with contextlib.ExitStack() as link:
        conversation: Conversation | None = None
        while True:
            began = time.monotonic()
            look: Look
            try:
                conversation = conversation or link.enter_context(Conversation(daemon))
                look = conversation.status(timeout)
            except PeerError as error:
                conversation = None
                link.close()
                look = error
            yield look
            pause.wait(max(0.0, began + interval - time.monotonic()))


def _changes(looks: Iterator[Look]) -> Iterator[Look]:
    """Leave out that the daemon is still away."""
    away = False
    for look in looks:
        if not (away and isinstance(look, PeerError)):
            yield look
        away = isinstance(look, PeerError)


def _print_json(looks: Iterator[Look]) -> None:
    for look in _changes(looks):
        plain = {"error": {"code": look.code, "message": look.message}} if isinstance(look, PeerError) else look
        click.echo(json.dumps(plain, default=str))


def _print(looks: Iterator[Look], daemon: DaemonAddress, out: Console) -> None:
    for look in _changes(looks):
        if isinstance(look, PeerError):
            out.print(f"{_now():%H:%M:%S}  {_waiting(daemon, look)}")
        else:
            out.print(_screen(look, fold=True), "")


def _show(looks: Iterator[Look], daemon: DaemonAddress, out: Console) -> None:
    """Keep one screen current; while the daemon is away it shows what it said last, and says so."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    last: Mapping[str, Any] = {}
    with Live(console=out, screen=True, auto_refresh=False) as live:
        for look in looks:
            if not isinstance(look, PeerError):
                last = look
                live.update(_screen(look, fold=False), refresh=True)
                continue
            parts: list[RenderableType] = [Text(_waiting(daemon, look), style="bold yellow"), ""]
            if last:
                parts += [Text("What it said last:", style="yellow"), _screen(last, fold=False)]
            live.update(Group(*parts), refresh=True)


def _screen(status: Mapping[str, Any], *, fold: bool) -> RenderableType:
    from cpe_daemon.cli.overview import overview

    return overview(status, now=_now(), fold=fold)


def _waiting(daemon: DaemonAddress, error: PeerError) -> str:
    return f"waiting for the daemon at {daemon.endpoint}: {error.message}"


def _now() -> datetime:
    return datetime.now().astimezone()
