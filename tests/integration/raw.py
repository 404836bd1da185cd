"""A trainer that speaks the wire protocol itself, so that it can say what no publisher would."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

import pytest
from xxhash import xxh3_128_digest

from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.errors import from_code
from cpe_daemon.links.dealer import Dealer
from cpe_daemon.links.keys import Credentials
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Chunk,
    ChunkDone,
    ErrorReply,
    FrontReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerHello,
    TrainerWelcome,
    VersionOpened,
    VersionStatus,
)
from tests.integration.harness import MODEL, RUN

M = TypeVar("M", bound=Message)
_SECONDS = 30.0


class RawTrainer:
    """One rank, over the socket, without a landing ring. It sends no heartbeats by itself. A context manager."""

    def __init__(
        self,
        endpoint: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        run: str = RUN,
        credentials: Credentials | None = None,
    ) -> None:
        self._dealer = Dealer(endpoint, FrontReply, credentials)
        self._run = run
        self._streams = itertools.count(1)
        self._dealer.send(TrainerHello(PROTOCOL, MODEL, run, rank, world_size))
        self.welcome = self.expect(TrainerWelcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dealer.close()

    def send(self, message: Message, *frames: bytes) -> None:
        """Send anything."""
        self._dealer.send(message, *frames)

    def expect(self, kind: type[M], seconds: float = _SECONDS) -> M:
        """Await a message of a kind, passing over chunks' credits and states of versions.

        Raises:
            CpeError: the daemon refused something instead.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            received = self._dealer.receive(left)
            if received is None:
                continue
            if isinstance(received[0], kind):
                return received[0]
            if isinstance(received[0], ErrorReply):
                raise from_code(received[0].error.code, received[0].error.message)
        pytest.fail(f"the daemon sent no {kind.__name__} within {seconds:g} s")

    def open(self, number: int, shards: Sequence[Shard], *, force: bool = False, folded: bool = False) -> int:
        """Announce a contribution and await the room for it; return the stream's number."""
        stream = next(self._streams)
        version = VersionId(MODEL, self._run, number)
        self.send(OpenVersion(stream, version, len(shards), layout(shards).nbytes, force, folded, folded))
        self.send(ManifestPart(stream, 0, list(shards)))
        self.expect(VersionOpened)
        return stream

    def send_bytes(self, stream: int, data: bytes) -> None:
        """Send a contribution's bytes, with as many chunks in flight as there are credits."""
        credits, size = self.welcome.credits, self.welcome.chunk_bytes
        for offset in range(0, len(data), size):
            if not credits:
                self.expect(ChunkDone)
                credits += 1
            part = data[offset : offset + size]
            self.send(Chunk(stream, offset, len(part)), part)
            credits -= 1

    def seal(self, stream: int, shards: Sequence[Shard], data: bytes, fold: int | None = None) -> None:
        """Say that ``data`` is what was sent."""
        offsets = layout(shards).offsets
        digests = (xxh3_128_digest(data[at : at + shard.nbytes]) for at, shard in zip(offsets, shards, strict=True))
        self.send(Seal(stream, b"".join(digests), fold))

    def await_state(self, state: str) -> VersionStatus:
        """Await the news that a version is in a state.

        Raises:
            CpeError: it failed instead, or something was refused.
        """
        while True:
            status = self.expect(VersionStatus)
            if status.state == state:
                return status
            if status.error is not None:
                raise from_code(status.error.code, status.error.message)
