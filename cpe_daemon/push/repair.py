"""What follows a round that not all engines came through well: each gets a version whole again, or stays paused."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from cpe_daemon.core.identity import may_be_same
from cpe_daemon.core.lifecycle import EngineEvent, VersionState
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.rounds import Rounds
from cpe_daemon.versions import Catalogue, Version

log = structlog.get_logger(__name__)


class Repair:
    """Gives engines what they held before. Belongs to the event loop.

    Args:
        catalogue: asked for versions.
        rounds: runs them.
        attempts: for every engine, before it is quarantined.
    """

    def __init__(self, catalogue: Catalogue, rounds: Rounds, *, attempts: int) -> None:
        self._catalogue = catalogue
        self._rounds = rounds
        self._attempts = attempts

    async def restore(self, failed: Sequence[Participant], taken: Version | None = None) -> list[Participant]:
        """Give engines that a round left in doubt what they held before, else what is live; else quarantine them.

        Those that answered when they were dropped come first, those of one version together: they have been paused for
        long enough, and shall not wait for one that hangs. Engines that hold ``taken`` are given what they held as
        well.

        Returns:
            Of each engine that was in a round for that, its last one.
        """
        tried: dict[Engine, Participant] = {}
        groups: dict[tuple[bool, VersionId | None, bytes, str], list[Participant]] = {}
        for dropped in sorted(failed, key=_hangs):
            held = dropped.held, dropped.held_digest
            groups.setdefault((_hangs(dropped), *held, dropped.engine.serves), []).append(dropped)
        for group in groups.values():
            for _ in range(self._attempts):
                engines = [dropped.engine for dropped in group if _is_due(dropped.engine, taken)]
                version = self.before(group[0])
                if version is not None:
                    tried |= {again.engine: again for again in await self._rounds.run(version, engines)}
        for dropped in failed:
            engine = dropped.engine
            if engine.in_doubt:
                error = dropped.error or engine.error
                engine.change(EngineEvent.GIVE_UP, error=error)
                log.error("engine.quarantined", engine=engine.name, error=str(error))
            elif _is_due(engine, taken):
                log.error(
                    "engine.not_taken_back",
                    engine=engine.name,
                    holds=str(dropped.engine.content),
                    error=str(engine.error),
                )
        return list(tried.values())

    def before(self, participant: Participant) -> Version | None:
        """What an engine held before a round, or else what is live, if its bytes can be pushed again.

        What goes by the name of what it held, and is known to be other weights, is not that.
        """
        held = self._catalogue.find(participant.held) if participant.held is not None else None
        same = held is not None and may_be_same(held.digest, participant.held_digest)
        if held is not None and same and held.state in (VersionState.LIVE, VersionState.RETAINED):
            return held
        return self._catalogue.live(participant.engine.serves)


def _hangs(dropped: Participant) -> bool:
    return not (dropped.alive or dropped.let_go)


def _is_due(engine: Engine, taken: Version | None) -> bool:
    """Whether an engine is to be given what it held: it is in doubt, or holds what is taken back."""
    return engine.in_doubt or (taken is not None and engine.ready and engine.holds(taken.id, taken.digest))
