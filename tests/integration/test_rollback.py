"""Versions that are taken back, and those who wait for one, against a real daemon with real trainers and engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from cpe_daemon.cli import main
from cpe_daemon.errors import DeadlineError, EngineError, MisuseError, PublishError, VersionRefusedError
from tests.integration.harness import MODEL, RUN, Node, Trainer
from tests.integration.processes import ROOT, until
from tests.integration.test_metrics import get, value

RECIPE = {"plain": 12, "nbytes": 512 << 10}


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def cpe(node: Node, *words: str) -> Result:
    """Run a command at the node's daemon."""
    return CliRunner().invoke(main, [*words, "--runtime-dir", str(node.runtime_dir)])


def build(trainer: Trainer, version: int) -> dict[str, str]:
    """Make a version's tensors and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def two_live(trainer: Trainer) -> tuple[dict[str, str], dict[str, str]]:
    """Publish versions 1 and 2, and return what an engine should hold of each."""
    first = build(trainer, 1)
    trainer.publish_live(1)
    second = build(trainer, 2)
    trainer.publish_live(2)
    return first, second


def counted(node: Node, name: str) -> float:
    return float(node.daemon.status()["counters"].get(name, 0.0))


# --- a rollback that is asked for ------------------------------------------------------------------------------------


def test_rollback_brings_the_bytes_back_that_were_live_before(node: Node) -> None:
    node.start_daemon()
    pair = node.engine("pair", world_size=2, recipe=RECIPE)
    (single,) = node.engine("single", recipe=RECIPE)
    trainer = node.trainer()
    first, second = two_live(trainer)
    assert single.ask("forward") == second
    both = [worker.ask("forward") for worker in pair]
    assert f"{MODEL}@{RUN}#2 → {MODEL}@{RUN}#1" in cpe(node, "status").stdout

    result = cpe(node, "rollback", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["version"]["number"] == 1
    assert {name: engine["outcome"] for name, engine in report["engines"].items()} == {
        "pair": "updated",
        "single": "updated",
    }
    assert single.ask("forward") == first
    assert all(worker.ask("forward") != before for worker, before in zip(pair, both, strict=True))
    assert (node.daemon.version(1)["state"], node.daemon.version(2)["state"]) == ("live", "retained")
    assert counted(node, 'cpe_rollbacks_total{cause="operator"}') == 1

    again = cpe(node, "rollback", MODEL, "--to", "1")
    assert (again.exit_code, again.stderr) == (0, f"note: {MODEL}@{RUN}#1 is live already: nothing was pushed\n")
    assert cpe(node, "rollback", MODEL, "--to", "2").exit_code == 0
    assert single.ask("forward") == second
    assert [worker.ask("forward") for worker in pair] == both


def test_trainer_rolls_back_its_own_model_and_goes_on_with_a_higher_number(node: Node) -> None:
    node.start_daemon()
    (worker,) = node.engine(recipe=RECIPE)
    trainer = node.trainer()
    with pytest.raises(MisuseError, match="no version of policy is retained here: none was live"):
        trainer.ask("rollback")
    first, _ = two_live(trainer)
    assert trainer.ask("rollback") == {"number": 1, "engines": {"e": "updated"}, "notes": [""]}
    assert worker.ask("forward") == first
    assert trainer.ask("rollback", to=1)["notes"] == [f"{MODEL}@{RUN}#1 is live already: nothing was pushed"]
    build(trainer, 1)
    trainer.ask("publish", version=0)
    with pytest.raises(VersionRefusedError, match="publish 3 or higher"):
        trainer.ask("live", version=0, timeout=20)
    third = build(trainer, 3)
    assert trainer.publish_live(3) == {"e": "updated"}
    assert worker.ask("forward") == third
    assert counted(node, 'cpe_rollbacks_total{cause="trainer"}') == 1


def test_ranks_do_not_undo_each_other_s_rollback(node: Node) -> None:
    node.start_daemon()
    two_live(node.trainer())
    second = node.trainer(1, 2, run="other")
    with pytest.raises(MisuseError, match=r"rank 1 rolls back only to a version that it names: rollback\(to=\.\.\.\)"):
        second.ask("rollback")
    assert second.ask("rollback", to=1)["number"] == 1


def test_version_stays_live_if_no_engine_takes_the_one_before(node: Node) -> None:
    node.start_daemon(deadlines__pause_seconds=3)
    (worker,) = node.engine(recipe=RECIPE)
    trainer = node.trainer()
    first, second = two_live(trainer)
    worker.ask("acquire")
    failed = cpe(node, "rollback")
    assert failed.exit_code == 7
    assert f"{MODEL}@{RUN}#1 was not rolled back to: e (kept):" in failed.stderr
    assert f"{MODEL}@{RUN}#2 stays live" in failed.stderr
    worker.ask("release")
    assert worker.ask("forward") == second
    assert node.daemon.version(1)["state"] == "retained"
    assert cpe(node, "rollback").exit_code == 0
    assert worker.ask("forward") == first


def test_what_cannot_be_rolled_back_says_why(node: Node) -> None:
    node.start_daemon(retention__versions=0)
    trainer = node.trainer()
    two_live(trainer)
    refused = cpe(node, "rollback")
    assert refused.exit_code == 3
    assert "no version of policy is retained here: retention.versions is 0" in refused.stderr
    assert "there is: policy@run-1#2 (live)" in refused.stderr
    assert "nothing is retained" in cpe(node, "status").stdout


# --- a version that not all engines took -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keep", "rollback"])
def test_version_that_one_engine_fails_to_take(policy: str, node: Node) -> None:
    node.start_daemon(push__partial=policy)
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    (good,) = node.engine("good", recipe=RECIPE)
    trainer = node.trainer()
    first = build(trainer, 1)
    trainer.publish_live(1)
    second = build(trainer, 2)
    raising.ask("arm", at=1, then="raise")
    if policy == "keep":
        assert trainer.publish_live(2) == {"raising": "failed", "good": "updated"}
        assert good.ask("forward") == second
    else:
        with pytest.raises(
            EngineError, match=r"policy@run-1#2 was taken back from good \(push.partial: rollback\), si"
        ):
            trainer.publish_live(2)
        until(lambda: node.daemon.engine("good")["content"] == f"{MODEL}@{RUN}#1", "it is taken back")
        assert good.ask("forward") == first
        assert (node.daemon.version(1)["state"], node.daemon.version(2)["state"]) == ("live", "failed")
        assert counted(node, 'cpe_rollbacks_total{cause="partial"}') == 1
    until(lambda: node.daemon.engine("raising")["ready"], "the other one is restored")
    assert raising.ask("forward") == first


def test_version_that_waits_is_superseded_and_its_trainer_told(node: Node) -> None:
    node.start_daemon(push__newer="supersede")
    slow = node.engine(target="callback", recipe=RECIPE)[0]
    trainer = node.trainer()
    build(trainer, 1)
    slow.ask("arm", at=1)
    trainer.ask("publish", version=1)
    slow.event("reached")
    for version in (2, 3):
        third = build(trainer, version)
        trainer.ask("publish", version=version)
        trainer.ask("staged", version=version, timeout=20)
    with pytest.raises(PublishError, match=r"policy@run-1#2 was superseded by policy@run-1#3 before its turn came"):
        trainer.ask("live", version=2, timeout=20)
    slow.ask("go")
    assert trainer.ask("live", version=3, timeout=20) == {"e": "updated"}
    assert slow.ask("forward") == third


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_version_is_waited_for_by_a_command_and_by_another_trainer(node: Node) -> None:
    node.start_daemon()
    trainer, other = node.trainer(), node.trainer(run="evaluation")
    waiting = other.begin("wait_live", number=1, run=RUN, timeout=30)
    command = [sys.executable, "-m", "cpe_daemon", "wait", MODEL, "--version", "1", "--timeout", "30"]
    process = subprocess.Popen(
        [*command, "--runtime-dir", str(node.runtime_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        build(trainer, 2)
        trainer.publish_live(2)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (0, f"{MODEL}@{RUN}#2\n")
    assert other.result(waiting) == f"{MODEL}@{RUN}#2"
    at_once = cpe(node, "wait", f"{MODEL}@{RUN}", "--version", "2", "--json")
    assert json.loads(at_once.stdout) == {"model": MODEL, "run": RUN, "number": 2}


def test_wait_that_comes_to_nothing_says_how_far_the_version_is(node: Node) -> None:
    node.start_daemon(push__automatic=False)
    trainer = node.trainer()
    late = cpe(node, "wait", MODEL, "--version", "1", "--timeout", "0.2")
    assert late.exit_code == 5
    assert "policy#1 is not live after" in late.stderr
    assert "nothing of it has come" in late.stderr
    build(trainer, 1)
    trainer.ask("publish", version=1)
    trainer.ask("staged", version=1, timeout=20)
    with pytest.raises(DeadlineError, match="policy@run-1#1 is staged, and waits for `cpe push policy`"):
        trainer.ask("wait_live", number=1, timeout=0.2)


def test_wait_for_a_version_that_fails_ends_at_once(node: Node) -> None:
    node.start_daemon(deadlines__pause_seconds=3)
    (worker,) = node.engine(recipe=RECIPE)
    trainer, other = node.trainer(), node.trainer(run="evaluation")
    build(trainer, 1)
    waiting = other.begin("wait_live", number=1, run=RUN, timeout=60)
    worker.ask("acquire")
    trainer.ask("publish", version=1)
    with pytest.raises(EngineError, match=r"policy@run-1#1 has failed: no engine took policy@run-1#1"):
        other.result(waiting)
    worker.ask("release")
    assert cpe(node, "wait", MODEL, "--version", "1", "--timeout", "60").exit_code == 7


# --- an engine that cannot be restored -------------------------------------------------------------------------------


def test_engine_that_cannot_be_restored_is_told_of_everywhere(node: Node) -> None:
    daemon = node.start_daemon()
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    node.engine("good", recipe=RECIPE)
    trainer = node.trainer()
    build(trainer, 1)
    trainer.publish_live(1)
    build(trainer, 2)
    raising.ask("arm", at=1, then="raise", every=True)
    assert trainer.publish_live(2) == {"raising": "failed", "good": "updated"}
    until(lambda: node.daemon.engine("raising")["state"] == "quarantined", "the engine is given up")

    engine = node.daemon.engine("raising")
    assert (engine["ready"], engine["content"]) == (False, None)
    assert "told to raise" in engine["error"]
    assert '"event": "engine.quarantined"' in daemon.said
    shown = cpe(node, "status").stdout
    assert "quarantined" in shown
    assert "engine 'raising' stays paused: engine 'raising' rank 0" in shown
    page = get(daemon, "/readyz")
    assert page.status == 503
    assert ("engine_quarantined", "raising") in [(reason["code"], reason["engine"]) for reason in page.json["reasons"]]
    assert value(daemon, "cpe_engine_state", engine="raising", state="quarantined") == 1
    assert value(daemon, "cpe_engines", state="quarantined") == 1

    raising.ask("arm")
    assert cpe(node, "rollback").exit_code == 0
    assert get(daemon, "/readyz").status == 200
    assert value(daemon, "cpe_engine_state", engine="raising", state="quarantined") == 0


def test_arena_that_cannot_hold_two_versions_is_warned_of(node: Node) -> None:
    daemon = node.start_daemon(arena__size_bytes="8MiB")
    trainer = node.trainer()
    assert node.daemon.status()["readiness"]["warnings"] == []
    build(trainer, 1)
    trainer.publish_live(1)
    (warning,) = node.daemon.status()["readiness"]["warnings"]
    assert warning["code"] == "no_rollback"
    assert "the arena of 8388608 bytes cannot hold two versions of policy, of 6291456 bytes each" in warning["message"]
    assert "N-1 cannot be kept" in cpe(node, "status").stdout
    assert daemon.said.count('"event": "arena.keeps_no_previous"') == 1
    assert node.daemon.status()["readiness"]["ready"]
