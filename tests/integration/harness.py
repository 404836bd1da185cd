"""A node for tests: a real daemon, real trainers and real engine workers, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from cpe_daemon.errors import PeerLostError
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.wire.messages import FrontReply, StatusReply, StatusRequest
from tests.integration.processes import ROOT, Child, Process, Zygote, exit_status, until

MODEL, RUN = "policy", "run-1"

SETTINGS: dict[str, Any] = {
    "arena": {"size_bytes": "64MiB"},
    "device": {"slots": 3, "slot_bytes": "1MiB"},
    "ingest": {"credits": 4, "chunk_bytes": "256KiB", "landing_credits": 4, "landing_chunk_bytes": "256KiB"},
    "deadlines": {
        "hello_seconds": 5,
        "heartbeat_interval_seconds": 0.5,
        "heartbeat_lost_seconds": 6,
        "receive_idle_seconds": 15,
        "reserve_seconds": 10,
        "pause_seconds": 10,
        "begin_seconds": 10,
        "bucket_seconds": 10,
        "finish_seconds": 10,
        "resume_seconds": 10,
        "abort_seconds": 5,
        "drain_seconds": 10,
    },
    "http": {"listen": "127.0.0.1:0"},
    "log": {"level": "debug", "format": "json"},
}
"""Small, and patient enough for a busy machine; a test that waits for a deadline to pass shortens that one."""

_UNEXPECTED = ("Traceback", "was never retrieved", "was never awaited")
_STOP_SECONDS = 30.0


def settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`SETTINGS` with changes by dotted name."""
    made: dict[str, Any] = {section: dict(values) for section, values in SETTINGS.items()}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            made.setdefault(section, {})[key] = value
        else:
            made[name] = value
    return made


class Daemon(Process):
    """A daemon of its own process, and a link for asking its status."""

    def __init__(self, name: str, started: tuple[int, int] | subprocess.Popen[bytes], runtime_dir: Path, log: Path):
        if isinstance(started, subprocess.Popen):
            super().__init__(name, started.pid, os.pidfd_open(started.pid), log)
        else:
            super().__init__(name, *started, log)
        self.runtime_dir = runtime_dir
        self.front = f"ipc://{runtime_dir / 'front.sock'}"
        self.engines = f"ipc://{runtime_dir / 'engines.sock'}"
        self._started = started
        self._dealer = Dealer(self.front, FrontReply)

    def await_ready(self, seconds: float = 40.0) -> None:
        """Wait until it answers."""
        until(lambda: not self.alive or self._asked(0.5), f"{self.name} answers", seconds)
        if not self.alive:
            pytest.fail(f"{self.name} ended at its start; see {self.log.name}")

    def status(self, seconds: float = 30.0) -> dict[str, Any]:
        """Its state, as it says."""
        answer = self._asked(seconds)
        if answer is None:
            pytest.fail(f"{self.name} gave no status within {seconds:g} s")
        return answer

    def version(self, number: int, run: str = RUN, model: str = MODEL) -> dict[str, Any]:
        """What it says of a version; {} if it knows none."""
        versions = self.status()["versions"]
        known = [v for v in versions if (v["model"], v["run"], v["number"]) == (model, run, number)]
        return known[-1] if known else {}

    def engine(self, name: str) -> dict[str, Any]:
        """What it says of an engine; {} if it knows none."""
        return next((engine for engine in self.status()["engines"] if engine["engine"] == name), {})

    @property
    def free_bytes(self) -> int:
        """Free bytes of its arena."""
        return int(self.status()["arena"]["free_bytes"])

    @property
    def said(self) -> str:
        """All that it has logged."""
        return self.log.read_text()

    def tcp_endpoint(self) -> str:
        """The endpoint over tcp that it chose a port for."""
        return next(str(e) for e in self.status()["daemon"]["endpoints"] if str(e).startswith("tcp://"))

    def stop(self, seconds: float = _STOP_SECONDS) -> int | None:
        """Ask it to end as an init system does; return its exit status."""
        self.signal(signal.SIGTERM)
        self.wait(seconds)
        return self.exit_status

    @property
    def exit_status(self) -> int | None:
        """With what it ended; None or negative if it was killed. Only once it has ended."""
        return self._started.wait() if isinstance(self._started, subprocess.Popen) else exit_status(self.log)

    def release(self) -> None:
        """Kill it if need be, and let go of it."""
        super().release()
        if isinstance(self._started, subprocess.Popen):
            self._started.wait()
        self._dealer.close()

    def _asked(self, seconds: float) -> dict[str, Any] | None:
        try:
            self._dealer.send(StatusRequest(), timeout=seconds)
        except PeerLostError:
            return None
        received = self._dealer.receive(seconds)
        if received is None:  # the answer may still come: nobody is to take it for that to the next question
            self._dealer.close()
            self._dealer = Dealer(self.front, FrontReply)
            return None
        return received[0].status if isinstance(received[0], StatusReply) else None


