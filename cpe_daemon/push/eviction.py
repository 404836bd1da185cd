"""What an operator wants to be rid of: versions of a model that nobody serves, such as one that was misspelt."""

from __future__ import annotations

from collections.abc import Iterable

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import BusyError, MisuseError
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import EvictRequest


def evict(catalogue: Catalogue, engines: Iterable[Engine], wanted: EvictRequest) -> str:
    """Evict all versions that are meant, or, if one cannot be, none. Returns what was done, in a line.

    Args:
        catalogue: of the node.
        engines: all that are known.
        wanted: which versions: of a model, of a run of it, or one.

    Raises:
        MisuseError: there is none, or an engine holds one or takes the model's versions.
        BusyError: one has yet to go live, or is being read.
    """
    known = [version for version in catalogue if version.contributions]
    chosen = [
        version
        for version in known
        if version.id.model == wanted.model
        and wanted.run in ("", version.id.run)
        and wanted.number in (-1, version.id.number)
    ]
    if not chosen:
        here = ", ".join(f"{version.id} ({version.state})" for version in known)
        run, number = (f"@{wanted.run}" if wanted.run else ""), (f"#{wanted.number}" if wanted.number >= 0 else "")
        raise MisuseError(f"no {wanted.model}{run}{number} is here; there is: {here or 'none'}")
    attached = [engine for engine in engines if engine.workers]
    for version in chosen:
        _check(version, attached)
    for version in chosen:
        catalogue.evict(version)
    return f"evicted {', '.join(str(version.id) for version in chosen)}"


def _check(version: Version, attached: Iterable[Engine]) -> None:
    """Refuse a version that somebody needs.

    Raises:
        MisuseError: an engine does.
        BusyError: it is on its way, or is being read.
    """
    if version.state not in (VersionState.LIVE, VersionState.RETAINED):
        raise BusyError(f"{version.id} is {version.state}: only versions that are live or retained can be evicted")
    for engine in attached:
        if engine.content == version.id:
            raise MisuseError(f"engine {engine.name!r} serves {version.id}, which is not evicted while it does")
        if version.state is VersionState.LIVE and engine.serves == version.id.model:
            raise MisuseError(
                f"engine {engine.name!r} takes versions of {version.id.model}, of which {version.id} is live: stop it"
                " first, or publish another version"
            )
    if version.leases:
        raise BusyError(f"{version.id} is being read, by a push or a check; try again when that is over")
