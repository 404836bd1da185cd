"""What an operator wants to be rid of: versions of a model that nobody serves, such as one that was misspelt."""

from __future__ import annotations

from collections.abc import Iterable

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.recovery import Before
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import BusyError, MisuseError
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import EvictRequest


def evict(catalogue: Catalogue, engines: Registry, wanted: EvictRequest, before: Before | None = None) -> str:
    """Evict all versions that are meant, or, if one cannot be, none. Returns what was done, in a line.

    A version that was live before this daemon, and is not here, is forgotten: engines that waited for it, and hold
    nothing, serve what they started with.

    Args:
        catalogue: of the node.
        engines: all that are known.
        wanted: which versions: of a model, of a run of it, or one.
        before: what was live before this daemon; None: nothing was.

    Raises:
        MisuseError: there is none, or an engine holds one or takes the model's versions.
        BusyError: one has yet to go live, or is being read.
    """
    known = [version for version in catalogue if version.contributions]
    chosen = [version for version in known if _is_meant(version.id, wanted)]
    gone = before.live(wanted.model) if before is not None else None
    if not chosen and before is not None and gone is not None and _is_meant(gone.version, wanted):
        return _forget(gone.version, engines, before)
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


def _is_meant(version: VersionId, wanted: EvictRequest) -> bool:
    exact = version.model == wanted.model and wanted.run in ("", version.run)
    return exact and wanted.number in (-1, version.number)


def _forget(version: VersionId, engines: Registry, before: Before) -> str:
    """Forget a version that was live before this daemon.

    Raises:
        MisuseError: an engine holds a version of its model.
    """
    for engine in engines:
        if engine.workers and any(
            w.content is not None and w.content.model == version.model for w in engine.workers.values()
        ):
            raise MisuseError(f"engine {engine.name!r} holds a version of {version.model}: {version} is not forgotten")
    before.forget(version.model)
    engines.look_again(version.model)
    engines.changed()
    return f"forgot {version}, which was live before this daemon and is not here"


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
        raise BusyError(f"{version.id} is being read, by a push or for its digest; try again when that is over")
