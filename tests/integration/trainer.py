"""A trainer rank: builds tensors from a recipe and a seed, and publishes them. Commands come over its `Console`."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import zmq
from torch import Tensor

from cpe_daemon.links.dealer import Dealer
from cpe_daemon.publisher import Handle, Publisher, link
from cpe_daemon.wire.messages import Chunk, Message
from tests.integration import weights
from tests.integration.console import Console


def gate_chunks(console: Console) -> None:
    """Have every chunk's message pass by the gate before it is sent."""

    class GatedDealer(Dealer):
        def send(self, message: Message, *frames: bytes | memoryview | zmq.Frame, timeout: float = 5.0) -> None:
            if isinstance(message, Chunk):
                console.gate.pass_by()
            super().send(message, *frames, timeout=timeout)

    vars(link)["Dealer"] = GatedDealer


class Trainer:
    """What the verbs of the console act upon."""

    def __init__(self, console: Console, publisher: Publisher, rank: int, world_size: int) -> None:
        self._console = console
        self._publisher = publisher
        self._rank = rank
        self._world_size = world_size
        self._tensors: dict[str, Tensor] = {}
        self._handles: dict[int, Handle] = {}
        self._scribbling = threading.Event()

    def build(self, recipe: dict[str, Any], seed: int) -> None:
        """Make the version's tensors; this rank contributes every ``world_size``-th."""
        self._tensors = weights.build(weights.specs(recipe), seed)

    def publish(self, version: int, watched: bool = False, source: str | None = None, force: bool = False) -> None:
        """Publish, if ``watched`` with the gate where progress is told; `staged` and `live` tell what became of it."""
        mine = dict(itertools.islice(self._tensors.items(), self._rank, None, self._world_size))
        progress = (lambda done, total: self._console.gate.pass_by()) if watched else None
        self._handles[version] = self._publisher.publish(source or mine, version, force=force, progress=progress)

    def staged(self, version: int, timeout: float) -> None:
        self._handles[version].staged(timeout)

    def live(self, version: int, timeout: float) -> dict[str, Any]:
        report = self._handles[version].live(timeout)
        return {name: engine.outcome for name, engine in report.engines.items()}

    def rollback(self, to: int | None = None, timeout: float = 20.0) -> dict[str, Any]:
        """Roll back; the number that is live then, and the outcome by engine."""
        report = self._publisher.rollback(to, timeout)
        return {
            "number": report.version.number,
            "engines": {name: engine.outcome for name, engine in report.engines.items()},
            "notes": [node.note for node in report.nodes.values()],
        }

    def wait_live(self, number: int, timeout: float, run: str | None = None) -> str:
        return str(self._publisher.wait_live(number, run, timeout))

    def held(self, version: int) -> tuple[str, int]:
        """The version's state as the handle tells it, and how many daemons held it before."""
        handle = self._handles[version]
        return handle.state, len(handle.held)

    def verified(self, version: int) -> list[str]:
        """The engines that found that they were handed what was staged."""
        report = self._handles[version].live(0)
        return [name for name, engine in report.engines.items() if engine.verified]

    def digests(self, rank: int = 0, world_size: int = 1) -> dict[str, str]:
        """What an engine's worker should hold of the tensors last built."""
        return weights.digests(weights.part_of(self._tensors, rank, world_size))

    def scribble(self) -> list[str]:
        """From now on, write to all shared memory that this process has mapped, again and again; name it."""
        found = [(start, end - start, name) for start, end, name in _shared_mappings()]
        threading.Thread(target=self._scribble, args=(found,), name="scribble", daemon=True).start()
        self._scribbling.wait(10)
        return [name for _, _, name in found]

    def close(self) -> None:
        self._publisher.close()

    def _scribble(self, found: list[tuple[int, int, str]]) -> None:
        for value in itertools.count():
            for start, nbytes, _ in found:
                ctypes.memset(start, value % 256, nbytes)
            for tensor in self._tensors.values():
                if tensor.numel():
                    tensor.zero_()
            if value > 1:
                self._scribbling.set()


def _shared_mappings() -> list[tuple[int, int, str]]:
    """(start, end, name) of what is mapped shared and writable; of what is mapped read-only, the fact is the test."""
    found = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            span, access, _, _, _, *name = line.split(maxsplit=5)
            if access == "rw-s":
                start, end = (int(part, 16) for part in span.split("-"))
                found.append((start, end, "".join(name).strip()))
    return found


def main(arguments: dict[str, Any]) -> None:
    console = Console()
    if arguments.pop("gate_chunks", False):
        gate_chunks(console)
    with Publisher(**arguments) as publisher:
        trainer = Trainer(console, publisher, arguments["rank"], arguments["world_size"])
        verbs: list[Callable[..., object]] = [
            trainer.build,
            trainer.publish,
            trainer.staged,
            trainer.live,
            trainer.rollback,
            trainer.wait_live,
            trainer.verified,
            trainer.held,
            trainer.digests,
            trainer.scribble,
            trainer.close,
        ]
        console.tell("ready")
        console.serve({verb.__name__: verb for verb in verbs})
