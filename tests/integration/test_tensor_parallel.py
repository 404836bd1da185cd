"""Engines whose workers wait for one another in every forward pass: an update stops them all after the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.harness import Node, Worker
from tests.integration.processes import until

RECIPE = {"plain": 4, "nbytes": 64 << 10}


def served(workers: list[Worker], least: int) -> None:
    """Wait until all have served so many passes more."""
    before = [worker.ask("served")["passes"] for worker in workers]

    def further() -> bool:
        now: list[dict[str, Any]] = [worker.ask("served") for worker in workers]
        assert not any(one["error"] for one in now), now
        return all(one["passes"] >= then + least for one, then in zip(now, before, strict=True))

    until(further, "forward passes go on", 15)


def test_engine_that_computes_together_is_paused_again_and_again(node: Node, tmp_path: Path) -> None:
    """With collectives in every pass: who stopped a pass before the others would leave them waiting for ever."""
    node.start_daemon(deadlines__pause_seconds=5)
    trainer = node.trainer()
    workers = node.engine("pair", world_size=2, recipe=RECIPE)
    for worker in workers:
        worker.ask("ready", timeout=15)
    starting = [
        (worker, worker.begin("serve_together", path=str(tmp_path / "group"), rank=rank, world_size=2))
        for rank, worker in enumerate(workers)
    ]
    for worker, number in starting:
        worker.result(number)
    for version in range(1, 21):
        served(workers, 2)
        trainer.ask("build", recipe=RECIPE, seed=version)
        assert trainer.publish_live(version) == {"pair": "updated"}
    served(workers, 2)
    stopping = [(worker, worker.begin("stop_serving")) for worker in workers]
    ended = [worker.result(number) for worker, number in stopping]
    assert [(one["torn"], one["error"]) for one in ended] == [(0, "")] * 2
    assert ended[0]["passes"] == ended[1]["passes"]
    expected = trainer.ask("digests")
    assert [worker.ask("forward") for worker in workers] == [expected] * 2
