"""``cpe serve``: run the daemon."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final, NoReturn

import click

from cpe_daemon.cli.failures import debug_option, debugging, exit_status
from cpe_daemon.cli.settings import load, settings_options
from cpe_daemon.errors import CpeError

_STDERR: Final = 2


@click.command("serve", short_help="Run the daemon of this node.")
@settings_options
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Record what each stage of the last pushes did when, and write it here at the end; ui.perfetto.dev shows it.",
)
@debug_option
def serve_command(
    path: Path | None, assignments: tuple[str, ...], runtime_dir: Path | None, trace: Path | None
) -> None:
    """Run the daemon of this node in the foreground, until SIGTERM or SIGINT.

    Settings come from --set, then the environment (CPE_<SECTION>__<NAME>), then --config, then defaults.

    \b
    Examples:
      cpe serve
      cpe serve --config /etc/cpe-daemon/config.yaml
      cpe serve --set arena.size_bytes=64GiB --set log.level=debug
    """  # noqa: D301 - click wants the \b itself
    config = load(path, assignments, runtime_dir).config

    import asyncio
    import faulthandler

    import structlog
    import uvloop

    from cpe_daemon.daemon import serve
    from cpe_daemon.observe.logs import configure_logging
    from cpe_daemon.push.trace import recording

    as_json = configure_logging(config.log.level, config.log.format)
    # A watchdog ends a daemon that is stuck by SIGABRT: then it says where its threads are.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    try:
        with recording(trace) as recorder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            begins_anew = runner.run(serve(config, recorder))
    except CpeError as error:
        ctx = click.get_current_context()
        if not as_json or debugging(ctx):
            raise
        structlog.get_logger(__name__).critical("daemon.failed", error=error.message, code=error.code)
        ctx.exit(exit_status(error))  # said as all else is: whoever reads the log finds an object a line
    if begins_anew:
        _begin_anew()


def _begin_anew() -> NoReturn:
    """Replace this process's program by itself: the same process, for whoever watches it, without anything it had."""
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) > _STDERR:
            with contextlib.suppress(OSError):  # the listing's own, which is closed by now
                os.set_inheritable(int(entry), False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - what is run already
