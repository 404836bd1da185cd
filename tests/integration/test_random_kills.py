"""Whatever is killed, and at whatever moment of a publish: what is served is whole, and the next publish works."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any

import pytest

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError
from tests.integration.harness import MODEL, RUN, Node, Trainer, Worker
from tests.integration.processes import Child, until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
LENGTH = {"chunk": 24, "tensor": 12, "millisecond": 60}
"""How long an update is, more or less."""

KILLS = 4
SEEDS = int(os.environ.get("CPE_TEST_SEEDS", "2"))


class Scene:
    """A daemon, a trainer, an engine that can be stopped at a tensor, and one of two ranks; each can be replaced."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.version = 0
        self.meant: dict[str, dict[str, str]] = {}
        """By version, the digests of its tensors."""
        self._start_daemon()
        self.trainer = self._trainer()
        self.gated = self._gated()
        self.pair = node.engine("pair", world_size=2, recipe=RECIPE)

    def publish(self) -> None:
        """Publish a version undisturbed; every engine has to take it."""
        expected = self._build()
        assert self.trainer.publish_live(self.version) == {"gated": "updated", "pair": "updated"}
        for worker in (self.gated, *self.pair):
            assert worker.ask("forward") == expected

    def kill(self, victim: str, stage: str, at: int) -> None:
        """Kill a process when a publish has come to a chunk, a tensor or a millisecond, and replace it."""
        self._build()
        doomed = {"trainer": self.trainer, "gated": self.gated, "pair": self.pair[at % 2], "daemon": self.node.daemon}
        if stage == "millisecond":
            self.trainer.begin("publish", version=self.version)
            time.sleep(at / 1000)
            doomed[victim].kill()
        else:
            stopped: Child = self.trainer if stage == "chunk" else self.gated
            stopped.ask("arm", at=at)
            self.trainer.begin("publish", version=self.version)
            stopped.event("reached")
            doomed[victim].kill()
            if doomed[victim] is not stopped:
                stopped.ask("go")
        self._replace(victim, at)
        self._check_whole()

    def _start_daemon(self) -> None:
        self.node.start_daemon(device__gpus=2, device__slots=2)

    def _replace(self, victim: str, at: int) -> None:
        if victim == "trainer":
            self.trainer = self._trainer()
        elif victim == "gated":
            self.gated = self._gated()
        elif victim == "pair":
            rank = at % 2
            self.pair[rank] = self.node.worker("pair", rank, 2, recipe=RECIPE)
            self.pair[rank].ask("attach")
        else:
            self._start_daemon()
            until(lambda: self.node.daemon.status()["trainers"], "the trainer has found the new daemon")
        until(lambda: sum(w["present"] for e in self._engines() for w in e["workers"]) == 3, "all workers are back")

    def _check_whole(self) -> None:
        """An engine that serves serves the version that it claims, whole, and all its ranks the same."""
        for group in ([self.gated], self.pair):
            states, held = self._look(group)
            if all(state["serving"] for state in states):
                (claimed,) = {state["version"] for state in states}
                if claimed is not None:
                    assert held == [self.meant[claimed]] * len(group)

    def _look(self, group: list[Worker]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """What workers say of themselves, and what they hold meanwhile: a daemon may be restoring them."""
        while True:
            states, held = [worker.state() for worker in group], [worker.ask("digests") for worker in group]
            if states == [worker.state() for worker in group]:
                return states, held

    def _build(self) -> dict[str, str]:
        """Make up the next version."""
        self.version += 1
        self.trainer.ask("build", recipe=RECIPE, seed=self.version)
        expected: dict[str, str] = self.trainer.ask("digests")
        self.meant[str(VersionId(MODEL, RUN, self.version))] = expected
        return expected

    def _engines(self) -> list[dict[str, Any]]:
        engines: list[dict[str, Any]] = self.node.daemon.status()["engines"]
        return engines

    def _trainer(self) -> Trainer:
        return self.node.trainer(gate_chunks=True)

    def _gated(self) -> Worker:
        worker = self.node.worker("gated", target="callback", recipe=RECIPE)
        with contextlib.suppress(CpeError):
            worker.ask("attach")
        return worker


@pytest.mark.parametrize("seed", range(SEEDS))
def test_next_publish_works_whatever_was_killed(node: Node, seed: int) -> None:
    chance = random.Random(seed)
    scene = Scene(node)
    scene.publish()
    for _ in range(KILLS):
        stage = chance.choice(list(LENGTH))
        at = chance.randint(1, LENGTH[stage])
        victim = chance.choice(["trainer", "gated", "pair", "daemon"])
        print(f"kill {victim} at {stage} {at}")
        scene.kill(victim, stage, at)
        scene.publish()
