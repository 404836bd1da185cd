"""A node without processes: the real catalogue, registry and pusher over a device without bytes and scripted workers.

A `FakeWorker` behaves as one that loads instantly, unless its script says otherwise, and notes whatever no daemon may
ask of a worker: to serve a mixture, or a version under another's name.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.driver import Driver
from cpe_daemon.core.journal import Identity, State
from cpe_daemon.core.lifecycle import EngineState
from cpe_daemon.core.manifest import layout, merge
from cpe_daemon.core.plan import Copy, Gpu, PeerCopy, Topology
from cpe_daemon.core.recovery import Before
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.expected import Expected
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import CpeError, EngineError, ResourceError
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.codec import Codec
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    CloseSlots,
    Finish,
    Halt,
    Load,
    Message,
    OpenSlots,
    Pause,
    Ping,
    Pong,
    Resume,
    SlotSet,
    StepDone,
    StepFailed,
    Wake,
    WorkerBye,
    WorkerCommand,
    WorkerHello,
    WorkerState,
    WorkerWelcome,
)
from cpe_daemon.wire.reports import ErrorInfo
from inference_plugins.torch.driver import TorchDriver

WAIT_SECONDS = 20.0
SLOT_BYTES = 1024
SLOTS = 2
TENSORS = 6
TENSOR_BYTES = 512
"""A version's: three buckets of two tensors."""

Answer = Message | CpeError | BaseException | None
Script = Callable[[Any], Answer]
"""Called with a step; returns what to answer, an error to answer with, or None to say nothing."""


def number(n: int, model: str = "m") -> VersionId:
    return VersionId(model, "r", n)


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Ties:
    """A hand-off that hands over nothing but tethers; ``on_gone`` in their order: call one, and a process has ended."""

    path = Path("/nowhere")

    def __init__(self) -> None:
        self.on_gone: list[Callable[[], None]] = []
        self.withdrawn: list[bytes] = []

    def tie(self, on_gone: Callable[[], None]) -> bytes:
        self.on_gone.append(on_gone)
        return len(self.on_gone).to_bytes(32, "little")

    def withdraw(self, token: bytes) -> None:
        self.withdrawn.append(token)


