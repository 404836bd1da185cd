"""Engines that come, leave and come back, of every shape: none serves before it holds the live version."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from cpe_daemon.errors import BusyError, CpeError, EngineError, ManifestError, MisuseError
from tests.integration.harness import Node, Trainer
from tests.integration.processes import until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
TIED = {"plain": 0, "add": ["embed.weight", "head.weight", "scale"]}


@pytest.fixture
def trainer(node: Node) -> Trainer:
    """A trainer, and a daemon."""
    node.start_daemon(deadlines__hello_seconds=0.5)
    return node.trainer()


def publish(trainer: Trainer, version: int, recipe: dict[str, Any] = RECIPE) -> dict[str, str]:
    """Publish a version and return what an engine should hold of it."""
    trainer.ask("build", recipe=recipe, seed=version)
    trainer.publish_live(version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


@pytest.mark.parametrize("target", ["dict", "callback"])
def test_late_engine_gets_the_live_version_before_it_serves(node: Node, trainer: Trainer, target: str) -> None:
    expected = publish(trainer, 1)
    worker = node.worker(target=target, recipe=RECIPE)
    if target == "callback":
        worker.ask("arm", at=5)
    worker.ask("attach")
    if target == "callback":
        worker.event("reached")
        assert not worker.state()["serving"]
        with pytest.raises(EngineError, match="not serving"):
            worker.ask("forward")
        assert node.daemon.engine("e")["ready"] is False
        worker.ask("go")
    worker.ask("ready", timeout=15)
    assert worker.ask("forward") == expected
    until(lambda: node.daemon.engine("e")["content"] == "policy@run-1#1", "the daemon has heard that it serves")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({**RECIPE, "reshape": {"layers.9.weight": [512, 256]}}, r"layers\.9\.weight is \[512, 256\] here"),
        ({**RECIPE, "add": ["layers.9.bias"]}, r"brings nothing for layers\.9\.bias"),
    ],
    ids=["shape", "missing"],
)
def test_late_engine_that_the_live_version_does_not_fit_never_serves(
    node: Node, trainer: Trainer, recipe: dict[str, Any], reason: str
) -> None:
    publish(trainer, 1)
    worker = node.worker(recipe=recipe)
    worker.ask("attach")
    until(lambda: node.daemon.engine("e").get("state") == "quarantined", "the engine is quarantined")
    with pytest.raises(CpeError, match=reason):
        worker.ask("ready", timeout=0.1)
    with pytest.raises(EngineError, match=reason):
        worker.ask("forward")
    assert node.daemon.engine("e")["ready"] is False


def test_engine_serves_what_it_started_with_before_the_first_version(node: Node, trainer: Trainer) -> None:
    worker = node.engine(recipe=RECIPE)[0]
    worker.ask("ready", timeout=15)
    assert worker.state() == {"version": None, "serving": True, "why": None}
    assert publish(trainer, 1) == worker.ask("forward")


def test_engines_of_one_and_of_two_ranks_take_the_same_version(node: Node, trainer: Trainer) -> None:
    recipe = {"zoo": 40}
    whole = node.engine("whole", recipe=recipe)[0]
    halves = node.engine("halves", world_size=2, recipe=recipe, slicing=True)
    for version in (1, 2):
        assert publish(trainer, version, recipe) == whole.ask("forward")
        for rank, worker in enumerate(halves):
            assert worker.ask("forward") == trainer.ask("digests", rank=rank, world_size=2)


def test_engine_with_a_missing_rank_waits_for_it(node: Node, trainer: Trainer) -> None:
    first = node.worker("pair", 0, 2, recipe=RECIPE)
    first.ask("attach")
    expected = publish(trainer, 1)
    assert node.daemon.engine("pair")["ready"] is False
    until(lambda: node.daemon.engine("pair")["error"], "somebody complains")
    assert "rank" in node.daemon.engine("pair")["error"]
    second = node.worker("pair", 1, 2, recipe=RECIPE)
    second.ask("attach")
    for worker in (first, second):
        worker.await_serving(1)
        assert worker.ask("forward") == expected


def test_restarted_engine_gets_the_live_version(node: Node, trainer: Trainer) -> None:
    workers = node.engine(world_size=2, recipe=RECIPE)
    publish(trainer, 1)
    expected = publish(trainer, 2)
    for worker in workers:
        worker.kill()
    until(lambda: not any(w["present"] for w in node.daemon.engine("e")["workers"]), "they are gone")
    for worker in node.engine(world_size=2, recipe=RECIPE):
        worker.ask("ready", timeout=15)
        assert worker.ask("forward") == expected
    assert publish(trainer, 3)


def test_engine_that_dies_while_it_is_brought_up_is_brought_up_again(node: Node, trainer: Trainer) -> None:
    expected = publish(trainer, 1)
    first = node.worker(target="callback", recipe=RECIPE)
    first.ask("arm", at=5)
    first.ask("attach")
    first.event("reached")
    first.kill()
    second = node.engine(target="callback", recipe=RECIPE)[0]
    second.ask("ready", timeout=15)
    assert second.ask("forward") == expected


def test_version_that_is_staged_while_an_engine_is_brought_up_follows(node: Node, trainer: Trainer) -> None:
    publish(trainer, 1)
    late = node.worker(target="callback", recipe=RECIPE)
    late.ask("arm", at=5)
    late.ask("attach")
    late.event("reached")
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("publish", version=2)
    trainer.ask("staged", version=2, timeout=15)
    assert node.daemon.version(2)["state"] == "staged"
    late.ask("go")
    trainer.ask("live", version=2, timeout=15)
    late.await_serving(2)
    assert late.ask("forward") == trainer.ask("digests")


def test_engine_that_was_silent_for_too_long_catches_up(node: Node) -> None:
    daemon = node.start_daemon(deadlines__heartbeat_interval_seconds=0.2, deadlines__heartbeat_lost_seconds=3)
    trainer = node.trainer()
    silent = node.engine("silent", recipe=RECIPE)[0]
    publish(trainer, 1)
    silent.signal(signal.SIGSTOP)
    until(lambda: not daemon.engine("silent")["workers"][0]["present"], "it is given up")
    expected = publish(trainer, 2)
    silent.signal(signal.SIGCONT)
    silent.await_serving(2)
    assert silent.ask("forward") == expected


def test_engine_that_detaches_is_forgotten_and_keeps_its_weights(node: Node, trainer: Trainer) -> None:
    worker = node.engine(recipe=RECIPE)[0]
    held = publish(trainer, 1)
    worker.ask("close")
    until(lambda: not node.daemon.engine("e"), "it is forgotten")
    publish(trainer, 2)
    assert worker.ask("forward") == held


def test_engine_waits_for_a_daemon_that_is_not_there_yet(node: Node) -> None:
    daemon = node.start_daemon()
    assert daemon.stop() == 0
    worker = node.worker(recipe=RECIPE)
    attaching = worker.begin("attach")
    node.start_daemon()
    worker.result(attaching)
    worker.ask("ready", timeout=15)


def test_tied_weights_stay_tied(node: Node, trainer: Trainer) -> None:
    worker = node.engine(target="module")[0]
    tied = {**TIED, "reshape": {"embed.weight": [40, 16], "head.weight": [40, 16], "scale": [3]}}
    before = worker.ask("forward")
    trainer.ask("build", recipe={**tied, "drop": ["head.weight"]}, seed=1)
    trainer.publish_live(1)
    after = worker.ask("forward")
    expected = trainer.ask("digests")
    assert after == {**expected, "head.weight": expected["embed.weight"]} != before
    trainer.ask("build", recipe={**tied, "drop": ["embed.weight", "head.weight"]}, seed=2)
    with pytest.raises((ManifestError, EngineError), match=r"brings nothing for embed\.weight, head\.weight"):
        trainer.publish_live(2)
    worker.await_serving(1)
    assert worker.ask("forward") == after


def test_forward_pass_delays_the_update_until_it_ends(node: Node, trainer: Trainer) -> None:
    worker = node.engine(recipe=RECIPE)[0]
    before = publish(trainer, 1)
    worker.ask("acquire")
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("publish", version=2)
    until(lambda: node.daemon.engine("e")["state"] == "updating", "the round has begun")
    assert worker.ask("digests") == before
    worker.ask("release")
    trainer.ask("live", version=2, timeout=15)
    assert worker.ask("forward") == trainer.ask("digests")


def test_update_keeps_forward_passes_waiting_and_then_lets_them_on(node: Node, trainer: Trainer) -> None:
    worker = node.engine(target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    worker.ask("arm", at=5)
    trainer.ask("publish", version=2)
    worker.event("reached")
    serving = worker.begin("forward", timeout=15)
    worker.result(worker.begin("go"))
    assert worker.result(serving) == trainer.ask("digests")


def test_models_do_not_mix(node: Node, trainer: Trainer) -> None:
    policy = node.engine("policy", recipe=RECIPE, model="policy")[0]
    critic = node.engine("critic", recipe=RECIPE, model="critic")[0]
    critics = node.trainer(model="critic")
    of_policy, of_critic = publish(trainer, 1), publish(critics, 7)
    assert (policy.ask("forward"), critic.ask("forward")) == (of_policy, of_critic)
    of_policy = publish(trainer, 2)
    assert (policy.ask("forward"), critic.ask("forward")) == (of_policy, of_critic)
    late = node.engine("late", recipe=RECIPE, model="critic")[0]
    late.ask("ready", timeout=15)
    assert late.ask("forward") == of_critic


@pytest.mark.parametrize(
    ("terms", "kind", "reason"),
    [
        ({"rank": 0, "world_size": 2}, BusyError, "attached already"),
        ({"rank": 1, "world_size": 3}, MisuseError, "has 2 ranks"),
        ({"rank": 1, "world_size": 2, "model": "critic"}, MisuseError, "for model"),
        ({"rank": 1, "world_size": 2, "gpu": "shm-7"}, MisuseError, "is not this node's"),
    ],
    ids=["taken", "world size", "model", "gpu"],
)
def test_worker_that_does_not_belong_is_refused(
    node: Node, trainer: Trainer, terms: dict[str, Any], kind: type[CpeError], reason: str
) -> None:
    first = node.worker(world_size=2, recipe=RECIPE)
    first.ask("attach")
    stranger = node.worker(recipe=RECIPE, connect_timeout=5.0, **terms)
    with pytest.raises(kind, match=reason):
        stranger.ask("attach")
    second = node.worker(rank=1, world_size=2, recipe=RECIPE)
    second.ask("attach")
    expected = publish(trainer, 1)
    assert first.ask("forward") == second.ask("forward") == expected
