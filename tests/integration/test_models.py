"""Two models on one daemon, each with its own retention and its own quota: neither costs the other one anything."""

from __future__ import annotations

import pytest

from cpe_daemon.errors import ArenaFullError
from tests.integration.harness import Node, Trainer

RECIPE = {"plain": 4, "nbytes": 1 << 20}
MIB = 1 << 20
SETTINGS = {"policy": {"versions": 2}, "critic": {"versions": 5, "quota_bytes": "8MiB"}}
"""A version takes 4 MiB: the critic has room for one beside the one that is live, whatever it would like to keep."""


def publish(trainer: Trainer, version: int) -> dict[str, str]:
    """Publish a version and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    trainer.publish_live(version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def held(node: Node, model: str) -> list[tuple[int, str]]:
    """A model's versions that hold bytes, by number."""
    versions = node.daemon.status()["versions"]
    return sorted((v["number"], v["state"]) for v in versions if v["model"] == model and v["nbytes"])


def test_each_model_has_its_own_retention_and_quota(node: Node) -> None:
    node.start_daemon(models=SETTINGS, retention__versions=1)
    of_policy = node.engine("policy", recipe=RECIPE, model="policy")[0]
    of_critic = node.engine("critic", recipe=RECIPE, model="critic")[0]
    policy, critic = node.trainer(model="policy"), node.trainer(model="critic")
    for number in (1, 2, 3, 4):
        policy_bytes, critic_bytes = publish(policy, number), publish(critic, number)
    assert held(node, "policy") == [(2, "retained"), (3, "retained"), (4, "live")]
    assert held(node, "critic") == [(3, "retained"), (4, "live")]  # its quota, not its five versions, said so
    assert (of_policy.ask("forward"), of_critic.ask("forward")) == (policy_bytes, critic_bytes)
    assert node.daemon.status()["models"] == [
        {"model": "critic", "used_bytes": 8 * MIB, "quota_bytes": 8 * MIB, "versions": 5},
        {"model": "policy", "used_bytes": 12 * MIB, "quota_bytes": 0, "versions": 2},
    ]

    critic.ask("build", recipe={"plain": 5, "nbytes": MIB}, seed=5)
    critic.ask("publish", version=5)
    with pytest.raises(ArenaFullError, match=r"model critic has no room for 5\.0 MiB .* quota of 8\.0 MiB"):
        critic.ask("staged", version=5, timeout=10)
    assert held(node, "critic") == [(3, "retained"), (4, "live")]  # a rollback is not given up for what does not fit
    assert held(node, "policy") == [(2, "retained"), (3, "retained"), (4, "live")]
    assert of_critic.ask("forward") == critic_bytes
    assert publish(critic, 6) == of_critic.ask("forward")
    assert held(node, "critic") == [(4, "retained"), (6, "live")]