class StillDevice:
    """Slots without bytes; ``error`` fails the next fetch.

    Attributes:
        room: slots that fit on each GPU.
        failures: GPUs that are lost.
        withdrawn: exports that were taken back.
        freed: GPUs whose slots were freed, in their order.
    """

    kind = "shm"

    def __init__(self, gpus: int = 1) -> None:
        self.topology = Topology(tuple(Gpu(f"gpu-{index}") for index in range(gpus)), peer_access=True)
        self.slot_bytes = SLOT_BYTES
        self.error: Exception | None = None
        self.withdrawn: list[SlotSet] = []
        self.stuck_seconds = 0.0
        self.room = [1000] * gpus
        self.failures: dict[int, CpeError] = {}
        self.freed: list[int] = []
        self._taken = [0] * gpus
        self._exports = 0

    @property
    def slot_count(self) -> int:
        return min(filter(None, self._taken), default=0)

    def slots(self, gpu: int) -> int:
        return self._taken[gpu]

    def give(self, count: int) -> None:
        self._taken = [count] * len(self._taken)

    async def take(self, gpu: int, count: int) -> None:
        if self._taken[gpu]:
            raise LookupError("it has slots")
        self._taken[gpu] = min(count, self.room[gpu])
        if not self._taken[gpu]:
            raise ResourceError("no room for a slot")

    async def release(self, gpu: int) -> None:
        self._taken[gpu] = 0
        self.freed.append(gpu)

    async def open(self, progress: Callable[[int, int], None]) -> None:
        """Nothing to pin."""

    async def close(self) -> None:
        """Nothing to free."""

    async def fetch(self, gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        if self.error is not None:
            raise self.error

    async def exchange(self, gpu: int, slot: int, copies: Sequence[PeerCopy]) -> None:
        """No bytes."""

    def export(self, gpu: int) -> SlotSet:
        self._exports += 1
        token = self._exports.to_bytes(32, "little")
        return SlotSet("shm", self.topology.gpus[gpu].uuid, self._taken[gpu], SLOT_BYTES, [token])

    def withdraw(self, slots: SlotSet) -> None:
        self.withdrawn.append(slots)


class FakeWorker:
    """One engine process.

    Args:
        node: whose daemon it talks to.
        engine: its engine's name.
        hello: further fields of its hello.
    """

    def __init__(self, node: FakeNode, engine: str, **hello: Any) -> None:
        fields: dict[str, Any] = {"protocol": 1, "rank": 0, "world_size": 1, "kind": "torch"}
        fields["incarnation"] = f"{engine}/{hello.get('rank', 0)}"
        self.hello = WorkerHello(engine=engine, **(fields | hello))
        self.peer = f"{engine}/{self.hello.rank}/{len(node.workers)}".encode()
        self.content = self.hello.content
        self.touched = self.hello.touched
        self.paused = False
        self.serving_wrong: list[str] = []
        self.steps: list[str] = []
        self.commands: list[Message] = []
        self.welcome: WorkerWelcome | None = None
        self.slots: SlotSet | None = None
        """What it has open."""
        self.script: dict[str, Script] = {}
        self.takes_messages = True
        self.asleep = self.hello.asleep
        self._node = node
        self._before: tuple[int, VersionId | None] | None = None
        self._loaded = 0
        self._naps = 0
        node.workers[self.peer] = self

    def say(self, message: Message) -> None:
        """Send the daemon a message, which is handled at once; raises what the daemon refuses it with."""
        self._node.registry.handlers()[type(message)](self.peer, message, ())

    def attach(self) -> FakeWorker:
        self.say(self.hello)
        return self

    def die(self) -> None:
        """Its process ends: the kernel cuts its tether."""
        self._node.ties.on_gone[self.tether]()

    def sleep(self) -> None:
        """Have its memory taken by others."""
        self.asleep = self.paused = True
        self._naps += 1
        self.slots = None
        self.say(WorkerState(True))

    def wake_up(self, *, kept: bool = False) -> None:
        """Have its memory again, and what was in it if that was ``kept``; it stays paused."""
        self.asleep, self.touched = False, self.touched or not kept
        self.say(WorkerState(False, self.content, self.touched))

    @property
    def tether(self) -> int:
        """Which of the node's ties it has."""
        if self.welcome is None:
            raise LookupError("it was not welcomed")
        return int.from_bytes(self.welcome.tether, "little") - 1

    def hang(self, *steps: str) -> None:
        """Say nothing to these."""
        for step in steps:
            self.script[step] = lambda _: None

    def fail(self, step: str, why: str = "no such layer") -> None:
        """Do nothing of a step but answer that it failed."""
        self.script[step] = lambda _: CpeError(why)

    def receive(self, message: Message) -> None:
        self.commands.append(message)
        if self.asleep and not isinstance(message, WorkerWelcome | Wake | Abort):
            self.serving_wrong.append(f"told {message} while it sleeps")
        if isinstance(message, WorkerWelcome):
            self.welcome = message
            self.paused = message.hold or self.touched
        elif isinstance(message, OpenSlots | CloseSlots | Check | Halt | Wake):
            asyncio.get_running_loop().call_soon(self._answer, str(message.__struct_config__.tag), message, self._naps)
        elif isinstance(message, Pause | Begin | Load | Finish | Abort | Resume):
            name = str(message.__struct_config__.tag)
            self.steps.append(name)
            asyncio.get_running_loop().call_soon(self._answer, name, message, self._naps)

    def _answer(self, name: str, step: Any, naps: int) -> None:
        seq = getattr(step, "seq", 0)
        if isinstance(step, Wake) and self.asleep and name not in self.script:
            self.wake_up()
        answer: Answer
        if self.asleep and not isinstance(step, Wake | Abort | CloseSlots):
            answer = EngineError("it is asleep")  # it fell asleep while this was on its way
        elif isinstance(step, Resume) and naps != self._naps and self.touched:
            answer = EngineError(
                "the weights may be a mixture"
            )  # since it slept, and woke up, while this was on its way
        else:
            answer = self.script[name](step) if name in self.script else self.do(step)
        if isinstance(answer, CpeError):
            answer = StepFailed(step.round, name, ErrorInfo(answer.code, answer.message), seq)
        if isinstance(answer, Message) and self._node.registry_knows(self.peer):
            self.say(answer)

    def do(self, step: Any) -> StepDone:
        """Carry a step out as a worker does that loads instantly."""
        name, touched = str(step.__struct_config__.tag), False
        match step:
            case OpenSlots() | CloseSlots():
                self.slots = getattr(step, "slots", None)
            case Halt() | Pause():
                self.paused = True
            case Begin():
                self._before, self._loaded = (step.round, self.content), 0
            case Load():
                if self.slots is None or step.slot >= self.slots.count:
                    self.serving_wrong.append(f"loading from slot {step.slot} of {self.slots}")
                if not self.paused:
                    self.serving_wrong.append("loading while it serves")
                self.touched = True
                self._loaded += sum(1 for part in step.parts if part.tensor_offset == 0)
            case Finish():
                if self._loaded != TENSORS:
                    self.serving_wrong.append(f"{self._loaded} tensors")
                update = next(c for c in reversed(self.commands) if isinstance(c, Begin))
                self.content, self.touched = update.version, False
            case Abort():
                begun, held = self._before or (0, None)
                touched = self.touched or (begun == step.round and held != self.content)
            case Resume():
                if self.touched or step.content != self.content:
                    self.serving_wrong.append(f"resumed as {step.content}, holds {self.content}, {self.touched=}")
                self.paused = False
        return StepDone(step.round, name, getattr(step, "seq", 0), 0.0, touched)


class FakeNode:
    """Everything but sockets, memory for slots, and processes."""

    def __init__(
        self,
        *,
        gpus: int = 1,
        retain: int = 1,
        deadlines: dict[str, float] | None = None,
        automatic: bool = True,
        push: dict[str, str] | None = None,
        slots: int | str = SLOTS,
        state_dir: Path = Path("/nonexistent/cpe-fake-node"),
        found: State | None = None,
    ) -> None:
        self.clock = Clock()
        self.config = Config.model_validate(
            {
                "runtime_dir": Path("/tmp/cpe-fake-node"),
                "deadlines": deadlines or {},
                "push": {"automatic": automatic, **(push or {})},
                "retention": {"versions": retain},
                "device": {"slots": slots, "slot_bytes": 4096},
            }
        )
        self.arena = Arena(1 << 20)
        self.device = StillDevice(gpus)
        self.ties = Ties()
        self.metrics = Metrics()
        self.catalogue = Catalogue(
            self.arena,
            retain=retain,
            clock=self.clock,
            automatic=automatic,
            supersede=self.config.push.newer == "supersede",
        )
        self.workers: dict[bytes, FakeWorker] = {}
        self.drivers: dict[str, Callable[..., Driver]] = {"torch": TorchDriver}
        self.expected = Expected(state_dir / "engines.json", self.drivers)
        self._codec = Codec(WorkerCommand)
        self.before = Before(found)
        self.registry = Registry(
            config=self.config,
            generation="g",
            device=self.device,
            handoff=self.ties,
            drivers=self.drivers,
            expected=self.expected,
            live=self._live,
            live_models=self.catalogue.live_models,
            clock=self.clock,
            before=self.before,
        )
        self.registry.connect(self)
        self.pusher = Pusher(
            config=self.config,
            catalogue=self.catalogue,
            registry=self.registry,
            device=self.device,
            metrics=self.metrics,
            clock=self.clock,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, **settings: Any) -> AsyncIterator[FakeNode]:
        """A node whose pusher runs."""
        node = cls(**settings)
        running = asyncio.create_task(node.pusher.run())
        try:
            yield node
            if running.done():
                running.result()
        finally:
            running.cancel()
            await asyncio.wait([running])
            node.arena.close()
        wrong = {worker.peer: worker.serving_wrong for worker in node.workers.values() if worker.serving_wrong}
        assert not wrong, wrong

    def send_encoded(self, peer: bytes, header: bytes, *frames: bytes | memoryview) -> bool:
        """The socket's part (`cpe_daemon.engines.worker.Sender`)."""
        worker = self.workers.get(peer)
        if worker is None or not worker.takes_messages:
            return False
        message = self._codec.decode(header)
        if not isinstance(message, Pong):
            worker.receive(message)
        return True

    def registry_knows(self, peer: bytes) -> bool:
        return any(worker.peer == peer for engine in self.registry for worker in engine.workers.values())

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.registry if engine.name == name)

    def worker(self, engine: str, **hello: Any) -> FakeWorker:
        """A new worker that has attached."""
        return FakeWorker(self, engine, **hello).attach()

    def open_slots(self, count: int = SLOTS) -> None:
        """Have every worker open slots, for a round that no pusher runs."""
        self.device.give(count)
        for worker in self.workers.values():
            worker.slots = self.device.export(0)

    def ping(self, worker: FakeWorker) -> None:
        worker.say(Ping())

    def bye(self, worker: FakeWorker) -> None:
        worker.say(WorkerBye())

    def stage(self, version: VersionId, digest: bytes = b"") -> Version:
        """Put a version into the catalogue, whole."""
        shards = [Shard(f"layers.{index}.w", "uint8", (TENSOR_BYTES,)) for index in range(TENSORS)]
        record = self.catalogue.open(version, 1)
        part = self.catalogue.contribute(record, 0, shards, layout(shards).nbytes)
        part.sealed = True
        part.digests = [bytes(16)] * TENSORS
        self.catalogue.stage(record, merge(version, [shards]), digest=digest)
        return record

    async def publish(self, version: VersionId) -> Version:
        """Stage a version, and wait until it is live or has failed, and all that follows is done."""
        record = self.stage(version)
        await self.until(lambda: record.state not in ("staged", "pushing"))
        await self.idle()
        return record

    async def idle(self) -> None:
        """Wait until the pusher has nothing left to do."""
        pusher = self.pusher
        await self.until(
            lambda: pusher._idle.is_set() and not (pusher._wake.is_set() or pusher.waiting or pusher._joined)
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the loop's own progress brings about."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():  # noqa: ASYNC110 - of no event: it is about turns of the loop
                await asyncio.sleep(0)

    def states(self) -> dict[str, tuple[str, VersionId | None]]:
        return {engine.name: (engine.state.value, engine.content) for engine in self.registry}

    def _live(self, model: str) -> Identity | None:
        live = self.catalogue.live(model)
        return Identity(live.id, live.digest) if live else None


CURRENT, UNKNOWN, QUARANTINED = (
    state.value for state in (EngineState.CURRENT, EngineState.UNKNOWN, EngineState.QUARANTINED)
)
