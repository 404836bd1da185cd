"""Engines that die, hang, raise or hold other tensors: none ever serves a mixture, and the others take no notice."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from cpe_daemon.errors import EngineError, ManifestError
from tests.integration.harness import MODEL, RUN, Node, Trainer
from tests.integration.processes import until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
"""Two tensors a bucket of 1 MiB."""

FIRST, MIDDLE, LAST = 1, 7, 12


@pytest.fixture
def trainer(node: Node) -> Trainer:
    """A trainer, and a daemon that waits for a bucket no longer than it must."""
    node.start_daemon(deadlines__bucket_seconds=3, deadlines__abort_seconds=2, deadlines__pause_seconds=2)
    return node.trainer()


def build(trainer: Trainer, version: int, **changes: Any) -> dict[str, str]:
    """Make a version's tensors and return what an engine should hold of it."""
    trainer.ask("build", recipe={**RECIPE, **changes}, seed=version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def begin(trainer: Trainer, version: int) -> int:
    """Publish, and return the number under which the outcome can be awaited."""
    trainer.ask("publish", version=version)
    return trainer.begin("live", version=version, timeout=25)


def test_killed_worker_is_dropped_and_its_successor_gets_the_live_version_first(node: Node, trainer: Trainer) -> None:
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    survivor, victim = node.engine("pair", world_size=2, target="callback", recipe=RECIPE)
    build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    victim.ask("arm", at=MIDDLE)
    live = begin(trainer, 2)
    victim.event("reached")
    victim.kill()
    assert trainer.result(live) == {"bystander": "updated", "pair": "lost"}
    assert bystander.ask("forward") == expected
    assert node.daemon.engine("pair")["ready"] is False
    assert not survivor.state()["serving"]
    with pytest.raises(EngineError, match="not serving"):
        survivor.ask("forward")

    successor = node.worker("pair", 1, 2, target="callback", recipe=RECIPE)
    successor.ask("attach")
    successor.ask("ready", timeout=15)
    survivor.ask("ready", timeout=15)
    assert successor.ask("forward") == survivor.ask("forward") == expected
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "pair": "updated"}
    assert successor.ask("forward") == survivor.ask("forward") == bystander.ask("forward") == expected


def test_stopped_worker_passes_the_deadline_and_is_restored_when_it_wakes(node: Node, trainer: Trainer) -> None:
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    stopped = node.engine("stopped", target="callback", recipe=RECIPE)[0]
    build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    stopped.ask("arm", at=MIDDLE)
    live = begin(trainer, 2)
    stopped.event("reached")
    stopped.signal(signal.SIGSTOP)
    assert trainer.result(live, 30) == {"bystander": "updated", "stopped": "failed"}
    assert bystander.ask("forward") == expected
    until(lambda: node.daemon.engine("stopped")["state"] == "quarantined", "the engine is given up")
    engine = node.daemon.engine("stopped")
    assert engine["ready"] is False
    assert "engine 'stopped' rank 0" in engine["error"]
    assert "did not load a bucket within 3 s" in engine["error"]
    assert bystander.ask("forward") == expected

    stopped.signal(signal.SIGCONT)
    stopped.ask("go")
    assert not stopped.state()["serving"]
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "stopped": "updated"}
    assert stopped.ask("forward") == bystander.ask("forward") == expected


@pytest.mark.parametrize("at", [FIRST, MIDDLE, LAST])
def test_raising_loader_is_restored_to_what_it_held(node: Node, trainer: Trainer, at: int) -> None:
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    before = build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    raising.ask("arm", at=at, then="raise")
    assert trainer.publish_live(2) == {"bystander": "updated", "raising": "failed"}
    assert bystander.ask("forward") == expected
    raising.await_serving(1)
    assert raising.ask("forward") == before
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "raising": "updated"}
    assert raising.ask("forward") == expected


@pytest.mark.parametrize("at", [FIRST, LAST])
def test_only_engine_that_raises_fails_the_version_and_is_restored(node: Node, trainer: Trainer, at: int) -> None:
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    before = build(trainer, 1)
    trainer.publish_live(1)
    build(trainer, 2)
    raising.ask("arm", at=at, then="raise")
    with pytest.raises(EngineError, match="told to raise"):
        trainer.publish_live(2)
    raising.await_serving(1)
    assert raising.ask("forward") == before
    assert node.daemon.version(2)["state"] == "failed"
    assert node.daemon.version(1)["state"] == "live"


