"""Trainers that die, stall, lie or contradict themselves: the live version stays, and nothing of theirs is left."""

from __future__ import annotations

import signal
import socket

import pytest
import zmq

from cpe_daemon.core.types import Shard
from cpe_daemon.errors import (
    ArenaFullError,
    DeadlineError,
    DigestError,
    ManifestError,
    PeerLostError,
    VersionRefusedError,
)
from tests.integration.harness import MODEL, Daemon, Node, Trainer, Worker
from tests.integration.processes import ChildError, until
from tests.integration.raw import RawTrainer

RECIPE = {"plain": 12, "nbytes": 256 << 10}
NBYTES = 12 * (256 << 10)


@pytest.fixture
def worker(node: Node) -> Worker:
    """An engine on a node with a daemon."""
    node.start_daemon(
        arena__size_bytes="16MiB",
        deadlines__heartbeat_interval_seconds=0.2,
        deadlines__heartbeat_lost_seconds=3,
        deadlines__receive_idle_seconds=3,
    )
    return node.engine(recipe=RECIPE)[0]


def publish(trainer: Trainer, worker: Worker, version: int) -> dict[str, str]:
    """Publish a version, see it arrive, and return its digests."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    assert trainer.publish_live(version) == {"e": "updated"}
    digests: dict[str, str] = trainer.ask("digests")
    assert worker.ask("forward") == digests
    return digests


def protocol_errors(daemon: Daemon) -> int:
    """How many messages it has refused."""
    counters = daemon.status()["counters"].items()
    return int(sum(value for name, value in counters if name.startswith("cpe_protocol_errors_total")))


@pytest.mark.parametrize("landing", [True, False], ids=["landing", "inline"])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_killed_trainer_leaves_nothing_behind(node: Node, worker: Worker, landing: bool, chunk: int) -> None:
    daemon = node.daemon
    held = publish(node.trainer(landing=landing), worker, 1)
    free = daemon.free_bytes
    doomed = node.trainer(landing=landing, gate_chunks=True)
    doomed.ask("build", recipe=RECIPE, seed=2)
    doomed.ask("arm", at=chunk)
    doomed.begin("publish", version=2)
    doomed.event("reached")
    assert daemon.version(2)["state"] == "receiving"
    doomed.kill()
    until(lambda: daemon.version(2)["state"] == "failed", "the version is given up")
    assert "is gone" in daemon.version(2)["error"]
    until(lambda: daemon.free_bytes == free, "its bytes are free again")
    assert worker.ask("forward") == held
    publish(node.trainer(landing=landing), worker, 2)


def test_stopped_trainer_is_given_up_and_may_come_back(node: Node, worker: Worker) -> None:
    daemon = node.daemon
    trainer = node.trainer()
    held = publish(trainer, worker, 1)
    free = daemon.free_bytes
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=3)
    trainer.begin("publish", version=2, watched=True)
    trainer.event("reached")
    trainer.signal(signal.SIGSTOP)
    until(lambda: daemon.version(2)["state"] == "failed", "the version is given up")
    until(lambda: not daemon.status()["trainers"], "the trainer is given up")
    until(lambda: daemon.free_bytes == free, "its bytes are free again")
    assert worker.ask("forward") == held
    trainer.signal(signal.SIGCONT)
    trainer.ask("go")
    with pytest.raises(PeerLostError):
        trainer.ask("live", version=2, timeout=10)
    publish(trainer, worker, 2)


def test_slow_trainer_passes_the_deadline(node: Node, worker: Worker) -> None:
    daemon = node.daemon
    trainer = node.trainer()
    publish(trainer, worker, 1)
    free = daemon.free_bytes
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=3)
    publishing = trainer.begin("publish", version=2, watched=True)
    trainer.event("reached")
    until(lambda: daemon.version(2)["state"] == "failed", "the version is given up")
    assert "nothing came" in daemon.version(2)["error"]
    until(lambda: daemon.free_bytes == free, "its bytes are free again")
    trainer.ask("go")
    trainer.result(publishing)
    with pytest.raises(DeadlineError, match=r"ranks \[0\] of 1 have not sealed"):
        trainer.ask("live", version=2, timeout=10)
    publish(trainer, worker, 2)


def test_missing_rank_is_named(node: Node, worker: Worker) -> None:
    ranks = [node.trainer(rank, 3) for rank in (0, 2)]
    for trainer in ranks:
        trainer.ask("build", recipe=RECIPE, seed=1)
        trainer.ask("publish", version=1)
    for trainer in ranks:
        with pytest.raises(DeadlineError, match=r"ranks \[1\] of 3 have not sealed"):
            trainer.ask("staged", version=1, timeout=15)
    size = node.daemon.status()["arena"]["size_bytes"]
    until(lambda: node.daemon.free_bytes == size, "their bytes are free again")


def test_killed_rank_fails_the_version_of_all(node: Node, worker: Worker) -> None:
    survivor, doomed = node.trainer(0, 2), node.trainer(1, 2, gate_chunks=True)
    doomed.ask("arm", at=2)
    for trainer in (survivor, doomed):
        trainer.ask("build", recipe=RECIPE, seed=1)
        trainer.begin("publish", version=1)
    doomed.event("reached")
    doomed.kill()
    with pytest.raises(PeerLostError, match=r"trainer rank 1/2 of policy .* is gone"):
        survivor.ask("live", version=1, timeout=15)
    successor = node.trainer(1, 2)
    successor.ask("build", recipe=RECIPE, seed=1)
    for trainer in (survivor, successor):
        trainer.ask("publish", version=1)
    assert survivor.ask("live", version=1, timeout=15) == {"e": "updated"}
    assert worker.ask("forward") == survivor.ask("digests")


def test_rank_that_dies_after_its_seal_is_not_mixed_with_its_successor(node: Node, worker: Worker) -> None:
    survivor, doomed = node.trainer(0, 2), node.trainer(1, 2)
    doomed.ask("build", recipe=RECIPE, seed=1)
    doomed.ask("publish", version=1)
    until(lambda: node.daemon.version(1).get("ranks_sealed") == 1, "the rank has sealed")
    doomed.kill()
    until(lambda: node.daemon.version(1).get("state") == "failed", "the version went with its rank")
    successor = node.trainer(1, 2)
    for trainer in (survivor, successor):
        trainer.ask("build", recipe=RECIPE, seed=2)
        trainer.ask("publish", version=1)
    assert survivor.ask("live", version=1, timeout=15) == {"e": "updated"}
    assert worker.ask("forward") == survivor.ask("digests")


def test_absent_daemon_is_named(node: Node, worker: Worker) -> None:
    trainer = node.trainer(endpoint=f"ipc://{node.runtime_dir}/nobody.sock", connect_timeout=0.5)
    trainer.ask("build", recipe=RECIPE, seed=1)
    with pytest.raises(PeerLostError, match=r"no daemon answered at ipc://.*/nobody\.sock"):
        trainer.ask("publish", version=1)


def test_garbage_at_every_socket_changes_nothing(node: Node, worker: Worker) -> None:
    daemon = node.daemon
    trainer = node.trainer()
    held = publish(trainer, worker, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=5)
    publishing = trainer.begin("publish", version=2, watched=True)
    trainer.event("reached")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for endpoint in (daemon.front, daemon.engines):
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 1000)
            stranger.connect(endpoint)
            for frames in ([b""], [b"cpe1"], [b"\x80\x04}."], [b"x" * 5000] * 3, [bytes(17 << 20)]):
                stranger.send_multipart(frames)
    context.term()
    for request in (b"GET / HTTP/1.0\r\n\r\n", b"cpe-fd1:" + bytes(32)):
        with socket.socket(socket.AF_UNIX) as stranger_at_the_handoff:
            stranger_at_the_handoff.connect(str(node.runtime_dir / "handoff.sock"))
            stranger_at_the_handoff.sendall(request)
            stranger_at_the_handoff.settimeout(10)
            assert stranger_at_the_handoff.recv(64) == b""
    until(lambda: protocol_errors(daemon) == 10, "all but the oversized ones, which are cut off, are counted")
    assert worker.ask("forward") == held
    trainer.ask("go")
    trainer.result(publishing)
    assert trainer.ask("live", version=2, timeout=15) == {"e": "updated"}
    assert worker.ask("forward") == trainer.ask("digests")


def test_trainer_that_gives_up_says_so(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    held = publish(trainer, worker, 1)
    free = node.daemon.free_bytes
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=2, then="raise")
    with pytest.raises(ChildError, match="told to raise"):
        trainer.ask("publish", version=2, watched=True)
    until(lambda: node.daemon.version(2)["state"] == "failed", "the version is given up")
    assert "gave up" in node.daemon.version(2)["error"]
    until(lambda: node.daemon.free_bytes == free, "its bytes are free again")
    assert worker.ask("forward") == held
    publish(trainer, worker, 2)


def test_flipped_bit_is_found_and_its_tensor_named(node: Node, worker: Worker) -> None:
    daemon = node.daemon
    held = publish(node.trainer(), worker, 1)
    free = daemon.free_bytes
    shards = [Shard(f"layers.{index}.weight", "float32", (65536,)) for index in range(12)]
    data = bytes(range(256)) * (NBYTES // 256)
    flipped = bytearray(data)
    flipped[7 * (256 << 10) + 12345] ^= 0x10
    with RawTrainer(daemon.front) as trainer:
        stream = trainer.open(2, shards)
        trainer.send_bytes(stream, bytes(flipped))
        trainer.seal(stream, shards, data)
        with pytest.raises(DigestError, match=r"the bytes of layers\.7\.weight differ"):
            trainer.await_state("staged")
        assert daemon.version(2)["state"] == "failed"
        until(lambda: daemon.free_bytes == free, "its bytes are free again")
        assert worker.ask("forward") == held
        stream = trainer.open(2, shards)
        trainer.send_bytes(stream, data)
        trainer.seal(stream, shards, data)
        trainer.await_state("live")
    assert daemon.engine("e")["content"] == f"{MODEL}@run-1#2"


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("int32", r"rank 1 contributes layers\.0\.weight"),
        ("float32", r"layers\.0\.weight is contributed more than once"),
    ],
)
def test_contradicting_ranks_are_refused(node: Node, worker: Worker, dtype: str, reason: str) -> None:
    name = "layers.0.weight"
    worker.ask("close")  # it would say that the tensors do not fit it
    trainers = node.trainers(2)
    for trainer, names in zip(trainers, ([name], ["padding", name]), strict=True):  # the second's is every second
        recipe = {"plain": 0, "add": names, "retype": {name: dtype} if len(names) > 1 else {}}
        trainer.ask("build", recipe=recipe, seed=1)
        trainer.ask("publish", version=1)
    for trainer in trainers:
        with pytest.raises(ManifestError, match=reason):
            trainer.ask("live", version=1, timeout=10)
    size = node.daemon.status()["arena"]["size_bytes"]
    until(lambda: node.daemon.free_bytes == size, "their bytes are free again")


def test_regression_is_refused_and_a_failed_number_is_not_used_up(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    publish(trainer, worker, 5)
    trainer.ask("publish", version=4)
    with pytest.raises(VersionRefusedError, match="publish 6 or higher"):
        trainer.ask("staged", version=4, timeout=10)
    trainer.ask("arm", at=2, then="raise")
    with pytest.raises(ChildError, match="told to raise"):
        trainer.ask("publish", version=6, watched=True)
    publish(trainer, worker, 6)
    other = node.trainer(run="run-2")
    publish(other, worker, 1)
    trainer.ask("publish", version=7)
    with pytest.raises(VersionRefusedError, match="superseded"):
        trainer.ask("staged", version=7, timeout=10)
    trainer.ask("publish", version=8, force=True)
    trainer.ask("live", version=8, timeout=20)
    assert worker.state()["version"] == f"{MODEL}@run-1#8"


def test_full_arena_is_refused_with_its_figures(node: Node, worker: Worker) -> None:
    trainer = node.trainer()
    held = publish(trainer, worker, 1)
    trainer.ask("build", recipe={"plain": 20, "nbytes": 1 << 20}, seed=2)
    trainer.ask("publish", version=2)
    with pytest.raises(ArenaFullError, match=r"no room for 20\.0 MiB .* 13\.0 MiB \(\d+ bytes\) free"):
        trainer.ask("staged", version=2, timeout=10)
    assert worker.ask("forward") == held
    publish(trainer, worker, 2)


def test_two_publishes_at_once_are_pushed_in_order(node: Node, worker: Worker) -> None:
    slow = node.engine("slow", target="callback", recipe=RECIPE)[0]
    slow.ask("arm", at=1)
    trainer = node.trainer()
    for version in (1, 2):
        trainer.ask("build", recipe=RECIPE, seed=version)
        trainer.ask("publish", version=version)
        trainer.ask("staged", version=version, timeout=10)
    slow.event("reached")
    assert [node.daemon.version(number)["state"] for number in (1, 2)] == ["pushing", "staged"]
    slow.ask("go")
    for version in (1, 2):
        assert trainer.ask("live", version=version, timeout=20) == {"e": "updated", "slow": "updated"}
    assert worker.ask("forward") == slow.ask("forward") == trainer.ask("digests")
    assert [node.daemon.version(number)["state"] for number in (1, 2)] == ["retained", "live"]
