"""Operators at work, against a real daemon: pushes that are asked for, engines that are expected, and watching it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cpe_daemon.cli import main
from cpe_daemon.errors import EngineError, MisuseError, ProtocolError, PublishError
from tests.integration.harness import MODEL, RUN, Node, Trainer
from tests.integration.processes import ROOT, until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
VERSION_BYTES = 12 * (512 << 10)


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CPE_")]:
        monkeypatch.delenv(name)


def cpe(node: Node, *words: str) -> Result:
    """Run a command at the node's daemon."""
    return CliRunner().invoke(main, [*words, "--runtime-dir", str(node.runtime_dir)])


def pushed(node: Node, *words: str) -> dict[str, str]:
    """Push, and return the outcome by engine."""
    result = cpe(node, "push", *words, "--json", "--timeout", "30")
    assert result.exit_code in (0, 7), result.output
    return {name: engine["outcome"] for name, engine in json.loads(result.stdout)["engines"].items()}


def build(trainer: Trainer, version: int) -> dict[str, str]:
    """Make a version's tensors and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def stage(trainer: Trainer, version: int) -> dict[str, str]:
    """Publish a version, and wait until it is whole."""
    expected = build(trainer, version)
    trainer.ask("publish", version=version)
    trainer.ask("staged", version=version, timeout=20)
    return expected


# --- pushes that are asked for ---------------------------------------------------------------------------------------


def test_version_is_held_back_until_it_is_pushed(node: Node) -> None:
    node.start_daemon(push__automatic=False)
    (worker,) = node.engine(recipe=RECIPE)
    trainer = node.trainer()
    before = worker.ask("forward")
    expected = stage(trainer, 1)
    live = trainer.begin("live", version=1, timeout=25)
    assert node.daemon.version(1)["state"] == "staged"
    assert worker.ask("forward") == before
    assert "policy@run-1#1 waits for `cpe push`" in cpe(node, "status").stdout

    result = cpe(node, "push")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{MODEL}@{RUN}#1: 12 tensors, 6.29 MB")
    assert trainer.result(live) == {"e": "updated"}
    assert worker.ask("forward") == expected
    again = cpe(node, "push", f"{MODEL}@{RUN}#1")
    assert (again.exit_code, "e       current" in again.stdout) == (0, True)


def test_newer_version_takes_the_place_of_the_one_that_waits(node: Node) -> None:
    node.start_daemon(push__automatic=False)
    (worker,) = node.engine(recipe=RECIPE)
    trainer = node.trainer()
    free = node.daemon.free_bytes
    stage(trainer, 1)
    expected = stage(trainer, 2)
    with pytest.raises(PublishError, match=r"policy@run-1#1 was superseded by policy@run-1#2 before anybody pushed it"):
        trainer.ask("live", version=1, timeout=20)
    assert node.daemon.version(1)["state"] == "evicted"
    assert free - node.daemon.free_bytes == VERSION_BYTES
    refused = cpe(node, "push", f"{MODEL}#1")
    assert refused.exit_code == 3
    assert "policy@run-1#1 is evicted: " in refused.stderr
    assert pushed(node, MODEL) == {"e": "updated"}
    assert worker.ask("forward") == expected


def test_version_is_tried_in_one_engine_first(node: Node) -> None:
    node.start_daemon(push__automatic=False)
    first, second = node.engine("first", recipe=RECIPE)[0], node.engine("second", recipe=RECIPE)[0]
    trainer = node.trainer()
    before = stage(trainer, 1)
    pushed(node)
    expected = stage(trainer, 2)
    assert pushed(node, "--engine", "first") == {"first": "updated"}
    assert (first.ask("forward"), second.ask("forward")) == (expected, before)
    assert node.daemon.version(2)["state"] == "live"
    assert pushed(node) == {"first": "current", "second": "updated"}
    assert second.ask("forward") == expected
    retained = cpe(node, "push", f"{MODEL}@{RUN}#1")
    assert retained.exit_code == 3
    assert f"`cpe rollback {MODEL}@{RUN} --to 1` brings it back" in retained.stderr


def test_engine_in_quarantine_is_repaired_by_a_push(node: Node) -> None:
    node.start_daemon()
    raising = node.engine("raising", target="callback", recipe=RECIPE)[0]
    bystander = node.engine("bystander", recipe=RECIPE)[0]
    trainer = node.trainer()
    build(trainer, 1)
    trainer.publish_live(1)
    expected = build(trainer, 2)
    raising.ask("arm", at=1, then="raise", every=True)
    assert trainer.publish_live(2) == {"raising": "failed", "bystander": "updated"}
    until(lambda: node.daemon.engine("raising")["state"] == "quarantined", "the engine is given up")
    failed = cpe(node, "push")
    assert failed.exit_code == 7
    assert "told to raise" in failed.stderr
    with pytest.raises(EngineError):
        raising.ask("forward")

    raising.ask("arm")
    assert pushed(node) == {"raising": "updated", "bystander": "current"}
    assert raising.ask("forward") == bystander.ask("forward") == expected


def test_push_that_no_engine_takes_may_be_tried_again(node: Node) -> None:
    node.start_daemon(push__automatic=False, deadlines__pause_seconds=3)
    (busy,) = node.engine(recipe=RECIPE)
    trainer = node.trainer()
    before = stage(trainer, 1)
    pushed(node)
    expected = stage(trainer, 2)
    busy.ask("acquire")
    assert pushed(node) == {"e": "kept"}
    assert node.daemon.version(2)["state"] == "staged"
    busy.ask("release")
    assert busy.ask("forward") == before
    assert pushed(node) == {"e": "updated"}
    assert busy.ask("forward") == expected


# --- engines that are expected ---------------------------------------------------------------------------------------


def test_engine_is_expected_after_a_restart_and_a_stranger_by_its_name_refused(node: Node) -> None:
    daemon = node.start_daemon()
    assert node.daemon.status()["readiness"]["ready"]
    added = cpe(node, "engine", "add", "pair", "--kind", "torch", "--model", MODEL, "--world-size", "2")
    assert (added.exit_code, added.stdout) == (0, "engine 'pair' is expected from now on\n")
    refused = cpe(node, "engine", "add", "v", "--kind", "tensorrt", "--url", "http://127.0.0.1:8000")
    assert refused.exit_code == 3
    assert "no plugin for engines of kind 'tensorrt' is installed; there is: sglang, torch, vllm" in refused.stderr
    assert daemon.stop() == 0

    node.start_daemon()
    engine = node.daemon.engine("pair")
    assert (engine["expected"], engine["state"], engine["ready"]) == (True, "unknown", False)
    assert [worker["present"] for worker in engine["workers"]] == [False, False]
    assert not node.daemon.status()["readiness"]["ready"]
    with pytest.raises(MisuseError, match="'pair' is expected with world size 2 and has world size 1"):
        node.worker("pair", recipe=RECIPE, connect_timeout=5.0).ask("attach")
    workers = node.engine("pair", world_size=2, recipe=RECIPE)
    assert node.daemon.engine("pair")["ready"]
    assert node.daemon.status()["readiness"]["ready"]

    for worker in workers:
        worker.kill()
    until(lambda: not any(w["present"] for w in node.daemon.engine("pair")["workers"]), "their loss is noticed")
    assert cpe(node, "engine", "remove", "pair").stdout == "engine 'pair' is forgotten\n"
    assert node.daemon.status()["engines"] == []
    listed = cpe(node, "engine", "list", "--json")
    assert json.loads(listed.stdout) == []


def test_broken_file_of_engines_ends_the_start_and_says_the_mend(node: Node) -> None:
    state = node.runtime_dir / "state"
    state.mkdir()
    (state / "engines.json").write_text('{"format": 1, "engines": [')
    daemon = node.launch_daemon()
    daemon.wait()
    assert daemon.exit_status == 2
    assert f"{state}/engines.json" in daemon.said
    assert "remove it and add the engines anew" in daemon.said


def test_engine_that_says_no_model_is_refused_where_two_are_live(node: Node) -> None:
    node.start_daemon()
    for model in (MODEL, "other"):
        trainer = node.trainer(model=model)
        build(trainer, 1)
        trainer.publish_live(1)
    with pytest.raises(MisuseError, match="'e' says no model, and this node serves other, policy: attach it with mod"):
        node.worker(recipe=RECIPE, connect_timeout=5.0).ask("attach")
    assert cpe(node, "engine", "add", "e", "--kind", "torch", "--model", "other").exit_code == 0
    (worker,) = node.engine(recipe=RECIPE)
    worker.ask("ready", timeout=15)
    assert worker.state()["version"] == f"other@{RUN}#1"


def test_trainer_at_the_engines_socket_is_told_the_right_one(node: Node) -> None:
    node.start_daemon()
    trainer = node.trainer(endpoint=node.daemon.engines)
    build(trainer, 1)
    with pytest.raises(ProtocolError, match=r"belongs to the socket of trainers and operators \(front\.sock\)"):
        trainer.ask("publish", version=1)


# --- watching --------------------------------------------------------------------------------------------------------


class Watcher:
    """``cpe status --watch`` as a process of its own, and what it has printed."""

    def __init__(self, runtime_dir: Path, *words: str) -> None:
        command = [sys.executable, "-m", "cpe_daemon", "status", "--watch", "--interval", "0.1", *words]
        self.process = subprocess.Popen(
            [*command, "--runtime-dir", str(runtime_dir)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            self.lines.extend(self.process.stdout)

    def until(self, seen: Callable[[str], bool], what: str) -> None:
        """Wait for a line that was not there when this was called."""
        known = len(self.lines)
        until(lambda: any(seen(line) for line in self.lines[known:]), f"the watcher shows {what}", 20.0)

    def interrupt(self) -> int:
        """Press Ctrl-C, and return its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(15)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def watch(node: Node) -> Iterator[Callable[..., Watcher]]:
    """Start watchers; they end with the test."""
    started: list[Watcher] = []

    def start(*words: str) -> Watcher:
        started.append(Watcher(node.runtime_dir, *words))
        return started[-1]

    yield start
    for watcher in started:
        watcher.close()


