"""Everything that the demo has running: a daemon, an engine of several ranks, a trainer. Owns it, and ends it."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cpe_daemon.config import ENGINES_SOCKET, FRONT_SOCKET
from cpe_daemon.demo.architecture import Architecture
from cpe_daemon.demo.checkpoint import write_config, write_weights
from cpe_daemon.demo.engine import ENGINE
from cpe_daemon.demo.memory import Sizes
from cpe_daemon.demo.processes import Process, Talker, await_daemon, start_daemon
from cpe_daemon.demo.show import Row, Screen, Step
from cpe_daemon.demo.trainer import Trainer
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.publisher import Publisher, PublishReport

RANKS: Final = 2
_MODEL: Final = "demo"
_SEED: Final = 20
_CONNECT_SECONDS: Final = 5.0
_START_SECONDS: Final = 120.0
_ANSWER_SECONDS: Final = 120.0
_LIVE_SECONDS: Final = 300.0


class Scene:
    """A context: everything is up inside of it, and gone behind it.

    Args:
        files: directory for the checkpoint and the logs.
        runtime: directory for sockets.
        architecture: the model.
        screen: where the steps are shown.
        sabotage: have a rank spoil its own weights before each comparison.
    """

    def __init__(
        self, files: Path, runtime: Path, architecture: Architecture, screen: Screen, *, sabotage: bool
    ) -> None:
        self.passes = 0
        """Forward passes of all ranks until the last version was compared."""
        self._checkpoint = files / "checkpoint"
        self._logs = files / "logs"
        self._runtime = runtime
        self._architecture = architecture
        self._screen = screen
        self._sabotage = sabotage
        self._processes: list[Process] = []
        self._ranks: list[Talker] = []
        self._trainer = Trainer(_SEED)
        self._held: list[dict[str, str]] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._checkpoint.mkdir()
            self._logs.mkdir()
            write_config(self._checkpoint, self._architecture)
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._screen.step("clean up"):
            self._undo.close()

    def _start(self, undo: contextlib.ExitStack) -> None:
        """Start the processes, and generate the checkpoint while they come up."""
        sizes = Sizes.of(self._architecture)
        daemon = undo.enter_context(start_daemon(self._runtime, sizes, self._logs / "daemon.log"))
        self._ranks = [undo.enter_context(self._engine(rank)) for rank in range(RANKS)]
        self._processes = [daemon, *self._ranks]
        with self._screen.step("generate a checkpoint") as step:
            files = write_weights(self._checkpoint, self._architecture, _SEED, step)
            gigabytes = self._architecture.nbytes / 1e9
            step.detail = f"{len(list(self._architecture.specs()))} tensors, {gigabytes:.2f} GB, {files} files"
        with self._screen.step("start the daemon and the engine") as step:
            endpoint = f"ipc://{self._runtime / FRONT_SOCKET}"
            await_daemon(endpoint, self._processes, _START_SECONDS)
            for process in self._ranks:
                process.hear(_START_SECONDS, meanwhile=daemon.check)
            step.detail = f"arena {sizes.arena_bytes / 2**30:.2f} GiB, {RANKS} ranks serve weights of their own"
        self._ask("digests")
        self._held = self._hear_digests(None)
        run = f"demo-{secrets.token_hex(3)}"
        self._publisher = undo.enter_context(
            Publisher(endpoint, model=_MODEL, run=run, connect_timeout=_CONNECT_SECONDS)
        )

    def _engine(self, rank: int) -> Talker:
        arguments = ["-m", "cpe_daemon.demo.engine", "--checkpoint", str(self._checkpoint)]
        arguments += ["--socket", f"ipc://{self._runtime / ENGINES_SOCKET}"]
        arguments += ["--rank", str(rank), "--world-size", str(RANKS)]
        if self._sabotage and rank == RANKS - 1:
            arguments.append("--sabotage")
        return Talker(f"engine rank {rank}", arguments, self._logs / f"engine-{rank}.log")

    # --- versions ----------------------------------------------------------------------------------------------------

    def publish(self, number: int) -> Row:
        """Publish a version, the first from files, later ones from memory, and compare what the engine holds then.

        Raises:
            EngineError: the version went live without the engine.
            CpeError: it could not be published.
        """
        if number > 1:
            with self._screen.step(f"version {number}: an optimizer step"):
                self._trainer.step()
        self._gap()
        with self._screen.step(f"version {number}: publish and push") as step:
            report = self._make_live(number, step)
        pause_seconds = self._gap()
        engine = report.engines.get(ENGINE)
        if engine is None or engine.outcome != "updated":
            raise EngineError(f"version {number} went live without the engine: {engine}")
        with self._screen.step(f"version {number}: compare what the engine holds"):
            if number == 1:
                self._trainer.load(self._checkpoint)
            self._ask("digests")
            expected = self._trainer.digests(RANKS)
            held, before = self._hear_digests(number), self._held
            different, compared = compare(held, expected)
            self._held = held
        return Row(
            version=number,
            source="safetensors" if number == 1 else "memory",
            changed=_changed(before, held),
            stage_seconds=report.stage_seconds,
            pause_seconds=pause_seconds,
            push_seconds=engine.phases.get("push", 0.0),
            gigabytes_per_second=engine.gigabytes_per_second,
            compared=compared,
            different=different,
        )

    def _make_live(self, number: int, step: Step) -> PublishReport:
        """Publish, and wait until it is live; if a process ended meanwhile, that is what went wrong."""
        source = self._checkpoint if number == 1 else self._trainer.tensors
        try:
            return self._publisher.publish(source, version=number, progress=step).live(timeout=_LIVE_SECONDS)
        except CpeError:
            for process in self._processes:
                process.check()
            raise

    def _gap(self) -> float:
        """The longest time without a forward pass, on any rank, since the last call."""
        self._ask("gap")
        answers = [rank.hear(_ANSWER_SECONDS) for rank in self._ranks]
        self.passes = sum(int(answer["passes"]) for answer in answers)
        return max(float(answer["longest_gap_seconds"]) for answer in answers)

    def _ask(self, question: str) -> None:
        """Ask all ranks at once."""
        for rank in self._ranks:
            rank.tell({"ask": question})

    def _hear_digests(self, number: int | None) -> list[dict[str, str]]:
        """By rank, the digests that the engine's processes computed of their own tensors.

        Raises:
            EngineError: a rank says that it holds another version.
        """
        digests: list[dict[str, str]] = []
        for rank, process in enumerate(self._ranks):
            answer = process.hear(_ANSWER_SECONDS)
            if answer["version"] != number:
                raise EngineError(f"rank {rank} says that it holds version {answer['version']}, not {number}")
            digests.append(answer["digests"])
        return digests


def compare(held: list[dict[str, str]], expected: list[dict[str, str]]) -> tuple[list[str], int]:
    """What differs, by rank and name, and how many were compared; a tensor that only one side has differs."""
    different: list[str] = []
    compared = 0
    for rank, (ours, theirs) in enumerate(zip(held, expected, strict=True)):
        names = sorted(ours.keys() | theirs.keys())
        compared += len(names)
        different += [f"rank {rank} {name}" for name in names if ours.get(name) != theirs.get(name)]
    return different, compared


def _changed(before: list[dict[str, str]], after: list[dict[str, str]]) -> int:
    """How many tensors have other bytes than before, on any rank."""
    return len({name for old, new in zip(before, after, strict=True) for name in new if old.get(name) != new[name]})
