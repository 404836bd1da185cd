"""``cpe status``: ask a daemon for its state."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from cpe_daemon.cli.conversation import DaemonAddress, ask_status, daemon_options, timeout_option
from cpe_daemon.cli.failures import debug_option

if TYPE_CHECKING:
    from cpe_daemon.links.keys import Credentials


@click.command("status", short_help="Show what a daemon holds and whom it serves.")
@daemon_options
@timeout_option(5.0, "How long to wait for it.")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C; waits for a daemon that is away.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look, with --watch.",
)
@click.option("--counters", is_flag=True, help="Show what it has counted as well, by the names of its metrics.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as described above; with --watch one object a line.")
@debug_option
def status_command(
    daemon: DaemonAddress, timeout: float, watch: bool, interval: float, counters: bool, as_json: bool
) -> None:
    """Show what a daemon holds and whom it serves. Without options, the daemon of this node.

    \b
    Examples:
      cpe status
      cpe status --watch
      cpe status --to tcp://10.0.0.7:5555 --key alice.key_secret --server-key daemon.key
      cpe status --json | jq '.engines[] | select(.ready | not)'

    \b
    Keys of the JSON object (sizes in bytes, times in seconds):
      daemon     version, node, pid, generation, uptime_seconds, protocol, endpoints
      readiness  ready, reasons: [code, engine, message], warnings: [code, message]
      arena      size_bytes, free_bytes, largest_free_bytes, prefaulted,
                 numa: node_bytes by NUMA node, or the reason why nobody placed it
      device     kind, gpus: [uuid, slots, slot_bytes, error]
      models     [model, used_bytes, quota_bytes (0: none), versions (kept for rollback)]
      versions   [model, run, number, state, nbytes, tensors, ranks_sealed, world_size,
                 age_seconds, stage_seconds (from its opening; 0 until it is staged), error]
      push       automatic, waiting, round: null, or number, version, phase, seconds,
                 nbytes, loaded_bytes, engines, dropped
      rollback   [model, live, to: null, or the version that a rollback would bring back]
      engines    [engine, model, kind, state, ready, expected, url, content, world_size,
                 workers: [rank, pid, node, gpu, present], error, last_push_seconds,
                 loading: null, or tensors by how they are loaded: learned, unproven,
                 kept (by the engine's loader): count by reason, digest]; the
                 column `learned` shows how many are, of all, and what keeps most others
      journal    path, error, written_at (Unix time), lost, not_resident: [model, run, number],
                 awaited: [engine]
      bootstrap  state, version, dir, message, percent
      trainers   [model, run, rank, world_size, transport, version, received_bytes,
                 total_bytes]
      counters   value by metric name
    """  # noqa: D301 - click wants the \b itself
    if watch:
        from cpe_daemon.cli.watch import watch as watch_daemon

        watch_daemon(daemon, interval=interval, timeout=timeout, as_json=as_json)
        return
    status = ask_status(daemon, timeout)
    if as_json:
        click.echo(json.dumps(status, indent=2, default=str))
        return
    from cpe_daemon.cli.tables import show_status

    show_status(status, counters=counters)


def ask(endpoint: str, timeout: float, credentials: Credentials | None = None) -> dict[str, Any]:
    """Return the state of the daemon at ``endpoint``, which is shown ``credentials`` if it is one over tcp.

    Raises:
        AccessError: it takes other keys, or none, or lets this one see no state.
        CpeError: as `ask_status` does.
    """
    return ask_status(DaemonAddress(endpoint, credentials), timeout)
