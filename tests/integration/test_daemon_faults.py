"""Daemons that are killed, stopped, started twice or told to end: engines in doubt stay paused, the others serve on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpe_daemon.errors import CpeError, EngineError, PeerLostError
from tests.integration.harness import Node, Trainer, Worker
from tests.integration.init_system import InitSystem
from tests.integration.processes import until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
MIDDLE = 7
SOCKETS = {"front.sock", "engines.sock", "handoff.sock"}


@pytest.fixture
def trainer(node: Node) -> Trainer:
    """A trainer, and a daemon."""
    node.start_daemon()
    return node.trainer()


@pytest.fixture
def system(no_leaks: None, runtime_dir: Path) -> Iterator[InitSystem]:
    """A manager with a watchdog."""
    path = runtime_dir.with_suffix(".notify")
    started = InitSystem(path, watchdog_seconds=60.0)
    yield started
    started.close()
    path.unlink()


def publish(trainer: Trainer, version: int) -> dict[str, str]:
    """Publish a version and return what an engine should hold of it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    trainer.publish_live(version)
    digests: dict[str, str] = trainer.ask("digests")
    return digests


def stop_midway(trainer: Trainer, gated: Worker, version: int) -> int:
    """Publish a version and return when ``gated`` is in the midst of it, with the number of the call that awaits it."""
    trainer.ask("build", recipe=RECIPE, seed=version)
    gated.ask("arm", at=MIDDLE)
    trainer.ask("publish", version=version)
    live = trainer.begin("live", version=version, timeout=20)
    gated.event("reached")
    return live


def test_killed_daemon_leaves_a_touched_engine_paused_until_the_next_publish(node: Node, trainer: Trainer) -> None:
    touched = node.engine("touched", target="callback", recipe=RECIPE, model="policy")[0]
    other = node.engine("other", recipe=RECIPE, model="critic")[0]
    critic = node.trainer(model="critic")
    untouched = publish(critic, 1)
    publish(trainer, 1)
    live = stop_midway(trainer, touched, 2)
    node.daemon.kill()
    touched.ask("go")
    with pytest.raises(PeerLostError):
        trainer.result(live)
    until(lambda: "lost the daemon" in touched.log.read_text(), "the engine notices")
    with pytest.raises(EngineError, match="mixture"):
        touched.ask("forward")
    assert other.ask("forward") == untouched
    assert {path.name for path in node.runtime_dir.iterdir()} >= SOCKETS

    daemon = node.start_daemon()
    until(lambda: daemon.engine("touched").get("workers", [{}])[0].get("present"), "the engine is back")
    until(lambda: daemon.engine("other").get("ready"), "the other engine is back, and serves what it held")
    assert daemon.engine("touched")["ready"] is False
    with pytest.raises(EngineError, match="mixture"):
        touched.ask("forward")
    assert other.ask("forward") == untouched

    expected = publish(trainer, 3)
    assert touched.ask("forward") == expected
    assert other.ask("forward") == untouched


def test_worker_that_waits_for_the_live_version_does_not_serve_when_the_daemon_dies(
    node: Node, trainer: Trainer
) -> None:
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    stop_midway(trainer, gated, 2)
    newcomer = node.engine("newcomer", recipe=RECIPE)[0]
    assert not newcomer.state()["serving"]
    node.daemon.kill()
    until(lambda: "lost the daemon" in newcomer.log.read_text(), "the newcomer notices")
    assert not newcomer.state()["serving"]
    with pytest.raises(EngineError, match="not serving"):
        newcomer.ask("forward")


