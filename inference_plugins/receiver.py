"""The engine-neutral half of a worker: attaches to the daemon, takes buckets out of slots, and drives a `Loader`.

Everything here runs in one thread, the caller's. Whatever the engine raises is reported to the daemon and goes no
further: nothing is raised across a link, and no wait is without a deadline. What a plugin adds is a `Loader`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.slots import Slots, open_slots
from cpe_daemon.errors import CpeError, DeadlineError, EngineError, PeerLostError, ProtocolError, from_code
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Abort,
    Begin,
    ErrorInfo,
    ErrorReply,
    Finish,
    Load,
    Message,
    Pause,
    Ping,
    Pong,
    Resume,
    StepDone,
    StepFailed,
    WorkerBye,
    WorkerCommand,
    WorkerHello,
    WorkerWelcome,
)
from inference_plugins.assembly import Assembly

log: Final = logging.getLogger(__name__)

_HELLO_EVERY_SECONDS: Final = 1.0
_SILENT_INTERVALS: Final = 5.0


class Loader(Protocol):
    """What an engine's plugin implements; called from the receiver's thread, in the order of the methods."""

    content: VersionId | None
    """The version that the weights are, whole; None before the first."""

    touched: bool
    """Whether the weights may be a mixture: true from the first write of an update until `finish` has returned."""

    def pause(self, seconds: float) -> None:
        """Keep the engine from serving, from between two forward passes on. Does nothing if it is paused already.

        Raises:
            DeadlineError: it did not come to rest within ``seconds``.
        """
        ...

    def begin(self) -> None:
        """Make ready for the tensors of a version; forget an update that was not finished."""
        ...

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load whole tensors. They are views of memory that is reused as soon as this returns."""
        ...

    def finish(self, version: VersionId) -> None:
        """Every tensor has been given: post-process, and raise unless each one that was expected came."""
        ...

    def resume(self) -> None:
        """Let the engine serve. Does nothing if it does."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is, as the daemon and its operators know it."""

    engine: str
    kind: str
    rank: int
    world_size: int
    incarnation: str
    model: str = ""
    node: str = ""
    gpu: str = ""
    leader: bool = True
    pid: int = 0