def test_raising_loader_without_a_previous_version_is_quarantined_until_the_next(node: Node, trainer: Trainer) -> None:
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    build(trainer, 1)
    raising.ask("arm", at=MIDDLE, then="raise")
    with pytest.raises(EngineError, match="told to raise"):
        trainer.publish_live(1)
    until(lambda: node.daemon.engine("raising")["state"] == "quarantined", "the engine is quarantined")
    assert not raising.state()["serving"]
    with pytest.raises(EngineError, match="mixture"):
        raising.ask("forward")
    expected = build(trainer, 2)
    assert trainer.publish_live(2) == {"raising": "updated"}
    assert raising.ask("forward") == expected


def test_loader_that_always_raises_stays_paused_and_says_so(node: Node, trainer: Trainer) -> None:
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    build(trainer, 1)
    trainer.publish_live(1)
    build(trainer, 2)
    raising.ask("arm", at=1, then="raise", every=True)
    with pytest.raises(EngineError, match="told to raise"):
        trainer.publish_live(2)
    until(lambda: node.daemon.engine("raising")["state"] == "quarantined", "the engine is quarantined")
    assert not raising.state()["serving"]
    raising.ask("arm")
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"raising": "updated"}
    assert raising.ask("forward") == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"retype": {"layers.9.weight": "int32"}}, r"layers\.9\.weight is torch\.float32 here, torch\.int32"),
        ({"reshape": {"layers.9.weight": [512, 256]}}, r"layers\.9\.weight is \[131072\] here, \[512, 256\]"),
        ({"add": ["layers.9.bias"]}, r"no tensor here is called layers\.9\.bias"),
        ({"drop": ["layers.9.weight"]}, r"brings nothing for layers\.9\.weight"),
        ({"drop": ["layers.9.weight"], "add": ["layers.9.wieght"]}, r"no tensor here is called layers\.9\.wieght"),
    ],
    ids=["dtype", "shape", "extra", "missing", "misspelt"],
)
def test_version_that_does_not_fit_fails_and_the_engine_keeps_what_it_had(
    node: Node, trainer: Trainer, changes: dict[str, Any], reason: str
) -> None:
    workers = node.engine(world_size=2, recipe=RECIPE)
    before = build(trainer, 1)
    trainer.publish_live(1)
    build(trainer, 2, **changes)
    with pytest.raises((ManifestError, EngineError), match=reason):  # as soon as it is known, or when it is pushed
        trainer.publish_live(2)
    for worker in workers:
        worker.await_serving(1)
        assert worker.ask("forward") == before
    expected = build(trainer, 2)  # the failed version may have been staged, so its number may be used up
    trainer.publish_live(3)
    for worker in workers:
        assert worker.ask("forward") == expected


def test_first_version_that_does_not_fit_touches_nothing(node: Node, trainer: Trainer) -> None:
    (worker,) = node.engine(recipe=RECIPE)
    before = worker.ask("forward")
    build(trainer, 1, reshape={"layers.9.weight": [512, 256]})  # the last tensor: what comes before it would fit
    with pytest.raises((ManifestError, EngineError), match=r"layers\.9\.weight is \[131072\] here, \[512, 256\]"):
        trainer.publish_live(1)
    assert worker.state()["serving"]
    assert worker.ask("forward") == before
    assert node.daemon.engine("e")["state"] == "current"


def test_forward_pass_that_never_ends_keeps_its_version(node: Node, trainer: Trainer) -> None:
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    busy = node.engine("busy", recipe=RECIPE)[0]
    before = build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    busy.ask("acquire")
    assert trainer.publish_live(2) == {"bystander": "updated", "busy": "kept"}
    assert busy.state() == {"version": f"{MODEL}@{RUN}#1", "serving": True, "why": None}
    busy.ask("release")
    assert busy.ask("forward") == before
    assert bystander.ask("forward") == expected
    assert "held the serving lock" in node.daemon.engine("busy")["error"]


def test_worker_that_hangs_at_its_pause_is_dropped_alone(node: Node, trainer: Trainer) -> None:
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    hanging = node.engine("hanging", recipe=RECIPE)[0]
    before = build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    hanging.signal(signal.SIGSTOP)
    outcomes = trainer.publish_live(2, 30)
    assert outcomes["bystander"] == "updated"
    assert bystander.ask("forward") == expected
    hanging.signal(signal.SIGCONT)
    assert hanging.ask("forward", timeout=15) in (before, expected)
    expected = build(trainer, 3)
    assert trainer.publish_live(3) == {"bystander": "updated", "hanging": "updated"}
    assert hanging.ask("forward") == expected
