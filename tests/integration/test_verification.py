"""Bytes that change between the arena and an engine: it is restored, and never serves them."""

from __future__ import annotations

import re

import pytest

from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard
from cpe_daemon.errors import CpeError, ProtocolError
from cpe_daemon.wire.messages import Seal
from tests.integration.harness import MODEL, Node, Trainer
from tests.integration.raw import RawTrainer
from tests.unit.test_fold import reference

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


@pytest.mark.parametrize("digested", [True, False])
def test_fold_that_comes_from_the_trainer_is_what_engines_are_held_to(node: Node, digested: bool) -> None:
    node.start_daemon(device__verify=True)
    (engine,) = node.engine(recipe=RECIPE)
    shards = [Shard(f"layers.{index}.weight", "float32", (512 << 8,)) for index in range(RECIPE["plain"])]
    nbytes = shards[0].nbytes
    with RawTrainer(node.daemon.front) as trainer:
        assert trainer.welcome.folds
        for version, wrong in ((1, 0), (2, 1)):
            data = bytes([version, *range(255)]) * (len(shards) * nbytes // 256)
            fold = reference({shard.name: data[at * nbytes :][:nbytes] for at, shard in enumerate(shards)})
            stream = trainer.open(version, shards, folded=True)
            trainer.send_bytes(stream, data)
            trainer.seal(stream, shards, data)
            with pytest.raises(ProtocolError, match="announced a fold, and sealed with None"):
                trainer.await_state("staged")
            if digested:
                trainer.seal(stream, shards, data, fold ^ wrong)
            else:
                trainer.send(Seal(stream, b"", fold ^ wrong))
            if wrong:
                with pytest.raises(CpeError, match="came here with other bytes"):
                    trainer.await_state("live")
            else:
                trainer.await_state("live")
    engine.await_serving(1)
    assert node.daemon.engine("e")["content"] == f"{MODEL}@run-1#1"


def test_what_a_fold_does_not_cover_cannot_be_sealed_without_digests(node: Node) -> None:
    node.start_daemon(device__verify=True)
    half = Shard("a", "uint8", (1000,), (0,), (500,))  # its last row is half another rank's
    with RawTrainer(node.daemon.front, world_size=2) as trainer:
        stream = trainer.open(1, [half], folded=True)
        trainer.send_bytes(stream, bytes(layout([half]).nbytes))
        trainer.send(Seal(stream, b"", 0))
        with pytest.raises(ProtocolError, match="0 bytes of digests for 1 tensors"):
            trainer.await_state("staged")


@pytest.mark.parametrize("folded", [False, True])
def test_what_no_engine_is_held_to_a_fold_of_cannot_be_sealed_without_digests(node: Node, folded: bool) -> None:
    node.start_daemon(device__verify=not folded)
    whole = Shard("a", "uint8", (1000,))
    with RawTrainer(node.daemon.front) as trainer:
        stream = trainer.open(1, [whole], folded=folded)
        trainer.send_bytes(stream, bytes(layout([whole]).nbytes))
        trainer.send(Seal(stream, b"", 0))
        with pytest.raises(ProtocolError, match="0 bytes of digests for 1 tensors"):
            trainer.await_state("staged")