class Trainer(Child):
    """A trainer rank; see `tests.integration.trainer`."""

    def publish_live(self, version: int, seconds: float = 30.0, **terms: Any) -> dict[str, str]:
        """Publish what was built, and wait until it is live; the outcome by engine."""
        self.ask("publish", version=version, seconds=seconds, **terms)
        outcomes: dict[str, str] = self.ask("live", seconds=seconds + 5, version=version, timeout=seconds)
        return outcomes


class Worker(Child):
    """An engine worker; see `tests.integration.engine_worker`."""

    def state(self) -> dict[str, Any]:
        """Its version, whether it serves, and why not."""
        answer: dict[str, Any] = self.ask("state")
        return answer

    def await_serving(self, version: int | None, run: str = RUN, seconds: float = 30.0) -> None:
        """Wait until it serves that version, or what it started with."""
        wanted = None if version is None else f"{MODEL}@{run}#{version}"
        until(
            lambda: (state := self.state())["serving"] and state["version"] == wanted,
            f"{self.name} serves {wanted}",
            seconds,
        )


C = TypeVar("C", bound=Child)
P = TypeVar("P", bound=Process)


class Node:
    """One node and all that runs on it. Everything ends with `close`."""

    def __init__(self, zygote: Zygote, runtime_dir: Path, logs: Path) -> None:
        self.runtime_dir = runtime_dir
        self._zygote = zygote
        self._logs = logs
        self._processes: list[Process] = []
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        """The daemon last started."""
        if self._daemon is None:
            raise RuntimeError("no daemon was started")
        return self._daemon

    def start_daemon(
        self,
        runtime_dir: Path | None = None,
        *,
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
        tricks: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Daemon:
        """Start a daemon and wait until it answers.

        Args:
            runtime_dir: the node's if None.
            fresh: start an interpreter of its own, as an init system does, rather than fork one.
            environment: variables that it has beside this process's.
            tricks: what is wrong with it; see `tests.integration.daemon_process`.
            changes: settings: ``deadlines__bucket_seconds=1``.
        """
        daemon = self.launch_daemon(runtime_dir, fresh=fresh, environment=environment, tricks=tricks, **changes)
        daemon.await_ready()
        self._daemon = daemon
        return daemon

    def launch_daemon(
        self,
        runtime_dir: Path | None = None,
        *,
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
        tricks: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Daemon:
        """`start_daemon` without the waiting."""
        directory = runtime_dir or self.runtime_dir
        name = f"daemon-{len(self._processes)}"
        config, log = self._logs / f"{name}.yaml", self._logs / f"{name}.log"
        made = settings({key.replace("__", "."): value for key, value in changes.items()})
        config.write_text(
            yaml.safe_dump({"runtime_dir": str(directory), "state_dir": str(directory / "state"), **made})
        )
        arguments = {"config": str(config), "environment": environment or {}, "tricks": tricks or {}}
        if not fresh:
            return self._keep(Daemon(name, self._zygote.fork("daemon_process", arguments, log), directory, log))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CPE_")}
        command = [sys.executable, "-m", "cpe_daemon", "serve", "--config", str(config)]
        if tricks:
            command = [sys.executable, "-m", "tests.integration.daemon_process", json.dumps(arguments)]
        with log.open("wb") as err:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=inherited | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
            )
        return self._keep(Daemon(name, process, directory, log))

    def trainer(self, rank: int = 0, world_size: int = 1, *, endpoint: str | None = None, **terms: Any) -> Trainer:
        """Start a trainer rank."""
        arguments = {
            "endpoints": endpoint or self.daemon.front,
            "model": MODEL,
            "run": RUN,
            "rank": rank,
            "world_size": world_size,
            "connect_timeout": 10.0,
            "send_timeout": 20.0,
            **terms,
        }
        trainer = self._fork(Trainer, f"trainer-{rank}", "trainer", arguments)
        trainer.event("ready")
        return trainer

    def trainers(self, world_size: int, **terms: Any) -> list[Trainer]:
        """Start all ranks of a training job."""
        return [self.trainer(rank, world_size, **terms) for rank in range(world_size)]

    def worker(
        self, engine: str = "e", rank: int = 0, world_size: int = 1, *, target: str = "dict", **terms: Any
    ) -> Worker:
        """Start an engine worker that is not attached yet."""
        arguments = {
            "engine": engine,
            "rank": rank,
            "world_size": world_size,
            "socket": self.daemon.engines,
            "connect_timeout": 10.0,
            "target": target,
            **terms,
        }
        return self._fork(Worker, f"engine-{engine}-{rank}", "engine_worker", arguments)

    def engine(self, name: str = "e", *, world_size: int = 1, **terms: Any) -> list[Worker]:
        """Start an engine's workers and attach them."""
        workers = [self.worker(name, rank, world_size, **terms) for rank in range(world_size)]
        for number, worker in [(worker.begin("attach"), worker) for worker in workers]:
            worker.result(number)
        return workers

    def hog(self, device: str) -> Child:
        """Start a process that takes a GPU's memory; see `tests.integration.gpus`."""
        return self._fork(Child, "hog", "gpus", {"device": device})

    def preload(self, module: str) -> None:
        """Import a module that is slow to import before the processes that need it start."""
        self._zygote.preload(module)

    def reference(self) -> Child:
        """Start a process that has the real model, and no daemon; see `tests.integration.minilm`."""
        return self._fork(Child, "reference", "minilm", {})

    def close(self, *, gracefully: bool) -> None:
        """End everything, and show what it said. ``gracefully``: a daemon that lives has to end well."""
        wrong: list[str] = []
        daemons = [process for process in self._processes if isinstance(process, Daemon)]
        try:
            if gracefully:
                for daemon in [daemon for daemon in daemons if daemon.alive]:
                    daemon.signal(signal.SIGCONT)
                    if (status := daemon.stop()) != 0:
                        wrong.append(f"{daemon.name} ended with status {status}")
                    if "daemon.drain_timed_out" in daemon.said:
                        wrong.append(f"{daemon.name} was still at a round that nothing kept from ending")
                for daemon in daemons:
                    wrong += [f"{daemon.name} logged {word!r}" for word in _UNEXPECTED if word in daemon.said]
        finally:
            for process in self._processes:
                process.release()
            self._show_logs()
        if wrong:
            pytest.fail("; ".join(wrong))

    def _show_logs(self) -> None:
        """pytest shows this where a test failed, and nowhere else."""
        for process in self._processes:
            lines = process.log.read_text(errors="replace").splitlines()
            print(f"--- {process.name} (pid {process.pid}), last of {len(lines)} lines")
            print("\n".join(lines[-40:]))

    def _fork(self, kind: type[C], name: str, module: str, arguments: Mapping[str, Any]) -> C:
        log = self._logs / f"{len(self._processes)}-{name}.log"
        return self._keep(self._zygote.start(kind, name, module, arguments, log))

    def _keep(self, process: P) -> P:
        self._processes.append(process)
        return process
