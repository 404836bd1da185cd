"""Faults of real GPUs: memory that is short, an engine killed while it loads, contexts that fail."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from cpe_daemon.errors import EngineError, PeerLostError
from tests.integration.harness import Node, Trainer, Worker
from tests.integration.processes import until

pytestmark = pytest.mark.gpu

RECIPE = {"plain": 12, "nbytes": 512 << 10}
"""Two tensors a bucket of 1 MiB."""

SLOT_BYTES = 1 << 30
"""What an engine takes to open slots is little beside it."""

LARGE_SLOTS = {"device__slot_bytes": SLOT_BYTES, "device__idle_seconds": 0}

MIDDLE = 7


def start(node: Node, **changes: Any) -> Trainer:
    """Start a daemon on all GPUs, and a trainer."""
    node.start_daemon(device__kind="cuda", deadlines__bucket_seconds=3, deadlines__abort_seconds=2, **changes)
    return node.trainer()


def engine(node: Node, name: str, gpu: int, **terms: Any) -> Worker:
    """Attach an engine with its tensors on a GPU."""
    return node.engine(name, recipe=RECIPE, device=f"cuda:{gpu}", **terms)[0]


def build(trainer: Trainer, version: int) -> dict[str, str]:
    """Make a version's tensors and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def last_gpu() -> int:
    return torch.cuda.device_count() - 1


def gpu_status(node: Node, gpu: int) -> dict[str, Any]:
    found: dict[str, Any] = node.daemon.status()["device"]["gpus"][gpu]
    return found


def test_engine_killed_while_it_loads_a_bucket_concerns_no_other_and_its_successor_is_updated(node: Node) -> None:
    trainer = start(node)
    bystander, victim = engine(node, "bystander", last_gpu()), engine(node, "victim", 0, target="callback")
    build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    victim.ask("arm", at=MIDDLE)
    trainer.ask("publish", version=2)
    live = trainer.begin("live", version=2, timeout=25)
    victim.event("reached")
    victim.kill()
    assert trainer.result(live) == {"bystander": "updated", "victim": "lost"}
    assert bystander.ask("forward") == expected
    successor = engine(node, "victim", 0, target="callback")
    successor.ask("ready", timeout=15)
    assert successor.ask("forward") == expected
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "victim": "updated"}
    assert successor.ask("forward") == bystander.ask("forward") == expected


def test_slots_are_fewer_where_memory_is_short(node: Node) -> None:
    trainer = start(node, **LARGE_SLOTS)
    worker = node.worker(recipe=RECIPE, device="cuda:0")
    worker.ask("digests")
    node.hog("cuda:0").ask("take_all_but", nbytes=SLOT_BYTES * 3 // 2)
    worker.ask("attach")
    expected = build(trainer, 1)
    assert trainer.publish_live(1) == {"e": "updated"}
    assert worker.ask("forward") == expected
    assert gpu_status(node, 0)["slots"] == 1
    assert "slots.reduced" in node.daemon.said


def test_engine_without_room_for_a_slot_serves_what_it_had_until_there_is_some(node: Node) -> None:
    trainer = start(node, **LARGE_SLOTS)
    worker, hog = node.worker(recipe=RECIPE, device="cuda:0"), node.hog("cuda:0")
    before = worker.ask("digests")
    hog.ask("take_all_but", nbytes=SLOT_BYTES // 2)
    worker.ask("attach")
    build(trainer, 1)
    with pytest.raises(EngineError, match=r"GPU-\S+ has no room for a slot of 1073741824 bytes .*lower device\.slot_b"):
        trainer.publish_live(1)
    assert worker.ask("forward") == before
    hog.ask("give_back")
    expected = build(trainer, 2)
    assert trainer.publish_live(2) == {"e": "updated"}
    assert worker.ask("forward") == expected
    assert gpu_status(node, 0)["slots"] == 3


def test_engine_whose_gpu_fails_is_dropped_alone_and_its_successor_is_updated(node: Node) -> None:
    trainer = start(node)
    bystander, failing = engine(node, "bystander", last_gpu()), engine(node, "failing", 0)
    build(trainer, 1)
    trainer.publish_live(1)
    failing.ask("break_context")
    expected = build(trainer, 2)
    assert trainer.publish_live(2) == {"bystander": "updated", "failing": "kept"}
    assert bystander.ask("forward") == expected
    assert "CUDA error: unspecified launch failure" in node.daemon.engine("failing")["error"]
    failing.kill()
    successor = engine(node, "failing", 0)
    successor.ask("ready", timeout=15)
    assert successor.ask("forward") == expected
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "failing": "updated"}
    assert successor.ask("forward") == bystander.ask("forward") == expected


def test_daemon_that_a_gpu_fails_says_so_begins_anew_and_pushes_the_next_version(node: Node) -> None:
    """One bad context, and the driver takes no calls of the process any more, for no GPU of it."""
    trainer = start(node, fresh=True, tricks={"on_signal": "break"})
    engines = {f"on-{gpu}": engine(node, f"on-{gpu}", gpu) for gpu in {0, last_gpu()}}
    held = build(trainer, 1)
    trainer.publish_live(1)
    node.daemon.signal(signal.SIGUSR1)
    until(lambda: "context broken" in node.daemon.said, "the context is broken")
    build(trainer, 2)
    with pytest.raises((EngineError, PeerLostError), match=r"copies to GPU-\S+ failed|the daemon stops"):
        trainer.publish_live(2)
    until(lambda: node.daemon.said.count("daemon.ready") == 2, "it has begun anew")
    assert node.daemon.said.count("gpu.failed") == torch.cuda.device_count()
    assert {name: worker.ask("forward") for name, worker in engines.items()} == dict.fromkeys(engines, held)
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == dict.fromkeys(engines, "updated")
    assert {name: worker.ask("forward") for name, worker in engines.items()} == dict.fromkeys(engines, expected)
    assert node.daemon.status()["daemon"]["pid"] == node.daemon.pid
