"""The way of the data: bytes from several trainer ranks into the tensors of engines, whole and unchanged."""

from __future__ import annotations

import os

import pytest

from tests.integration.harness import Daemon, Node, Trainer, Worker
from tests.integration.processes import until

ZOO = {"zoo": 300}
"""Tensors of every dtype, of no dimension and of no element, strided, and one that is larger than three slots."""

RANKS = 4
VERSIONS = int(os.environ.get("CPE_TEST_VERSIONS", "12"))
WARM_UP = 5
GROWTH_BYTES = 8 << 20
"""What allocators may keep. It is less than one version, and several are published after the warm-up."""


def publish(trainers: list[Trainer], workers: list[Worker], version: int) -> None:
    """Publish a version from all ranks at once, and compare every tensor of every worker with the trainer's."""
    for trainer, number in [(t, t.begin("build", recipe=ZOO, seed=version)) for t in trainers]:
        trainer.result(number)
    for trainer, number in [(t, t.begin("publish", version=version)) for t in trainers]:
        trainer.result(number)
    for trainer in trainers:
        assert trainer.ask("live", version=version, timeout=20) == {"tp": "updated"}
    for rank, worker in enumerate(workers):
        held = worker.ask("forward")
        assert len(held) == ZOO["zoo"]
        assert held == trainers[0].ask("digests", rank=rank, world_size=len(workers))
        assert worker.state()["version"] == f"policy@run-1#{version}"


def usage(daemon: Daemon, trainers: list[Trainer], workers: list[Worker]) -> dict[str, dict[str, int]]:
    """What every process holds, without what their allocators keep of the tensors that the test had them make."""
    for child in (*trainers, *workers):
        child.ask("trim")
    return {process.name: process.usage() for process in (daemon, *trainers, *workers)}


@pytest.mark.parametrize(("way", "gpus", "slots"), [("landing", 1, 3), ("ipc", 2, 2), ("tcp", 3, 1)])
def test_every_byte_of_every_kind_of_tensor_arrives(node: Node, way: str, gpus: int, slots: int) -> None:
    """With several sets of slots each fetches its share of a bucket and gets the rest from the others."""
    daemon = node.start_daemon(
        device__gpus=gpus, device__slots=slots, ingest__insecure=True, ingest__listen=["tcp://127.0.0.1:0"]
    )
    endpoint = daemon.tcp_endpoint() if way == "tcp" else daemon.front
    trainers = node.trainers(RANKS, endpoint=endpoint, landing=way == "landing")
    workers = node.engine("tp", world_size=2, recipe=ZOO, slicing=True)
    for version in (1, 2, 3):
        publish(trainers, workers, version)
        found = {trainer["transport"] for trainer in daemon.status()["trainers"]}
        assert found == {"landing" if way == "landing" else "inline"}


@pytest.mark.timeout(600)
def test_nothing_grows_with_the_number_of_versions(node: Node) -> None:
    daemon = node.start_daemon(fresh=True)
    trainers = node.trainers(RANKS)
    workers = node.engine("tp", world_size=2, recipe=ZOO, slicing=True)
    for version in range(1, WARM_UP + 1):
        publish(trainers, workers, version)
    before = usage(daemon, trainers, workers)
    free = daemon.free_bytes
    for version in range(WARM_UP + 1, VERSIONS + 1):
        publish(trainers, workers, version)
    after = usage(daemon, trainers, workers)
    for name, was in before.items():
        is_now = after[name]
        print(name, was, "->", is_now)
        assert is_now["threads"] <= was["threads"] + 4, name  # pools start their threads as they need them
        assert is_now["rss_bytes"] < was["rss_bytes"] + GROWTH_BYTES, name
    assert daemon.free_bytes == free
    for process in (daemon, *trainers, *workers):  # the daemon may have a file of its state open for a moment
        most, what = before[process.name]["fds"], f"{process.name} has closed what it opened"
        until(lambda process=process, most=most: process.usage()["fds"] <= most, what)  # type: ignore[misc]


def test_trainer_cannot_change_what_is_staged(node: Node) -> None:
    """It writes to all memory that it shares with the daemon, and to its tensors, while engines take the version."""
    daemon = node.start_daemon()
    trainer = node.trainer()
    first = node.engine("first", target="callback", recipe=ZOO)[0]
    first.ask("arm", at=1)
    trainer.ask("build", recipe=ZOO, seed=1)
    expected = trainer.ask("digests")
    trainer.ask("publish", version=1)
    trainer.ask("staged", version=1, timeout=15)
    first.event("reached")
    shared = trainer.ask("scribble")
    assert any("cpe-landing" in name for name in shared)
    assert not [name for name in shared if "cpe-arena" in name or "cpe-slots" in name]
    assert trainer.ask("digests") != expected
    first.ask("go")
    trainer.ask("live", version=1, timeout=15)
    assert first.ask("forward") == expected
    second = node.engine("second", recipe=ZOO)[0]
    second.ask("ready", timeout=15)
    assert second.ask("forward") == expected
    assert daemon.version(1)["state"] == "live"
