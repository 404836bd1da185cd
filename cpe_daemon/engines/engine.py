"""One serving instance: its workers, its driver, and what is known of its weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog
from msgspec import structs

from cpe_daemon.core.driver import Driver, Update
from cpe_daemon.core.identity import may_be_same
from cpe_daemon.core.lifecycle import ENGINE_TABLE, EngineEvent, EngineState, advance
from cpe_daemon.core.pace import Pace
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.worker import Step, Worker
from cpe_daemon.errors import CpeError, PeerLostError
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    Digested,
    Finish,
    Halt,
    Pause,
    Resume,
    StepDone,
    Wake,
    WorkerHello,
)
from cpe_daemon.wire.reports import LoadingReport

log = structlog.get_logger(__name__)

ASLEEP: Final = "asleep"
STARTING: Final = "starting"
_ANSWER_SECONDS: Final = 0.5


class Engine:
    """An engine from its first worker's hello. Belongs to the event loop.

    Args:
        hello: of its first worker; all others must agree with it.
        make_driver: the plugin's daemon half.
    """

    def __init__(self, hello: WorkerHello, make_driver: Callable[[str, EngineWorkers], Driver]) -> None:
        self.name = hello.engine
        self.model = hello.model
        self.serves = hello.model
        """Whose versions it takes: as it said, else of the first version that it held; "" before that."""
        self.kind = hello.kind
        self.world_size = hello.world_size
        self.workers: dict[int, Worker] = {}
        self.state = EngineState.UNKNOWN
        self.content: VersionId | None = None
        self.taking = b""
        """The digest of the version that it was last told to load."""
        self.error: CpeError | None = None
        self.last_push_seconds = 0.0
        self.pace = Pace()
        """What its last round showed."""
        self.url = hello.url
        """Where its own API is, if it has one and somebody says."""
        self.incomplete_since: float | None = None
        """Since when some of its workers are missing; None if they are not, or if that was complained of."""
        self.changed: Callable[[], None] = lambda: None
        """Called after every change of its state."""
        self.driver: Driver = make_driver(self.name, EngineWorkers(self))

    @property
    def loading(self) -> LoadingReport | None:
        """How tensors are loaded by the worker that has learned fewest; None if none learns, or has loaded any."""
        reports = [worker.loading for worker in self.workers.values() if worker.loading is not None]
        return min(reports, key=lambda report: report.learned, default=None)

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks without an attached worker."""
        return [rank for rank in range(self.world_size) if rank not in self.workers]

    @property
    def complete(self) -> bool:
        """Whether all its workers are attached."""
        return len(self.workers) == self.world_size

    @property
    def ready(self) -> bool:
        """Whether it may serve a version whole (or, before the first, what it started with)."""
        return self.complete and self.state is EngineState.CURRENT and not self.asleep

    @property
    def starting(self) -> bool:
        """Whether any of its workers has not served yet: it may serve nobody before it was given a version."""
        return any(worker.starting for worker in self.workers.values())

    @property
    def serving(self) -> bool:
        """Whether it is ready, and has started: what people are told."""
        return self.ready and not self.starting

    @property
    def asleep(self) -> bool:
        """Whether any of its workers sleeps: it serves nobody, and its weights may be gone."""
        return any(worker.asleep for worker in self.workers.values())

    @property
    def condition(self) -> str:
        """What people are told of it: its state, or that it is asleep, or starts."""
        if self.asleep:
            return ASLEEP
        return STARTING if self.starting and self.state is EngineState.CURRENT else self.state.value

    @property
    def idle(self) -> bool:
        """Whether it is complete, awake, and nothing is done to it: it can be asked something."""
        busy = self.state is EngineState.UPDATING or any(worker.busy for worker in self.workers.values())
        return self.complete and not self.asleep and not busy

    @property
    def in_doubt(self) -> bool:
        """Whether all its workers are here and may hold a mixture: it needs a version to serve again."""
        return self.complete and self.state is EngineState.UNKNOWN and not self.asleep

    @property
    def digest(self) -> bytes:
        """The digest of what it holds; ``b""`` if its workers do not know, or do not agree."""
        digests = {worker.digest for worker in self.workers.values()} - {b""}
        return digests.pop() if len(digests) == 1 else b""

    def holds(self, version: VersionId, digest: bytes) -> bool:
        """Whether it is known to hold this version, and not another by its name."""
        return self.content == version and all(may_be_same(worker.digest, digest) for worker in self.workers.values())

    def takes(self, model: str) -> bool:
        """Whether a model's versions are meant for it."""
        return self.serves in ("", model)

    def change(self, event: EngineEvent, *, content: VersionId | None = None, error: CpeError | None = None) -> None:
        """Apply an event; ``content`` is what it holds in a state that knows.

        Raises:
            LifecycleError: the event is illegal now.
        """
        self.state = advance(ENGINE_TABLE, self.state, event)
        self.error = error
        if self.state is EngineState.UPDATING:
            self._mark(touched=True)
        elif self.state is EngineState.CURRENT:
            self.content = content
            self.serves = self.serves or (content.model if content else "")
            self._mark(touched=False)
            if event is EngineEvent.COMPLETE:
                self._note_digest()
        else:
            self.content = None
        log.info(
            "engine.changed",
            engine=self.name,
            state=str(self.state),
            content=str(self.content) if self.content else None,
            error=error.message if error else None,
        )
        self.changed()

    def learn(self, version: VersionId, digest: bytes) -> None:
        """The digest of a version is known: tell the workers that it was given to without, in this attachment.

        One that sleeps is not told, and one that came with the version is not known to hold the same by its name.
        """
        for worker in self.workers.values():
            given = worker.loaded is not None and (worker.content, worker.digest) == (version, b"")
            if given and not worker.asleep:
                worker.digest = digest
                worker.tell(encode(Digested(version, digest)))

    def _note_digest(self) -> None:
        """All its workers hold what they were told to load."""
        for worker in self.workers.values():
            worker.digest = self.taking

    def _mark(self, *, touched: bool) -> None:
        """Note on every worker what is known of its weights now."""
        for worker in self.workers.values():
            worker.touched = touched
            if not touched:
                worker.content = self.content


