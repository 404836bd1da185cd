"""A daemon as the zygote forks it: the same command line, without the second that its imports take."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import uvloop  # noqa: F401 - so that children need not

import cpe_daemon.daemon
import cpe_daemon.daemon.daemon
import cpe_daemon.daemon.drain
import cpe_daemon.daemon.service
import cpe_daemon.ingest.digesting
import cpe_daemon.ingest.ingest
import cpe_daemon.observe.logs
from cpe_daemon.cli import main as cpe
from cpe_daemon.core.plan import PeerCopy
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.shm import ShmDevice
from cpe_daemon.ingest.digesting import Digesting


def main(arguments: dict[str, Any]) -> None:
    os.environ.update(arguments["environment"])
    play(**arguments["tricks"])
    cpe(["serve", "--config", arguments["config"]], prog_name="cpe")


def play(
    copies_wait_for: str = "",
    close_seconds: float = 0.0,
    thread_hangs: bool = False,
    spoils_bucket: int = 0,
    never_quiet: bool = False,
    on_signal: str = "",
) -> None:
    """Have something be wrong with this daemon, or different.

    Args:
        copies_wait_for: a FIFO; a thread that copies into the arena is stuck until somebody opens it to write.
        close_seconds: how long a daemon that stops waits for its threads.
        thread_hangs: a thread of the loop's own pool never ends, as one that looks at a dead network file system.
        spoils_bucket: which bucket, of all that reach the second GPU, has one bit flipped there when it is whole.
        never_quiet: what need not be digested at once is not digested before somebody waits for it.
        on_signal: what SIGUSR1 does: "fail": brings a bug out, in a part of the daemon; "lose": has it find that no GPU
            takes its calls any more; "break": has a GPU fail it.
    """
    if copies_wait_for:

        class StuckPool(CopyPool):
            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                def stuck() -> Any:
                    with open(copies_wait_for, "rb"):
                        return fn(*args, **kwargs)

                return super().submit(stuck)

        vars(cpe_daemon.daemon.daemon)["CopyPool"] = StuckPool
    if close_seconds:
        vars(cpe_daemon.daemon.drain)["CLOSE_SECONDS"] = close_seconds
    if never_quiet:
        vars(cpe_daemon.ingest.ingest)["Digesting"] = LateDigesting
        vars(cpe_daemon.ingest.digesting)["_PATIENCE_SECONDS"] = 3600.0
    if spoils_bucket:
        spoil(spoils_bucket)
    if thread_hangs or on_signal:

        class FaultyDaemon(cpe_daemon.daemon.daemon.Daemon):
            async def start(self, *args: Any) -> None:
                await super().start(*args)
                if thread_hangs:
                    self.hanging = asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
                if on_signal:
                    self._spawn(stumble(self, on_signal))

        vars(cpe_daemon.daemon.service)["Daemon"] = FaultyDaemon


class LateDigesting(Digesting):
    """Digests what somebody waits for, and nothing else."""

    def _is_quiet(self) -> bool:
        return False


def spoil(bucket: int) -> None:
    """Flip one bit of a bucket in a GPU's slot."""
    countdown = itertools.count(bucket - 1, -1)

    class SpoilingDevice(ShmDevice):
        def _exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
            super()._exchange(gpu, slot, copies)
            if gpu == 1 and next(countdown) == 0:
                ctypes.c_uint8.from_address(self._slot(gpu, slot)).value ^= 1

    vars(cpe_daemon.daemon.daemon)["ShmDevice"] = SpoilingDevice


async def stumble(daemon: cpe_daemon.daemon.daemon.Daemon, how: str) -> None:
    signalled = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, signalled.set)
    await signalled.wait()
    if how == "fail":
        raise ZeroDivisionError
    if how == "lose":
        daemon.lost.set()
    else:
        from tests.integration.gpus import break_context  # with torch, which no other daemon needs

        await asyncio.to_thread(break_context, 0)
        print("context broken", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
