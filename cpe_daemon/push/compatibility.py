"""Asks engines whether they could load a version, while they serve, and outside of any round.

Rounds ask too, before they pause anybody (`cpe_daemon.push.round`). What is asked here comes earlier: when the manifest
of a version is known and its bytes are still to come, or when an operator wants to know.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import CpeError, EngineError, ManifestError
from cpe_daemon.push.driving import drive
from cpe_daemon.push.targets import Targets
from cpe_daemon.versions import Version
from cpe_daemon.wire.codec import encode
from cpe_daemon.wire.messages import Expect
from cpe_daemon.wire.reports import EngineReport, ErrorInfo, VersionReport

_SPECS_A_MESSAGE: Final = 4096

FITS: Final = EngineReport("fits")
"""What a dry run says of an engine that could load the version."""


def announced(number: int, specs: Sequence[TensorSpec]) -> Iterator[bytes]:
    """Encode what tells workers of a version's tensors under a number; to be sent without anything in between."""
    for first in range(0, max(len(specs), 1), _SPECS_A_MESSAGE):
        part = list(specs[first : first + _SPECS_A_MESSAGE])
        yield encode(Expect(number, first, len(specs), part))


def specs_of(contributions: Iterable[Iterable[Shard]]) -> list[TensorSpec]:
    """Return the tensors of all ranks' shards, in the order of the manifest that is made of them later.

    Where ranks contradict one another the first counts: whoever makes the manifest finds that out.
    """
    specs: dict[str, TensorSpec] = {}
    for shards in contributions:
        for shard in shards:
            specs.setdefault(shard.name, shard.spec)
    return list(specs.values())


class Compatibility:
    """Asks, and judges the answers. Belongs to the event loop.

    Args:
        registry: of the engines.
        deadlines: how long an engine may take to answer.
    """

    def __init__(self, registry: Registry, deadlines: DeadlinesConfig) -> None:
        self._registry = registry
        self._deadlines = deadlines
        self._numbers = itertools.count(-1, -1)
        """Of questions: below 0, so that none is a round's."""
        self._examined: set[Version] = set()

    async def refusal(self, version: VersionId, contributions: Sequence[Sequence[Shard]]) -> ManifestError | None:
        """Return why no engine that answers could take a version; None if one could, or if none answers.

        An engine all of whose workers have loaded these very tensors before could, and then nobody is asked. Otherwise
        the engines of its model are that are idle. One that is busy or asleep, or does not answer by the deadline, has
        no say, neither for the version nor against it.

        Args:
            version: its name.
            contributions: its shards, by rank.
        """
        engines = [engine for engine in self._registry if engine.workers and engine.takes(version.model)]
        known = {id(w.loaded): w.loaded for e in engines for w in e.workers.values() if w.loaded is not None}
        specs, loaded = await asyncio.to_thread(_compared, contributions, list(known.values()))
        fitting = {number for number, same in zip(known, loaded, strict=True) if same}
        asked = []
        for engine in engines:
            if engine.workers and all(id(worker.loaded) in fitting for worker in engine.workers.values()):
                return None
            if engine.idle:
                asked.append(engine)
        answers = dict(zip(asked, await asyncio.gather(*(self.ask(e, specs) for e in asked)), strict=True))
        refusals = [answer for answer in answers.values() if isinstance(answer, ManifestError)]
        if not refusals or None in answers.values():
            return None
        return ManifestError(f"no engine here can take {version}: {'; '.join(map(str, refusals))}")

    async def examine(self, version: Version) -> None:
        """Ask as soon as every rank's manifest of a version that is being received is here, whose bytes are to come.

        Raises:
            ManifestError: no engine could take it.
        """
        if len(version.contributions) < version.world_size or version in self._examined:
            return
        self._examined.add(version)
        try:
            shards = [version.contributions[rank].shards for rank in range(version.world_size)]
            refusal = await self.refusal(version.id, shards)
        finally:
            self._examined.discard(version)
        if refusal is not None:
            raise refusal

    async def report(self, version: Version, targets: Targets) -> VersionReport:
        """Ask every engine that a push of a version would be for, and push nothing.

        Outcomes: fits, differs (the error says what), asleep, absent, or unanswered.
        """
        tensors, _ = version.located()
        specs = [tensor.spec for tensor in tensors]
        answers = await asyncio.gather(*(self._answer(engine, specs) for engine in targets.engines))
        said = {engine.name: answer for engine, answer in zip(targets.engines, answers, strict=True)}
        report = targets.report([], 0.0)
        engines = {name: FITS if one.outcome == "current" else one for name, one in report.engines.items()}
        return replace(report, engines=engines | said)

    async def _answer(self, engine: Engine, specs: Sequence[TensorSpec]) -> EngineReport:
        error = await self.ask(engine, specs) if engine.idle else EngineError(f"engine {engine.name!r} is busy")
        if error is None:
            return FITS
        outcome = "differs" if isinstance(error, ManifestError) else "unanswered"
        return EngineReport(outcome, error=ErrorInfo(error.code, error.message))

    async def ask(self, engine: Engine, specs: Sequence[TensorSpec]) -> CpeError | None:
        """Ask an engine that is idle; None if it could load a version of these tensors.

        Returns:
            A ManifestError if it could not; says what differs. Another error if it did not say.
        """
        number, seconds = next(self._numbers), self._deadlines.check_seconds
        workers = list(engine.workers.values())
        for header in announced(number, specs):
            for worker in workers:
                worker.tell(header)
        return await drive(engine, "say", lambda: engine.driver.check(number, seconds), seconds)


def _compared(
    contributions: Sequence[Sequence[Shard]], loaded: Sequence[Sequence[TensorSpec]]
) -> tuple[list[TensorSpec], list[bool]]:
    """The tensors, and of which of the sets that were loaded before they are; takes long for very many."""
    specs = specs_of(contributions)
    return specs, [list(known) == specs for known in loaded]
