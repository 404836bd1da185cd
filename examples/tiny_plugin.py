"""A plugin for an engine of one's own, both halves: copy it, and put your engine in the place of TinyEngine."""

import os
import socket
import threading
import uuid
from collections.abc import Sequence

import torch

from cpe_daemon.core.driver import Update, Workers
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.errors import DeadlineError, EngineError, ManifestError
from cpe_daemon.wire.messages import PROTOCOL, WorkerHello
from inference_plugins.assembly import Place, dtype_of
from inference_plugins.endpoint import engines_endpoint
from inference_plugins.receiver import Receiver


class TinyEngine:
    """Stands for your engine: weights, and a lock that is held for each forward pass, and while it may not serve."""

    def __init__(self) -> None:
        self.weights = {"embed.weight": torch.zeros(64, 16), "head.weight": torch.zeros(16, 64)}
        self.lock = threading.Lock()

    def forward(self, token: int) -> int:
        """The token that follows."""
        with self.lock, torch.inference_mode():
            return int((self.weights["embed.weight"][token] @ self.weights["head.weight"]).argmax())


class TinyLoader:
    """What the engine does with the steps of a round. The receiver's thread calls it, one step after another."""

    def __init__(self, engine: TinyEngine) -> None:
        self.content: VersionId | None = None
        self.touched = self.asleep = self.starting = False
        self._engine = engine
        self._come: set[str] = set()
        self.serving = True
        self.pause(seconds=60.0)  # until the daemon has taken it in

    def halt(self) -> int:
        """How many forward passes were begun: asked only of engines of several workers."""
        raise EngineError("this engine has one worker")

    def pause(self, seconds: float, passes: int | None = None) -> None:
        """Keep the engine from serving, once the forward pass that is under way has ended."""
        if self.serving:
            if not self._engine.lock.acquire(timeout=max(0.0, seconds)):
                raise DeadlineError(f"a forward pass did not end within {seconds:g} s")
            self.serving = False

    def expect(self, tensors: Sequence[TensorSpec]) -> None:
        """Refuse a version that does not fit. The engine serves meanwhile: only look."""
        brought = {spec.name: (dtype_of(spec.dtype), torch.Size(spec.shape)) for spec in tensors}
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in self._engine.weights.items()}
        if brought != wanted:
            wrong = sorted(name for name in brought.keys() | wanted.keys() if brought.get(name) != wanted.get(name))
            raise ManifestError(f"missing, unknown, or of another dtype or shape: {', '.join(wrong[:10])}")

    def begin(self) -> None:
        """Nothing has come yet."""
        self._come.clear()

    def place(self, tensors: Sequence[TensorSpec], device: torch.device) -> list[Place | None]:
        """Where the bytes could be copied to by address; None: give them to `load`."""
        return [None] * len(tensors)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copy what the tensors hold now: they are views of a slot that is filled anew soon after this returns."""
        for name, tensor in tensors:
            held = self._engine.weights.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                raise EngineError(f"no place for {name} ({tensor.dtype}, {list(tensor.shape)})")
            self.touched = True  # before the first write: whatever fails from here on leaves a mixture
            held.copy_(tensor)
            self._come.add(name)

    def finish(self, version: VersionId) -> None:
        """All has come: say so only if it has."""
        if missing := sorted(self._engine.weights.keys() - self._come):
            raise EngineError(f"{version} brought nothing for {', '.join(missing[:10])}")
        self.content, self.touched = version, False

    def abandon(self, reason: str) -> None:
        """What was written stays, and the engine stays paused: `touched` says why."""

    def resume(self) -> None:
        """Let the engine serve; the receiver has seen to it that it holds a whole version."""
        if not self.serving:
            self.serving = True
            self._engine.lock.release()

    def sleep(self, seconds: float) -> None:
        """Lend the weights' memory to others: this engine cannot."""
        raise EngineError("this engine does not sleep")

    def rouse(self) -> None:
        """Have it take its memory back."""
        raise EngineError("this engine does not sleep")

    def wake_up(self, *, kept: bool) -> None:
        """It has its memory again, with the weights that were in it or not."""


class TinyWorker:
    """The engine's link to the daemon of its node, in a thread of its own, for as long as the engine lives."""

    def __init__(self, engine: TinyEngine, endpoint: str | None = None) -> None:
        self.engine, self.loader = engine, TinyLoader(engine)
        hello = WorkerHello(
            protocol=PROTOCOL,
            engine="my-engine",
            kind="tiny",  # the entry point's name
            rank=0,
            world_size=1,
            incarnation=uuid.uuid4().hex,
            node=socket.gethostname(),
            pid=os.getpid(),
        )
        self._receiver = Receiver(engines_endpoint(endpoint), hello, self.loader)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpe-receiver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._receiver.run(self._stopped)
        finally:
            self._receiver.close()

    def close(self) -> None:
        """Detach; the engine keeps its weights."""
        self._stopped.set()
        self._receiver.wake()
        self._thread.join(10.0)


class TinyDriver:
    """The daemon's half: an engine that is its own server passes every step on to its worker."""

    def __init__(self, engine: str, workers: Workers) -> None:
        self._workers = workers

    async def check(self, round: int, seconds: float) -> None:
        """Say whether a version fits."""
        await self._workers.check(round, seconds)

    async def pause(self, round: int, seconds: float) -> None:
        """Stop serving. A server that is paused by its API is paused here, before its workers are told."""
        await self._workers.pause(round, seconds)

    async def begin(self, update: Update, seconds: float) -> None:
        """Make ready for buckets."""
        await self._workers.begin(update, seconds)

    async def finish(self, round: int, seconds: float) -> None:
        """Check that all came."""
        await self._workers.finish(round, seconds)

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Forget the round; True if the weights may be others than before it."""
        return await self._workers.abort(round, reason, seconds)

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Serve again. A server's API is called here, after its workers have agreed."""
        await self._workers.resume(round, content, seconds)

    async def wake(self, seconds: float) -> None:
        """Wake up an engine that sleeps."""
        await self._workers.wake(seconds)
