"""A host for benchmarks of pushes: a real daemon and engine workers, each a process, and a publisher in this one."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from benchmarks.models import DENSE
from cpe_daemon.config import ENGINES_SOCKET, FRONT_SOCKET
from cpe_daemon.core.types import align
from cpe_daemon.demo.architecture import Architecture
from cpe_daemon.demo.digests import digest_of
from cpe_daemon.demo.engine import local_tensors
from cpe_daemon.demo.processes import Talker, await_daemon
from cpe_daemon.demo.trainer import slice_of
from cpe_daemon.errors import DeadlineError, EngineError
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.publisher import Publisher
from cpe_daemon.wire.messages import FrontReply, StatusReply, StatusRequest
from cpe_daemon.wire.reports import VersionReport

START_SECONDS: Final = 120.0
SERVE: Final = ("-m", "cpe_daemon", "serve")
_ANSWER_SECONDS: Final = 120.0
_STATUS_SECONDS: Final = 10.0
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """What stands on the host.

    Attributes:
        model: a name of `benchmarks.models.DENSE`.
        slots: slots in each set.
        slot_bytes: size of a slot.
        workers: tensor-parallel ranks of the one engine.
        gpus: sets of slots; workers are dealt to them in turn.
        more: further settings of the daemon, by section.
        retained: versions that are kept beside the live one.
    """

    model: str
    slots: int
    slot_bytes: int
    workers: int = 1
    gpus: int = 1
    more: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    retained: int = 0

    @property
    def architecture(self) -> Architecture:
        """Names and shapes."""
        return DENSE[self.model]

    def config(self, directory: Path) -> dict[str, object]:
        """The daemon's settings: room for versions that are live, retained and coming, and no listener over HTTP."""
        made: dict[str, Mapping[str, object] | str] = {
            "runtime_dir": str(directory),
            "state_dir": str(directory / "state"),
            "arena": {"size_bytes": align(self.architecture.nbytes * (21 + 10 * self.retained) // 10 + 16 * _MIB)},
            "device": {"gpus": self.gpus, "slots": self.slots, "slot_bytes": self.slot_bytes},
            "retention": {"versions": self.retained},
            "http": {"listen": ""},
        }
        return {**made, **self.more}


class Weights:
    """What the trainer publishes; every version differs from the one before, in every tensor.

    Args:
        architecture: names and shapes.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.tensors = local_tensors(architecture, 1, seed=7)
        self.nbytes = architecture.nbytes

    @torch.no_grad()
    def step(self) -> None:
        """Change a number of each tensor."""
        for tensor in self.tensors.values():
            tensor.view(-1)[0] += 1.0

    def digests(self, rank: int, world_size: int) -> dict[str, str]:
        """What a rank has to hold."""
        return {name: digest_of(slice_of(name, t, rank, world_size)) for name, t in self.tensors.items()}


class DaemonProcess(Talker):
    """A daemon, which ends when it is told to, and not with its standard input."""

    @property
    def pid(self) -> int:
        """Its process's number."""
        return self._popen.pid

    def _ask_to_end(self) -> None:
        self._popen.terminate()


class Host:
    """A context: daemon, workers and publisher are up inside of it, and gone behind it.

    Args:
        setting: what stands on it.
        directory: for sockets and logs; its path has to be short.
        serve: Python's arguments that start a daemon, but for ``--config``.
    """

    def __init__(self, setting: Setting, directory: Path, serve: Sequence[str] = SERVE) -> None:
        self.setting = setting
        self.daemon: DaemonProcess
        self._directory = directory
        self._endpoint = f"ipc://{directory / FRONT_SOCKET}"
        self._serve = serve
        self._number = 0
        self._workers: list[Talker] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _start(self, undo: contextlib.ExitStack) -> None:
        self._directory.mkdir(parents=True)
        config = self._directory / "config.yaml"
        config.write_text(json.dumps(self.setting.config(self._directory)))  # JSON is YAML
        command = [*self._serve, "--config", str(config)]
        self.daemon = undo.enter_context(DaemonProcess("the daemon", command, self._directory / "daemon.log"))
        self._workers = [undo.enter_context(self._worker(rank)) for rank in range(self.setting.workers)]
        await_daemon(self._endpoint, [self.daemon, *self._workers], START_SECONDS)
        for worker in self._workers:
            worker.hear(START_SECONDS, meanwhile=self.daemon.check)
        run = f"bench-{secrets.token_hex(3)}"
        self._publisher = undo.enter_context(Publisher(self._endpoint, model="bench", run=run))

    def _worker(self, rank: int) -> Talker:
        command = ["-m", "benchmarks.worker", "--model", self.setting.model]
        command += ["--socket", f"ipc://{self._directory / ENGINES_SOCKET}", "--gpu", f"shm-{rank % self.setting.gpus}"]
        command += ["--rank", str(rank), "--world-size", str(self.setting.workers)]
        return Talker(f"engine rank {rank}", command, self._directory / f"engine-{rank}.log")

    def update(self, weights: Weights) -> VersionReport:
        """Publish the next version, and wait until the engine serves it.

        Returns:
            The daemon's own report: seconds from staged to live, and of each phase.

        Raises:
            EngineError: the version went live without the engine.
            CpeError: it could not be published.
        """
        weights.step()
        self._number += 1
        report = self._publisher.publish(weights.tensors, version=self._number).live(timeout=_ANSWER_SECONDS)
        if report.behind or len(report.engines) != 1:
            raise EngineError(f"version {self._number} went live without the engine: {report}")
        (node,) = report.nodes.values()
        return node

    def roll_back(self) -> VersionReport:
        """Bring the version back that was live before, and wait until the engine serves it.

        Raises:
            EngineError: the engine did not take it.
            CpeError: it could not be brought back.
        """
        (node,) = self._publisher.rollback(timeout=_ANSWER_SECONDS).nodes.values()
        if [engine.outcome for engine in node.engines.values()] != ["updated"]:
            raise EngineError(f"version {node.version.number} was rolled back to without the engine: {node}")
        return node

    def expected(self, weights: Weights) -> list[dict[str, str]]:
        """What each worker has to hold of these weights."""
        return [weights.digests(rank, self.setting.workers) for rank in range(self.setting.workers)]

    def check(self, weights: Weights) -> None:
        """Compare what every worker holds with what was published, bit by bit.

        Raises:
            EngineError: it is not the same; names some tensors.
        """
        self.check_held(self.expected(weights), self._number)

    def check_held(self, expected: Sequence[Mapping[str, str]], number: int) -> None:
        """Compare what every worker holds with what it has to hold of a version; raises as `check` does."""
        for rank, worker in enumerate(self._workers):
            worker.tell({})
            held = worker.hear(_ANSWER_SECONDS)
            wrong = [name for name, digest in expected[rank].items() if held["digests"].get(name) != digest]
            if wrong or held["version"] != number:
                raise EngineError(
                    f"rank {rank} holds version {held['version']} of {number}, with {len(wrong)} tensors that"
                    f" differ: {', '.join(wrong[:3])}"
                )

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself.

        Raises:
            DeadlineError: it does not answer.
        """
        with contextlib.closing(Dealer(self._endpoint, FrontReply)) as dealer:
            dealer.send(StatusRequest(), timeout=_STATUS_SECONDS)
            received = dealer.receive(_STATUS_SECONDS)
        if received is None or not isinstance(received[0], StatusReply):
            raise DeadlineError("the daemon does not tell its status")
        return received[0].status


class FloorProcess(Talker):
    """A floor for the same model and slots, in a process of its own.

    Args:
        setting: of the host that it is compared with.
        directory: for its log.
    """

    def __init__(self, setting: Setting, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["-m", "benchmarks.floor", "--model", setting.model, "--slots", str(setting.slots)]
        command += ["--slot-bytes", str(setting.slot_bytes)]
        super().__init__("the floor", command, directory / "floor.log")

    def ready(self) -> int:
        """Wait until it can run; return how many buckets there are."""
        return int(self.hear(START_SECONDS)["buckets"])

    def run(self) -> float:
        """Run once; return the seconds that it took."""
        self.tell({})
        return float(self.hear(_ANSWER_SECONDS)["seconds"])
