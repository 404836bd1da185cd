"""What a node keeps of one model: how many versions for rollback, and how many bytes of the arena in all."""

from __future__ import annotations

from dataclasses import dataclass

from cpe_daemon.core.extents import readable
from cpe_daemon.errors import ArenaFullError


@dataclass(frozen=True, slots=True)
class Keeping:
    """A model's share.

    Attributes:
        versions: how many are retained that were live before.
        quota_bytes: what all its extents may take together; 0: no bound.
    """

    versions: int
    quota_bytes: int = 0

    def holds(self, nbytes: int) -> bool:
        """Whether so many bytes are within the quota."""
        return not self.quota_bytes or nbytes <= self.quota_bytes

    def check(self, model: str, held_bytes: int, need_bytes: int) -> None:
        """Refuse an extent that would take the model over its quota.

        Raises:
            ArenaFullError: it would; names quota, need and use.
        """
        if not self.holds(held_bytes + need_bytes):
            raise ArenaFullError(
                f"model {model} has no room for {readable(need_bytes)}: {readable(held_bytes)} of its quota of"
                f" {readable(self.quota_bytes)} (models.{model}.quota_bytes) are used",
                need_bytes=need_bytes,
                free_bytes=max(0, self.quota_bytes - held_bytes),
                model=model,
                quota_bytes=self.quota_bytes,
            )
