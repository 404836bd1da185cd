"""What a trainer is told of a version."""

from __future__ import annotations

from typing import Final

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import VersionStatus
from cpe_daemon.wire.reports import ErrorInfo

FINAL: Final = (VersionState.FAILED, VersionState.EVICTED)
"""The states after which there is no news."""
_NAMED: Final = 16


async def nobody_to_ask(version: Version) -> None:
    """Examine a version whose manifest is complete: where no engine can be asked, any will do."""


def status_of(version: Version, stream: int = 0) -> VersionStatus:
    """Its state, with the reason if it failed and the report if it is live; ``stream`` if this answers its seal."""
    error = ErrorInfo(version.error.code, version.error.message) if version.error else None
    return VersionStatus(version.id, version.state, error, version.report, stream)


def missing(version: Version) -> str:
    """Which ranks have not done their part."""
    sealed = {rank for rank, part in version.contributions.items() if part.sealed}
    late = [rank for rank in range(version.world_size) if rank not in sealed]
    return f"ranks {late[:_NAMED]} of {version.world_size} have not sealed"
