"""Engines that have learned how they load are sent their own slices alone, and hold what they would hold without."""

from __future__ import annotations

import random

import pytest

from cpe_daemon.errors import EngineError
from tests.integration.harness import Daemon, Node, Trainer, Worker
from tests.integration.test_metrics import value

RECIPE = {"layers": 3}
"""Some of these tensors no engine learns here, since their places are transposed; and some come in several slots."""

SECONDS = 60.0
VERSIONS = 20


@pytest.fixture(autouse=True)
def learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPE_LEARNED", raising=False)


def moved_bytes(daemon: Daemon) -> float:
    """Bytes that all stages but the loading have moved, since the daemon started."""
    return sum(value(daemon, "cpe_stage_bytes_total", stage=stage) or 0.0 for stage in ("fetch", "exchange"))


def publish(node: Node, trainer: Trainer, number: int) -> dict[str, str]:
    """Publish a version, wait until it is live, and return what became of each engine."""
    trainer.ask("build", recipe=RECIPE, seed=number)
    return trainer.publish_live(number, SECONDS)


def check(trainer: Trainer, workers: list[Worker], number: int) -> None:
    """All workers hold their parts of a version, and serve it."""
    for rank, worker in enumerate(workers):
        worker.await_serving(number, seconds=SECONDS)
        assert worker.ask("forward") == trainer.ask("digests", rank=rank, world_size=len(workers))


def all_learned(workers: list[Worker]) -> bool:
    said = [worker.ask("loading") for worker in workers]
    return all(loading["learned"] > 6 and not loading["unproven"] for loading in said)


def moved_while_learning(
    node: Node, versions: int, learner: list[Worker], *others: list[Worker]
) -> tuple[float, float]:
    """Publish so many versions, after which all is learned, and return the bytes that the first and the last took."""
    trainer, moved = node.trainer(), [0.0]
    for number in range(1, versions + 1):
        publish(node, trainer, number)
        for workers in (learner, *others):
            check(trainer, workers, number)
        moved.append(moved_bytes(node.daemon))
    assert all_learned(learner)
    return moved[1] - moved[0], moved[-1] - moved[-2]


def test_ranks_are_sent_fewer_bytes_once_it_is_known_which_they_need(node: Node) -> None:
    node.start_daemon(device__gpus=2)
    workers = node.engine("tp", world_size=2, target="learned", recipe=RECIPE, slicing=True)
    first, last = moved_while_learning(node, 5, workers)
    print(f"{first:.0f} bytes for the first version, {last:.0f} for the last one")
    assert 0 < last < 0.85 * first


def test_engine_beside_it_that_needs_everything_gets_everything(node: Node) -> None:
    node.start_daemon(device__gpus=2)
    workers = node.engine("tp", world_size=2, target="learned", recipe=RECIPE, slicing=True)
    others = node.engine("other", world_size=2, recipe=RECIPE, slicing=True)
    first, last = moved_while_learning(node, 4, workers, others)
    assert last == first


def test_workers_that_verify_are_sent_everything(node: Node) -> None:
    node.start_daemon(device__gpus=2, device__verify=True)
    workers = node.engine("tp", world_size=2, target="learned", recipe=RECIPE, slicing=True)
    first, last = moved_while_learning(node, 4, workers)
    assert last == first


@pytest.mark.timeout(300)
def test_twenty_versions_with_faults_end_bit_identical(node: Node) -> None:
    """Parameters move, are learned anew, a worker's function fails, one is killed, and versions are taken back."""
    rng = random.Random(8)
    daemon = node.start_daemon(device__gpus=2)
    trainer = node.trainer()
    workers = node.engine("tp", world_size=2, target="learned", recipe=RECIPE, slicing=True)
    live, number, moved, sizes = 0, 0, 0.0, []
    for round in range(VERSIONS):
        number += 1
        fault = rng.choice(["", "", "", "move", "relearn", "fail", "kill", "roll back"]) if round > 2 else ""
        rank = rng.randrange(2)
        if fault == "kill":
            workers[rank].kill()
            workers[rank] = node.worker("tp", rank, 2, target="learned", recipe=RECIPE, slicing=True)
            workers[rank].ask("attach")
            check(trainer, workers, live)
        elif fault in {"move", "relearn"}:
            workers[rank].ask(fault)
        elif fault == "fail":
            workers[rank].ask("relearn")
            workers[rank].ask("fail", at=rng.randrange(1, 8))
            trainer.ask("build", recipe=RECIPE, seed=number)
            trainer.ask("publish", version=number, seconds=SECONDS)
            with pytest.raises(EngineError):
                trainer.ask("live", seconds=SECONDS + 5, version=number, timeout=SECONDS)
            trainer.ask("build", recipe=RECIPE, seed=live)
            check(trainer, workers, live)
            number += 1
        assert publish(node, trainer, number) == {"tp": "updated"}, fault
        check(trainer, workers, number)
        if fault == "roll back":
            trainer.ask("rollback", seconds=SECONDS)
            trainer.ask("build", recipe=RECIPE, seed=live)
            check(trainer, workers, live)
        else:
            live = number
        now = moved_bytes(daemon)
        sizes.append((fault, int(now - moved)))
        moved = now
    print(sizes)
    undisturbed = [size for name, size in sizes if not name]
    assert len(undisturbed) > 5
    assert min(undisturbed) < 0.85 * max(undisturbed)
