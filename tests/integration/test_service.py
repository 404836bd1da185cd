"""The daemon as a service: what its manager hears over a real notify socket, and how it stops, whatever it is at."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpe_daemon.daemon.drain import CLOSE_SECONDS, FAREWELL_SECONDS
from cpe_daemon.errors import BusyError, EngineError, PeerLostError
from tests.integration.harness import MODEL, RUN, Daemon, Node, Trainer, Worker
from tests.integration.init_system import InitSystem
from tests.integration.processes import until

RECIPE = {"plain": 12, "nbytes": 512 << 10}
MIDDLE = 7
SOCKETS = ("front.sock", "engines.sock", "handoff.sock")
FIRST, SECOND = f"{MODEL}@{RUN}#1", f"{MODEL}@{RUN}#2"


@pytest.fixture
def manager(no_leaks: None, runtime_dir: Path) -> Iterator[InitSystem]:
    """Beside the daemon's directory: that one is the daemon's own."""
    started = InitSystem(runtime_dir.with_suffix(".notify"))
    yield started
    started.close()
    runtime_dir.with_suffix(".notify").unlink()


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


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    """What it logged under a name."""
    said = [json.loads(line) for line in daemon.said.splitlines() if line.startswith("{")]
    return [entry for entry in said if entry["event"] == name]


def ended(daemon: Daemon) -> dict[str, Any]:
    """Wait for its good end, and return what it said of the engines."""
    daemon.wait()
    assert daemon.exit_status == 0
    (drained,) = events(daemon, "daemon.drained")
    return drained


# --- start and service -----------------------------------------------------------------------------------------------


def test_daemon_is_ready_once_all_its_doors_are_open(node: Node, manager: InitSystem) -> None:
    daemon = node.launch_daemon(fresh=True, environment=manager.environment)
    manager.hear("READY", "1")
    for name in SOCKETS:  # at once: who is started after this service may come now
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(node.runtime_dir / name))
    assert manager.said("STATUS")[-1] == "serving 0 engines, nothing live"
    assert daemon.status()["arena"]["prefaulted"]
    starting = manager.said("STATUS")[:-1]
    assert starting
    assert all(line.startswith("starting: prefaulting the arena, ") for line in starting)
    assert daemon.stop() == 0
    manager.hear_out()
    assert manager.said("READY") == ["1"]
    assert manager.said("WATCHDOG") == []  # nobody asked for any


def test_status_line_is_true_while_the_daemon_serves(node: Node, manager: InitSystem) -> None:
    node.start_daemon(environment=manager.environment)
    trainer = node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    manager.hear("STATUS", "serving 1 engine, nothing live")
    publish(trainer, 1)
    manager.hear("STATUS", f"serving 1 engine, {FIRST} live")
    live = stop_midway(trainer, gated, 2)
    manager.hear("STATUS", f"serving 0 of 1 engines, {FIRST} live, {SECOND} being pushed")
    gated.ask("go")
    trainer.result(live)
    manager.hear("STATUS", f"serving 1 engine, {SECOND} live")
    gated.kill()
    manager.hear("STATUS", f"serving 0 engines, {SECOND} live")


def test_starting_asks_for_time_as_long_as_memory_comes(node: Node, manager: InitSystem) -> None:
    daemon = node.launch_daemon(environment=manager.environment, arena__size_bytes="2GiB", arena__prefault_threads=1)
    assert int(manager.hear("EXTEND_TIMEOUT_USEC")) == 60_000_000
    daemon.signal(signal.SIGTERM)  # most of it is still to come
    manager.hear("STOPPING", "1")
    daemon.wait()
    assert daemon.exit_status == 0
    manager.hear_out()
    assert manager.said("READY") == []
    assert events(daemon, "daemon.not_started")
    assert "daemon.ready" not in daemon.said
    assert not [name for name in SOCKETS if (node.runtime_dir / name).exists()]


def test_second_daemon_is_not_ready(node: Node, manager: InitSystem) -> None:
    node.start_daemon()
    second = node.launch_daemon(fresh=True, environment=manager.environment)
    second.wait()
    assert second.exit_status == 6
    (failed,) = events(second, "daemon.failed")
    assert (failed["level"], failed["code"]) == ("critical", "resource")
    assert f"another daemon (pid {node.daemon.pid})" in failed["error"]
    assert "error:" not in second.said, "it is said once, as all else is"
    manager.hear_out()
    assert manager.heard == []
    assert node.daemon.status()["daemon"]["pid"] == node.daemon.pid
    second.log.write_text("")  # it has nothing more to tell


def test_taken_address_is_noticed_before_memory_is_provided(node: Node, manager: InitSystem) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        daemon = node.launch_daemon(
            environment=manager.environment, ingest__insecure=True, ingest__listen=[endpoint], http__listen=""
        )
        daemon.wait()
    assert daemon.exit_status == 6
    (failed,) = events(daemon, "daemon.failed")
    assert f"cannot listen on {endpoint} (ingest.listen)" in failed["error"]
    assert "give ingest.listen another port" in failed["error"]
    assert not events(daemon, "daemon.stopped"), "it never ran"
    manager.hear_out()
    assert not [line for line in manager.said("STATUS") if "prefaulting" in line], "nothing that takes long had begun"
    assert manager.said("READY") == []


# --- the watchdog ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watching(no_leaks: None, runtime_dir: Path) -> Iterator[InitSystem]:
    """A manager with a watchdog of 0.4 s."""
    started = InitSystem(runtime_dir.with_suffix(".notify"), watchdog_seconds=0.4)
    yield started
    started.close()
    runtime_dir.with_suffix(".notify").unlink()


def test_watchdog_is_fed_twice_a_period_and_more(node: Node, watching: InitSystem) -> None:
    daemon = node.start_daemon(environment=watching.environment)
    watching.hear("READY")
    began = time.monotonic()
    for _ in range(12):
        watching.hear("WATCHDOG", "1")
    fed = watching.times_of("WATCHDOG")[:12]
    # Twelve meals at half the period would take 2.4 s; a machine that is busy may be late with some of them.
    assert fed[-1] - began < 12 * 0.4
    assert daemon.stop() == 0


def test_watchdog_is_not_fed_by_a_loop_that_stands_still(node: Node, watching: InitSystem) -> None:
    daemon = node.start_daemon(environment=watching.environment)
    watching.hear("WATCHDOG")
    daemon.signal(signal.SIGSTOP)
    watching.hear_out()
    fed = len(watching.said("WATCHDOG"))
    watching.hear_out(1.0)
    assert len(watching.said("WATCHDOG")) == fed
    daemon.signal(signal.SIGCONT)
    watching.hear("WATCHDOG")


def test_watchdog_is_not_fed_while_a_copy_is_stuck(node: Node, watching: InitSystem, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    daemon = node.start_daemon(
        environment=watching.environment,
        tricks={"copies_wait_for": str(fifo)},
        deadlines__stuck_seconds=0.3,
        ingest__copy_threads=1,
    )
    trainer = node.trainer()
    watching.hear("WATCHDOG")
    trainer.ask("build", recipe={"plain": 1, "nbytes": 4096}, seed=1)
    trainer.ask("publish", version=1)
    live = trainer.begin("live", version=1, timeout=20)
    assert "a copy into the arena has been in flight" in watching.hear("STATUS", "NOT WELL")
    watching.hear_out()
    fed = len(watching.said("WATCHDOG"))
    watching.hear_out(1.0)
    assert len(watching.said("WATCHDOG")) == fed
    assert len(events(daemon, "daemon.stuck")) == 1  # said once, and loudly
    assert events(daemon, "daemon.stuck")[0]["level"] == "error"
    assert daemon.status()["versions"][0]["state"] == "receiving"  # the loop goes round all the while
    with fifo.open("wb"):
        watching.hear("WATCHDOG")
    trainer.result(live)
    watching.hear("STATUS", f"{FIRST} live")
    assert len(events(daemon, "daemon.goes_on")) == 1


def test_watchdog_is_fed_while_the_daemon_drains(node: Node, watching: InitSystem) -> None:
    daemon = node.start_daemon(environment=watching.environment)
    trainer = node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    daemon.signal(signal.SIGTERM)
    waiting = watching.hear("STATUS", "stopping: waiting up to 10 s")
    for _ in range(5):
        watching.hear("WATCHDOG")
    assert watching.said("STATUS")[-1] == waiting
    gated.ask("go")
    trainer.result(live)
    ended(daemon)


def test_daemon_that_the_watchdog_ends_says_where_its_threads_are(node: Node) -> None:
    daemon = node.start_daemon(fresh=True)
    daemon.signal(signal.SIGABRT)
    daemon.wait()
    assert daemon.exit_status == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in daemon.said
    assert "cpe_daemon/daemon/service.py" in daemon.said or "cpe_daemon/cli/serve.py" in daemon.said


def test_daemon_with_a_stuck_copy_ends_all_the_same(node: Node, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    daemon = node.start_daemon(
        tricks={"copies_wait_for": str(fifo), "close_seconds": 0.2},
        deadlines__drain_seconds=0.1,
        deadlines__undo_seconds=0.1,
    )
    trainer = node.trainer()
    trainer.ask("build", recipe={"plain": 1, "nbytes": 4096}, seed=1)
    trainer.ask("publish", version=1)
    live = trainer.begin("live", version=1, timeout=20)
    until(lambda: daemon.version(1).get("state") == "receiving", "it is being received")
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    (said,) = events(daemon, "daemon.stop_timed_out")
    assert said["level"] == "critical"
    assert said["copies"]["in"] > 0
    assert not events(daemon, "daemon.stopped")
    with pytest.raises(PeerLostError, match="the daemon stops"):
        trainer.result(live)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["told to stop", "after a bug"])
def test_daemon_ends_though_a_thread_of_the_loop_s_own_pool_does_not(node: Node, number: signal.Signals) -> None:
    """Python waits for that pool after the loop is over, and nobody is left who could look at a clock."""
    daemon = node.start_daemon(
        tricks={"thread_hangs": True, "on_signal": "fail", "close_seconds": 0.5},
        deadlines__drain_seconds=0.1,
        deadlines__undo_seconds=0.1,
    )
    daemon.signal(number)
    daemon.wait()
    assert events(daemon, "daemon.stopped")
    (said,) = events(daemon, "daemon.stop_timed_out")
    assert said["level"] == "critical"


# --- stopping --------------------------------------------------------------------------------------------------------


def test_idle_daemon_stops_at_once_and_says_what_engines_hold(node: Node, manager: InitSystem) -> None:
    daemon = node.start_daemon(environment=manager.environment)
    trainer = node.trainer()
    worker = node.engine(recipe=RECIPE)[0]
    fresh = node.engine("fresh", recipe=RECIPE, model="critic")[0]
    held = publish(trainer, 1)
    daemon.signal(signal.SIGTERM)
    manager.hear("STOPPING", "1")
    at_most = int(manager.hear("EXTEND_TIMEOUT_USEC")) / 1e6
    assert 0 < at_most - (10 + 30 + FAREWELL_SECONDS + CLOSE_SECONDS) < 1  # as configured, what is added, the arena
    drained = ended(daemon)
    assert drained["engines"] == {"e": FIRST, "fresh": "what it started with"}
    assert drained["in_doubt"] == {}
    manager.hear_out()
    assert manager.said("STATUS")[-1] == f"stopped: e holds {FIRST}; fresh holds what it started with"
    assert worker.ask("forward") == held
    assert fresh.state()["serving"]


def test_farewell_is_no_reason_to_worry(node: Node) -> None:
    """Neither side complains; both wait for the next daemon, and are there when it comes."""
    node.start_daemon()
    trainers = [node.trainer(landing=landing) for landing in (True, False)]
    worker = node.engine(recipe=RECIPE)[0]
    publish(trainers[0], 1)
    assert node.daemon.stop() == 0
    assert not events(node.daemon, "daemon.farewell_unanswered")
    gone = [entry["reason"] for name in ("trainer.gone", "worker.gone") for entry in events(node.daemon, name)]
    assert gone == ["it said goodbye", "it said goodbye", "it detached"]
    for process in (*trainers, worker):
        until(lambda process=process: "said farewell" in process.log.read_text(), f"{process.name} has heard it")  # type: ignore[misc]
    node.start_daemon()
    publish(trainers[1], 2)
    worker.await_serving(2)
    for process in (*trainers, worker):
        assert "WARNING" not in process.log.read_text()
        assert "ERROR" not in process.log.read_text()


def test_version_that_is_being_received_fails_and_says_why(node: Node) -> None:
    daemon = node.start_daemon()
    trainer = node.trainer()
    worker = node.engine(recipe=RECIPE)[0]
    held = publish(trainer, 1)
    trainer.ask("build", recipe=RECIPE, seed=2)
    trainer.ask("arm", at=3)
    publishing = trainer.begin("publish", version=2, watched=True)
    trainer.event("reached")
    daemon.signal(signal.SIGTERM)
    ended(daemon)
    trainer.ask("go")
    trainer.result(publishing)
    with pytest.raises(PeerLostError, match=f"the daemon stops, and had not received {SECOND} whole"):
        trainer.ask("live", version=2, timeout=15)
    assert worker.ask("forward") == held


def test_while_a_push_ends_nothing_else_begins(node: Node, manager: InitSystem) -> None:
    daemon = node.start_daemon(environment=manager.environment, retention__versions=2, deadlines__drain_seconds=60)
    trainer, other, waiting = node.trainer(), node.trainer(), node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    waiting.ask("build", recipe=RECIPE, seed=3)
    waiting.ask("publish", version=3)
    waiting.ask("staged", version=3, timeout=15)
    daemon.signal(signal.SIGTERM)
    manager.hear("STATUS", "stopping: waiting up to 60 s for the push in flight")
    other.ask("build", recipe=RECIPE, seed=4)
    other.ask("publish", version=4)
    with pytest.raises(BusyError, match="the daemon stops, and takes no more versions"):
        other.ask("live", version=4, timeout=15)
    with pytest.raises(PeerLostError, match=f"the daemon stops, and did not push {MODEL}@{RUN}#3"):
        waiting.ask("live", version=3, timeout=15)
    newcomer = node.worker("newcomer", recipe=RECIPE, connect_timeout=5.0)
    with pytest.raises(PeerLostError, match="takes no workers: the daemon stops"):
        newcomer.ask("attach")
    expected = trainer.begin("digests")
    gated.ask("go")
    assert trainer.result(live) == {"gated": "updated"}
    assert ended(daemon)["engines"] == {"gated": SECOND}
    assert gated.ask("forward") == trainer.result(expected)


def test_push_that_does_not_end_in_time_is_undone(node: Node, manager: InitSystem) -> None:
    """The one that hangs is in doubt; those who waited for it have their version again, and serve it."""
    daemon = node.start_daemon(
        environment=manager.environment,
        deadlines__drain_seconds=0.3,
        deadlines__abort_seconds=1,
        deadlines__pause_seconds=2,
        deadlines__undo_seconds=10,
    )
    trainer = node.trainer()
    hung, well = (node.engine(name, target="callback", recipe=RECIPE)[0] for name in ("hung", "well"))
    held = publish(trainer, 1)
    live = stop_midway(trainer, hung, 2)
    hung.signal(signal.SIGSTOP)
    daemon.signal(signal.SIGTERM)
    with pytest.raises(PeerLostError, match="the daemon stops; the push was undone"):
        trainer.result(live)
    drained = ended(daemon)
    assert drained["engines"] == {"well": FIRST}
    assert list(drained["in_doubt"]) == ["hung"]
    assert "the daemon stops" in drained["in_doubt"]["hung"]
    manager.hear_out()
    assert "stopping: undoing the push in flight, for up to 10 s" in manager.said("STATUS")
    assert manager.said("STATUS")[-1] == f"stopped: well holds {FIRST}; hung IS IN DOUBT"
    assert well.ask("forward") == held

    hung.signal(signal.SIGCONT)
    hung.ask("go")
    until(lambda: "lost the daemon" in hung.log.read_text(), "it notices")
    with pytest.raises(EngineError, match="mixture"):
        hung.ask("forward")
    node.start_daemon()
    until(lambda: len(node.daemon.status()["engines"]) == 2, "both are back")
    expected = publish(trainer, 3)
    assert hung.ask("forward") == well.ask("forward") == expected


def test_engine_that_wakes_while_the_push_is_undone_is_restored_as_well(node: Node) -> None:
    daemon = node.start_daemon(deadlines__drain_seconds=0.3, deadlines__undo_seconds=15)
    trainer = node.trainer()
    hung = node.engine("hung", target="callback", recipe=RECIPE)[0]
    held = publish(trainer, 1)
    live = stop_midway(trainer, hung, 2)
    hung.signal(signal.SIGSTOP)
    daemon.signal(signal.SIGTERM)
    until(lambda: "daemon.drain_timed_out" in daemon.said, "it undoes the push")
    hung.signal(signal.SIGCONT)
    hung.ask("go")
    with pytest.raises(PeerLostError, match="the daemon stops; the push was undone"):
        trainer.result(live)
    assert ended(daemon)["engines"] == {"hung": FIRST}
    assert hung.ask("forward") == held


def test_second_signal_has_the_push_undone_at_once(node: Node) -> None:
    daemon = node.start_daemon(deadlines__drain_seconds=3600)
    trainer = node.trainer()
    gated = node.engine("gated", target="callback", recipe=RECIPE)[0]
    held = publish(trainer, 1)
    live = stop_midway(trainer, gated, 2)
    daemon.signal(signal.SIGTERM)
    until(lambda: "daemon.draining" in daemon.said, "it drains")
    daemon.signal(signal.SIGINT)
    until(lambda: "daemon.drain_hurried" in daemon.said, "it does not wait any longer")
    gated.ask("go")
    with pytest.raises(PeerLostError, match="the daemon stops; the push was undone"):
        trainer.result(live)
    assert ended(daemon)["engines"] == {"gated": FIRST}
    assert gated.ask("forward") == held


def test_engine_that_is_being_given_the_live_version_gets_it(node: Node) -> None:
    """Undoing that would leave it with nothing, so it has both spans of time."""
    daemon = node.start_daemon(deadlines__drain_seconds=0.3, deadlines__undo_seconds=15)
    trainer = node.trainer()
    expected = publish(trainer, 1)
    late = node.worker("late", target="callback", recipe=RECIPE)
    late.ask("arm", at=MIDDLE)
    late.ask("attach")
    late.event("reached")
    daemon.signal(signal.SIGTERM)
    until(lambda: "daemon.drain_timed_out" in daemon.said, "the first is over")
    late.ask("go")
    assert ended(daemon)["engines"] == {"late": FIRST}
    assert late.ask("forward") == expected


def test_trainer_that_hangs_delays_the_end_by_no_more_than_its_time(node: Node) -> None:
    daemon = node.start_daemon()
    trainer = node.trainer(landing=False)
    until(lambda: events(daemon, "trainer.connected"), "the trainer is known")
    trainer.signal(signal.SIGSTOP)
    daemon.signal(signal.SIGTERM)
    ended(daemon)
    assert events(daemon, "daemon.farewell_unanswered")
