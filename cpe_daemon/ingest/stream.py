"""One rank's contribution on its way in: manifest, bytes, seal, in that order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from cpe_daemon.core.manifest import MAX_DIMS, MAX_NAME_CHARS
from cpe_daemon.core.types import Shard
from cpe_daemon.errors import ManifestError, ProtocolError
from cpe_daemon.ingest.copier import Copier, Job
from cpe_daemon.ingest.writer import ExtentWriter
from cpe_daemon.versions import Contribution, Version
from cpe_daemon.wire.messages import ManifestPart, OpenVersion


class Stream:
    """The state of one contribution; belongs to the event loop.

    Holds a lease on its version from its first write to its last, so that no extent is reused under a copying thread.
    """

    def __init__(self, opened: OpenVersion, version: Version, rank: int) -> None:
        self.id = opened.stream
        self.version = version
        self.rank = rank
        self.tensors = opened.tensors
        self.nbytes = opened.nbytes
        self.shards: list[Shard] = []
        self.contribution: Contribution | None = None
        self.writer: ExtentWriter | None = None
        self.copier: Copier | None = None
        self.writes = 0
        self.seal: bytes | None = None
        self._lease = contextlib.ExitStack()

    @property
    def manifest_complete(self) -> bool:
        """Whether every announced shard has come."""
        return len(self.shards) == self.tensors

    @property
    def received_bytes(self) -> int:
        """Bytes that have come."""
        return self.writer.accepted_bytes if self.writer is not None else 0

    @property
    def drained(self) -> bool:
        """Whether no write is in flight."""
        return self.writes == 0

    def add(self, part: ManifestPart) -> None:
        """Take the next part of the manifest.

        Raises:
            ProtocolError: it is not the next one.
            ManifestError: it brings more shards than announced, or one with an endless name or shape.
        """
        if self.manifest_complete or part.first != len(self.shards):
            raise ProtocolError(f"manifest part at {part.first}; {len(self.shards)} of {self.tensors} shards are here")
        if len(self.shards) + len(part.shards) > self.tensors:
            raise ManifestError(f"more than the {self.tensors} shards announced")
        for shard in part.shards:  # only what bounds the memory that they take; `layout` looks closely, in a thread
            dims = max(len(shard.shape), len(shard.start or ()), len(shard.local_shape or ()))
            if len(shard.name) > MAX_NAME_CHARS or dims > MAX_DIMS:
                raise ManifestError(f"a tensor with a name of {len(shard.name)} characters and {dims} dimensions")
        self.shards += part.shards

    def ready(self) -> ExtentWriter:
        """Return the writer.

        Raises:
            ProtocolError: the daemon has not said `VersionOpened`, or the rank has sealed.
        """
        if self.writer is None or self.seal is not None:
            raise ProtocolError(f"stream {self.id} takes no bytes now")
        return self.writer

    def copy(self, job: Job) -> None:
        """Have a chunk that the writer accepted copied."""
        if self.copier is not None:
            self.copier.put(job)

    def begin_write(self, lease: Callable[[], contextlib.AbstractContextManager[Version]]) -> None:
        """Count a write, and hold the version while any is in flight."""
        if not self.writes:
            self._lease.enter_context(lease())
        self.writes += 1

    def end_write(self) -> None:
        """Uncount a write, and let the version go after the last."""
        self.writes -= 1
        if not self.writes:
            self._lease.close()
