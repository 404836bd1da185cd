"""The engines of this node: takes their workers in, notices their loss, and says which need the live version."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

import structlog

from cpe_daemon.config import Config
from cpe_daemon.core.driver import Driver
from cpe_daemon.core.journal import Identity
from cpe_daemon.core.lifecycle import EngineEvent
from cpe_daemon.core.recovery import Before
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.adoption import Adoption, model_of
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.expected import MAX_WORKERS, Expected, check_fit, check_hello
from cpe_daemon.engines.sleep import take_state
from cpe_daemon.engines.worker import Handoff, Sender, Worker
from cpe_daemon.errors import BusyError, DeadlineError, EngineError, MisuseError, ProtocolError
from cpe_daemon.links.router import Handler
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    EngineSpec,
    Farewell,
    Message,
    Ping,
    Pong,
    StepDone,
    StepFailed,
    WorkerBye,
    WorkerHello,
    WorkerState,
    WorkerWelcome,
)

log = structlog.get_logger(__name__)

_MAX_REMEMBERED: Final = 64
"""Engines without workers that are kept, so that status can tell of their loss."""


class Registry:
    """All engines. Belongs to the event loop.

    Args:
        config: the daemon's settings.
        generation: of this daemon's process.
        device: the GPUs.
        handoff: ties workers' lives to their links.
        drivers: by kind of engine.
        expected: the engines that an operator counts on.
        live: the live version of a model, with its digest, if there is one.
        live_models: the models of which one is.
        clock: seconds, monotonic.
        before: what was live before this daemon; None: nothing was.
    """

    def __init__(
        self,
        *,
        config: Config,
        generation: str,
        device: Device,
        handoff: Handoff,
        drivers: Mapping[str, Callable[..., Driver]],
        expected: Expected,
        live: Callable[[str], Identity | None],
        live_models: Callable[[], Collection[str]],
        clock: Callable[[], float],
        before: Before | None = None,
    ) -> None:
        self._config = config
        self._generation = generation
        self._device = device
        self._handoff = handoff
        self._drivers = drivers
        self.expected = expected
        self.adoption = Adoption(live, live_models, before or Before())
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self._workers: dict[bytes, Worker] = {}
        self._sender: Sender | None = None
        self._on_joined: Callable[[Engine], None] = lambda engine: None
        self.changed: Callable[[], None] = lambda: None
        """Called when an engine has attached, in part too, when it has changed, and when it is forgotten."""
        self._farewell: Farewell | None = None
        self._left = asyncio.Event()

    def __iter__(self) -> Iterator[Engine]:
        """All engines known; the set may change while one iterates."""
        return iter(tuple(self._engines.values()))

    @property
    def absent(self) -> list[EngineSpec]:
        """The expected engines of which nothing is known: none of their workers has attached, or the last one left."""
        return [spec for spec in self.expected if spec.name not in self._engines]

    def find(self, name: str) -> Engine | None:
        """The engine, if a worker of it has attached and it was not forgotten since."""
        return self._engines.get(name)

    def forget(self, name: str) -> None:
        """Let go of an engine that has no workers; one that has some stays."""
        engine = self._engines.get(name)
        if engine is not None and not engine.workers:
            del self._engines[name]
            self.changed()

    def look_again(self, model: str) -> None:
        """What engines of a model may serve has changed: those in doubt that may serve what they hold do so."""
        for engine in self:
            if engine.in_doubt and engine.takes(model):
                self._join(engine)

    def handlers(self) -> Mapping[type[Message], Handler]:
        """The messages that are answered here."""
        return {
            WorkerHello: self._on_hello,
            WorkerState: self._on_state,
            StepDone: lambda peer, done, _: self._worker(peer).done(done),
            StepFailed: lambda peer, failed, _: self._worker(peer).failed(failed),
            WorkerBye: self._on_bye,
            Ping: self._on_ping,
        }

    def connect(self, sender: Sender) -> None:
        """Answer through ``sender`` from now on."""
        self._sender = sender

    def on_joined(self, callback: Callable[[Engine], None]) -> None:
        """Call ``callback`` with an engine whose last missing worker has attached, or that sleeps or is awake now."""
        self._on_joined = callback

    def turn_away(self, reason: str) -> None:
        """Let no worker in any more: whoever says hello hears a farewell."""
        self._farewell = Farewell(reason)

    async def take_leave(self) -> None:
        """After `turn_away`: say farewell to every worker, and wait until all have let go. The caller bounds it."""
        for worker in tuple(self._workers.values()):
            worker.tell(encode(self._farewell or Farewell("")))
        while self._workers:
            self._left.clear()
            await self._left.wait()

    def close(self) -> None:
        """Give every worker up: their engines keep what they hold."""
        for worker in tuple(self._workers.values()):
            self._lose(worker, "this daemon stops")

    def check_deadlines(self) -> None:
        """Give up workers that are silent without being at work for us; complain of engines that lack workers."""
        limits = self._config.deadlines
        for worker in tuple(self._workers.values()):
            if not worker.busy and self._clock() - worker.seen_at > limits.heartbeat_lost_seconds:
                self._lose(worker, f"silent for {limits.heartbeat_lost_seconds:g} s")
        for engine in self:
            since = engine.incomplete_since
            if since is not None and self._clock() - since > limits.hello_seconds:
                engine.incomplete_since = None
                engine.error = DeadlineError(
                    f"engine {engine.name!r}: ranks {engine.missing_ranks} of {engine.world_size} are not attached"
                    f" after {limits.hello_seconds:g} s; it gets no versions until they are"
                )
                log.warning("engine.incomplete", engine=engine.name, error=engine.error.message)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _on_hello(self, peer: bytes, hello: WorkerHello, _: object) -> None:
        if self._sender is None:
            return
        if self._farewell is not None:
            self._sender.send_encoded(peer, encode(self._farewell))
            return
        self._check(hello)
        gpu = self._gpu(hello)
        leaving = self._leaving(peer, hello)
        engine = self._engine(hello, leaving)
        serves = self._serves(hello, engine)
        name = self._device.topology.gpus[gpu].uuid
        worker = Worker(peer, hello, gpu, name, self._sender, self._clock())
        worker.tether = self._handoff.tie(lambda: self._lose(worker, "its process ended"))
        for old in leaving:  # from here on nothing is refused any more
            self._lose(old, "it said hello again")
        engine.serves = serves
        engine.url = self.expected.url(hello.engine) or (hello.url if hello.leader else engine.url)
        self._engines[hello.engine] = engine
        self._workers[peer] = engine.workers[hello.rank] = worker
        log.info(
            "worker.attached",
            worker=worker.name,
            content=str(hello.content) if hello.content else None,
            touched=hello.touched,
        )
        welcome = WorkerWelcome(
            protocol=PROTOCOL,
            generation=self._generation,
            heartbeat_seconds=self._config.deadlines.heartbeat_interval_seconds,
            tether=worker.tether,
            handoff=str(self._handoff.path),
            hold=self.adoption.must_hold(engine, hello),
        )
        self._sender.send_encoded(peer, encode(welcome))
        self.changed()
        if engine.complete and not engine.asleep:
            self._join(engine)

    def _check(self, hello: WorkerHello) -> None:
        if not OLDEST_PROTOCOL <= hello.protocol <= PROTOCOL:
            raise ProtocolError(f"protocol {hello.protocol}; this daemon speaks {OLDEST_PROTOCOL} to {PROTOCOL}")
        check_hello(hello)
        if not 0 <= hello.rank < hello.world_size <= MAX_WORKERS:
            raise ProtocolError(f"rank {hello.rank} of {hello.world_size}")
        if hello.kind not in self._drivers:
            raise MisuseError(f"no plugin for engines of kind {hello.kind!r}; installed: {', '.join(self._drivers)}")
        if len(self._workers) >= MAX_WORKERS:
            raise BusyError(f"{len(self._workers)} workers are attached; no more are taken")
        spec = self.expected.get(hello.engine)
        if spec is not None:
            check_fit(spec, kind=hello.kind, model=model_of(hello), world_size=hello.world_size)

    def _gpu(self, hello: WorkerHello) -> int:
        """The index of a worker's GPU; on a CPU host a worker need not name one."""
        uuids = [gpu.uuid for gpu in self._device.topology.gpus]
        if not hello.gpu and self._device.kind == "shm":
            return hello.rank % len(uuids)
        if hello.gpu not in uuids:
            mend = "; set device.kind to cuda for engines on GPUs" if self._device.kind == "shm" else ""
            raise MisuseError(
                f"engine {hello.engine!r} rank {hello.rank}: GPU {hello.gpu!r} is not this node's:"
                f" {', '.join(uuids)}{mend}"
            )
        gpu = uuids.index(hello.gpu)
        if gpu in self._device.failures:
            raise self._device.failures[gpu]
        return gpu

    def _leaving(self, peer: bytes, hello: WorkerHello) -> list[Worker]:
        """Whose places a worker takes: a returning process its own, nobody else's.

        Raises:
            BusyError: another process has its rank.
        """
        leaving = [self._workers[peer]] if peer in self._workers else []
        engine = self._engines.get(hello.engine)
        known = engine.workers.get(hello.rank) if engine is not None else None
        if known is not None and known not in leaving:
            if known.hello.incarnation != hello.incarnation:
                raise BusyError(f"{known.name} is attached already; detach it before another takes its rank")
            leaving.append(known)
        return leaving

    def _engine(self, hello: WorkerHello, leaving: Collection[Worker]) -> Engine:
        """The engine that a worker belongs to; a new one if none is known, or only one that has nobody left.

        Raises:
            MisuseError: the engine's other workers say something else of it.
        """
        engine = self._engines.get(hello.engine)
        if engine is not None:
            if (engine.world_size, engine.model, engine.kind) == (hello.world_size, hello.model, hello.kind):
                return engine
            if any(worker not in leaving for worker in engine.workers.values()):
                raise MisuseError(
                    f"engine {hello.engine!r} has {engine.world_size} ranks of kind {engine.kind} for model"
                    f" {engine.model!r}; rank {hello.rank} says {hello.world_size}, {hello.kind}, {hello.model!r}"
                )
        engine = Engine(hello, self._drivers[hello.kind])
        engine.incomplete_since = self._clock()
        engine.changed = lambda: self.changed()  # noqa: PLW0108 - who is called is said later
        return engine

    def _serves(self, hello: WorkerHello, engine: Engine) -> str:
        """Whose versions an engine takes: as an operator says, as it says or said, or of the version that it holds.

        Raises:
            MisuseError: nobody says, and there are several to choose from.
        """
        spec = self.expected.get(hello.engine)
        model = (spec.model if spec is not None else "") or engine.serves or model_of(hello)
        if not model and len(models := self.adoption.models) > 1:
            raise MisuseError(
                f"engine {hello.engine!r} says no model, and this node serves {', '.join(models)}: attach it"
                f" with model=, or `cpe engine add {hello.engine} --kind {hello.kind} --model MODEL`"
            )
        return model

    def _join(self, engine: Engine) -> None:
        """The last missing worker is here: does the engine hold, as a whole, what it may serve?

        What is not live stays unknown, so that nothing but a version that it takes lets the engine serve.
        """
        engine.incomplete_since = engine.error = None
        if objection := self.adoption.objection(engine):
            engine.error = EngineError(f"engine {engine.name!r} stays paused until it is given a version: {objection}")
        else:
            engine.change(EngineEvent.REPORT, content=engine.workers[0].content)
        self._on_joined(engine)

    def _on_state(self, peer: bytes, state: WorkerState, _: object) -> None:
        worker = self._worker(peer)
        engine = self._engines[worker.hello.engine]
        if take_state(engine, worker, state, self._device) and engine.complete:
            (self._on_joined if engine.asleep else self._join)(engine)

    def _on_ping(self, peer: bytes, _: Ping, __: object) -> None:
        self._worker(peer)
        self._pong(peer)

    def _pong(self, peer: bytes) -> None:
        if self._sender is not None:
            self._sender.send_encoded(peer, encode(Pong(self._generation)))

    def _on_bye(self, peer: bytes, _: WorkerBye, __: object) -> None:
        worker = self._worker(peer)
        self._lose(worker, "it detached")
        self.forget(worker.hello.engine)
        self._pong(peer)

    def _worker(self, peer: bytes) -> Worker:
        worker = self._workers.get(peer)
        if worker is None:
            raise ProtocolError("say hello first")
        worker.seen_at = self._clock()
        return worker

    def _lose(self, worker: Worker, reason: str) -> None:
        """Forget a worker: its engine's weights are in doubt until all its workers are back."""
        if self._workers.get(worker.peer) is not worker:
            return
        del self._workers[worker.peer]
        self._left.set()
        engine = self._engines[worker.hello.engine]
        del engine.workers[worker.hello.rank]
        log.info("worker.gone", worker=worker.name, reason=reason)
        worker.lose(reason)
        if worker.tether is not None:
            self._handoff.withdraw(worker.tether)
        if worker.slots is not None:
            self._device.withdraw(worker.slots)
        engine.incomplete_since = engine.incomplete_since or self._clock()
        engine.change(EngineEvent.LOSE, error=worker.gone)
        empty = [known.name for known in self if not known.workers]
        for name in empty[: max(0, len(empty) - _MAX_REMEMBERED)]:
            del self._engines[name]
