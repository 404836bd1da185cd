"""``python -m benchmarks.churn``: many pushes, with engines killed and started again between and during them.

A real daemon, engines and a trainer, each rank a process. After every push each tensor of each engine that serves is
compared, bit by bit, with the version that it claims to hold. At the end the daemon must have no more threads,
descriptors and pinned memory than after the first push, and the GPUs no less memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.gpu.census import Counter, grown
from benchmarks.gpu.node import ANSWER_SECONDS, START_SECONDS, Node, Setting, check_answer
from benchmarks.gpu.push import gpus_of, progress
from benchmarks.models import MODELS
from cpe_daemon.demo.memory import Sizes
from cpe_daemon.demo.signals import Interruption
from cpe_daemon.errors import CpeError, EngineError

_MIB: Final = 1 << 20
_KILL_CHANCE: Final = 0.3
_WAIT_CHANCE: Final = 0.5
_SETTLE_SECONDS: Final = 30.0

_EPILOG: Final = """\
examples:
  python -m benchmarks.churn                             # 200 pushes over shared memory
  python -m benchmarks.churn --device cuda --gpus 2
  python -m benchmarks.churn --quick --seed 7            # some pushes

Exit status 1: an engine held something else than it claimed, or the daemon has grown. The last line is JSON: bench,
device, pushes, kills, failed, seconds (of each push), before and after."""

Who = tuple[str, int]
"""An engine's name, and a rank."""


class Churn:
    """Pushes and kills on one node.

    Args:
        node: is up, and no version was published.
        seed: of what is killed, and when.
    """

    def __init__(self, node: Node, seed: int) -> None:
        self.kills = 0
        self.failed = 0
        """Versions that no engine took, for all that could were killed."""
        self.seconds: list[float] = []
        self._node = node
        self._chance = random.Random(seed)
        self._away: set[Who] = set()

    def push(self) -> None:
        """Publish a version, perhaps with a rank killed before or meanwhile; then compare what engines hold.

        Raises:
            EngineError: one holds something else than it claims, or than it should.
        """
        self._welcome(wait=self._chance.random() < _WAIT_CHANCE)
        victim = None
        if not self._away and self._chance.random() < _KILL_CHANCE:
            victim = self._chance.choice(sorted(self._node.workers))
        whole = {name for name in self._node.setting.engines if name not in {engine for engine, _ in self._away}}
        if victim is not None and self._chance.random() < 1 / 3:
            self._kill(victim)
        began = time.monotonic()
        self._node.begin_publish()
        if victim is not None and victim not in self._away:
            time.sleep(self._chance.uniform(0.0, self.seconds[-1] if self.seconds else 0.1))
            self._kill(victim)
        live = True
        try:
            self._node.end_publish()
        except EngineError:
            if victim is None:
                raise
            live = False
            self.failed += 1
        self.seconds.append(time.monotonic() - began)
        if victim is not None:
            self._node.start_worker(*victim)
            whole.discard(victim[0])
        self._compare(whole, self._node.number if live else None)

    def finish(self) -> None:
        """Have everybody back, push once, undisturbed, into all, and compare what they hold."""
        self._welcome(wait=True)
        self._node.publish()
        self._compare(set(self._node.setting.engines), self._node.number)

    def _kill(self, victim: Who) -> None:
        self._node.workers[victim].kill()
        self._node.workers[victim].stop()
        self._away.add(victim)
        self.kills += 1

    def _welcome(self, *, wait: bool) -> None:
        """Notice who is back, and compare what it was given."""
        for who in sorted(self._away):
            worker = self._node.workers[who]
            if wait or worker.has_spoken:
                worker.hear(START_SECONDS, meanwhile=self._node.daemon.check)
                self._away.discard(who)
                self._compare({who[0]}, None)

    def _compare(self, engines: set[str], number: int | None) -> None:
        """Compare what engines hold with what they claim, and that with ``number`` unless that is None."""
        asked = {who: worker for who, worker in self._node.workers.items() if who[0] in engines}
        for worker in asked.values():
            worker.tell({"ask": "check"})
        for (engine, rank), worker in asked.items():
            answer = worker.hear(ANSWER_SECONDS, meanwhile=self._node.daemon.check)
            check_answer(f"engine {engine!r} rank {rank}", answer, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Churn, and print; returns the exit status."""
    asked = _parse(arguments)
    with Interruption() as interruption, tempfile.TemporaryDirectory(prefix="cpe-churn-") as directory:
        interruption.arm()
        try:
            return _run(_setting(asked), Path(directory) / "node", asked.pushes, asked.seed)
        except CpeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def _run(setting: Setting, directory: Path, pushes: int, seed: int) -> int:
    with Node(setting, directory) as node:
        churn, counter = Churn(node, seed), Counter(node.daemon.pid, setting.gpus)
        churn.finish()
        before = counter.count()
        with progress(f"churn of {setting.model}", pushes) as tell:
            for _ in range(pushes):
                churn.push()
                tell()
        churn.finish()
        after = counter.settled(before, _SETTLE_SECONDS)
    more = grown(before, after)
    report.show(
        f"{pushes} pushes of {setting.architecture.nbytes / 1e9:.3f} GB ({setting.model}) on {setting.device}, seed"
        f" {seed}",
        ("of the daemon", "after the first push", "at the end", ""),
        [(name, before[name], after[name], "grown" if name in more else "") for name in before],
        notes=[
            f"{churn.kills} ranks were killed, and {churn.failed} versions failed for it; every tensor of every engine"
            " was what it claimed, bit by bit, after every push",
            f"publish to live: {report.spread(churn.seconds)}",
        ],
    )
    report.finish(
        {
            "bench": "churn",
            "device": setting.device,
            "model": setting.model,
            "pushes": pushes,
            "kills": churn.kills,
            "failed": churn.failed,
            "seconds": report.rounded(churn.seconds),
            "before": before,
            "after": after,
        }
    )
    if more:
        print(f"error: the daemon has more than after its first push: {', '.join(more)}", file=sys.stderr)
    return 1 if more else 0


def _setting(asked: argparse.Namespace) -> Setting:
    """Two engines: one on the first GPU, and one over all of them, or beside it where there is one GPU."""
    gpus = gpus_of(asked.device, asked.gpus)
    engines = {"alone": gpus[:1], "spread": gpus}
    slot_bytes = min(Sizes.of(MODELS[asked.model]).slot_bytes, 64 * _MIB)
    return Setting(asked.device, asked.model, gpus, engines, slots=asked.slots, slot_bytes=slot_bytes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.churn",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["shm", "cuda"], default="shm", help="shm: shared memory; cuda: GPUs")
    parser.add_argument("--model", choices=sorted(MODELS), help="whose names and shapes (small; 0.6b with cuda)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs, or sets of slots (2; 1 with cuda)")
    parser.add_argument("--pushes", type=int, default=200, metavar="N", help="how many (200)")
    parser.add_argument("--slots", type=int, default=3, metavar="N", help="slots a GPU (3)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what is killed, and when (1)")
    parser.add_argument("--quick", action="store_true", help="eight pushes")
    asked = parser.parse_args(arguments)
    on_gpu = asked.device == "cuda"
    asked.model = asked.model or ("0.6b" if on_gpu else "small")
    asked.gpus = asked.gpus or (1 if on_gpu else 2)
    asked.pushes = 8 if asked.quick else asked.pushes
    return asked


if __name__ == "__main__":
    sys.exit(main())
