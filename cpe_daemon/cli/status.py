"""``cpe status``: ask a daemon for its state."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from cpe_daemon.cli.failures import debug_option
from cpe_daemon.cli.settings import LOCAL_DAEMON, front_endpoint
from cpe_daemon.errors import DeadlineError, PeerLostError, from_code


@click.command("status", short_help="Show what a daemon holds and whom it serves.")
@click.option("--to", "endpoint", metavar="ENDPOINT", help="Ask the daemon at this endpoint.")
@LOCAL_DAEMON
@click.option(
    "--timeout",
    type=click.FloatRange(0.0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as described above.")
@debug_option
def status_command(endpoint: str | None, runtime_dir: Path | None, timeout: float, as_json: bool) -> None:
    """Show what a daemon holds and whom it serves. Without options, the daemon of this node.

    \b
    Examples:
      cpe status
      cpe status --to tcp://10.0.0.7:5555
      cpe status --json | jq '.engines[] | select(.ready | not)'

    \b
    Keys of the JSON object (sizes in bytes, times in seconds):
      daemon     version, node, pid, generation, uptime_seconds, protocol, endpoints
      arena      size_bytes, free_bytes, largest_free_bytes, prefaulted
      device     kind, gpus: [uuid, slots, slot_bytes]
      versions   [model, run, number, state, nbytes, tensors, ranks_sealed, world_size,
                 age_seconds, error]
      engines    [engine, model, kind, state, ready, content, world_size,
                 workers: [rank, pid, node, gpu, present], error, last_push_seconds]
      trainers   [model, run, rank, world_size, transport, version]
      counters   value by metric name
    """  # noqa: D301 - click wants the \b itself
    status = ask(endpoint or front_endpoint(runtime_dir), timeout)
    if as_json:
        click.echo(json.dumps(status, indent=2, default=str))
        return
    from cpe_daemon.cli.tables import show_status

    show_status(status)


def ask(endpoint: str, timeout: float) -> dict[str, Any]:
    """Return the state of the daemon at ``endpoint``.

    Raises:
        PeerLostError: nobody is there.
        DeadlineError: somebody is, and did not answer in ``timeout`` seconds.
        CpeError: what the daemon answered instead.
    """
    from cpe_daemon.links.dealer import Dealer
    from cpe_daemon.wire.messages import ErrorReply, FrontReply, StatusReply, StatusRequest

    _look(endpoint)
    deadline = time.monotonic() + timeout
    dealer = Dealer(endpoint, FrontReply)
    try:
        dealer.send(StatusRequest(), timeout=timeout)
        while (left := deadline - time.monotonic()) > 0:
            received = dealer.receive(left)
            if received is None:
                continue
            message = received[0]
            if isinstance(message, StatusReply):
                return message.status
            if isinstance(message, ErrorReply):
                raise from_code(message.error.code, message.error.message)
    finally:
        dealer.close()
    raise DeadlineError(f"the daemon at {endpoint} did not send its status within {timeout:g} s")


def _look(endpoint: str) -> None:
    """Fail at once where no daemon ever listened, rather than wait for one to appear.

    Raises:
        PeerLostError: the endpoint's socket is no file here.
    """
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and not Path(path).exists():
        raise PeerLostError(f"no daemon listens at {endpoint}; is `cpe serve` running, and in this --runtime-dir?")
