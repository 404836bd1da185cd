"""Bytes that change between the arena and an engine: it is restored, and never serves them."""

from __future__ import annotations

import re

import pytest

from tests.integration.harness import Node, Trainer

RECIPE = {"plain": 12, "nbytes": 512 << 10}
BUCKETS = 6
"""Of 1 MiB."""


def build(trainer: Trainer, version: int) -> dict[str, str]:
    """Make a version's tensors and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


@pytest.mark.parametrize("bucket", [1, BUCKETS])
def test_engine_that_is_handed_other_bytes_gets_back_what_it_held(node: Node, bucket: int) -> None:
    node.start_daemon(device__gpus=2, device__verify=True, tricks={"spoils_bucket": BUCKETS + bucket})
    trainer = node.trainer()
    before = build(trainer, 1)
    spoiled = node.engine("spoiled", world_size=2, recipe=RECIPE)
    sound = node.engine("sound", recipe=RECIPE)[0]
    assert trainer.publish_live(1) == {"sound": "updated", "spoiled": "updated"}

    expected = build(trainer, 2)
    assert trainer.publish_live(2) == {"sound": "updated", "spoiled": "failed"}
    assert sound.ask("forward") == expected
    for worker in spoiled:
        worker.await_serving(1)
        assert worker.ask("forward") == before
    assert re.search(
        r"engine 'spoiled' rank 1 .* could not finish: policy@run-1#2 came here with other bytes", node.daemon.said
    )

    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"sound": "updated", "spoiled": "updated"}
    for worker in [*spoiled, sound]:
        assert worker.ask("forward") == expected


def test_version_of_several_ranks_is_verified_whatever_its_tensors_and_chunks_are(node: Node) -> None:
    """Chunks that end within a row, tensors that end within a word, and an engine whose ranks take slices."""
    zoo = {"zoo": 40}
    node.start_daemon(device__verify=True, device__slot_bytes="64KiB", ingest__landing_chunk_bytes=10_001)
    trainers = node.trainers(2)
    workers = node.engine(world_size=2, recipe=zoo, slicing=True)
    for version in (1, 2):
        for trainer in trainers:
            trainer.ask("build", recipe=zoo, seed=version)
            trainer.ask("publish", version=version)
        for trainer in trainers:
            assert trainer.ask("live", version=version, timeout=25, seconds=30) == {"e": "updated"}
            assert trainer.ask("verified", version=version) == ["e"]
        for rank, worker in enumerate(workers):
            assert worker.ask("forward") == trainers[0].ask("digests", rank=rank, world_size=2)
