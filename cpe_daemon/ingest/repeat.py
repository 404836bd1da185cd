"""One rank's contribution to a version that is held here already: compared with what is here, and no byte travels."""

from __future__ import annotations

from typing import Final

import structlog

from cpe_daemon.core.admission import brief
from cpe_daemon.core.manifest import DIGEST_BYTES
from cpe_daemon.errors import ProtocolError, VersionRefusedError
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import ManifestPart, OpenVersion

log = structlog.get_logger(__name__)

_NAMED: Final = 3


class Repeat:
    """One rank's contribution, as far as it was announced again. Belongs to the event loop.

    It keeps what is known of the one that is held, not its bytes: those may be let go while a trainer makes digests.

    Args:
        opened: announces it.
        version: held here.
        rank: whose part it is.
        now: seconds, monotonic.

    Raises:
        VersionRefusedError: it has other tensors.
    """

    def __init__(self, opened: OpenVersion, version: Version, rank: int, now: float) -> None:
        self.id = opened.stream
        self.version = version
        self.began_at = now
        self._rank = rank
        self._held = version.contributions[rank]
        self._seen = 0
        self._digests: bytes | None = None
        if opened.tensors != len(self._held.shards):
            raise self._refusal(f"{len(self._held.shards)} tensors, not {opened.tensors}")

    @property
    def manifest_complete(self) -> bool:
        """Whether every shard was announced, and is as it was."""
        return self._seen == len(self._held.shards)

    def add(self, part: ManifestPart) -> None:
        """Compare the next part of the manifest.

        Raises:
            ProtocolError: it is not the next one.
            VersionRefusedError: it differs.
        """
        if part.first != self._seen or not part.shards or self.manifest_complete:
            raise ProtocolError(f"manifest part at {part.first}; {self._seen} shards are here")
        ours = self._held.shards[self._seen : self._seen + len(part.shards)]
        if len(ours) < len(part.shards):
            raise ProtocolError(f"more than the {len(self._held.shards)} shards announced")
        for mine, theirs in zip(ours, part.shards, strict=True):
            if mine != theirs:
                raise self._refusal(f"{mine.spec} where now {theirs.spec} comes, or another part of it")
        self._seen += len(ours)

    @property
    def sealed(self) -> bool:
        """Whether its digests have come."""
        return self._digests is not None

    def seal(self, digests: bytes) -> None:
        """Take the digests of all shards, 16 bytes each.

        Raises:
            ProtocolError: the manifest is not complete, or there is not one digest a shard; or they have come before.
        """
        if not self.manifest_complete or len(digests) != DIGEST_BYTES * self._seen or self.sealed:
            raise ProtocolError(f"{len(digests)} bytes of digests for {self._seen} tensors")
        self._digests = digests

    def compare(self) -> bool:
        """Compare the digests; False if those of what is held, or what comes again, are not known yet.

        Raises:
            VersionRefusedError: the bytes of some differ.
        """
        digests = self._digests
        if digests is None or self._held.digests is None:
            return False
        ours = b"".join(self._held.digests)
        if digests == ours:
            return True
        differing = [at for at in range(0, len(ours), DIGEST_BYTES) if ours[at : at + 16] != digests[at : at + 16]]
        named = [
            f"{self._held.shards[at // DIGEST_BYTES].name} ({brief(ours[at : at + DIGEST_BYTES])}, now"
            f" {brief(digests[at : at + DIGEST_BYTES])})"
            for at in differing[:_NAMED]
        ]
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        raise self._refusal(f"other digests of {', '.join(named)}{more}")

    def _refusal(self, what: str) -> VersionRefusedError:
        log.warning("version.refused", version=str(self.version.id), rank=self._rank, held=what)
        return VersionRefusedError(
            f"{self.version.id} is held here ({self.version.state}) with other weights: of rank {self._rank} it has"
            f" {what}; publish these under a new number"
        )
