"""The conversation about versions that are held here already (`cpe_daemon.ingest.repeat`).

The same version again is no mistake: a trainer that was restarted, or lost an answer, says what it said before. It is
told what became of the version, as if it had published it now. Other weights under a number that is in use are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import structlog

from cpe_daemon.errors import DeadlineError, VersionRefusedError
from cpe_daemon.ingest.digesting import Digesting
from cpe_daemon.ingest.news import FINAL, status_of
from cpe_daemon.ingest.repeat import Repeat
from cpe_daemon.ingest.session import Session
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.router import Handler
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    VersionOpened,
)
from cpe_daemon.wire.reports import ErrorInfo

log = structlog.get_logger(__name__)


class Repeats:
    """All of them. Belongs to the event loop.

    Args:
        trainers: the links that they come over.
        digesting: makes the digests of what is held, if that was put off.
        clock: seconds, monotonic.
    """

    def __init__(self, trainers: Trainers, digesting: Digesting, clock: Callable[[], float]) -> None:
        self._trainers = trainers
        self._digesting = digesting
        self._clock = clock

    def open(self, session: Session, opened: OpenVersion, version: Version) -> None:
        """Begin to compare.

        Raises:
            VersionRefusedError: it has other tensors.
        """
        repeat = Repeat(opened, version, session.hello.rank, self._clock())
        session.repeats[repeat.id] = repeat
        self._digesting.want(version)
        self._accept(session, repeat)

    def settle(self, version: Version) -> None:
        """The digests of a version are known: answer those that waited for them."""
        for session in self._trainers:
            for repeat in [r for r in session.repeats.values() if r.version is version]:
                try:
                    self._compare(session, repeat)
                except VersionRefusedError as error:
                    del session.repeats[repeat.id]
                    self._trainers.send(session, ErrorReply(ErrorInfo(error.code, error.message), repeat.id))

    def before(self, handlers: Mapping[type[Message], Handler]) -> dict[type[Message], Handler]:
        """Return the handlers of messages of streams, for all streams but those that are compared here."""
        return {kind: self._first(handler) for kind, handler in handlers.items()}

    def drop_late(self, seconds: float) -> None:
        """Forget those that began longer ago than ``seconds``, and say so."""
        now = self._clock()
        for session in self._trainers:
            for repeat in [r for r in session.repeats.values() if now - r.began_at > seconds]:
                del session.repeats[repeat.id]
                what = "were not known here" if repeat.sealed else f"did not come from {session.name}"
                late = DeadlineError(f"digests of {repeat.version.id} {what} within {seconds:g} s")
                self._trainers.send(session, ErrorReply(ErrorInfo(late.code, late.message), repeat.id))

    def _first(self, handler: Handler) -> Handler:
        def handle(peer: bytes, message: Message, frames: Sequence[memoryview]) -> None:
            session = self._trainers.session(peer)
            repeat = session.repeats.get(getattr(message, "stream", 0))
            if repeat is None:
                handler(peer, message, frames)
                return
            try:
                self._take(session, repeat, message)
            except VersionRefusedError:
                del session.repeats[repeat.id]
                raise

        return handle

    def _take(self, session: Session, repeat: Repeat, message: Message) -> None:
        match message:
            case ManifestPart():
                repeat.add(message)
                self._accept(session, repeat)
            case Chunk():  # of a publisher that does not know that they need not come: its credit is due
                self._trainers.send(session, ChunkDone(message.stream, message.ring_offset))
            case Seal():
                repeat.seal(message.digests)
                self._compare(session, repeat)
            case Abandon():
                del session.repeats[repeat.id]

    def _accept(self, session: Session, repeat: Repeat) -> None:
        if repeat.manifest_complete:
            self._trainers.send(session, VersionOpened(repeat.id, held=True))

    def _compare(self, session: Session, repeat: Repeat) -> None:
        """If it is the same version, as far as is known, the trainer is told of it as whoever published it first."""
        if not repeat.compare():
            return
        del session.repeats[repeat.id]
        version = repeat.version
        if version.state not in FINAL:
            session.watching.add(version.id)
        log.info("version.repeated", version=str(version.id), trainer=session.name, state=str(version.state))
        self._trainers.send(session, status_of(version, repeat.id))
