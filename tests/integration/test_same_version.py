"""The same version again: it changes nothing, is told what became of it, and other weights by its name are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cpe_daemon.errors import EngineError, PublishError, VersionRefusedError
from tests.integration.harness import Daemon, Node, Trainer, Worker
from tests.integration.processes import until

RECIPE = {"plain": 8, "nbytes": 512 << 10}


@pytest.fixture
def worker(node: Node) -> Worker:
    """An engine whose loading may be made to fail, on a node with a daemon."""
    node.start_daemon()
    return node.engine(target="callback", recipe=RECIPE)[0]


def build(trainer: Trainer, seed: int) -> dict[str, str]:
    """Make tensors, and return what an engine should hold of them."""
    trainer.ask("build", recipe=RECIPE, seed=seed)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def rounds(daemon: Daemon) -> float:
    """How often engines took part in a round."""
    return float(sum(value for name, value in daemon.status()["counters"].items() if name.startswith("cpe_rounds_")))


@pytest.mark.parametrize("landing", [True, False], ids=["landing", "inline"])
def test_restarted_trainer_may_say_again_what_it_said(node: Node, worker: Worker, landing: bool) -> None:
    first = node.trainer(landing=landing)
    expected = build(first, 1)
    first.publish_live(1)
    first.kill()
    before = rounds(node.daemon), node.daemon.free_bytes
    again = node.trainer(landing=landing)
    build(again, 1)
    assert again.publish_live(1) == {"e": "updated"}
    assert again.ask("held", version=1) == ["live", 1]
    assert (rounds(node.daemon), node.daemon.free_bytes) == before
    assert worker.ask("forward") == expected
    expected = build(again, 2)
    assert again.publish_live(2) == {"e": "updated"}
    assert again.ask("held", version=2) == ["live", 0]
    assert worker.ask("forward") == expected


@pytest.mark.parametrize("recipe", [RECIPE, {"plain": 7, "nbytes": 512 << 10}], ids=["bytes", "tensors"])
def test_other_weights_by_the_name_of_what_is_held_are_refused(
    node: Node, worker: Worker, recipe: dict[str, Any]
) -> None:
    trainer = node.trainer()
    expected = build(trainer, 1)
    trainer.publish_live(1)
    trainer.ask("build", recipe=recipe, seed=2)
    trainer.ask("publish", version=1)
    with pytest.raises(VersionRefusedError, match=r"policy@run-1#1 is held here \(live\) with other weights"):
        trainer.ask("live", version=1, timeout=10)
    assert trainer.ask("held", version=1) == ["failed", 0]
    assert node.daemon.version(1)["state"] == "live"
    assert worker.ask("forward") == expected
    expected = build(trainer, 2)
    trainer.publish_live(2)
    assert worker.ask("forward") == expected


def test_version_that_was_replaced_is_held_and_does_not_come_back_by_itself(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    for version in (1, 2):
        expected = build(trainer, version)
        trainer.publish_live(version)
    build(trainer, 1)
    trainer.ask("publish", version=1)
    trainer.ask("staged", version=1, timeout=10)
    assert trainer.ask("held", version=1) == ["retained", 1]
    with pytest.raises(PublishError, match=r"retained at .*another version took its place"):
        trainer.ask("live", version=1, timeout=10)
    assert worker.ask("forward") == expected
    assert [node.daemon.version(version)["state"] for version in (1, 2)] == ["retained", "live"]


def test_each_rank_is_compared_by_itself(node: Node, worker: Worker) -> None:
    ranks = node.trainers(2)
    expected = {}
    for rank in ranks:
        expected = build(rank, 1)
    for rank in ranks:
        rank.ask("publish", version=1)
    for rank in ranks:
        rank.ask("live", version=1, timeout=20)
    assert worker.ask("forward") == expected
    build(ranks[1], 2)
    for rank in ranks:
        rank.ask("publish", version=1)
    ranks[0].ask("live", version=1, timeout=10)
    with pytest.raises(VersionRefusedError, match="of rank 1 it has other digests"):
        ranks[1].ask("live", version=1, timeout=10)
    assert [rank.ask("held", version=1) for rank in ranks] == [["live", 1], ["failed", 0]]
    alone = node.trainer()
    build(alone, 1)
    alone.ask("publish", version=1)
    with pytest.raises(VersionRefusedError, match="is held from 2 ranks; this one says 1"):
        alone.ask("live", version=1, timeout=10)
    assert worker.ask("forward") == expected


def test_push_that_failed_is_tried_again_with_the_same_weights_and_no_others(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    before = build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    worker.ask("arm", at=1, then="raise")
    trainer.ask("publish", version=2)
    with pytest.raises(EngineError, match="told to raise"):
        trainer.ask("live", version=2, timeout=20)
    worker.await_serving(1)
    build(trainer, 3)
    trainer.ask("publish", version=2)
    with pytest.raises(VersionRefusedError, match=r"staged before with other weights \(digest \w{12}, now \w{12}\)"):
        trainer.ask("live", version=2, timeout=20)
    assert worker.ask("forward") == before
    assert build(trainer, 2) == expected
    assert trainer.publish_live(2) == {"e": "updated"}
    assert trainer.ask("held", version=2) == ["live", 0]
    assert worker.ask("forward") == expected


def test_version_may_come_again_while_it_is_pushed(node: Node, worker: Worker) -> None:
    first, second = node.trainer(), node.trainer()
    expected = build(first, 1)
    worker.ask("arm", at=3)
    first.ask("publish", version=1)
    worker.event("reached")
    build(second, 1)
    second.ask("publish", version=1)
    second.ask("staged", version=1, timeout=10)
    assert second.ask("held", version=1) == ["pushing", 1]
    first.kill()
    worker.ask("go")
    assert second.ask("live", seconds=20, version=1, timeout=15) == {"e": "updated"}
    assert worker.ask("forward") == expected


def test_trainer_that_dies_while_its_version_is_compared_changes_nothing(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    expected = build(trainer, 1)
    trainer.publish_live(1)
    victim = node.trainer()
    build(victim, 1)
    victim.ask("arm", at=2)
    victim.begin("publish", version=1, watched=True)
    victim.event("reached")
    victim.kill()
    until(lambda: "trainer.gone" in node.daemon.said, "its end is noticed")
    assert node.daemon.version(1)["state"] == "live"
    assert worker.ask("forward") == expected
    trainer.publish_live(1)
    assert trainer.ask("held", version=1) == ["live", 1]
