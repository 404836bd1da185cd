"""``cpe demo``: a trainer, a daemon and an engine of two ranks on this machine, and a proof that the bytes arrive.

It generates a random checkpoint with the names and shapes of a real model (`architecture`, `checkpoint`), starts a
daemon and the engine's ranks as processes of their own (`processes`, `engine`), publishes versions as a trainer would
(`trainer`), and compares every tensor in the engine's memory with the trainer's, bit by bit (`scenario`). `memory`
finds out what the host can bear, `show` draws.
"""

from __future__ import annotations

from cpe_daemon.demo.options import Options
from cpe_daemon.demo.signals import Interruption

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    """Run the demo; return 0 if every tensor of every version arrived bit by bit.

    Raises:
        CpeError: it could not be carried out, or something differs; says what. Nothing is left behind.
    """
    with Interruption() as interruption:
        from cpe_daemon.demo.scenario import run_scenario  # torch is large: only who runs the demo waits for it

        interruption.arm()
        return run_scenario(options, interruption.check)
