"""What follows from a journal: what was live before this daemon, and what an engine may serve until a version is here.

The bytes are gone with the daemon that held them. What an engine holds only it can say; whether that may be served
follows from what is known of the versions' names and digests. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from cpe_daemon.core.admission import History
from cpe_daemon.core.journal import EngineEntry, Identity, State
from cpe_daemon.core.types import VersionId

AWAY_SECONDS: Final = 3600.0
"""For how long an engine without workers is written down, and awaited by a daemon that starts."""


def remembered(engines: Mapping[str, EngineEntry], now: float) -> dict[str, EngineEntry]:
    """Leave out the engines that have been gone for too long to be waited for; ``now``: Unix time."""
    return {name: entry for name, entry in engines.items() if not entry.gone_at or now - entry.gone_at < AWAY_SECONDS}


class Before:
    """What was live on this node before this daemon, of each model until a version of it is live here.

    Args:
        state: what the journal says.
    """

    def __init__(self, state: State | None = None) -> None:
        state = state or State()
        self._live = {model: entry.live for model, entry in state.models.items() if entry.live is not None}
        self._lost = state.lost

    @property
    def lost(self) -> bool:
        """Whether there may have been versions that nobody knows of: a journal could not be read."""
        return self._lost

    def make_good(self, *, settled: bool, held: Collection[Identity | None], live: Collection[str]) -> bool:
        """Whether a loss does not matter any more; True once, when that is found out.

        An engine that holds nothing may be one that should hold something. When every one holds a version of a model
        that is live here, and those that were here before have had the time to come back, what the lost journal told is
        known otherwise.

        Args:
            settled: engines of the daemon before have had their time to come back.
            held: by each engine that is here, or expected: what it holds whole, or None.
            live: the models of which a version is live here.
        """
        known = all(identity is not None and identity.version.model in live for identity in held)
        if not (self._lost and settled and held and known):
            return False
        self._lost = False
        return True

    @property
    def models(self) -> Sequence[str]:
        """The models of which a version was live that is not here."""
        return list(self._live)

    def live(self, model: str) -> Identity | None:
        """The version of a model that was live and is not here; ``""`` asks for the only model there is."""
        fitting = [live for name, live in self._live.items() if model in ("", name)]
        return fitting[0] if len(fitting) == 1 else None

    def went_live(self, version: VersionId) -> None:
        """A version is live here: what was before does not matter any more for its model."""
        self._live.pop(version.model, None)

    def forget(self, model: str) -> None:
        """Nobody wants a model's version any more that was live and is not here: it keeps no engine from serving."""
        self._live.pop(model, None)

    def objection(self, model: str, held: Identity | None) -> str:
        """Why an engine may not serve what it says it holds, while no version of its model is live here; "" if it may.

        Any whole version may be served: an engine serves N, or N-1, or what it was given in the push that a crash cut
        short. What it started with may not, if there was a version that it should hold, or if nobody knows that there
        was none.

        Args:
            model: whose versions it takes; "" if it takes any.
            held: the version that it holds whole; None: what it started with.
        """
        live = self.live(model)
        if held is None and live is not None:
            return f"it holds no version, and {live}, which was live before this daemon, is not here: {_mend(live)}"
        if held is None and self._lost:
            return "it holds no version, and the journal that told what was live could not be read: publish a version"
        if held is not None and live is not None and held.version == live.version and not live.same_bytes(held.digest):
            return f"it holds other weights by the name of {live}, which was live before this daemon: {_mend(live)}"
        return ""


def _mend(live: Identity) -> str:
    return f"publish {live.version} again, or a newer version"


def why_not_bootstrap(
    wanted: VersionId,
    history: History,
    *,
    here: Iterable[VersionId],
    held: Iterable[VersionId],
    live: VersionId | None = None,
) -> str:
    """Why a node's bootstrap is not published; "" if nothing that it might take the place of is known.

    A checkpoint that lies on a disk is older than what a trainer sent, unless it is that very version.

    Args:
        wanted: the bootstrap.
        history: of its model.
        here: versions of the model that are being received, or are held.
        held: versions that engines of the model hold.
        live: the version of the model that was live before, and is not here.
    """
    if found := sorted({str(version) for version in here}):
        return f"{', '.join(found)} came first"
    if others := sorted({str(version) for version in held if version != wanted}):
        return f"engines hold {', '.join(others)}"
    if history.run not in (None, wanted.run) and wanted != live:
        return f"versions of run {history.run!r} were published since; publish the last of them again"
    return ""
