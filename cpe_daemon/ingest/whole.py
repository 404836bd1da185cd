"""What a version is once all its ranks have sealed: the manifest of all parts, their digest, and their fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.manifest import Manifest, merge
from cpe_daemon.errors import ManifestError
from cpe_daemon.ingest.folding import fold_of
from cpe_daemon.versions import Contribution, Version


class Whole(NamedTuple):
    """What `cpe_daemon.versions.Catalogue.stage` is told of a version."""

    manifest: Manifest
    fold: int | None
    digest: bytes


def join(version: Version, arena: memoryview) -> Whole:
    """Join the contributions of a sealed version; takes tenths of a second for 140,000 shards, so not on the loop.

    Raises:
        ManifestError: they do not cover each tensor once, or there is none.
    """
    parts = [version.contributions[rank] for rank in range(version.world_size)]
    shards = [part.shards for part in parts]
    manifest = merge(version.id, shards)
    if not manifest.tensors:
        raise ManifestError(f"{version.id} has no tensors")
    return Whole(manifest, fold_of(manifest, parts, arena), digest_of(parts))


def digest_of(parts: Sequence[Contribution]) -> bytes:
    """The digest of a version of these contributions, by rank; ``b""`` if some are not digested yet."""
    digests = [part.digests for part in parts if part.digests is not None]
    return content_digest([part.shards for part in parts], digests) if len(digests) == len(parts) else b""
