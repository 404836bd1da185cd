"""A node for benchmarks: a real daemon, engines with a worker process for each rank, and a trainer process."""

from __future__ import annotations

import contextlib
import json
import secrets
import select
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from benchmarks.gpu.scrape import Readings, scrape
from benchmarks.gpu.trainer import MODEL
from benchmarks.host import SERVE, DaemonProcess
from benchmarks.models import MODELS
from cpe_daemon.cli.conversation import Conversation, DaemonAddress, ask_status
from cpe_daemon.config import ENGINES_SOCKET, FRONT_SOCKET
from cpe_daemon.core.types import align
from cpe_daemon.demo.architecture import Architecture
from cpe_daemon.demo.processes import Talker, await_daemon
from cpe_daemon.errors import EngineError
from cpe_daemon.wire.messages import PushReply, PushRequest
from cpe_daemon.wire.reports import VersionReport

START_SECONDS: Final = 300.0
ANSWER_SECONDS: Final = 330.0
_STATUS_SECONDS: Final = 10.0
_MIB: Final = 1 << 20
_GPU_HOST: Final = {"ingest": {"landing_credits": 24}}
"""As configs/h200-8gpu.yaml has it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What stands on the node.

    Attributes:
        device: ``cuda``, or ``shm`` on a CPU host.
        model: a name of `benchmarks.models.MODELS`.
        gpus: UUIDs of the GPUs that take part; for ``shm`` names of sets of slots.
        engines: by name, the GPU of each of its ranks.
        slots: slots a GPU; "auto" leaves it to the daemon.
        slot_bytes: size of a slot.
        versions: how many the arena has room for.
        source: UUID of the GPU that holds the trainer's tensors; "": host memory.
        serve: more arguments of ``cpe serve``.
        more: further settings of the daemon, by section.
    """

    device: str
    model: str
    gpus: tuple[str, ...]
    engines: Mapping[str, Sequence[str]]
    slots: int | str = 3
    slot_bytes: int = 256 * _MIB
    versions: int = 2
    source: str = ""
    serve: tuple[str, ...] = ()
    more: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """Names and shapes."""
        return MODELS[self.model]

    def config(self, directory: Path) -> Mapping[str, object]:
        """The daemon's settings."""
        extent_bytes = sum(align(spec.nbytes) for spec in self.architecture.specs())
        device: dict[str, object] = {"kind": self.device, "slots": self.slots, "slot_bytes": self.slot_bytes}
        device |= {"uuids": list(self.gpus)} if self.device == "cuda" else {"gpus": len(self.gpus)}
        made: dict[str, Mapping[str, object] | str] = {
            "runtime_dir": str(directory),
            "state_dir": str(directory / "state"),
            "arena": {"size_bytes": max(align(self.versions * extent_bytes) + 4096, _MIB)},
            "device": device,
            "retention": {"versions": 0},
            "http": {"listen": "127.0.0.1:0"},
            **(_GPU_HOST if self.device == "cuda" else {}),
        }
        for section, settings in self.more.items():
            known = made.get(section, {})
            made[section] = {**known, **settings} if isinstance(known, Mapping) else settings
        return made


def one_engine(gpus: Sequence[str]) -> dict[str, Sequence[str]]:
    """One engine, a rank on each GPU."""
    return {"tp": tuple(gpus)}


def engine_each(gpus: Sequence[str]) -> dict[str, Sequence[str]]:
    """An engine on each GPU, which holds the whole model."""
    return {f"each-{number}": (gpu,) for number, gpu in enumerate(gpus)}


class EngineProcess(Talker):
    """One rank of an engine, which can be killed."""

    def kill(self) -> None:
        """End it at once, as the kernel does when memory is short."""
        self._popen.kill()
        self._popen.wait()

    @property
    def has_spoken(self) -> bool:
        """Whether `hear` would return at once."""
        said = self._popen.stdout
        return bool(self._unread) or (said is not None and bool(select.select([said], [], [], 0)[0]))


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish came to: seconds from the call to live and to its return, and the daemon's own report."""

    seconds: float
    returned: float
    report: VersionReport


