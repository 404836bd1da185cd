"""The engine-neutral half of a worker: its link to the daemon, from hello to goodbye, through restarts of either side.

Everything here runs in one thread, the caller's, and no wait is without a deadline. The steps of a round are in
`inference_plugins.steps`; what a plugin adds is a `Loader`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Final

from msgspec import structs

from cpe_daemon.devices.slots import Slots, open_slots
from cpe_daemon.errors import CpeError, DeadlineError, EngineError, PeerLostError, ProtocolError
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.handoff import Tether, claim
from cpe_daemon.wire.messages import (
    CloseSlots,
    Digested,
    ErrorReply,
    Expect,
    Farewell,
    Message,
    OpenSlots,
    Ping,
    Pong,
    Resume,
    StepDone,
    Wake,
    WorkerBye,
    WorkerCommand,
    WorkerHello,
    WorkerWelcome,
)
from inference_plugins.errands import Errands
from inference_plugins.hello import refusal, renew, state_of
from inference_plugins.holding import Holding
from inference_plugins.loader import Loader
from inference_plugins.steps import Answer, Step, Steps, name_of

log: Final = logging.getLogger(__name__)

_HELLO_EVERY_SECONDS: Final = 1.0
_SILENT_INTERVALS: Final = 5.0
_GOODBYE_SECONDS: Final = 1.0


class Receiver:
    """One worker's link to the daemon of its node.

    Args:
        endpoint: the daemon's socket for engines, ``ipc://PATH``.
        hello: who this worker is; what it holds is filled in whenever it is said.
        loader: the engine.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, hello: WorkerHello, loader: Loader) -> None:
        self.endpoint = endpoint
        self._hello = hello
        self._loader = loader
        self._dealer = Dealer(endpoint, WorkerCommand)
        self._slots: Slots | None = None
        self._tether: Tether | None = None
        """By which either side learns at once that the other is gone."""
        self._welcome: WorkerWelcome | None = None
        self._steps = Steps(loader)
        self._holding = Holding(loader)
        self._errands = Errands(self.wake)
        self._heard = 0.0
        self._unanswered = 0
        """Pongs that the daemon owes."""

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
            if not self._steps.under_way:
                self._errands.run()
            if not self.attached:
                self._say_hello(_HELLO_EVERY_SECONDS)
                continue
            interval = self._welcome.heartbeat_seconds if self._welcome else _HELLO_EVERY_SECONDS
            try:
                self._dealer.send(Ping(), timeout=interval)
                self._unanswered += 1
                self._listen(interval)
                if not self._steps.under_way:
                    self._holding.keep(interval)
            except CpeError as error:
                self._lose(str(error))
            if self._cut:
                self._lose("its process ended")
            if time.monotonic() - self._heard > _SILENT_INTERVALS * interval:
                self._lose(f"silent for {_SILENT_INTERVALS * interval:g} s")

    def wake(self) -> None:
        """Make `run` look at its stop event; callable from any thread."""
        self._dealer.wake()

    def announce(self, url: str, seconds: float) -> None:
        """Have the daemon know where the engine's own API is. From any other thread than `run`'s; raises as `sleep`."""
        self._errands.do(lambda left: self._say_hello(min(left, _HELLO_EVERY_SECONDS), url=url), seconds)

    def sleep(self, seconds: float) -> None:
        """Have the engine sleep: it serves no more, has no slots open, and says so. From any other thread than `run`'s.

        Raises:
            DeadlineError: a round or a forward pass did not end within ``seconds``; it is awake.
        """
        self._errands.do(self._fall_asleep, seconds)

    def wake_up(self, seconds: float, *, kept: bool) -> None:
        """The engine has its memory again, ``kept``: with its weights. It serves when the daemon has seen to that.

        Raises:
            DeadlineError: the receiver's thread did not get to it within ``seconds``.
        """
        self._errands.do(lambda _: self._be_awake(kept=kept), seconds)

    def close(self) -> None:
        """Detach for good; the engine keeps the weights that it has."""
        if self.attached:
            self._say_goodbye()
        self._close_link()
        self._dealer.close()

    # --- the link ----------------------------------------------------------------------------------------------------

    def _say_hello(self, seconds: float, **news: str) -> CpeError | None:
        """Say hello once and await the welcome for ``seconds``; return why this worker is not in, if that is known.

        All that time is spent on waiting, whatever comes: hellos in quick succession overtake one another's welcomes,
        each of which the next one makes void. One that is known already says only what is new.
        """
        self._hello = structs.replace(self._hello, **news)
        hello = renew(self._hello, self._loader, self._steps.held.digest)
        deadline = time.monotonic() + seconds
        refused: CpeError | None = None
        try:
            self._dealer.send(hello, timeout=seconds)
        except PeerLostError as error:
            log.debug("no hello to %s: %s", self.endpoint, error)
        while not self.attached and (left := deadline - time.monotonic()) > 0:
            message = self._receive(left)
            refused = refusal(message, self.endpoint) or refused
            if isinstance(message, WorkerWelcome):
                try:
                    self._take_in(message)
                except CpeError as error:
                    log.debug("a welcome of %s is void: %s", self.endpoint, error)
                    refused = error
        return refused

    def _say_goodbye(self) -> None:
        """Have the daemon forget this worker before it sees the slots let go, which it would take for a death."""
        deadline = time.monotonic() + _GOODBYE_SECONDS
        try:
            self._dealer.send(WorkerBye(), timeout=_GOODBYE_SECONDS)
        except PeerLostError as error:
            log.debug("could not say goodbye: %s", error)
            return
        self._unanswered += 1
        while self._unanswered > 0 and (left := deadline - time.monotonic()) > 0:
            if isinstance(self._receive(left), Pong):
                self._unanswered -= 1

    def _take_in(self, welcome: WorkerWelcome) -> None:
        """The daemon knows this worker: tie the two lives together, and serve or hold as it says."""
        self._steps.drop("the daemon began anew")
        self._close_link()
        fd, self._tether = claim(welcome.handoff, welcome.tether)
        os.close(fd)
        self._welcome = welcome
        self._steps = Steps(self._loader, self._steps.held.loaded)  # rounds are counted anew by each daemon
        self._unanswered = 0
        self._holding.held = welcome.hold or self._loader.asleep
        if welcome.hold:
            self._holding.begin(_HELLO_EVERY_SECONDS)
        elif self._hello.world_size == 1 and not self._loader.starting:  # the others when all are here, and agree
            self._holding.let_serve()
        log.info("attached to the daemon at %s%s", self.endpoint, ", awaiting the live version" if welcome.hold else "")

    # --- sleep -------------------------------------------------------------------------------------------------------

    def _fall_asleep(self, seconds: float) -> None:
        if not self._loader.asleep:
            self._loader.sleep(seconds)
            self._holding.held = True
            self._close_slots()
            self._say_state()

    def _be_awake(self, *, kept: bool) -> None:
        if self._loader.asleep:
            self._loader.wake_up(kept=kept)
            self._say_state()

    def _say_state(self) -> None:
        """Tell the daemon; one that is away hears it in the next hello."""
        if not self.attached:
            return
        try:
            self._dealer.send(state_of(self._loader, self._steps.held.digest))
        except PeerLostError as error:
            self._lose(str(error))

    def _wake(self) -> None:
        if self._loader.asleep:
            self._loader.rouse()
            self._be_awake(kept=False)

    def _lose(self, reason: str) -> None:
        """The daemon is gone: an engine that was serving serves on, unless it is touched.

        One that is touched, or was waiting for the live version, stays paused until a daemon says more.
        """
        if self.attached:
            log.warning("lost the daemon at %s: %s", self.endpoint, reason)
            self._let_go()

    def _part(self, reason: str) -> None:
        """The daemon stops, and has said so: all is as if it were lost, and nothing to worry about."""
        if not self._cut:  # it may have ended long ago, if this process was stopped
            self._say_goodbye()
        log.info("the daemon at %s said farewell: %s; waiting for another", self.endpoint, reason)
        self._let_go()

    def _let_go(self) -> None:
        self._welcome = None
        self._steps.drop("the daemon is gone")
        self._close_link()
        self._holding.let_serve()

    def _listen(self, seconds: float) -> None:
        """Carry out what the daemon asks for, for ``seconds``, or until there is an errand and no round."""
        deadline = time.monotonic() + seconds
        while self.attached and (left := deadline - time.monotonic()) > 0:
            if self._errands.due and not self._steps.under_way:
                return
            message = self._receive(0.0 if self._steps.loading else left)
            if message is None and self._steps.loading:
                self._answer(self._steps.settle(1))
            elif message is None:
                return  # woken, or nothing came
            elif isinstance(message, Pong):
                self._unanswered -= 1
                if self._welcome is not None and message.generation != self._welcome.generation:
                    self._lose("it was restarted")
            elif isinstance(message, ErrorReply):
                self._lose(message.error.message)
            elif isinstance(message, Farewell):
                self._part(message.reason)
            elif isinstance(message, WorkerWelcome):
                self._take_in(message)  # of a hello said twice: the daemon counts on its last answer
            elif isinstance(message, Expect):
                self._steps.expect(message)
            elif isinstance(message, Digested):
                self._steps.held.learn(message.version, message.digest)
            else:
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
        self._steps.settle_all()  # nobody is to be answered any more
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.close()

    def _close_link(self) -> None:
        self._close_slots()
        if self._tether is not None:
            self._tether.close()
            self._tether = None

    @property
    def _cut(self) -> bool:
        """Whether the daemon that this worker is attached to has ended."""
        return self._tether is not None and self._tether.cut

    def _carry_out(self, step: Message) -> None:
        """Do a step, and answer, to buckets that have been loaded meanwhile as well."""
        answers: list[Answer] = []
        if isinstance(step, OpenSlots | CloseSlots | Wake):
            answers = [*self._steps.settle_all(), self._do(step)]
        elif isinstance(step, Step):
            answers = self._steps.carry_out(step, self._slots)
        if isinstance(step, Resume) and isinstance(answers[-1], StepDone):
            self._holding.held = False
        self._answer(answers)

    def _answer(self, answers: Sequence[Answer]) -> None:
        if answers and self._cut:
            raise PeerLostError("its process ended")  # sending would wait some seconds for it, and for nothing
        for answer in answers:
            self._dealer.send(answer)

    def _do(self, step: OpenSlots | CloseSlots | Wake) -> Answer:
        """Do a step that is not of a round."""
        began = time.monotonic()
        failed = self._steps.attempt(step, lambda: self._wake() if isinstance(step, Wake) else self._change_slots(step))
        return failed or StepDone(step.round, name_of(step), seconds=time.monotonic() - began)

    def _change_slots(self, step: OpenSlots | CloseSlots) -> None:
        """Close the slots that are open, and open others if there are to be some."""
        self._close_slots()
        if isinstance(step, OpenSlots) and self._welcome is not None:
            if self._loader.asleep:
                raise EngineError("it is asleep")
            self._slots = open_slots(step.slots, self._welcome.handoff)
            if step.folds:
                self._steps.warm_up(self._slots)