def test_watch_survives_a_restart_of_its_daemon(node: Node, watch: Callable[..., Watcher]) -> None:
    daemon = node.start_daemon()
    watcher = watch()
    watcher.until(lambda line: f"pid {daemon.pid}," in line, "the daemon")
    node.engine(recipe=RECIPE)
    watcher.until(lambda line: "Engines: 1 current" in line, "the engine")
    daemon.kill()
    watcher.until(lambda line: "waiting for the daemon at" in line, "that it waits")
    second = node.start_daemon()
    watcher.until(lambda line: f"pid {second.pid}," in line, "the daemon's successor")
    assert watcher.interrupt() == 0


def test_watch_in_json_tells_of_a_push_in_flight(node: Node, watch: Callable[..., Watcher]) -> None:
    node.start_daemon()
    slow = node.engine(target="callback", recipe=RECIPE)[0]
    watcher = watch("--json")
    trainer = node.trainer()
    build(trainer, 1)
    slow.ask("arm", at=7)
    trainer.ask("publish", version=1)
    slow.event("reached")

    def in_flight(line: str) -> bool:
        current: dict[str, Any] | None = json.loads(line).get("push", {}).get("round")
        return current is not None and current["phase"] == "streaming" and current["engines"] == ["e"]

    watcher.until(in_flight, "the push")
    slow.ask("go")
    assert trainer.ask("live", version=1, timeout=20) == {"e": "updated"}
    watcher.until(lambda line: json.loads(line)["push"]["round"] is None, "that it is over")
    assert watcher.interrupt() == 0
    assert all(isinstance(json.loads(line), dict) for line in watcher.lines)