@pytest.mark.parametrize("landing", [True, False], ids=["landing", "inline"])
def test_publish_waits_for_a_daemon_that_is_restarted(node: Node, landing: bool) -> None:
    node.start_daemon()
    trainer = node.trainer(landing=landing)
    worker = node.engine(recipe=RECIPE)[0]
    publish(trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    node.daemon.kill()
    if not landing:  # without a tether it takes some heartbeats until the trainer knows
        until(lambda: "daemon at ipc" in trainer.log.read_text(), "the trainer notices")
    publishing = trainer.begin("publish", version=2)
    node.start_daemon()
    trainer.result(publishing)
    trainer.ask("live", version=2, timeout=15)
    worker.await_serving(2)
    assert worker.ask("forward") == trainer.ask("digests")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_publish_returns_when_the_daemon_ends_or_hangs_while_it_is_sent_the_tensors(
    node: Node, how: signal.Signals
) -> None:
    node.start_daemon()
    trainer = node.trainer(landing=False, gate_chunks=True)
    worker = node.engine(recipe=RECIPE)[0]
    publish(trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=1)
    publishing = trainer.begin("publish", version=2)
    trainer.event("reached")
    node.daemon.signal(how)
    trainer.ask("go")
    trainer.result(publishing)
    with pytest.raises(PeerLostError):
        trainer.ask("live", version=2, timeout=15)
    if how == signal.SIGSTOP:
        node.daemon.signal(signal.SIGCONT)
        until(lambda: node.daemon.version(2).get("state") == "failed", "the version is given up")
    else:
        node.daemon.wait()
        node.start_daemon()
    expected = publish(trainer, 3)
    worker.await_serving(3)
    assert worker.ask("forward") == expected


def test_second_daemon_refuses_and_the_first_is_unharmed(node: Node, trainer: Trainer) -> None:
    worker = node.engine(recipe=RECIPE)[0]
    publish(trainer, 1)
    first = node.daemon
    second = node.launch_daemon(fresh=True)
    second.wait()
    assert second.exit_status == 6
    assert f"another daemon (pid {first.pid}) runs on" in second.said
    assert {path.name for path in node.runtime_dir.iterdir()} >= SOCKETS
    expected = publish(trainer, 2)
    assert worker.ask("forward") == expected
    second.log.write_text("")  # it has nothing more to tell


def test_daemon_without_the_memory_that_it_is_told_to_take_says_so(node: Node) -> None:
    daemon = node.launch_daemon(fresh=True, arena__size_bytes="60TiB")
    daemon.wait()
    assert daemon.exit_status == 6
    assert "arena" in daemon.said
    assert not SOCKETS & {path.name for path in node.runtime_dir.iterdir()}


def test_sockets_of_a_killed_daemon_are_replaced_and_those_of_a_stopped_one_removed(node: Node) -> None:
    node.start_daemon().kill()
    assert {path.name for path in node.runtime_dir.iterdir()} >= SOCKETS
    daemon = node.start_daemon(fresh=True)
    worker = node.engine(recipe=RECIPE)[0]
    assert worker.ask("forward") == worker.ask("digests")
    assert daemon.stop() == 0
    assert not SOCKETS & {path.name for path in node.runtime_dir.iterdir()}


def test_terminated_daemon_ends_the_push_first(node: Node, trainer: Trainer) -> None:
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    expected = trainer.begin("digests")
    node.daemon.signal(signal.SIGTERM)
    until(lambda: "daemon.draining" in node.daemon.said, "it drains")
    gated.ask("go")
    assert trainer.result(live) == {"gated": "updated"}
    node.daemon.wait()
    assert node.daemon.exit_status == 0
    until(lambda: "said farewell" in gated.log.read_text(), "the engine has heard it")
    assert gated.ask("forward") == trainer.result(expected)


def test_terminated_daemon_does_not_wait_for_trainers(node: Node, trainer: Trainer) -> None:
    worker = node.engine(recipe=RECIPE)[0]
    held = publish(trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=3)
    publishing = trainer.begin("publish", version=2, watched=True)
    trainer.event("reached")
    assert node.daemon.stop() == 0
    trainer.ask("go")
    trainer.result(publishing)
    with pytest.raises(PeerLostError):
        trainer.ask("live", version=2, timeout=15)
    assert worker.ask("forward") == held
    node.start_daemon()
    publish(trainer, 2)
    worker.await_serving(2)


def test_terminated_daemon_does_not_wait_for_ever(node: Node) -> None:
    node.start_daemon(deadlines__drain_seconds=0.5, deadlines__undo_seconds=0.5)
    trainer = node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    assert node.daemon.stop() == 0
    with pytest.raises(PeerLostError, match=r"the daemon stops|said farewell"):
        trainer.result(live)
    gated.ask("go")
    until(lambda: "lost the daemon" in gated.log.read_text(), "the engine notices")
    with pytest.raises(EngineError, match="mixture"):
        gated.ask("forward")


def test_daemon_that_stood_still_for_a_while_goes_on(node: Node, trainer: Trainer) -> None:
    """Long enough for whoever says hello to say it twice; nothing here depends on how long it is."""
    worker = node.engine(recipe=RECIPE)[0]
    publish(trainer, 1)
    late = node.worker("late", recipe=RECIPE)
    node.daemon.signal(signal.SIGSTOP)
    attaching = late.begin("attach")
    threading.Event().wait(1.5)
    node.daemon.signal(signal.SIGCONT)
    late.result(attaching)
    late.ask("ready", timeout=15)
    expected = publish(trainer, 2)
    assert late.ask("forward") == worker.ask("forward") == expected
    late.kill()
    until(lambda: not node.daemon.engine("late")["workers"][0]["present"], "its death is noticed", 4)


def test_daemon_that_no_gpu_listens_to_begins_anew_in_the_same_process(system: InitSystem, node: Node) -> None:
    """Between two versions its engines serve on, and the next version reaches them."""
    daemon = node.start_daemon(fresh=True, environment=system.environment, tricks={"on_signal": "lose"})
    trainer, worker = node.trainer(), node.engine(recipe=RECIPE)[0]
    held = publish(trainer, 1)
    before = daemon.status()["daemon"]
    daemon.signal(signal.SIGUSR1)
    system.hear("RELOADING", "1")
    system.hear("READY")
    after = daemon.status()["daemon"]
    assert (before["pid"], after["pid"]) == (daemon.pid, daemon.pid)
    assert before["generation"] != after["generation"]
    assert worker.ask("forward") == held
    expected = publish(trainer, 2)
    assert worker.ask("forward") == expected
    system.hear_out()
    assert system.said("STOPPING") == []


def test_daemon_that_is_told_to_stop_while_it_drains_does_not_begin_anew(node: Node) -> None:
    daemon = node.start_daemon(fresh=True, tricks={"on_signal": "lose"})
    trainer, gated = node.trainer(), node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    daemon.signal(signal.SIGUSR1)
    until(lambda: "daemon.lost_all_gpus" in daemon.said, "it is about to begin anew")
    daemon.signal(signal.SIGTERM)
    until(lambda: "daemon.stopping" in daemon.said, "it has heard that it is to stop")
    gated.ask("go")
    trainer.result(live)
    daemon.wait()
    assert daemon.exit_status == 0
    assert daemon.said.count("daemon.ready") == 1


def test_daemon_that_no_gpu_has_listened_to_ends_for_others_to_see(node: Node) -> None:
    """Who starts it counts how often, and waits longer and longer."""
    daemon = node.start_daemon(fresh=True, tricks={"on_signal": "lose"})
    daemon.signal(signal.SIGUSR1)
    daemon.wait()
    assert daemon.exit_status == 6
    assert "no GPU takes calls of this process any more" in daemon.said


def test_daemon_needs_no_torch(node: Node) -> None:
    """Half a second of start and little memory, where torch takes seconds and hundreds of megabytes."""
    daemon = node.start_daemon(fresh=True)
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "zmq" in maps
    assert "torch" not in maps


def test_room_that_a_push_will_give_back_is_waited_for(node: Node) -> None:
    """As long as ``reserve_seconds``: a trainer that cannot send yet is no trainer that has fallen silent."""
    daemon = node.start_daemon(
        arena__size_bytes="16MiB",
        deadlines__heartbeat_interval_seconds=0.2,
        deadlines__receive_idle_seconds=2,
        retention__versions=0,
    )
    trainer, next_trainer = node.trainer(), node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    next_trainer.ask("build", recipe=RECIPE, seed=3)
    publishing = next_trainer.begin("publish", version=3)
    until(lambda: daemon.version(3).get("age_seconds", 0) > 4.5, "it waits")
    assert daemon.version(3)["state"] == "receiving"
    gated.ask("go")
    assert trainer.result(live) == {"gated": "updated"}
    next_trainer.result(publishing)
    next_trainer.ask("live", version=3, timeout=15)
    assert gated.ask("forward") == next_trainer.ask("digests")


def test_room_that_does_not_come_in_time_is_a_deadline(node: Node) -> None:
    node.start_daemon(
        arena__size_bytes="16MiB",
        deadlines__heartbeat_interval_seconds=0.2,
        deadlines__reserve_seconds=1,
        retention__versions=0,
    )
    trainer, next_trainer = node.trainer(), node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    next_trainer.ask("build", recipe=RECIPE, seed=3)
    with contextlib.suppress(CpeError):
        next_trainer.ask("publish", version=3)
    with pytest.raises(CpeError, match="no room for 6291456 bytes"):
        next_trainer.ask("live", version=3, timeout=15)
    gated.ask("go")
    assert trainer.result(live) == {"gated": "updated"}
