"""A rollback that somebody asked for: which version it goes back to, and why it cannot where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import BusyError, MisuseError
from cpe_daemon.versions import Version
from cpe_daemon.wire.reports import EngineReport, VersionReport


@dataclass(frozen=True, slots=True)
class Rollback:
    """What was asked for. Empty and -1: the model's retained version that was live last, of whatever run.

    ``cause`` is who asked, a label of `cpe_daemon.observe.inventory.ROLLBACKS`.
    """

    model: str
    run: str = ""
    number: int = -1
    cause: str = "operator"
    seen: VersionId | None = None
    """What was live when it was asked for."""


def rollback_target(versions: Iterable[Version], model: str) -> Version | None:
    """The version that a rollback of a model goes to if none is named; None if none is retained."""
    retained = [v for v in versions if v.id.model == model and v.state is VersionState.RETAINED]
    return max(retained, key=lambda version: version.live_until, default=None)


def choose_retained(versions: Iterable[Version], model: str, wanted: Rollback, *, kept: int) -> Version:
    """Return the version that is meant: a retained one, or the live one if that was named.

    Looked for when its turn has come: what is live and what is retained may have changed since it was asked for.

    Args:
        versions: of the node.
        model: whose version is wanted.
        wanted: which one.
        kept: previous versions of the model that the settings keep.

    Raises:
        MisuseError: nothing can be rolled back to, or not to that; says why, and what is here.
        BusyError: that version is on its way into engines for the first time.
    """
    known = [version for version in versions if version.id.model == model]
    fitting = [v for v in known if wanted.run in ("", v.id.run) and wanted.number in (-1, v.id.number)]
    retained = [version for version in fitting if version.state is VersionState.RETAINED]
    if retained:
        return max(retained, key=lambda version: version.live_until)
    if wanted.number < 0:
        raise MisuseError(
            f"no version of {_named(model, wanted)} is retained here: {_why(known, kept)}; {_here(known)}"
        )
    live = [version for version in fitting if version.state is VersionState.LIVE]
    if live:
        return live[-1]
    if not fitting:
        raise MisuseError(f"this node knows no version {_named(model, wanted)}; {_here(known)}")
    raise _refusal(fitting[-1], known)


def already_live(version: Version, engines: Iterable[Engine]) -> VersionReport:
    """The report of a rollback to the live version, which does nothing."""
    holding = [engine.name for engine in engines if engine.ready and engine.holds(version.id, version.digest)]
    manifest = version.manifest
    return VersionReport(
        version.id,
        manifest.nbytes if manifest else 0,
        len(manifest.tensors) if manifest else 0,
        version.stage_seconds,
        engines={name: EngineReport("current") for name in holding},
        note=f"{version.id} is live already: nothing was pushed",
    )


def _named(model: str, wanted: Rollback) -> str:
    run = f"@{wanted.run}" if wanted.run else ""
    return f"{model}{run}" if wanted.number < 0 else f"{model}{run}#{wanted.number}"


def _refusal(version: Version, known: Sequence[Version]) -> MisuseError | BusyError:
    match version.state:
        case VersionState.PUSHING:
            return BusyError(
                f"{version.id} is being pushed for the first time; there is nothing to roll back to it from"
            )
        case VersionState.RECEIVING | VersionState.STAGED:
            return MisuseError(
                f"{version.id} is {version.state} and was never live: it gets into engines by `cpe push`, and not by a"
                " rollback"
            )
        case _:
            why = f": {version.error.message}" if version.error is not None else ""
            return MisuseError(f"{version.id} is {version.state}{why}; this node has its bytes no more; {_here(known)}")


def _why(known: Sequence[Version], kept: int) -> str:
    """Why nothing is retained."""
    if not any(version.state is VersionState.LIVE for version in known):
        return "none was live since this daemon started"
    if kept == 0:
        return "retention.versions is 0, so that none is kept"
    evicted = [version for version in known if version.state is VersionState.EVICTED and version.live_until]
    if evicted:
        return f"{evicted[-1].id}, which was live before, was evicted to make room in the arena (arena.size_bytes)"
    return "the one that is live is the first"


def _here(known: Sequence[Version]) -> str:
    """Whose bytes are here."""
    held = ", ".join(f"{version.id} ({version.state})" for version in known if version.contributions)
    return f"there is: {held or 'none'}"
