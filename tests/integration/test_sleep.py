"""Engines that lend their GPU to a trainer between pushes, and wake up with other weights than the live ones."""

from __future__ import annotations

import pytest

from cpe_daemon.errors import EngineError, ManifestError, PublishError
from tests.integration.harness import Node, Trainer
from tests.integration.processes import until

RECIPE = {"plain": 6, "nbytes": 256 << 10}


def publish(trainer: Trainer, version: int) -> tuple[dict[str, str], dict[str, str]]:
    """Publish a version; the outcome by engine, and what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    outcomes = trainer.publish_live(version)
    digests: dict[str, str] = trainer.ask("digests")
    return outcomes, digests


def slots(node: Node) -> int:
    return int(node.daemon.status()["device"]["gpus"][0]["slots"])


def test_engine_that_slept_gets_what_went_live_meanwhile_before_it_serves(node: Node) -> None:
    node.start_daemon()
    trainer, engine = node.trainer(), node.engine(recipe=RECIPE)[0]
    assert publish(trainer, 1)[0] == {"e": "updated"}
    engine.ask("sleep")
    until(lambda: slots(node) == 0, "the slots are given back")
    assert node.daemon.engine("e")["state"] == "asleep"
    readiness = node.daemon.status()["readiness"]
    assert (readiness["ready"], readiness["warnings"][-1]["code"]) == (True, "engine_asleep")
    outcomes, expected = publish(trainer, 2)
    assert outcomes == {"e": "asleep"}
    with pytest.raises(EngineError, match="it is asleep"):
        engine.ask("forward")
    engine.ask("wake_up")
    engine.ask("ready", timeout=15)
    assert engine.ask("forward") == expected
    until(lambda: node.daemon.engine("e")["content"] == "policy@run-1#2", "the daemon has heard that it serves")
    assert publish(trainer, 3)[0] == {"e": "updated"}


def test_engine_that_sleeps_through_a_restart_of_the_daemon_gets_the_live_version(node: Node) -> None:
    daemon = node.start_daemon()
    engine = node.engine(recipe=RECIPE)[0]
    publish(node.trainer(), 1)
    engine.ask("sleep")
    until(lambda: node.daemon.engine("e")["state"] == "asleep", "the daemon knows")
    daemon.stop()
    node.start_daemon()
    until(lambda: node.daemon.engine("e").get("state") == "asleep", "it is attached anew")
    outcomes, expected = publish(node.trainer(), 2)
    assert outcomes == {"e": "asleep"}
    engine.ask("wake_up")
    engine.ask("ready", timeout=15)
    assert engine.ask("forward") == expected


def test_engine_that_goes_to_sleep_in_the_midst_of_pushes_wakes_up_with_the_live_version(node: Node) -> None:
    """Whether the push or the sleep comes first is a matter of milliseconds, and must not matter."""
    node.start_daemon()
    trainer, bystander = node.trainer(), node.engine("bystander", recipe=RECIPE)[0]
    ranks = node.engine("pair", world_size=2, recipe=RECIPE)
    publish(trainer, 1)
    for version in range(2, 8):
        trainer.ask("build", recipe=RECIPE, seed=version)
        trainer.ask("publish", version=version)
        sleeping = [(rank, rank.begin("sleep")) for rank in ranks]
        outcomes = trainer.ask("live", version=version, timeout=20)
        assert outcomes["bystander"] == "updated"
        assert outcomes["pair"] in ("updated", "asleep", "failed", "kept")
        for rank, number in sleeping:
            rank.result(number)
        until(lambda: node.daemon.engine("pair")["state"] == "asleep", "the daemon knows")
        for rank in ranks:
            rank.ask("wake_up")
        expected = trainer.ask("digests")
        for rank in ranks:
            rank.ask("ready", timeout=15)
            assert rank.ask("forward") == expected
        assert bystander.ask("forward") == expected


def test_engine_is_woken_up_for_a_version(node: Node) -> None:
    node.start_daemon(push__asleep="wake")
    trainer, engine = node.trainer(), node.engine(recipe=RECIPE, on_wake=True)[0]
    publish(trainer, 1)
    engine.ask("sleep")
    until(lambda: node.daemon.engine("e")["state"] == "asleep", "the daemon knows")
    outcomes, expected = publish(trainer, 2)
    engine.event("woken")
    assert outcomes == {"e": "updated"}
    assert engine.ask("forward") == expected


def test_version_fails_for_an_engine_that_cannot_be_woken_up(node: Node) -> None:
    node.start_daemon(push__asleep="wake")
    trainer, engine = node.trainer(), node.engine(recipe=RECIPE)[0]
    publish(trainer, 1)
    engine.ask("sleep")
    until(lambda: node.daemon.engine("e")["state"] == "asleep", "the daemon knows")
    trainer.ask("build", recipe=RECIPE, seed=2)
    with pytest.raises((PublishError, EngineError), match="attached without on_wake"):
        trainer.publish_live(2)


# --- versions that do not fit ----------------------------------------------------------------------------------------


def test_version_that_no_engine_can_take_fails_before_its_bytes_have_come(node: Node) -> None:
    """It is told of with the manifest: no engine is paused, and no gigabytes are sent for nothing."""
    node.start_daemon()
    trainer, engine = node.trainer(gate_chunks=True), node.engine(recipe=RECIPE)[0]
    _, expected = publish(trainer, 1)
    trainer.ask("build", recipe={**RECIPE, "plain": 5}, seed=2)
    trainer.ask("arm", at=1)
    publishing = trainer.begin("publish", version=2)
    trainer.event("reached")  # before the first chunk is sent
    until(lambda: node.daemon.version(2)["state"] == "failed", "the engine has refused it")
    assert node.daemon.version(2)["error"].startswith("no engine here can take policy@run-1#2: engine 'e' rank 0")
    assert node.daemon.version(2)["error"].endswith("brings nothing for layers.5.weight")
    trainer.ask("go")
    trainer.result(publishing)
    with pytest.raises(ManifestError, match="no engine here can take"):
        trainer.ask("live", version=2, timeout=10)
    assert node.daemon.said.count('"event": "round.started"') == 1  # the first version's
    assert engine.ask("forward") == expected
    assert publish(trainer, 3)[0] == {"e": "updated"}


def test_engine_that_a_version_does_not_fit_serves_on_while_others_are_updated(node: Node) -> None:
    node.start_daemon()
    trainer = node.trainer()
    fits = node.engine("fits", recipe=RECIPE)[0]
    other = node.engine("other", recipe={**RECIPE, "add": ["layers.5.bias"]})[0]
    before = other.ask("forward")
    outcomes, expected = publish(trainer, 1)
    assert outcomes == {"fits": "updated", "other": "kept"}
    assert fits.ask("forward") == expected
    assert other.ask("digests") == before
