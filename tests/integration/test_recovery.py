"""A daemon that is killed, and the next one on the same directories: each engine's fate, the journal, the bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from cpe_daemon.cli import main
from cpe_daemon.cli.tables import lag_text
from cpe_daemon.core.journal import State, decode
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import EngineError, VersionRefusedError
from tests.integration import weights
from tests.integration.harness import MODEL, RUN, Daemon, Node, Trainer, Worker
from tests.integration.processes import until

RECIPE = {"plain": 12, "nbytes": 64 << 10}
MIDDLE = 7


def publish(trainer: Trainer, version: int, seed: int | None = None) -> dict[str, str]:
    """Publish a version and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version if seed is None else seed)
    trainer.publish_live(version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def journal(node: Node) -> State:
    return decode((node.runtime_dir / "state" / "journal.json").read_bytes())


def await_written(node: Node, number: int, run: str = RUN) -> None:
    """Wait until it is written that a version is live and in all engines, and that nothing is under way."""

    def written() -> bool:
        found = journal(node)
        live = found.models[MODEL].live if MODEL in found.models else None
        settled = found.round is None and all(engine.held == live for engine in found.engines.values())
        return live is not None and live.version == VersionId(MODEL, run, number) and settled

    until(written, f"it is written that {number} is live")


def cpe(node: Node, *words: str) -> Result:
    """Run a command at the node's daemon."""
    return CliRunner().invoke(main, [*words, "--runtime-dir", str(node.runtime_dir)])


def stage_and_push(node: Node, trainer: Trainer, version: int, *words: str) -> dict[str, str]:
    """Publish what was built to a daemon that waits to be told, tell it, and return what an engine should hold."""
    trainer.ask("publish", version=version)
    trainer.ask("staged", version=version, timeout=20)
    assert cpe(node, "push", *words).exit_code == 0
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def codes(daemon: Daemon, which: str = "reasons") -> list[tuple[str, str]]:
    return sorted((one["code"], one.get("engine", "")) for one in daemon.status()["readiness"][which])


def await_ready(daemon: Daemon, *engines: str) -> None:
    """Wait until the node is ready; when it first says so, these have to be."""
    told = until(lambda: (one := daemon.status())["readiness"]["ready"] and one, "the node is ready")
    assert {one["engine"] for one in told["engines"] if one["ready"]} >= set(engines)


def metrics(daemon: Daemon) -> list[str]:
    url = next(e for e in daemon.status()["daemon"]["endpoints"] if e.startswith("http://"))
    with urlopen(f"{url}/metrics", timeout=10) as answer:
        return str(answer.read(), "utf-8").splitlines()


def named(number: int, run: str = RUN) -> dict[str, Any]:
    return {"model": MODEL, "run": run, "number": number}


def reads(engine: Worker) -> Any:
    return engine.ask("forward")


# --- at rest ---------------------------------------------------------------------------------------------------------


def test_daemon_killed_at_rest_is_followed_by_one_that_knows_what_is_live(node: Node) -> None:
    node.start_daemon(device__gpus=2)
    trainer = node.trainer()
    engine, pair = node.engine("e", recipe=RECIPE)[0], node.engine("pair", world_size=2, recipe=RECIPE)
    publish(trainer, 1)
    meant = publish(trainer, 2)
    await_written(node, 2)
    known = journal(node)
    live = known.models[MODEL].live
    assert live is not None
    assert (live.version, len(live.digest)) == (VersionId(MODEL, RUN, 2), 16)
    assert [retained.version.number for retained in known.models[MODEL].retained] == [1]
    assert {name: (entry.state, entry.held) for name, entry in known.engines.items()} == {
        "e": ("current", live),
        "pair": ("current", live),
    }
    node.daemon.kill()
    assert reads(engine) == meant

    daemon = node.start_daemon(device__gpus=2)
    await_ready(daemon, "e", "pair")
    assert "engines.awaited" in daemon.said
    assert [daemon.engine(name)["content"] for name in ("e", "pair")] == [str(live)] * 2
    assert [reads(worker) for worker in (engine, *pair)] == [meant] * 3
    told = daemon.status()
    assert told["versions"] == []
    assert told["journal"]["not_resident"] == [named(2)]
    assert ("not_resident", "") in codes(daemon, "warnings")

    # One that starts now would serve what it started with: it waits for the version that is not here.
    late = node.engine("late", recipe=RECIPE)[0]
    until(lambda: ("engine_unknown", "late") in codes(daemon), "readiness says so")
    error = daemon.engine("late")["error"]
    assert f"{live}, which was live before this daemon, is not here: publish {live} again" in error
    with pytest.raises(EngineError, match="not serving"):
        reads(late)

    # The same version again is pushed to those that need it, and to nobody else.
    node_trainer = node.trainer()
    node_trainer.ask("build", recipe=RECIPE, seed=2)
    assert node_trainer.publish_live(2) == {"e": "current", "pair": "current", "late": "updated"}
    assert reads(late) == meant
    await_ready(daemon)
    assert daemon.status()["journal"]["not_resident"] == []


def test_engine_that_holds_another_version_whole_serves_on_and_is_behind(node: Node) -> None:
    node.start_daemon(push__automatic=False)
    trainer = node.trainer()
    first, second = node.engine("first", recipe=RECIPE)[0], node.engine("second", recipe=RECIPE)[0]
    trainer.ask("build", recipe=RECIPE, seed=1)
    old = stage_and_push(node, trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    new = stage_and_push(node, trainer, 2, "--engine", "first")
    until(lambda: (live := journal(node).models[MODEL].live) is not None and live.version.number == 2, "it is written")
    node.daemon.kill()
    daemon = node.start_daemon(push__automatic=False)
    await_ready(daemon, "first", "second")
    assert (reads(first), reads(second)) == (new, old)
    status = daemon.status()
    behind = {engine["engine"]: lag_text(status, engine) for engine in status["engines"]}
    assert behind == {"first": "0", "second": "1"}
    shown = cpe(node, "status").stdout
    assert f"{MODEL}@{RUN}#2 is live, not resident: publish it again or set bootstrap" in shown


def test_daemon_that_ends_well_leaves_word_of_what_engines_hold(node: Node) -> None:
    daemon = node.start_daemon()
    trainer = node.trainer()
    node.engine("e", recipe=RECIPE)
    publish(trainer, 1)
    assert daemon.stop() == 0
    left = journal(node)
    assert left.models[MODEL].live == left.engines["e"].held
    assert left.engines["e"].state == "current"
    assert left.round is None
    again = node.start_daemon()
    await_ready(again, "e")
    assert "round.cut_short" not in again.said


def test_what_was_used_up_is_used_up_after_a_kill(node: Node) -> None:
    node.start_daemon()
    trainer = node.trainer()
    publish(trainer, 1)
    publish(trainer, 2)
    await_written(node, 2)
    node.daemon.kill()
    node.start_daemon()
    again = node.trainer()
    again.ask("build", recipe=RECIPE, seed=1)
    with pytest.raises(VersionRefusedError, match="has staged number 2 already"):
        again.publish_live(1)
    with pytest.raises(VersionRefusedError, match="was staged before with other weights"):
        again.publish_live(2)
    publish(again, 3)


def test_node_is_not_ready_before_engines_are_back_and_gives_up_those_that_are_gone(node: Node) -> None:
    node.start_daemon()
    trainer = node.trainer()
    engine = node.engine("e", recipe=RECIPE)[0]
    publish(trainer, 1)
    await_written(node, 1)
    node.daemon.kill()
    engine.kill()
    daemon = node.start_daemon(deadlines__hello_seconds=5)
    assert codes(daemon) == [("engine_awaited", "e")]
    await_ready(daemon)
    assert "engine.not_returned" in daemon.said
    until(lambda: not journal(node).engines, "it counts no longer")


# --- in the midst of a round -----------------------------------------------------------------------------------------


def test_daemon_killed_in_a_round_leaves_each_engine_what_it_can_be_sure_of(node: Node) -> None:
    node.start_daemon()
    trainer, critic = node.trainer(), node.trainer(model="critic")
    touched = node.engine("touched", target="callback", recipe=RECIPE, model=MODEL)[0]
    other = node.engine("other", recipe=RECIPE, model="critic")[0]
    publish(trainer, 1)
    untouched = publish(critic, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    touched.ask("arm", at=MIDDLE)
    trainer.ask("publish", version=2)
    touched.event("reached")
    decided = journal(node)
    assert decided.round is not None
    assert decided.round.version.version.number == 2
    assert [str(held) for held in decided.round.held.values()] == [f"{MODEL}@{RUN}#1"]
    assert decided.models[MODEL].history.used[RUN].number == 2
    assert (live := decided.models[MODEL].live) is not None
    assert live.version.number == 1
    node.daemon.kill()
    touched.ask("go")

    daemon = node.start_daemon()
    assert "round.cut_short" in daemon.said
    until(lambda: daemon.engine("other").get("ready"), "the other one serves what it held")
    until(lambda: codes(daemon) == [("engine_unknown", "touched")], "readiness names the one in doubt")
    assert "may be a mixture of versions" in daemon.engine("touched")["error"]
    assert reads(other) == untouched
    with pytest.raises(EngineError, match="mixture"):
        reads(touched)
    successor = node.trainer()
    successor.ask("build", recipe=RECIPE, seed=2)
    assert successor.publish_live(2) == {"touched": "updated"}
    assert reads(touched) == successor.ask("digests")
    await_ready(daemon)


# --- a journal that is no help ---------------------------------------------------------------------------------------


def test_damaged_journal_is_put_aside_and_no_engine_serves_what_it_started_with(node: Node) -> None:
    node.start_daemon()
    trainer = node.trainer()
    engine = node.engine("e", recipe=RECIPE)[0]
    meant = publish(trainer, 1)
    path = node.runtime_dir / "state" / "journal.json"
    node.daemon.kill()
    path.write_bytes(path.read_bytes()[:-40])
    daemon = node.start_daemon()
    said = next(json.loads(line) for line in daemon.said.splitlines() if "journal.unreadable" in line)
    assert said["path"] == str(path)
    assert Path(said["kept_as"]).exists()
    until(lambda: daemon.engine("e").get("ready"), "it serves what it says it holds")
    assert reads(engine) == meant
    late = node.engine("late", recipe=RECIPE)[0]
    until(lambda: codes(daemon) == [("engine_unknown", "late")], "it is held back")
    assert "the journal that told what was live could not be read" in daemon.engine("late")["error"]
    with pytest.raises(EngineError, match="not serving"):
        reads(late)
    expected = publish(node.trainer(), 2)
    assert [reads(engine), reads(late)] == [expected] * 2


def test_journal_that_cannot_be_written_is_told_and_hinders_no_update(node: Node) -> None:
    daemon = node.start_daemon(state_dir="/proc/cpe-nowhere")
    engine = node.engine("e", recipe=RECIPE)[0]
    until(lambda: daemon.status()["journal"]["error"], "it is noticed before anything is published")
    assert publish(node.trainer(), 1) == reads(engine)
    assert daemon.status()["readiness"]["ready"]
    assert ("journal", "") in codes(daemon, "warnings")
    assert "cpe_journal_failing 1.0" in metrics(daemon)


# --- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the weights of seed 5."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    save_file(weights.build(weights.specs(RECIPE), 5), made / "model.safetensors")
    return made


def test_bootstrap_gives_engines_a_version_and_again_after_a_kill(node: Node, checkpoint: Path) -> None:
    settings: dict[str, Any] = {
        "bootstrap__dir": str(checkpoint),
        "bootstrap__model": MODEL,
        "bootstrap__run": "base",
        "bootstrap__number": 3,
        "deadlines__hello_seconds": 5,
    }
    meant = weights.digests(weights.build(weights.specs(RECIPE), 5))
    daemon = node.start_daemon(**settings)
    assert ("bootstrap", "") in codes(daemon)
    engine = node.engine("e", recipe=RECIPE)[0]
    engine.await_serving(3, run="base")
    assert reads(engine) == meant
    await_ready(daemon)
    assert daemon.status()["bootstrap"]["state"] == "done"
    await_written(node, 3, "base")
    daemon.kill()

    daemon = node.start_daemon(**settings)
    until(lambda: daemon.version(3, "base").get("state") == "live", "its bytes are back")
    await_ready(daemon)
    assert reads(engine) == meant
    assert daemon.engine("e")["last_push_seconds"] == 0.0  # it held it, and was left alone
    late = node.engine("late", recipe=RECIPE)[0]
    late.await_serving(3, run="base")
    assert reads(late) == meant


def test_daemon_ends_in_the_midst_of_a_bootstrap(node: Node, checkpoint: Path) -> None:
    daemon = node.start_daemon(
        bootstrap__dir=str(checkpoint), bootstrap__model=MODEL, deadlines__hello_seconds=0.001, arena__size_bytes="1MiB"
    )
    until(lambda: daemon.status()["bootstrap"]["state"] != "waiting", "it begins")
    assert daemon.stop() == 0


def test_bootstrap_does_not_take_the_place_of_what_a_trainer_sent(node: Node, checkpoint: Path) -> None:
    node.start_daemon()
    engine = node.engine("e", recipe=RECIPE)[0]
    meant = publish(node.trainer(), 1)
    node.daemon.kill()
    (node.runtime_dir / "state" / "journal.json").unlink()  # an older release wrote none
    daemon = node.start_daemon(bootstrap__dir=str(checkpoint), bootstrap__model=MODEL, deadlines__hello_seconds=8)
    until(lambda: daemon.status()["bootstrap"]["state"] == "skipped", "it is left alone")
    assert f"engines hold {MODEL}@{RUN}#1" in daemon.status()["bootstrap"]["message"]
    assert reads(engine) == meant
    await_ready(daemon)
