"""The conversation about versions over one session: open, manifest, chunks, seal; credits, acknowledgements, states.

No sockets: messages go out by a function that is handed in, and come in by `Sending.take`. All of it belongs to the
link's thread, but for the methods that say otherwise.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Final, Protocol

import zmq

from cpe_daemon.core.types import Shard
from cpe_daemon.devices.memory import SharedMemory, address_of, copy
from cpe_daemon.errors import CpeError, DeadlineError, from_code
from cpe_daemon.publisher.credits import Credits
from cpe_daemon.publisher.delivery import Bell, Delivery
from cpe_daemon.publisher.pagelock import PageLock
from cpe_daemon.publisher.straight import Straight
from cpe_daemon.publisher.under_way import Stream
from cpe_daemon.publisher.watching import Watching
from cpe_daemon.publisher.window import Window
from cpe_daemon.wire.messages import (
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
)

SHARDS_A_PART: Final = 512
MARGIN_SECONDS: Final = 5.0
"""Other threads wait so much longer than the link's thread does for the same, which then tells them why it failed."""


class Send(Protocol):
    """Sends one message and its bulk frames."""

    def __call__(self, message: Message, *frames: bytes | memoryview | zmq.Frame) -> None:
        """Raises `PeerLostError` if the daemon does not take it."""
        ...


