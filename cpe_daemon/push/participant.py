"""One engine in one round: how far it came, how long each phase took, and why it was dropped if it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.identity import may_be_same
from cpe_daemon.core.lifecycle import EngineEvent, EngineState
from cpe_daemon.core.types import TensorSpec, VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.worker import Worker
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.push.driving import drive
from cpe_daemon.push.trace import Trace
from cpe_daemon.wire.messages import Abort, Load, StepDone
from cpe_daemon.wire.reports import EngineReport, ErrorInfo

log = structlog.get_logger(__name__)


class Participant:
    """An engine that a round takes from pause to resume. Belongs to the event loop.

    A failure of the engine is kept here (``error``) and never raised: the round goes on with the others.

    Args:
        engine: complete when the round begins.
        round: the round's number.
        deadlines: of each phase.
        clock: seconds, monotonic.
    """

    def __init__(self, engine: Engine, round: int, deadlines: DeadlinesConfig, clock: Callable[[], float]) -> None:
        self.engine = engine
        self.workers = tuple(engine.workers.values())
        self.error: CpeError | None = None
        self.phases: dict[str, float] = {}
        self.verified = False
        """Whether all its workers found that what they were handed is what was staged."""
        self.loaded_bytes = 0
        """Bytes of weights that all its workers have loaded in the round."""
        self._stopped_at = clock()
        self.stopped_seconds: float | None = None
        """For how long it did not serve, if it served before the round and serves the version now."""
        self.held = engine.content
        """The version that the engine held before the round."""
        self.held_digest = engine.digest
        """Of that; ``b""`` if it is not known."""
        self.let_go = False
        """Whether it is dropped and has forgotten the round: it answers, and a version can be tried again."""
        self._was_current = engine.state is EngineState.CURRENT
        self._paused = False
        """Whether it was asked to pause, and may have."""
        self._naps = [worker.naps for worker in self.workers]
        self._round = round
        self._deadlines = deadlines
        self._clock = clock
        engine.change(EngineEvent.BEGIN)

    @property
    def alive(self) -> bool:
        """Whether it is still in the round."""
        return self.error is None

    @property
    def updated(self) -> bool:
        """Whether it has taken the version whole, and serves it."""
        return self.alive and self.engine.state is EngineState.CURRENT

    def drop(self, error: CpeError) -> None:
        """Take it out of the round; the first reason stands."""
        if self.error is None:
            self.error = error
            log.warning("engine.dropped", engine=self.engine.name, round=self._round, error=error.message)

    async def step(self, phase: str, work: Callable[[], Awaitable[object]], seconds: float) -> None:
        """Carry out one phase, time it, and drop the engine if it fails or is late, or may not be asked any more.

        ``seconds`` is the workers' own deadline.
        """
        began = self._clock()

        async def checked() -> None:
            self._check_attached()
            if phase == "pause":
                self._stopped_at, self._paused = began, True
            await work()
            self._check_attached()

        try:
            error = await drive(self.engine, phase, checked, seconds)
        finally:
            self.phases[phase] = self._clock() - began
        if error is not None:
            self.drop(error)

    def _check_attached(self) -> None:
        """A worker that was lost or fell asleep, even if it is back already, ends the engine's part in the round.

        Raises:
            PeerLostError: names the worker.
            EngineError: one has gone to sleep.
        """
        for worker, naps in zip(self.workers, self._naps, strict=True):
            if worker.gone is not None:
                raise worker.gone
            if worker.naps != naps:
                raise EngineError(f"{worker.name} has gone to sleep")

    def knows(self, specs: Sequence[TensorSpec]) -> bool:
        """Whether all its workers have loaded a version of these very tensors."""
        return all(worker.loaded is specs for worker in self.workers)

    def tell(self, header: bytes) -> None:
        """Send a message that is not answered to all workers."""
        for worker in self.workers:
            worker.tell(header)

    def post(self, load: Load, header: bytes, trace: Trace | None = None) -> Awaitable[None]:
        """Send a bucket to all workers now; the result ends when the slot is theirs no more. ``trace`` records that."""
        answers = asyncio.gather(*(self._post(w, load, header, trace) for w in self.workers), return_exceptions=True)
        return self._loaded(answers, sum(part.nbytes for part in load.parts))

    def _post(self, worker: Worker, load: Load, header: bytes, trace: Trace | None) -> Awaitable[StepDone]:
        answer = worker.post(load, self._deadlines.bucket_seconds, header)
        if trace is None:
            return answer
        where = f"GPU {worker.gpu}: load by {self.engine.name} rank {worker.hello.rank}"
        return trace.during(answer, where, f"bucket {load.seq}", slot=load.slot)

    async def _loaded(self, answers: Awaitable[Sequence[StepDone | BaseException]], nbytes: int) -> None:
        for result in await answers:
            if isinstance(result, CpeError):
                self.drop(result)
            elif isinstance(result, BaseException):
                raise result
        if self.alive:
            self.loaded_bytes += nbytes

    async def resume(self, content: VersionId, specs: Sequence[TensorSpec]) -> None:
        """The engine holds ``content``, of the tensors ``specs``, whole: let it serve."""
        for worker in self.workers:
            worker.loaded = specs
        await self.step(
            "resume",
            lambda: self.engine.driver.resume(self._round, content, self._deadlines.resume_seconds),
            self._deadlines.resume_seconds,
        )
        if self.alive and self.engine.state is EngineState.UPDATING:
            self.engine.change(EngineEvent.COMPLETE, content=content)
            self.stopped_seconds = self._clock() - self._stopped_at if self._was_current else None

    async def leave(self) -> None:
        """Take a dropped engine out: untouched, it serves again what it held; otherwise its content is unknown."""
        error = self.error or CpeError("dropped")
        undone = self._in_round and await self._undone(error.message)
        if not self._in_round:
            await self._tell_survivors()
            self._take_back()
        elif undone:
            self.engine.change(EngineEvent.WITHDRAW, content=self.held, error=error)
        else:
            self.engine.change(EngineEvent.FAULT, error=error)

    @property
    def _in_round(self) -> bool:
        """Whether the engine has lost no worker since the round took it, and none has slept and woken up."""
        return self.engine.state is EngineState.UPDATING

    async def _undone(self, reason: str) -> bool:
        """Abort; True if no weight had been touched and the engine serves again, or sleeps.

        One that was not asked to pause yet serves on, and need not be told anything.
        """
        if not self._paused:
            self.let_go = True
            return self._was_current
        seconds, resume_seconds = self._deadlines.abort_seconds, self._deadlines.resume_seconds
        try:
            async with asyncio.timeout(seconds + resume_seconds):
                touched = await self.engine.driver.abort(self._round, reason, seconds)
                self.let_go = True
                if touched or not self._was_current or not self._in_round:
                    return False
                if self.engine.asleep:
                    return True
                await self.engine.driver.resume(self._round, self.held, resume_seconds)
        except Exception as error:  # task boundary: whatever a plugin raises, the engine's content is unknown then
            log.warning("engine.abort_failed", engine=self.engine.name, round=self._round, error=repr(error))
            return False
        return True

    def _take_back(self) -> None:
        """The lost worker is back already, and all hold what they held before: the engine is as it was, but paused.

        Whoever takes it in anew lets it serve; nothing else could, if no version is there to be given to it.
        """
        workers = self.engine.workers.values()
        whole = {(worker.content, worker.touched) for worker in workers} == {(self.held, False)}
        same = all(may_be_same(worker.digest, self.held_digest) for worker in workers)
        if self._was_current and self.engine.in_doubt and whole and same:
            self.engine.change(EngineEvent.REPORT, content=self.held, error=self.error)

    async def _tell_survivors(self) -> None:
        """The engine lost a worker: have the others forget the round, and note what they hold, for its return."""
        seconds = self._deadlines.abort_seconds
        survivors = [worker for worker in self.workers if worker.gone is None]
        abort = Abort(self._round, str(self.error))
        answers = await asyncio.gather(*(w.step(abort, seconds) for w in survivors), return_exceptions=True)
        for worker, answer in zip(survivors, answers, strict=True):
            if isinstance(answer, StepDone):
                worker.touched = answer.touched

    @property
    def outcome(self) -> str:
        """How the round ended for the engine: updated, kept (what it held, untouched), failed (in doubt), or lost."""
        if self.alive:
            return "updated"
        if self.engine.state is EngineState.CURRENT and not self.engine.asleep:
            return "kept"
        return "failed" if self.engine.complete else "lost"

    def report(self) -> EngineReport:
        """What the round did to the engine; the rate is over the loading of buckets."""
        error = ErrorInfo(self.error.code, self.error.message) if self.error else None
        nbytes, push = self.loaded_bytes, self.phases.get("push", 0.0)
        rate = nbytes / push / 1e9 if push else 0.0
        return EngineReport(self.outcome, dict(self.phases), nbytes, rate, error, self.verified)
