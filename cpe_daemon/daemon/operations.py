"""What operators ask the daemon to do: push a version, roll one back, expect an engine, forget one.

Trainers may have their own model rolled back.

Each request is carried out by a task of its own and answered when it is done. How many there may be at a time is
bounded: a script in a loop must not fill the daemon with work that nobody waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol, TypeVar

import structlog
from structlog.typing import FilteringBoundLogger as BoundLogger

from cpe_daemon.engines.expected import check_fit
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import BusyError, CpeError, MisuseError, ProtocolError
from cpe_daemon.ingest.session import Session
from cpe_daemon.links.router import Handler
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.push.rollback import Rollback
from cpe_daemon.wire.messages import (
    Done,
    EngineAdd,
    EngineRemove,
    ErrorReply,
    EvictRequest,
    Message,
    PushReply,
    PushRequest,
    RollbackRequest,
    TrainerRollback,
)
from cpe_daemon.wire.reports import ErrorInfo, VersionReport

log = structlog.get_logger(__name__)

R = TypeVar("R", PushRequest, RollbackRequest, TrainerRollback, EvictRequest, EngineAdd, EngineRemove)

_PUSHES: Final = (PushRequest, RollbackRequest, TrainerRollback)

MAX_REQUESTS: Final = 8
"""At a time: of operators, and as many of trainers, who take none of theirs."""

_MAX_NAMES: Final = 1024


class Sender(Protocol):
    """What is needed of the socket."""

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        """Send without waiting; False if the peer cannot take it."""
        ...

    def client(self, peer: bytes) -> str:
        """Return what a peer is called in the log."""
        ...


class Operations:
    """The operators' requests. Belongs to the event loop.

    Args:
        pusher: carries out pushes, in turn with those that nobody asked for.
        registry: of the engines, those that are expected included.
        tasks: owns the requests.
        session: a trainer's link, by its routing id; raises if there is none.
        evict: lets go of versions, and says which.
    """

    def __init__(
        self,
        *,
        pusher: Pusher,
        registry: Registry,
        tasks: asyncio.TaskGroup,
        session: Callable[[bytes], Session] | None = None,
        evict: Callable[[EvictRequest], str] | None = None,
    ) -> None:
        self._evict_now = evict
        self._pusher = pusher
        self._session = session or _nobody
        self._registry = registry
        self._tasks = tasks
        self._running: dict[asyncio.Task[None], tuple[bytes, type[Message]]] = {}
        self._sender: Sender | None = None

    def handlers(self) -> Mapping[type[Message], Handler]:
        """The messages that are answered here."""
        return {
            PushRequest: self._on_push,
            RollbackRequest: self._on_rollback,
            TrainerRollback: self._on_trainer_rollback,
            EvictRequest: self._on_evict,
            EngineAdd: self._on_add,
            EngineRemove: self._on_remove,
        }

    def connect(self, sender: Sender) -> None:
        """Answer through ``sender`` from now on."""
        self._sender = sender

    def close(self) -> None:
        """Carry out nothing more."""
        for task in self._running:
            task.cancel()

    def drop_pushes(self, may: Callable[[bytes, type[Message]], bool]) -> list[bytes]:
        """Carry out no more pushes of those who may not ask for them now, and return these; one in flight goes on."""
        found = {
            task: (peer, kind)
            for task, (peer, kind) in self._running.items()
            if kind in _PUSHES and not may(peer, kind)
        }
        for task, (peer, kind) in found.items():
            log.warning("operator.dropped", client=self._client(peer), request=kind.__name__)
            task.cancel()
        return [peer for peer, _ in found.values()]

    def _client(self, peer: bytes) -> str:
        return self._sender.client(peer) if self._sender is not None else ""

    def _on_push(self, peer: bytes, request: PushRequest, _: object) -> None:
        if len(request.engines) > _MAX_NAMES:
            raise MisuseError(f"{len(request.engines)} engines are named; at most {_MAX_NAMES} are taken")
        self._begin(peer, request, self._push)

    def _on_rollback(self, peer: bytes, request: RollbackRequest, _: object) -> None:
        self._begin(peer, request, self._roll_back)

    def _on_trainer_rollback(self, peer: bytes, request: TrainerRollback, _: object) -> None:
        model = self._session(peer).hello.model

        async def roll_back(request: TrainerRollback, client: str) -> PushReply:
            wanted = Rollback(model, request.run, request.number, "trainer")
            return PushReply(await self._rolled_back(wanted, client), request.stream)

        self._begin(peer, request, roll_back)

    def _on_evict(self, peer: bytes, request: EvictRequest, _: object) -> None:
        self._begin(peer, request, self._evict)

    def _on_add(self, peer: bytes, request: EngineAdd, _: object) -> None:
        self._begin(peer, request, self._expect)

    def _on_remove(self, peer: bytes, request: EngineRemove, _: object) -> None:
        self._begin(peer, request, self._forget)

    # --- in tasks ----------------------------------------------------------------------------------------------------

    def _begin(self, peer: bytes, request: R, work: Callable[[R, str], Coroutine[Any, Any, Message]]) -> None:
        """Carry a request out beside everything else.

        Raises:
            BusyError: too many are being carried out.
        """
        client, kind = self._client(peer), type(request)
        of_trainer = kind is TrainerRollback
        if sum((other is TrainerRollback) is of_trainer for _, other in self._running.values()) >= MAX_REQUESTS:
            whose = "trainers" if of_trainer else "operators"
            raise BusyError(f"{MAX_REQUESTS} requests of {whose} are being carried out or wait for their turn already")
        said = log.bind(client=client, request=kind.__name__)
        stream = getattr(request, "stream", 0)
        task = self._tasks.create_task(self._carry_out(peer, stream, said, work(request, client)))
        self._running[task] = peer, kind
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)

    async def _carry_out(self, peer: bytes, stream: int, said: BoundLogger, work: Coroutine[Any, Any, Message]) -> None:
        answer: Message
        try:
            answer = await work
        except CpeError as error:
            said.info("operator.refused", code=error.code, error=error.message)
            answer = ErrorReply(ErrorInfo(error.code, error.message), stream)
        except Exception as error:  # task boundary: what one operator asks for must not end the daemon
            said.exception("operator.failed")
            reason = f"{type(error).__name__} in the daemon, whose log has more"
            answer = ErrorReply(ErrorInfo(CpeError.code, reason), stream)
        if (task := asyncio.current_task()) is not None:
            self._ended(task)  # before it is answered: whoever reads that may ask the next thing
        if self._sender is None or not self._sender.send(peer, answer):
            said.info("operator.left")

    async def _push(self, request: PushRequest, client: str) -> PushReply:
        log.info(
            "operator.push",
            client=client,
            model=request.model,
            run=request.run,
            number=request.number,
            engines=request.engines,
        )
        return PushReply(await self._pusher.request(request))

    async def _roll_back(self, request: RollbackRequest, client: str) -> PushReply:
        return PushReply(await self._rolled_back(Rollback(request.model, request.run, request.number), client))

    async def _rolled_back(self, wanted: Rollback, client: str) -> VersionReport:
        log.info(
            "operator.rollback",
            client=client,
            model=wanted.model,
            run=wanted.run,
            number=wanted.number,
            cause=wanted.cause,
        )
        return await self._pusher.request(wanted)

    async def _evict(self, request: EvictRequest, client: str) -> Done:
        """Let go of versions that nobody serves.

        Raises:
            CpeError: somebody does; nothing has changed.
        """
        if self._evict_now is None:
            raise MisuseError("this node evicts nothing")
        done = self._evict_now(request)
        log.info("operator.evict", client=client, model=request.model, run=request.run, number=request.number)
        return Done(done)

    async def _expect(self, request: EngineAdd, client: str) -> Done:
        """Count on an engine from now on, after a restart too.

        Raises:
            MisuseError: its terms are impossible, or another engine is attached by its name.
            CpeError: it cannot be kept; nothing has changed.
        """
        spec, expected = request.engine, self._registry.expected
        expected.check(spec)
        attached = self._registry.find(spec.name)
        if attached is not None and attached.workers:
            check_fit(spec, kind=attached.kind, model=attached.serves, world_size=attached.world_size)
        await expected.add(spec)
        engine = self._registry.find(spec.name)
        if engine is not None:
            engine.serves = spec.model or engine.serves
        log.info("engine.expected", client=client, engine=spec.name, kind=spec.kind, model=spec.model, url=spec.url)
        here = "; it is attached" if engine is not None and engine.workers else ""
        return Done(f"engine {spec.name!r} is expected from now on{here}")

    async def _forget(self, request: EngineRemove, client: str) -> Done:
        """Count on an engine no longer, and forget it unless workers of it are attached.

        Raises:
            MisuseError: nobody expects it, and it is not known, or attached.
            CpeError: the expectation cannot be taken back; nothing has changed.
        """
        name = request.engine
        engine = self._registry.find(name)
        if self._registry.expected.get(name) is None:
            if engine is None:
                known = [known.name for known in self._registry] + [spec.name for spec in self._registry.absent]
                raise MisuseError(f"no engine {name!r} is known here; there is: {', '.join(known) or 'none'}")
            if engine.workers:
                raise MisuseError(
                    f"engine {name!r} is attached, and nobody added it: stop it, and it is forgotten by itself"
                )
        await self._registry.expected.remove(name)
        self._registry.forget(name)
        log.info("engine.forgotten", client=client, engine=name)
        if self._registry.find(name) is not None:
            return Done(f"engine {name!r} is expected no longer; it is attached, and gets versions until it is stopped")
        return Done(f"engine {name!r} is forgotten")


def _nobody(_: bytes) -> Session:
    """No trainer is known.

    Raises:
        ProtocolError: always.
    """
    raise ProtocolError("say hello first")
