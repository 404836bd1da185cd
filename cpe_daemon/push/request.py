"""A push that somebody asked for: which version is meant, and who waits for what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cpe_daemon.core.journal import Identity
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.errors import BusyError, CpeError, MisuseError
from cpe_daemon.push.rollback import Rollback
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import PushRequest
from cpe_daemon.wire.reports import VersionReport


class Request:
    """One push that was asked for. Belongs to the event loop.

    Args:
        wanted: what was asked for.
    """

    def __init__(self, wanted: PushRequest | Rollback) -> None:
        self.wanted = wanted
        self.outcome: asyncio.Future[VersionReport] = asyncio.get_running_loop().create_future()
        """What came of it. Cancelled if nobody wants to know any more."""

    @property
    def urgent(self) -> bool:
        """Whether it comes before what waits: engines serve what somebody wants to have taken back."""
        return isinstance(self.wanted, Rollback)

    def finish(self, report: VersionReport) -> None:
        """It was pushed; the report says into which engines."""
        if not self.outcome.done():
            self.outcome.set_result(report)

    def fail(self, error: CpeError) -> None:
        """Nothing was pushed."""
        if not self.outcome.done():
            self.outcome.set_exception(error)


def choose_version(versions: Iterable[Version], wanted: PushRequest, before: Identity | None = None) -> Version:
    """Return the version that is meant: the newest that waits, else the live one, among those that fit.

    A dry run that names a number may mean a retained one, too.

    Looked for when its turn has come, for what was newest when it was asked for may be gone by then.

    Args:
        versions: of this node.
        wanted: what was asked for.
        before: the version of the model that is live since a daemon before this one, and whose bytes are not here.

    Raises:
        MisuseError: none fits, several models do and none was named, or the one that fits cannot be pushed.
        BusyError: it is being received.
    """
    known = list(versions)
    nothing_here = not any(version.contributions for version in known)
    model = wanted.model or (before.version.model if before is not None and nothing_here else only_model(known))
    fitting = [
        version
        for version in known
        if version.id.model == model
        and wanted.run in ("", version.id.run)
        and (wanted.number < 0 or wanted.number == version.id.number)
    ]
    retained = (VersionState.RETAINED,) if wanted.dry_run and wanted.number >= 0 else ()
    for state in (VersionState.STAGED, VersionState.LIVE, *retained):
        pushable = [version for version in fitting if version.state is state]
        if pushable:
            return max(pushable, key=lambda version: version.staged_at)
    if wanted.number >= 0 and fitting:
        raise _refusal(fitting[-1])
    held = ", ".join(f"{version.id} ({version.state})" for version in known if version.contributions)
    absent = ""
    if before is not None and before.version.model == model:
        absent = f"; {before} is live, but not resident: publish it again, or set bootstrap"
    run = f"@{wanted.run}" if wanted.run else ""
    no = (
        f"no {model}{run}#{wanted.number} is" if wanted.number >= 0 else f"no version of {model}{run} is staged or live"
    )
    raise MisuseError(f"{no} here; there is: {held or 'none'}{absent}")


def only_model(versions: Iterable[Version]) -> str:
    """The model of all versions that are here.

    Raises:
        MisuseError: there is none, or are several.
    """
    models = sorted({version.id.model for version in versions if version.contributions})
    if len(models) != 1:
        held = f"versions of {', '.join(models)}: say which model is meant" if models else "no version"
        raise MisuseError(f"this node holds {held}")
    return models[0]


def _refusal(version: Version) -> CpeError:
    """Why a version that is known cannot be pushed."""
    match version.state:
        case VersionState.RECEIVING:
            return BusyError(f"{version.id} is being received; it can be pushed when it is staged")
        case VersionState.RETAINED:
            again = f"cpe rollback {version.id.model}@{version.id.run} --to {version.id.number}"
            return MisuseError(f"{version.id} is retained: `{again}` brings it back into all engines of its model")
        case _:
            why = f": {version.error.message}" if version.error is not None else ""
            return MisuseError(f"{version.id} is {version.state}{why}; this node has its bytes no more")
