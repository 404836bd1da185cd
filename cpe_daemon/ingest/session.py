"""One trainer rank's link: who it is, what it may still send, and the landing ring if it is on this host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.memory import SharedMemory, address_of
from cpe_daemon.errors import ProtocolError
from cpe_daemon.ingest.repeat import Repeat
from cpe_daemon.ingest.stream import Stream
from cpe_daemon.ingest.writer import Span
from cpe_daemon.wire.codec import check_bulk
from cpe_daemon.wire.messages import MOST_CHUNK_FRAMES, Chunk, TrainerHello


@dataclass(slots=True, eq=False)
class Session:
    """The state of one link. Belongs to the event loop.

    ``credits`` chunks of ``chunk_bytes`` may be in flight; ``in_flight`` are. ``ring`` has a place for each credit.
    """

    peer: bytes
    hello: TrainerHello
    credits: int
    chunk_bytes: int
    seen_at: float
    ring: SharedMemory | None = None
    token: bytes = b""
    in_flight: int = 0
    landed: bool = False
    busy_places: set[int] = field(default_factory=set)
    streams: dict[int, Stream] = field(default_factory=dict)
    repeats: dict[int, Repeat] = field(default_factory=dict)
    """Streams of versions that are held here already."""
    last_stream: int = 0
    watching: set[VersionId] = field(default_factory=set)
    gone: bool = False

    @property
    def name(self) -> str:
        """Who this is, for messages."""
        return f"trainer rank {self.hello.rank}/{self.hello.world_size} of {self.hello.model} (pid {self.hello.pid})"

    def stream(self, number: int) -> Stream | None:
        """The stream; None if it was closed while messages for it were on their way.

        Raises:
            ProtocolError: there never was one.
        """
        if not 0 < number <= self.last_stream:
            raise ProtocolError(f"no stream {number} is open")
        return self.streams.get(number)

    @property
    def transport(self) -> str:
        """How its bytes come: landing or inline."""
        return "landing" if self.landed else "inline"

    def take(self, chunk: Chunk, frames: Sequence[memoryview]) -> list[Span]:
        """Spend a credit on a chunk; return where its bytes lie: in the ring, or in frames, which keep them.

        Raises:
            ProtocolError: no credit is left, or the chunk does not lie where it says.
        """
        if self.in_flight >= self.credits:
            raise ProtocolError(f"a chunk without a credit: {self.credits} are in flight")
        if not 0 < chunk.nbytes <= self.chunk_bytes:
            raise ProtocolError(f"a chunk of {chunk.nbytes} bytes; at most {self.chunk_bytes} are allowed")
        if chunk.ring_offset < 0:
            check_bulk(frames, chunk.nbytes, MOST_CHUNK_FRAMES)
            runs = [Span(address_of(frame), frame.nbytes) for frame in frames]
        else:
            runs = [Span(self._place(chunk, frames), chunk.nbytes)]
        self.in_flight += 1
        return runs

    def give_back(self, ring_offset: int) -> None:
        """Return the credit of a chunk, and its place."""
        self.in_flight -= 1
        self.busy_places.discard(ring_offset)

    def free(self) -> None:
        """Unmap the ring, once no copy out of it is in flight."""
        if self.gone and not self.in_flight and self.ring is not None:
            self.ring.close()
            self.ring = None

    def _place(self, chunk: Chunk, frames: Sequence[memoryview]) -> int:
        at = chunk.ring_offset
        if self.ring is None or frames or at % self.chunk_bytes or at + self.chunk_bytes > self.ring.nbytes:
            raise ProtocolError(f"no chunk can lie at {at} of the landing ring")
        if at in self.busy_places:
            raise ProtocolError(f"the place at {at} of the landing ring is still being read")
        self.busy_places.add(at)
        return self.ring.address + at