class Node:
    """A context: daemon, engines and trainer are up inside of it, and gone behind it.

    Args:
        setting: what stands on it.
        directory: for sockets and logs; its path has to be short.
    """

    def __init__(self, setting: Setting, directory: Path) -> None:
        self.setting = setting
        self.number = 0
        """Of the version that was published last."""
        self.workers: dict[tuple[str, int], EngineProcess] = {}
        self.daemon: DaemonProcess
        self._trainer: Talker
        self._directory = directory
        self._address = DaemonAddress(f"ipc://{directory / FRONT_SOCKET}")
        self._url = ""
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
        command = [*SERVE, *self.setting.serve, "--config", str(config)]
        self.daemon = undo.enter_context(DaemonProcess("the daemon", command, self._directory / "daemon.log"))
        self._trainer = undo.enter_context(self._start_trainer())
        undo.callback(self._stop_workers)
        for name, gpus in self.setting.engines.items():
            for rank in range(len(gpus)):
                self.start_worker(name, rank)
        await_daemon(self._address.endpoint, [self.daemon, self._trainer, *self.workers.values()], START_SECONDS)
        for worker in self.workers.values():
            worker.hear(START_SECONDS, meanwhile=self.daemon.check)
        self._trainer.hear(START_SECONDS, meanwhile=self.daemon.check)
        endpoints = [str(endpoint) for endpoint in self.status()["daemon"]["endpoints"]]
        self._url = next(endpoint for endpoint in endpoints if endpoint.startswith("http://"))

    def _start_trainer(self) -> Talker:
        command = ["-m", "benchmarks.gpu.trainer", "--model", self.setting.model, "--gpu", self.setting.source]
        command += ["--endpoint", self._address.endpoint, "--run", f"bench-{secrets.token_hex(3)}"]
        return Talker("the trainer", command, self._directory / "trainer.log")

    def _stop_workers(self) -> None:
        with contextlib.ExitStack() as undo:
            for worker in self.workers.values():
                undo.callback(worker.stop)

    def start_worker(self, engine: str, rank: int) -> EngineProcess:
        """Start the process of a rank, in the place of one that has ended; it says when it is attached."""
        gpus = self.setting.engines[engine]
        command = ["-m", "benchmarks.gpu.engine", "--model", self.setting.model, "--gpu", gpus[rank]]
        command += ["--socket", f"ipc://{self._directory / ENGINES_SOCKET}", "--engine", engine]
        command += ["--rank", str(rank), "--world-size", str(len(gpus))]
        log = self._directory / f"{engine}-{rank}.log"
        made = self.workers[engine, rank] = EngineProcess(f"engine {engine!r} rank {rank}", command, log)
        return made

    # --- versions ----------------------------------------------------------------------------------------------------

    def publish(self) -> Published:
        """Publish the next version, and wait until it is live.

        Raises:
            EngineError: it is not in every engine, or failed.
        """
        self.begin_publish()
        published = self.end_publish()
        self._check_all_took(published.report)
        return published

    def begin_publish(self) -> None:
        """Have the trainer publish the next version; `end_publish` awaits it."""
        self.number += 1
        self._trainer.tell({"version": self.number})

    def end_publish(self) -> Published:
        """Wait until what was begun is live in one engine at least.

        Raises:
            EngineError: it failed.
        """
        heard = self._trainer.hear(ANSWER_SECONDS, meanwhile=self.daemon.check)
        if "error" in heard:
            raise EngineError(f"version {heard['version']}: {heard['error']}")
        return Published(heard["seconds"], heard["returned"], msgspec.convert(heard["report"], VersionReport))

    def push_again(self) -> VersionReport:
        """Have the live version pushed into all engines again, as ``cpe push --engine`` does.

        Raises:
            EngineError: it is not in every engine then.
        """
        request = PushRequest(MODEL, engines=tuple(self.setting.engines))
        with Conversation(self._address) as conversation:
            report = conversation.ask(request, PushReply, ANSWER_SECONDS, "push").report
        self._check_all_took(report)
        return report

    def _check_all_took(self, report: VersionReport) -> None:
        taken = [name for name, engine in report.engines.items() if engine.outcome == "updated"]
        if sorted(taken) != sorted(self.setting.engines):
            raise EngineError(f"{report.version} is in {', '.join(taken) or 'no engine'} only: {report.engines}")

    # --- questions ---------------------------------------------------------------------------------------------------

    def poison(self) -> None:
        """Overwrite what every engine holds, so that what is right afterwards was brought by a push."""
        for _ in self._ask_all("poison"):
            pass

    def check(self) -> dict[str, int]:
        """Compare what every worker holds with the version that was published last, bit by bit.

        Returns:
            By GPU, the memory that its workers took beside their weights since the last `poison`.

        Raises:
            EngineError: it is not the same; names some tensors.
        """
        extra: dict[str, int] = {}
        for (engine, rank), answer in self._ask_all("check"):
            check_answer(f"engine {engine!r} rank {rank}", answer, self.number)
            gpu = self.setting.engines[engine][rank]
            extra[gpu] = extra.get(gpu, 0) + int(answer["extra_bytes"])
        return extra

    def _ask_all(self, question: str) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        for worker in self.workers.values():
            worker.tell({"ask": question})
        for who, worker in self.workers.items():
            yield who, worker.hear(ANSWER_SECONDS, meanwhile=self.daemon.check)

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        return ask_status(self._address, _STATUS_SECONDS)

    def metrics(self) -> Readings:
        """What the daemon has counted."""
        return scrape(self._url)


def check_answer(who: str, answer: Mapping[str, Any], number: int | None = None) -> None:
    """Check what a worker says of its tensors.

    Raises:
        EngineError: they are not those of the version that it claims, or it claims another one than ``number``.
    """
    if answer["wrong"]:
        raise EngineError(
            f"{who} claims to hold version {answer['version']}, but {answer['wrong']} tensors differ from it:"
            f" {', '.join(answer['named'])}"
        )
    if number is not None and answer["version"] != number:
        raise EngineError(f"{who} holds version {answer['version']}, not {number}")
