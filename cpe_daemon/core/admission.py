"""Which version may be published next: the rule of identity, as one pure function over what a model has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import VersionRefusedError


@dataclass(frozen=True, slots=True)
class History:
    """What a model's versions have used up.

    ``run`` is the run whose versions are accepted now (None: none yet); ``used`` the highest number staged in each run.
    """

    run: str | None = None
    used: Mapping[str, int] = field(default_factory=dict)

    def after(self, version: VersionId) -> History:
        """The history once ``version`` is staged: its run is the present one, its number is used up."""
        used = {**self.used, version.run: max(version.number, self.used.get(version.run, version.number))}
        return History(version.run, used)


def admit(history: History, version: VersionId, *, force: bool = False) -> None:
    """Refuse a version whose number is used up, or whose run was superseded by another.

    ``force`` lets a superseded run return; it never lets a number be used twice, for two trainers might then mean
    different weights by one name.

    Raises:
        VersionRefusedError: says which number would be accepted.
    """
    highest = history.used.get(version.run)
    if highest is not None and version.number <= highest:
        raise VersionRefusedError(
            f"{version} is refused: run {version.run!r} has staged number {highest} already;"
            f" publish {highest + 1} or higher"
        )
    if history.run not in (None, version.run) and version.run in history.used and not force:
        raise VersionRefusedError(
            f"{version} is refused: run {version.run!r} was superseded by run {history.run!r};"
            " publish with force to return to it"
        )
