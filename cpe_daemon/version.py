"""One version on this node: what it is made of, where its bytes lie, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpe_daemon.core.extents import Extent
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import Manifest, Tensor
from cpe_daemon.core.plan import HERE, Base
from cpe_daemon.core.types import Shard, VersionId, align
from cpe_daemon.errors import CpeError, MisuseError
from cpe_daemon.wire.reports import VersionReport


@dataclass(slots=True, eq=False)
class Contribution:
    """One rank's part of a version: its shards, where they lie, and whether it has sent and ``sealed`` them all.

    ``digests``, one a shard, are of its bytes in the arena; None: not known yet. ``claimed`` is what its rank says they
    are, 16 bytes each, where that was not compared. ``fold`` is of the same bytes (`cpe_daemon.core.fold`), where
    workers are to verify what they load.
    """

    shards: Sequence[Shard]
    extent: Extent
    sealed: bool = False
    digests: Sequence[bytes] | None = None
    claimed: bytes = b""
    fold: int | None = None


@dataclass(slots=True, eq=False)
class Version:
    """One version on this node. Read it anywhere; only the catalogue writes it."""

    id: VersionId
    world_size: int
    opened_at: float
    forced: bool = False
    """Whether it may be staged though another run has superseded its own."""
    state: VersionState = VersionState.RECEIVING
    contributions: dict[int, Contribution] = field(default_factory=dict)
    manifest: Manifest | None = None
    fold: int | None = None
    """Of all its bytes (`cpe_daemon.core.fold`), once staged; None if workers shall not verify what they load."""
    digest: bytes = b""
    """Of what it consists of (`cpe_daemon.core.identity`), once staged; ``b""``: nobody knows it yet."""
    error: CpeError | None = None
    report: VersionReport | None = None
    staged_at: float = 0.0
    live_until: float = 0.0
    """When another took its place in the engines, last."""
    pushes: int = 0
    """How often a push of it was begun."""
    leases: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the arena."""
        return sum(part.extent.nbytes for part in self.contributions.values())

    @property
    def room_bytes(self) -> int:
        """Bytes of the arena that nobody else can have for it: those it takes, and what alignment adds."""
        return sum(align(part.extent.nbytes) for part in self.contributions.values())

    @property
    def sealed(self) -> bool:
        """Whether every rank has sent everything and said so."""
        return len(self.contributions) == self.world_size and all(part.sealed for part in self.contributions.values())

    @property
    def held(self) -> bool:
        """Whether it is here whole, and may be served now or later."""
        return self.state not in (VersionState.RECEIVING, VersionState.EVICTED, VersionState.FAILED)

    @property
    def stage_seconds(self) -> float:
        """From its first rank's opening to staged; 0 before that."""
        return self.staged_at - self.opened_at if self.staged_at else 0.0

    def located(self) -> tuple[Sequence[Tensor], Sequence[Base]]:
        """Its tensors, and where in the arena each rank's extent begins, for a plan.

        Raises:
            MisuseError: it is not staged.
        """
        if self.manifest is None:
            raise MisuseError(f"{self.id} is not staged")
        bases = [Base(HERE, self.contributions[rank].extent.offset) for rank in range(self.world_size)]
        return self.manifest.tensors, bases
