"""The fold of a version (`cpe_daemon.core.fold`) as it comes, where workers are to verify what they load.

What numpy does is in `cpe_daemon.ingest.fold`, imported only where it is needed: a daemon starts faster without.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpe_daemon.core.fold import modulo
from cpe_daemon.core.manifest import Layout, Manifest
from cpe_daemon.core.types import Shard
from cpe_daemon.versions import Contribution

if TYPE_CHECKING:
    from cpe_daemon.ingest.fold import ExtentFold


def extent_fold(view: memoryview, shards: Sequence[Shard], layout: Layout) -> ExtentFold:
    """Make ready to fold an extent; takes tenths of a second for 140,000 shards.

    Args:
        view: its bytes.
        shards: what it holds, in order.
        layout: where each shard lies.

    Raises:
        ManifestError: a shard splits an inner dimension of its tensor.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread a core for what is not used here
    from cpe_daemon.ingest.fold import ExtentFold

    return ExtentFold(view, shards, layout)


def fold_of(manifest: Manifest, contributions: Sequence[Contribution], arena: memoryview) -> int | None:
    """The fold of a version whose contributions, by rank, were folded; None if one was not. Reads the arena."""
    folds = [part.fold for part in contributions if part.fold is not None]
    if len(folds) < len(contributions):
        return None
    from cpe_daemon.ingest.fold import fold_seams

    extents = [arena[part.extent.offset : part.extent.end] for part in contributions]
    return modulo(sum(folds) + fold_seams(manifest.tensors, extents))