class Sending:
    """All streams of one session.

    Args:
        send: sends a message.
        welcome: the session's terms.
        ring: the landing ring, if there is one; stays the caller's.
        bell: guards the credits, and rings when one comes back.
        send_timeout: seconds without an answer to bytes after which a stream is given up.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        send: Send,
        welcome: TrainerWelcome,
        ring: SharedMemory | None,
        bell: Bell,
        *,
        send_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        # A view of our own: it keeps the memory mapped for whoever is writing to it when the session ends.
        self._memory = None if ring is None else ring.view[:]
        self._address = 0 if ring is None else ring.address
        self.page_lock: PageLock | None = None
        """Of the ring, since GPUs copy to it; stays the caller's."""
        self._bell = bell
        self._send_timeout = send_timeout
        self._clock = clock
        self._chunk_bytes = welcome.chunk_bytes
        self._credits = Credits(welcome.credits, welcome.chunk_bytes, ring=ring is not None)
        self._numbers = itertools.count(1)
        self._begun: dict[int, Stream] = {}  # not opened yet; guarded by the bell's lock, as is the next
        self._over: CpeError | None = None
        self._streams: dict[int, Stream] = {}
        self._watching = Watching()

    # --- any thread --------------------------------------------------------------------------------------------------

    def begin(self, delivery: Delivery) -> Stream:
        """Make a stream, for `open`; if the session is over it has failed already."""
        with self._bell.lock:
            stream = Stream(next(self._numbers), delivery, self._clock())
            if self._over is None:
                self._begun[stream.number] = stream
                return stream
            over = self._over
        delivery.fail(over)
        return stream

    def credit(self, stream: Stream, before_waiting: Callable[[], None] = lambda: None) -> int | None:
        """Wait for a credit; return its offset in the ring, or None if the stream has failed.

        ``before_waiting`` is called if none is free.
        """
        delivery = stream.delivery
        deadline = self._clock() + self._send_timeout + MARGIN_SECONDS
        with self._bell.lock:
            if delivery.error is None and (at := self._credits.take(stream.number)) is not None:
                return at
        before_waiting()
        with self._bell.lock:
            while delivery.error is None:
                at = self._credits.take(stream.number)
                if at is not None:
                    return at
                if not self._bell.moved.wait(deadline - self._clock()):
                    break
        delivery.fail(DeadlineError(f"{delivery.endpoint} gave no credit for {delivery.version} in time"))
        return None

    def window(self, ring_offset: int, nbytes: int) -> Window:
        """The memory of a credit. Only with a landing ring, and only for the credit's holder."""
        if self._memory is None:
            raise ValueError("this session has no landing ring")
        return Window(self._address + ring_offset, self._memory[ring_offset : ring_offset + nbytes])

    def hold(self) -> bool:
        """Keep the ring page-locked until `let_go`, if it is."""
        return self.page_lock is not None and self.page_lock.hold()

    def let_go(self) -> None:
        """What was `hold` for is over."""
        if self.page_lock is not None:
            self.page_lock.let_go()

    def refund(self, stream: Stream, ring_offset: int) -> None:
        """Return a credit that was not used."""
        with self._bell.lock:
            self._credits.give_back(stream.number, ring_offset)
            self._bell.moved.notify_all()

    # --- the link's thread -------------------------------------------------------------------------------------------

    def open(self, stream: Stream, shards: list[Shard], force: bool, folded: bool = False) -> None:
        """Announce a contribution and its manifest; ``folded``: and that its fold comes with the seal."""
        delivery = stream.delivery
        with self._bell.lock:
            self._begun.pop(stream.number, None)
            if delivery.error is not None:
                return
        stream.moved_at = self._clock()
        self._streams[stream.number] = stream
        self._watching.add(delivery)
        undigested = folded and self._memory is not None  # what goes by sockets is digested while it waits for them
        nbytes = delivery.nbytes
        self._send(OpenVersion(stream.number, delivery.version, len(shards), nbytes, force, folded, undigested))
        for first in range(0, len(shards), SHARDS_A_PART):
            self._send(ManifestPart(stream.number, first, shards[first : first + SHARDS_A_PART]))

    def chunk(self, stream: Stream, offset: int, nbytes: int, ring_offset: int) -> None:
        """Send a chunk for which `credit` was called and whose bytes lie in the ring."""
        if stream.number not in self._streams:
            self.refund(stream, ring_offset)
            return
        self._send_chunk(stream, Chunk(stream.number, offset, nbytes, ring_offset))

    def feed(self, stream: Stream, staged: memoryview, upto: int, straight: Straight | None = None) -> None:
        """Have the first ``upto`` bytes of ``staged`` sent: they must not change until it is delivered or failed.

        Chunks that are ``straight`` are sent from where they lie. That takes a session without a ring.
        """
        if stream.number in self._streams:
            stream.staged, stream.staged_bytes, stream.straight = staged, upto, straight

    def seal(self, stream: Stream, digests: bytes, fold: int | None = None) -> None:
        """Seal the stream once all its bytes are sent; with a fold if one was announced."""
        stream.digests, stream.fold = digests, fold
        self._finish(stream)

    def abandon(self, stream: Stream, error: CpeError) -> None:
        """Give a stream up, and say so; does nothing if it is sealed or has failed."""
        if stream.number in self._streams and not stream.sealed:
            self._give_up(stream, error)

    def abandon_all(self, error: CpeError) -> None:
        """Give up what is not sealed."""
        for stream in list(self._streams.values()):
            self.abandon(stream, error)

    def pump(self) -> None:
        """Send staged bytes as far as there are credits."""
        for stream in list(self._streams.values()):
            staged = stream.staged
            if staged is None or not stream.opened:
                continue
            if stream.delivery.held:
                stream.staged = None  # it is only compared
                continue
            while nbytes := stream.sendable(self._chunk_bytes):
                with self._bell.lock:
                    at = self._credits.take(stream.number)
                if at is None:
                    break
                if not self._send_staged(stream, staged, nbytes, at):
                    self.refund(stream, at)
                    stream.staged = None  # it is over, and its end is on the way
                    break
            self._finish(stream)

    def take(self, message: Message) -> None:
        """Handle what the daemon said of a stream or a version; what concerns none that is known is ignored."""
        if isinstance(message, ChunkDone):
            self._on_done(message)
        elif isinstance(message, VersionOpened) and (stream := self._streams.get(message.stream)):
            stream.opened = True
            stream.moved_at = self._clock()
            self._watching.opened(stream.delivery.version)
            stream.delivery.mark_opened(held=message.held)
            self._finish(stream)  # if there are no bytes, nothing else will
        elif isinstance(message, VersionStatus):
            self._on_status(message)
        elif isinstance(message, ErrorReply) and (stream := self._streams.get(message.stream)):
            if stream.opened and not stream.delivery.held:
                self._watching.given_up(stream.delivery.version)
            self._drop(stream, stream.delivery.reported(message.error.code, message.error.message))

    def give_up_stalled(self) -> None:
        """Fail the streams to which the daemon has owed an answer for too long."""
        now = self._clock()
        for stream in [s for s in self._streams.values() if s.waiting and now - s.moved_at > self._send_timeout]:
            delivery = stream.delivery
            owed = "acknowledged no bytes of" if stream.opened else "made no room for"
            owed = "did not compare" if delivery.held else owed
            what = f"the daemon at {delivery.endpoint} {owed} {delivery.version} for {self._send_timeout:g} s"
            self._give_up(stream, DeadlineError(what))

    def end(self, error: CpeError) -> None:
        """The session is over: fail whatever was expected of it."""
        with self._bell.lock:
            self._over = error
            streams = [*self._begun.values(), *self._streams.values()]
            self._begun.clear()
        for stream in streams:
            stream.staged = None
        for delivery in [*(stream.delivery for stream in streams), *self._watching]:
            delivery.fail(from_code(error.code, f"{error.message} ({delivery.version} was {delivery.state})"))
        self._streams.clear()
        self._watching.clear()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _send_staged(self, stream: Stream, staged: memoryview, nbytes: int, at: int) -> bool:
        """Send the next chunk; False if its tensors are not to be read any more."""
        start = stream.sent_bytes
        frames = None if stream.straight is None else stream.straight.frames(start)
        if frames is not None:
            if frames:
                self._send_chunk(stream, Chunk(stream.number, start, nbytes, at), *frames)
            return bool(frames)
        part = staged[start : start + nbytes]
        chunk = Chunk(stream.number, start, len(part), at)
        if at >= 0:
            copy(self.window(at, len(part)).address, address_of(part), len(part))
            self._send_chunk(stream, chunk)
        else:
            # Not copied: the staging is not written again before every chunk is acknowledged, or the stream was given
            # up, and then it is never sealed.
            self._send_chunk(stream, chunk, zmq.Frame(part, copy=False))
        return True

    def _send_chunk(self, stream: Stream, chunk: Chunk, *frames: zmq.Frame) -> None:
        if not stream.unacked:
            stream.moved_at = self._clock()
        self._send(chunk, *frames)
        stream.unacked += 1
        stream.sent_bytes += chunk.nbytes
        stream.delivery.mark_sent(chunk.nbytes)

    def _on_done(self, done: ChunkDone) -> None:
        stream = self._streams.get(done.stream)
        with self._bell.lock:
            returned = self._credits.give_back(done.stream, done.ring_offset)
            self._bell.moved.notify_all()
        if stream is None or not returned:
            return  # it failed meanwhile; its credits come back all the same
        stream.acknowledged()
        stream.moved_at = self._clock()
        self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        if stream.number not in self._streams or not stream.opened:
            return
        held = stream.delivery.held
        if not stream.sealed and stream.digests is not None and (held or stream.sent_bytes == stream.delivery.nbytes):
            self._send(Seal(stream.number, stream.digests, stream.fold))
            stream.sealed = True
            stream.moved_at = self._clock() if held else stream.moved_at
        if stream.sealed and not stream.unacked and not held:
            del self._streams[stream.number]
            stream.staged = None
            stream.delivery.mark_delivered()

    def _on_status(self, status: VersionStatus) -> None:
        compared = self._streams.get(status.stream)
        if compared is not None and compared.sealed and compared.delivery.comparing:
            del self._streams[status.stream]
            compared.delivery.confirm(status)
            if compared.delivery.over:
                self._watching.drop(compared.delivery)
            return
        failed = [delivery for delivery in self._watching.take(status) if delivery.error is not None]
        for stream in [stream for stream in self._streams.values() if stream.delivery in failed]:
            self._forget(stream)

    def _give_up(self, stream: Stream, error: CpeError) -> None:
        if not stream.delivery.held:
            self._watching.given_up(stream.delivery.version)
        self._drop(stream, error)
        self._send(Abandon(stream.number, error.message))

    def _drop(self, stream: Stream, error: CpeError) -> None:
        """A stream failed."""
        self._forget(stream)
        self._watching.drop(stream.delivery)
        stream.delivery.fail(error)

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)
        stream.staged = None