class Receiver:
    """One worker's link to the daemon of its node.

    Args:
        endpoint: the daemon's socket for engines, ``ipc://PATH``.
        identity: who this worker is.
        loader: the engine.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, identity: Identity, loader: Loader) -> None:
        self.endpoint = endpoint
        self._identity = identity
        self._loader = loader
        self._dealer = Dealer(endpoint, WorkerCommand)
        self._slots: Slots | None = None
        self._welcome: WorkerWelcome | None = None
        self._update: Begin | None = None
        self._assembly = Assembly()
        self._loaded = 0
        self._heard = 0.0

    @property
    def attached(self) -> bool:
        """Whether the daemon knows this worker."""
        return self._welcome is not None

    def attach(self, seconds: float) -> None:
        """Introduce this worker until the daemon takes it in.

        Raises:
            DeadlineError: no daemon answered within ``seconds``.
            CpeError: the daemon refuses this worker, and says why.
        """
        deadline = time.monotonic() + seconds
        refused: CpeError | None = None
        while not self.attached:
            left = deadline - time.monotonic()
            if left <= 0:
                raise refused or DeadlineError(
                    f"no daemon answered at {self.endpoint} within {seconds:g} s; is `cpe serve` running on this node?"
                )
            refused = self._say_hello(min(left, _HELLO_EVERY_SECONDS)) or refused

    def run(self, stopped: threading.Event) -> None:
        """Serve the daemon until ``stopped`` is set and `wake` was called; attach anew whenever it was restarted."""
        while not stopped.is_set():
            if not self.attached:
                self._say_hello(_HELLO_EVERY_SECONDS)
                continue
            interval = self._welcome.heartbeat_seconds if self._welcome else _HELLO_EVERY_SECONDS
            try:
                self._dealer.send(Ping(), timeout=interval)
                self._listen(interval)
            except PeerLostError as error:
                self._lose(str(error))
            if self._slots is not None and self._slots.lost:
                self._lose("its process ended")
            if time.monotonic() - self._heard > _SILENT_INTERVALS * interval:
                self._lose(f"silent for {_SILENT_INTERVALS * interval:g} s")

    def wake(self) -> None:
        """Make `run` look at its stop event; callable from any thread."""
        self._dealer.wake()

    def close(self) -> None:
        """Detach for good; the engine keeps the weights that it has."""
        if self.attached:
            try:
                self._dealer.send(WorkerBye(), timeout=1.0)
            except PeerLostError as error:
                log.debug("could not say goodbye: %s", error)
        self._close_slots()
        self._dealer.close()

    # --- the link ----------------------------------------------------------------------------------------------------

    def _say_hello(self, seconds: float) -> CpeError | None:
        """Say hello once and await the welcome for ``seconds``; return the daemon's refusal, if that is what came."""
        who = self._identity
        hello = WorkerHello(
            protocol=PROTOCOL,
            engine=who.engine,
            kind=who.kind,
            rank=who.rank,
            world_size=who.world_size,
            incarnation=who.incarnation,
            model=who.model,
            node=who.node,
            gpu=who.gpu,
            leader=who.leader,
            pid=who.pid,
            content=self._loader.content,
            touched=self._loader.touched,
        )
        deadline = time.monotonic() + seconds
        refused: CpeError | None = None
        try:
            self._dealer.send(hello, timeout=seconds)
            while not self.attached and (left := deadline - time.monotonic()) > 0:
                message = self._receive(left)
                if isinstance(message, ErrorReply):
                    refused = from_code(message.error.code, message.error.message)
                elif isinstance(message, WorkerWelcome):
                    self._take_in(message)
        except CpeError as error:
            log.debug("hello to %s failed: %s", self.endpoint, error)
        return refused

    def _take_in(self, welcome: WorkerWelcome) -> None:
        """The daemon knows this worker: open its slots, and serve or hold as it says."""
        self._close_slots()
        self._slots = open_slots(welcome.slots, welcome.handoff)
        self._welcome = welcome
        self._forget_update()
        if welcome.hold:
            self._hold()
        elif not self._loader.touched:
            self._loader.resume()
        log.info(
            "attached to the daemon at %s%s",
            self.endpoint,
            ", awaiting the live version" if welcome.hold else "",
        )

    def _hold(self) -> None:
        try:
            self._loader.pause(_HELLO_EVERY_SECONDS)
        except CpeError as error:
            log.warning("still serving until the update's own pause: %s", error)

    def _lose(self, reason: str) -> None:
        """The daemon is gone: an untouched engine serves on, a touched one stays paused until a daemon restores it."""
        if not self.attached:
            return
        log.warning("lost the daemon at %s: %s", self.endpoint, reason)
        self._welcome = None
        self._forget_update()
        self._close_slots()
        if not self._loader.touched:
            self._loader.resume()

    def _listen(self, seconds: float) -> None:
        """Carry out what the daemon asks for, for ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.attached and (left := deadline - time.monotonic()) > 0:
            message = self._receive(left)
            if message is None:
                return  # woken, or nothing came
            if isinstance(message, Pong):
                if self._welcome is not None and message.generation != self._welcome.generation:
                    self._lose("it was restarted")
            elif isinstance(message, ErrorReply):
                self._lose(message.error.message)
            elif not isinstance(message, WorkerWelcome):
                self._carry_out(message)
                self._heard = time.monotonic()  # a long step was no silence of the daemon's

    def _receive(self, seconds: float) -> Message | None:
        try:
            received = self._dealer.receive(seconds)
        except ProtocolError as error:
            log.warning("ignored a message of the daemon's: %s", error)
            return None
        if received is None:
            return None
        self._heard = time.monotonic()
        return received[0]

    def _close_slots(self) -> None:
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    # --- the steps of a round ----------------------------------------------------------------------------------------

    def _carry_out(self, step: Message) -> None:
        """Do one step and answer it, whatever happens."""
        work: Callable[[], None]
        match step:
            case Pause():
                name, work = "pause", lambda: self._loader.pause(step.deadline_seconds)
            case Begin():
                name, work = "begin", lambda: self._begin(step)
            case Load():
                name, work = "load", lambda: self._load(step)
            case Finish():
                name, work = "finish", lambda: self._finish(step)
            case Abort():
                name, work = "abort", self._forget_update
            case Resume():
                name, work = "resume", self._resume
            case _:
                return
        seq = getattr(step, "seq", 0)
        began = time.monotonic()
        try:
            work()
        except CpeError as error:
            self._answer(StepFailed(step.round, name, ErrorInfo(error.code, error.message), seq))
        except (
            Exception
        ) as error:  # task boundary: whatever the engine raises is reported, never raised across the link
            log.exception("%s failed in the engine", name)
            info = ErrorInfo(EngineError.code, f"{type(error).__name__}: {error}")
            self._answer(StepFailed(step.round, name, info, seq))
        else:
            spent = time.monotonic() - began
            self._answer(StepDone(step.round, name, seq, spent, name == "abort" and self._loader.touched))

    def _answer(self, message: Message) -> None:
        self._dealer.send(message)

    def _begin(self, begin: Begin) -> None:
        self._forget_update()
        self._loader.begin()
        self._update = begin

    def _load(self, load: Load) -> None:
        if self._update is None or load.round != self._update.round or self._slots is None:
            raise EngineError(f"a bucket of round {load.round}, which was not begun here")
        tensors = self._assembly.take(load.parts, self._slots.slot(load.slot))
        self._loader.load(tensors)
        self._loaded += len(tensors)

    def _finish(self, finish: Finish) -> None:
        begun = self._update
        if begun is None or finish.round != begun.round:
            raise EngineError(f"round {finish.round} was not begun here")
        if self._loaded != begun.tensors:
            raise EngineError(f"{self._loaded} of {begun.tensors} tensors came")
        self._loader.finish(begun.version)
        self._forget_update()

    def _resume(self) -> None:
        if self._loader.touched:
            raise EngineError("the weights may be a mixture of versions; not resuming")
        self._loader.resume()

    def _forget_update(self) -> None:
        self._update = None
        self._loaded = 0
        self._assembly.clear()