class EngineWorkers:
    """The steps of a round as messages to all workers of one engine (`cpe_daemon.core.driver.Workers`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._woken = 0

    @property
    def world_size(self) -> int:
        """How many there are to be."""
        return self._engine.world_size

    @property
    def url(self) -> str:
        """Where the engine's own API is."""
        return self._engine.url

    @property
    def starting(self) -> bool:
        """Whether any of its workers has not served yet."""
        return self._engine.starting

    async def check(self, round: int, seconds: float) -> None:
        """Say whether what was announced fits."""
        await self._all(Check(round), seconds)

    async def halt(self, round: int, seconds: float) -> int | None:
        """Begin no further forward pass; the largest number that any worker has begun.

        None if they do not hold the same: they have not been serving together since they took it.
        """
        passes = [done.passes for done in await self._all(Halt(round), seconds)]
        return max(passes) if len({worker.content for worker in self._engine.workers.values()}) == 1 else None

    async def pause(self, round: int, seconds: float, passes: int | None = None) -> None:
        """Stop serving. A worker that cannot says why when its time is over, for which its answer gets a moment."""
        await self._all(Pause(round, seconds, passes), seconds + _ANSWER_SECONDS)

    async def begin(self, update: Update, seconds: float) -> None:
        """Make ready to load."""
        self._engine.taking = update.digest
        begin = Begin(update.round, update.version, update.tensors, update.nbytes, update.fold, update.digest)
        await self._all(begin, seconds, lambda worker: structs.replace(begin, needs=worker.planned))

    async def finish(self, round: int, seconds: float) -> None:
        """Post-process and check."""
        await self._all(Finish(round), seconds)

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Forget the round; True if any worker's weights may be others than before it."""
        return any(done.touched for done in await self._all(Abort(round, reason), seconds))

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Serve again."""
        await self._all(Resume(round, content), seconds)
        for worker in self._engine.workers.values():
            worker.starting = False

    async def wake(self, seconds: float) -> None:
        """Wake up. Those that are awake say so."""
        self._woken += 1
        await self._all(Wake(self._woken, seconds), seconds + _ANSWER_SECONDS)

    async def _all(self, step: Step, seconds: float, own: Callable[[Worker], Step] | None = None) -> list[StepDone]:
        """Have every worker do it; every answer is awaited before the first error is raised.

        Args:
            step: what is to be done.
            seconds: until each worker's deadline.
            own: what that is for one worker, if it is not the same for all.
        """
        if not self._engine.complete:
            raise PeerLostError(f"engine {self._engine.name!r} has lost a worker")
        header = encode(step) if own is None else None
        workers = self._engine.workers.values()
        sent = [worker.post(own(worker) if own else step, seconds, header) for worker in workers]  # now, not in tasks
        answers = await asyncio.gather(*sent, return_exceptions=True)
        done: list[StepDone] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            done.append(answer)
        return done
