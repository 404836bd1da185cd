"""Versions that went live before they were digested, and the daemon that comes after."""

from __future__ import annotations

import random

import pytest

from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.journal import Identity, decode
from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import VersionRefusedError
from cpe_daemon.wire.messages import Seal
from tests.integration.harness import MODEL, RUN, Node
from tests.integration.processes import until
from tests.integration.raw import RawTrainer
from tests.unit.test_digesting import digests_of
from tests.unit.test_fold import reference

RECIPE = {"plain": 3, "nbytes": 64 << 10}
SHARDS = [Shard(f"layers.{index}.weight", "float32", (64 << 8,)) for index in range(RECIPE["plain"])]
ONE = VersionId(MODEL, RUN, 1)


def data_of(seed: int) -> bytes:
    return random.Random(seed).randbytes(layout(SHARDS).nbytes)


def start_daemon(node: Node) -> None:
    """Whose versions are not digested before somebody waits for that."""
    node.start_daemon(device__verify=True, tricks={"never_quiet": True})


def publish(node: Node, version: int, seed: int) -> str:
    """As a trainer whose GPUs fold; returns what became of the engine's update, when the version is live.

    Raises:
        CpeError: it is refused, or fails.
    """
    data = data_of(seed)
    places = zip(SHARDS, layout(SHARDS).offsets, strict=True)
    with RawTrainer(node.daemon.front) as trainer:
        stream = trainer.open(version, SHARDS, folded=True)
        trainer.send_bytes(stream, data)
        trainer.send(Seal(stream, b"", reference({shard.name: data[at:][: shard.nbytes] for shard, at in places})))
        report = trainer.await_state("live").report
    assert report is not None
    return report.engines["e"].outcome


def live(node: Node) -> Identity | None:
    """What the journal says."""
    models = decode((node.runtime_dir / "state" / "journal.json").read_bytes()).models
    return models[MODEL].live if MODEL in models else None


def test_daemon_that_is_stopped_digests_first_and_the_next_one_takes_the_version_again(node: Node) -> None:
    start_daemon(node)
    (engine,) = node.engine(recipe=RECIPE)
    publish(node, 1, seed=1)
    until(lambda: live(node) == Identity(ONE), "it is written that the version is live")
    node.daemon.stop()
    assert live(node) == Identity(ONE, content_digest([SHARDS], [digests_of(data_of(1), SHARDS)]))

    start_daemon(node)
    until(lambda: [e["state"] for e in node.daemon.status()["engines"]] == ["current"], "the engine is back")
    engine.await_serving(1)
    with pytest.raises(VersionRefusedError, match="was staged before with other weights"):
        publish(node, 1, seed=2)
    assert publish(node, 1, seed=1) == "current"  # its worker was told the digest before the daemon ended
    assert publish(node, 2, seed=2) == "updated"
    engine.await_serving(2)


def test_version_of_a_daemon_that_was_killed_before_it_digested_is_served_on_and_does_not_come_again(
    node: Node,
) -> None:
    start_daemon(node)
    (engine,) = node.engine(recipe=RECIPE)
    publish(node, 1, seed=1)
    until(lambda: live(node) == Identity(ONE), "it is written that the version is live")
    node.daemon.kill()

    start_daemon(node)
    until(lambda: [e["state"] for e in node.daemon.status()["engines"]] == ["current"], "the engine is back")
    engine.await_serving(1)
    with pytest.raises(VersionRefusedError, match="publish 2 or higher"):
        publish(node, 1, seed=1)
    publish(node, 2, seed=2)
    engine.await_serving(2)
