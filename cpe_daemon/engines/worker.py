"""One engine worker's link: steps sent, answers awaited, each with its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cpe_daemon.core.needs import Needs
from cpe_daemon.core.types import TensorSpec
from cpe_daemon.errors import CpeError, DeadlineError, EngineError, ManifestError, PeerLostError, VerificationError
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import (
    Abort,
    Begin,
    Check,
    CloseSlots,
    Finish,
    Halt,
    Load,
    OpenSlots,
    Pause,
    Resume,
    SlotSet,
    StepDone,
    StepFailed,
    Wake,
    WorkerHello,
)
from cpe_daemon.wire.reports import LoadingReport

Step = OpenSlots | CloseSlots | Check | Wake | Halt | Pause | Begin | Load | Finish | Abort | Resume
"""A command that a worker answers by `StepDone` or `StepFailed`."""


def step_name(step: Step | type[Step]) -> str:
    """The name by which the answer refers to a step: its tag on the wire."""
    return str(step.__struct_config__.tag)


class Sender(Protocol):
    """What is needed of the socket."""

    def send_encoded(self, peer: bytes, header: bytes, *frames: bytes | memoryview) -> bool:
        """Send without waiting; False if the peer cannot take it."""
        ...


class Handoff(Protocol):
    """What is needed of `cpe_daemon.links.handoff.HandoffServer`."""

    path: Path

    def tie(self, on_gone: Callable[[], None]) -> bytes:
        """Offer a tether once, under the token returned; ``on_gone`` is called when its taker lets go or dies."""
        ...

    def withdraw(self, token: bytes) -> None:
        """Take an offer back, if nobody took it."""
        ...


class Worker:
    """One worker, from its hello until it is lost. Belongs to the event loop.

    Args:
        peer: its address on the socket.
        hello: how it introduced itself.
        gpu: index of its GPU on this node.
        gpu_name: that GPU's UUID.
        sender: the socket.
        seen_at: when it was last heard.
    """

    def __init__(
        self, peer: bytes, hello: WorkerHello, gpu: int, gpu_name: str, sender: Sender, seen_at: float
    ) -> None:
        self.peer = peer
        self.hello = hello
        self.gpu = gpu
        self.gpu_name = gpu_name
        self.slots: SlotSet | None = None
        """What it may have open; for a worker that was late that is not certain."""
        self.has_slots = False
        """Whether it has them open."""
        self.tether: bytes | None = None
        """The token of the offer that ties its life to this link, so that it can be taken back."""
        self.seen_at = seen_at
        self.content = hello.content
        """The version that it holds whole, if any."""
        self.digest = hello.digest
        """That version's, as far as it is known (`cpe_daemon.core.identity`)."""
        self.touched = hello.touched
        """Whether its weights may be a mixture."""
        self.starting = hello.starting
        """Whether it has not served yet."""
        self.asleep = hello.asleep
        """Whether the memory of its weights may belong to others now."""
        self.naps = 0
        """How often it has gone to sleep in this attachment."""
        self.loaded: Sequence[TensorSpec] | None = None
        """The tensors of the version that it loaded last in this attachment."""
        self.loading: LoadingReport | None = None
        """How its tensors are loaded, as it said last in this attachment; None if nothing is learned there."""
        self.needs: Needs | None = None
        """Which bytes it needs, as it said last in this attachment; None: all of them."""
        self.planned: str | None = None
        """By which needs the round in hand was planned, as `Begin.needs` tells it."""
        self.gone: PeerLostError | None = None
        self._sender = sender
        self._waiting: dict[tuple[int, str, int], asyncio.Future[StepDone]] = {}

    @property
    def name(self) -> str:
        """Who this is, for messages."""
        hello = self.hello
        return f"engine {hello.engine!r} rank {hello.rank} (pid {hello.pid}, GPU {self.gpu_name})"

    @property
    def busy(self) -> bool:
        """Whether it is carrying out a step; it is silent meanwhile, and the step's deadline watches it."""
        return bool(self._waiting)

    def tell(self, header: bytes) -> None:
        """Send an encoded message that is not answered; if it does not arrive, the next step fails by itself."""
        if self.gone is None:
            self._sender.send_encoded(self.peer, header)

    def post(self, step: Step, seconds: float, header: bytes | None = None) -> asyncio.Future[StepDone]:
        """Send a step now; its answer, or what became of it, comes with the future, in ``seconds`` at the latest.

        Whoever does not await the future any more need not tell the worker: nothing is kept longer than that.

        Args:
            step: what is to be done.
            seconds: until its deadline.
            header: the step encoded, if it is already.

        Returns:
            A future that ends in the answer, or in a DeadlineError, an EngineError if the worker could not do it, or a
            PeerLostError.
        """
        name = step_name(step)
        key = (step.round, name, getattr(step, "seq", 0))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepDone] = loop.create_future()
        if self.gone is not None:
            future.set_exception(self.gone)
        elif not self._sender.send_encoded(self.peer, header or encode(step)):
            future.set_exception(PeerLostError(f"{self.name} takes no messages"))
        else:
            late = loop.call_later(seconds, self._late, future, name, seconds)
            self._waiting[key] = future

            def over(done: asyncio.Future[StepDone]) -> None:
                late.cancel()
                if self._waiting.get(key) is done:
                    del self._waiting[key]

            future.add_done_callback(over)
        return future

    def _late(self, future: asyncio.Future[StepDone], name: str, seconds: float) -> None:
        if not future.done():
            what = "load a bucket" if name == "load" else name
            future.set_exception(DeadlineError(f"{self.name} did not {what} within {seconds:g} s"))

    async def step(self, step: Step, seconds: float) -> StepDone:
        """Send a step and await its answer; raises as the future of `post`."""
        return await self.post(step, seconds)

    def done(self, message: StepDone) -> None:
        """Take an answer; one that comes after its deadline is ignored."""
        self.loading = message.loading or self.loading
        self.needs = None if message.whole else message.needs or self.needs
        future = self._waiting.get((message.round, message.step, message.seq))
        if future is not None and not future.done():
            future.set_result(message)

    def failed(self, message: StepFailed) -> None:
        """Take a failure."""
        future = self._waiting.get((message.round, message.step, message.seq))
        if future is not None and not future.done():
            future.set_exception(self._failure(message))

    def _failure(self, message: StepFailed) -> CpeError:
        """What a worker's failure is called: one that cannot take a version, or was handed another, is not at fault."""
        if message.step == step_name(Check) and message.error.code == ManifestError.code:
            return ManifestError(f"{self.name} cannot take it: {message.error.message}")
        kind = VerificationError if message.error.code == VerificationError.code else EngineError
        return kind(f"{self.name} could not {message.step}: {message.error.message}")

    def lose(self, reason: str) -> None:
        """Everything that waits for this worker fails now."""
        self.gone = PeerLostError(f"{self.name} is gone: {reason}")
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(self.gone)
