"""The trainers' links: who is connected, on which terms, and who has fallen silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

import structlog

from cpe_daemon.config import Config
from cpe_daemon.core.names import check_names
from cpe_daemon.devices.memory import SharedMemory
from cpe_daemon.errors import BusyError, CpeError, ProtocolError
from cpe_daemon.ingest.session import Session
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.links.router import Handler
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.wire.messages import (
    MOST_CHUNK_FRAMES,
    OLDEST_PROTOCOL,
    PROTOCOL,
    Farewell,
    Message,
    Ping,
    Pong,
    TrainerBye,
    TrainerHello,
    TrainerWelcome,
)

log = structlog.get_logger(__name__)

_MAX_NAME_CHARS: Final = 256
_MAX_RANKS: Final = 65_536


class Sender(Protocol):
    """What is needed of the socket."""

    def send(self, peer: bytes, message: Message, *frames: bytes | memoryview) -> bool:
        """Send without waiting; False if the peer cannot take it."""
        ...


class Trainers:
    """All links of trainer ranks. Belongs to the event loop.

    Args:
        config: the daemon's settings.
        generation: of this daemon's process.
        boot_id: of this host, to recognise trainers that share it.
        handoff: passes landing rings to them.
        metrics: counters.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        config: Config,
        generation: str,
        boot_id: str,
        handoff: HandoffServer,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._generation = generation
        self._boot_id = boot_id
        self._handoff = handoff
        self._metrics = metrics
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._sender: Sender | None = None
        self._on_lost: Callable[[Session, str], None] = lambda session, reason: None
        self._farewell: Farewell | None = None
        self._left = asyncio.Event()

    def __iter__(self) -> Iterator[Session]:
        """All links; the set may change while one iterates."""
        return iter(tuple(self._sessions.values()))

    def handlers(self) -> Mapping[type[Message], Handler]:
        """The messages that are answered here."""
        return {TrainerHello: self._on_hello, TrainerBye: self._on_bye, Ping: self._on_ping}

    def connect(self, sender: Sender) -> None:
        """Answer through ``sender`` from now on."""
        self._sender = sender

    def on_lost(self, callback: Callable[[Session, str], None]) -> None:
        """Call ``callback(session, reason)`` when a link is given up."""
        self._on_lost = callback

    def session(self, peer: bytes) -> Session:
        """The link of a peer that has just been heard.

        Raises:
            ProtocolError: it never said hello.
        """
        session = self._sessions.get(peer)
        if session is None:
            raise ProtocolError("say hello first")
        session.seen_at = self._clock()
        return session

    def send(self, session: Session, message: Message) -> None:
        """Tell a trainer something; what a stuck one cannot take is dropped, and its deadline ends the link."""
        if self._sender is not None and not session.gone:
            self._sender.send(session.peer, message)

    def drop_silent(self) -> None:
        """Give up every link that was silent for too long."""
        limit = self._config.deadlines.heartbeat_lost_seconds
        for session in self:
            if self._clock() - session.seen_at > limit:
                self._lose(session, f"silent for {limit:g} s")

    def drop(self, refused: Callable[[bytes], bool], reason: str) -> list[bytes]:
        """Give up every link whose peer is ``refused``; return those peers."""
        dropped = [session for session in self if refused(session.peer)]
        for session in dropped:
            self._lose(session, reason)
        return [session.peer for session in dropped]

    def turn_away(self, reason: str) -> None:
        """Let no trainer in any more: whoever says hello hears a farewell."""
        self._farewell = Farewell(reason)

    async def take_leave(self) -> None:
        """After `turn_away`: say farewell to every trainer, and wait until all have let go. The caller bounds it."""
        for session in self:
            if self._sender is None or self._farewell is None or not self._sender.send(session.peer, self._farewell):
                self._lose(session, "it cannot be told that the daemon stops")
        while self._sessions:
            self._left.clear()
            await self._left.wait()

    def close(self) -> None:
        """Give up every link."""
        for session in self:
            self._lose(session, "the daemon stops")

    def _on_hello(self, peer: bytes, hello: TrainerHello, _: object) -> None:
        if self._farewell is not None and self._sender is not None:
            self._sender.send(peer, self._farewell)
            return
        if not OLDEST_PROTOCOL <= hello.protocol <= PROTOCOL:
            raise ProtocolError(f"protocol {hello.protocol}; this daemon speaks {OLDEST_PROTOCOL} to {PROTOCOL}")
        if not 0 <= hello.rank < hello.world_size <= _MAX_RANKS:
            raise ProtocolError(f"rank {hello.rank} of {hello.world_size}")
        if not (0 < len(hello.model) <= _MAX_NAME_CHARS and 0 < len(hello.run) <= _MAX_NAME_CHARS):
            raise ProtocolError(f"model and run need 1 to {_MAX_NAME_CHARS} characters")
        check_names(model=hello.model, run=hello.run)
        if peer in self._sessions:
            self._lose(self._sessions[peer], "said hello again")
        if len(self._sessions) >= self._config.ingest.max_trainers:
            raise BusyError(f"{len(self._sessions)} trainers are connected; ingest.max_trainers allows no more")
        session = self._sessions[peer] = self._admit(peer, hello)
        log.info("trainer.connected", trainer=session.name, run=hello.run, same_host=bool(session.token))
        self.send(
            session,
            TrainerWelcome(
                protocol=PROTOCOL,
                generation=self._generation,
                heartbeat_seconds=self._config.deadlines.heartbeat_interval_seconds,
                credits=session.credits,
                chunk_bytes=session.chunk_bytes,
                handoff=str(self._handoff.path) if session.token else "",
                landing_token=session.token,
                chunk_frames=MOST_CHUNK_FRAMES,
                folds=self._config.device.verifies,
            ),
        )

    def _admit(self, peer: bytes, hello: TrainerHello) -> Session:
        """Set the terms: a trainer of this host gets a landing ring."""
        settings = self._config.ingest
        if not hello.boot_id or hello.boot_id != self._boot_id:
            return Session(peer, hello, settings.credits, settings.chunk_bytes, self._clock())
        session = Session(peer, hello, settings.landing_credits, settings.landing_chunk_bytes, self._clock())
        session.ring = SharedMemory.create("cpe-landing", session.credits * session.chunk_bytes)
        try:
            session.token = self._handoff.offer(session.ring.fd, lambda: self._lose(session, "its process ended"))
        except CpeError:
            session.ring.close()
            raise
        return session

    def _on_ping(self, peer: bytes, _: Ping, __: object) -> None:
        self.send(self.session(peer), Pong(self._generation))

    def _on_bye(self, peer: bytes, _: TrainerBye, __: object) -> None:
        self._lose(self.session(peer), "it said goodbye")
        if self._sender is not None:
            self._sender.send(peer, Pong(self._generation))

    def _lose(self, session: Session, reason: str) -> None:
        if session.gone:
            return
        session.gone = True
        del self._sessions[session.peer]
        self._left.set()
        self._handoff.withdraw(session.token)
        log.info("trainer.gone", trainer=session.name, reason=reason)
        self._on_lost(session, reason)
        session.free()
