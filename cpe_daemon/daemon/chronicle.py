"""What the journal is told: versions, engines and rounds as they are, whenever they change."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from msgspec import structs

from cpe_daemon.core.admission import History
from cpe_daemon.core.journal import EngineEntry, Identity, ModelEntry, RoundEntry, State
from cpe_daemon.core.lifecycle import EngineState, VersionState
from cpe_daemon.core.recovery import Before, remembered
from cpe_daemon.core.types import VersionId
from cpe_daemon.daemon.returning import Returning
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.journal import Journal
from cpe_daemon.versions import Catalogue, Version

log = structlog.get_logger(__name__)


class Chronicle:
    """Gives the catalogue what the journal knew, and has the journal written from then on. Belongs to the event loop.

    It is where rounds are written down (`cpe_daemon.push.rounds.Decisions`).

    Args:
        journal: of the node.
        catalogue: of this daemon, in which nothing is staged yet.
        registry: its engines.
        before: what was live; is told what goes live.
        returning: engines that have yet to come back. They stay in the journal meanwhile, but not for ever.
        now: Unix time.
    """

    def __init__(
        self,
        journal: Journal,
        catalogue: Catalogue,
        registry: Registry,
        before: Before,
        returning: Returning,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        self._gone_at = {name: entry.gone_at or now() for name, entry in returning.missing.items()}
        """Since when engines have no workers."""
        self._journal = journal
        self._catalogue = catalogue
        self._registry = registry
        self._before = before
        self._returning = returning
        for model, entry in journal.found.models.items():
            live = (entry.live.version, entry.live.digest) if entry.live is not None else None
            catalogue.numbers.remember(model, entry.history, live)
        journal.connect(self.look)
        catalogue.watch(self._on_version)
        catalogue.on_digest(lambda _: journal.note())
        registry.changed = returning.changed = journal.note

    def look(self) -> State:
        """What is to be written down, as it is now."""
        histories = self._catalogue.numbers.histories
        names = {*histories, *self._before.models, *self._catalogue.live_models()}
        models = {name: self._model(name, histories.get(name, History())) for name in sorted(names)}
        engines = dict(self._returning.missing)
        engines |= {engine.name: self._engine(engine) for engine in self._registry}
        now, here = self._now(), {engine.name for engine in self._registry if engine.workers}
        self._gone_at = {name: self._gone_at.get(name, now) for name in engines if name not in here}
        engines = remembered(
            {name: structs.replace(entry, gone_at=self._gone_at.get(name, 0.0)) for name, entry in engines.items()}, now
        )
        held = [engines[name].held for name in engines] + [None for _ in self._registry.absent]
        if self._before.make_good(settled=self._returning.settled, held=held, live=self._catalogue.live_models()):
            log.info("journal.made_good", consequence="engines that hold no version are no longer kept from serving")
        return State(models, engines, lost=self._before.lost)

    def _model(self, name: str, history: History) -> ModelEntry:
        live = self._catalogue.live(name)
        retained = [v for v in self._catalogue if v.id.model == name and v.state is VersionState.RETAINED]
        return ModelEntry(
            history,
            Identity(live.id, live.digest) if live is not None else self._before.live(name),
            [Identity(version.id, version.digest) for version in retained],
        )

    def _engine(self, engine: Engine) -> EngineEntry:
        held = self.identity(engine.content) if engine.state is EngineState.CURRENT else None
        if held is not None and not held.digest:
            held = Identity(held.version, engine.digest)
        return EngineEntry(engine.serves, engine.world_size, str(engine.state), held)

    def identity(self, version: VersionId | None) -> Identity | None:
        """A version with its digest, as far as that is known here."""
        if version is None:
            return None
        known, before = self._catalogue.last(version), self._before.live(version.model)
        if known is not None and known.digest:
            return Identity(version, known.digest)
        return before if before is not None and before.version == version else Identity(version)

    async def decide(self, entry: RoundEntry) -> None:
        """Have a round written down; see `Journal.decide`."""
        await self._journal.decide(entry)

    def over(self) -> None:
        """A round is over."""
        self._journal.over()

    def _on_version(self, version: Version) -> None:
        if version.state is VersionState.LIVE:
            self._before.went_live(version.id)
        if version.state is not VersionState.RECEIVING:
            self._journal.note()
