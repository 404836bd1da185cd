"""One rank's contribution on its way in: manifest, bytes, seal, in that order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from cpe_daemon.core.fold import MAX_FOLD
from cpe_daemon.core.manifest import DIGEST_BYTES, MAX_DIMS, MAX_NAME_CHARS
from cpe_daemon.core.types import Shard
from cpe_daemon.errors import ManifestError, ProtocolError
from cpe_daemon.ingest.copier import Copier, Job
from cpe_daemon.ingest.writer import ExtentWriter
from cpe_daemon.versions import Contribution, Version
from cpe_daemon.wire.messages import ManifestPart, OpenVersion, Seal


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
        self.folded = opened.folded
        self.undigested = opened.undigested
        self.covered = False
        """Whether a fold that engines are held to is of every byte of it: its digests verify nothing, and can wait."""
        self.shards: list[Shard] = []
        self.contribution: Contribution | None = None
        self.writer: ExtentWriter | None = None
        self.copier: Copier | None = None
        self.writes = 0
        self.seal: Seal | None = None
        self._lease = contextlib.ExitStack()

    @property
    def manifest_complete(self) -> bool:
        """Whether every announced shard has come."""
        return len(self.shards) == self.tensors

    @property
    def received_bytes(self) -> int:
        """Bytes that have come."""
        return self.writer.accepted_bytes if self.writer is not None else 0

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

    def take_seal(self, seal: Seal) -> None:
        """Take the rank's word for what it has sent.

        Raises:
            ProtocolError: it has not sent all of it, or says less of it, or other things, than it should.
        """
        if not self.ready().all_accepted:
            raise ProtocolError(f"sealed before every byte of {self.version.id} was sent")
        needless = self.covered and not seal.digests
        if not needless and len(seal.digests) != DIGEST_BYTES * self.tensors:
            raise ProtocolError(f"{len(seal.digests)} bytes of digests for {self.tensors} tensors")
        if self.folded and (seal.fold is None or not 0 <= seal.fold <= MAX_FOLD):
            raise ProtocolError(f"announced a fold, and sealed with {seal.fold}")
        self.seal = seal

    def finish(self, *, verified: bool) -> bool:
        """Fill the contribution in once the rank has sealed it and no write is in flight; return whether that was now.

        Args:
            verified: whether engines are held to a fold: the rank's, if it announced one, else ours.

        Raises:
            DigestError: bytes differ from what the trainer digested; names the tensors.
        """
        part, writer, seal = self.contribution, self.writer, self.seal
        if part is None or writer is None or seal is None or self.writes or part.sealed:
            return False
        part.digests = writer.check(seal.digests)
        part.claimed = seal.digests if part.digests is None else b""
        fold = seal.fold if self.folded else writer.fold
        part.fold = fold if verified else None
        part.sealed = True
        return True

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
