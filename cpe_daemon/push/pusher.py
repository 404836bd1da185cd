"""Decides which round comes next: staged versions in their order, then what operators ask for, then engines in need.

An engine in need has become complete, and must have the live version to serve at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from cpe_daemon.config import Config
from cpe_daemon.core.lifecycle import EngineEvent, VersionState
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import BusyError, CpeError, EngineError, PeerLostError
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.request import Request, choose_version
from cpe_daemon.push.round import Round
from cpe_daemon.push.rounds import Rounds
from cpe_daemon.push.targets import Targets
from cpe_daemon.push.traffic import Traffic
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import PushRequest
from cpe_daemon.wire.reports import VersionReport

log = structlog.get_logger(__name__)


class Pusher:
    """Runs the rounds of this node, one at a time. Belongs to the event loop.

    Args:
        config: the daemon's settings.
        catalogue: asked for versions, told what went live.
        registry: asked for engines.
        device: whose slots are used.
        metrics: counters.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        config: Config,
        catalogue: Catalogue,
        registry: Registry,
        device: Device,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._registry = registry
        self._rounds = Rounds(
            config=config, catalogue=catalogue, registry=registry, device=device, metrics=metrics, clock=clock
        )
        self._metrics = metrics
        self._clock = clock
        self._due: deque[Version] = deque()
        self._asked: deque[Request] = deque()
        self._joined: deque[Engine] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        catalogue.watch(self._on_version)
        registry.on_joined(self._on_joined)

    async def run(self) -> None:
        """Carry out what is due, until cancelled."""
        while True:
            await self._woken()
            self._wake.clear()
            while (self._due or self._asked or self._joined) and not self._draining:
                self._idle.clear()
                if self._due:
                    version = self._due.popleft()
                    await self._push(version, Targets(self._registry, version))
                elif self._asked:
                    await self._serve(self._asked.popleft())
                else:
                    await self._bring_up(self._joined.popleft())
                self._idle.set()

    async def _woken(self) -> None:
        """Wait for something to do, and give slots back that nothing needs for long."""
        while not self._wake.is_set():
            try:
                async with asyncio.timeout(self._rounds.slots.idle_in_seconds):
                    await self._wake.wait()
            except TimeoutError:
                await self._rounds.slots.give_back()

    async def drain(self) -> None:
        """Begin nothing more, and wait for what is in flight; what waits for its push fails."""
        self._draining = True
        while self._asked:
            self._asked.popleft().fail(BusyError("this daemon stops; nothing was pushed"))
        for version in [version for version in self._catalogue if version.state is VersionState.STAGED]:
            self._catalogue.fail(version, PeerLostError(f"the daemon stops, and did not push {version.id}"))
        await self._idle.wait()

    def undo(self, reason: str) -> None:
        """Give up the push in flight, if there is one: engines that it touched get back what they held.

        An engine that is being given the live version, or what it held, is left to get it.
        """
        self._rounds.undo(PeerLostError(reason))

    async def request(self, wanted: PushRequest) -> VersionReport:
        """Push a version that is held here, when what was asked for or staged before is done; say what came of it.

        Raises:
            MisuseError: no such version can be pushed, or no such engine is there.
            BusyError: it is not whole yet, or this daemon stops.
            EngineError: none of the engines that were named is there.
        """
        if self._draining:
            raise BusyError("this daemon stops; nothing was pushed")
        request = Request(wanted)
        self._asked.append(request)
        self._wake.set()
        return await request.outcome

    @property
    def current(self) -> Round | None:
        """The round in flight."""
        return self._rounds.current

    @property
    def traffic(self) -> Traffic:
        """What all rounds have moved."""
        return self._rounds.traffic

    @property
    def waiting(self) -> int:
        """Pushes that wait for their turn."""
        return len(self._due) + len(self._asked)

    def _on_version(self, version: Version) -> None:
        if version.state is VersionState.STAGED and self._config.push.automatic:
            self._due.append(version)
            self._wake.set()

    def _on_joined(self, engine: Engine) -> None:
        self._joined.append(engine)
        self._wake.set()

    # --- a version for all, or for some ------------------------------------------------------------------------------

    async def _serve(self, request: Request) -> None:
        """Carry out what an operator asked for, unless nobody waits for it any more."""
        if request.outcome.done():
            return
        try:
            version = choose_version(self._catalogue, request.wanted)
            targets = Targets(self._registry, version, request.wanted.engines)
            request.finish(await self._push(version, targets, asked=True))
        except CpeError as error:
            request.fail(error)

    async def _push(self, version: Version, targets: Targets, *, asked: bool = False) -> VersionReport:
        """Push a staged version, or the live one again.

        Engines that it left in doubt are restored afterwards: the others serve already, and the trainer is told so.
        """
        began = self._clock()
        staged = version.state is VersionState.STAGED
        if staged:
            self._catalogue.begin_push(version)
        participants = await self._rounds.run(version, targets.engines, undoable=staged)
        report = targets.report(participants, self._clock() - began)
        if staged:
            self._settle(version, participants, report, asked=asked)
        failed = [participant for participant in participants if not participant.alive]
        await self._restore(failed)
        return report

    def _settle(
        self, version: Version, participants: Sequence[Participant], report: VersionReport, *, asked: bool
    ) -> None:
        """A version is live if any engine took it, or if there is none. Otherwise it has failed.

        Whoever asked for it may ask again, when the engines are well: then it waits as it did before.
        """
        if not participants or any(participant.alive for participant in participants):
            if not participants:
                log.warning("version.live_without_engines", version=str(version.id))
            self._catalogue.go_live(version, report)
            return
        reasons = "; ".join(str(participant.error) for participant in participants)
        error = self._rounds.undoing or EngineError(f"no engine took {version.id}: {reasons}")
        if asked and self._rounds.undoing is None:
            self._catalogue.put_back(version)
        else:
            self._metrics.failures.labels(code=error.code).inc()
            self._catalogue.fail(version, error)

    # --- engines in need ---------------------------------------------------------------------------------------------

    async def _bring_up(self, engine: Engine) -> None:
        """Give an engine that has just become complete the live version, unless it holds that already."""
        await self._rounds.slots.provide(engine.workers.values(), 0)  # now, for a push would have to wait for them
        live = self._catalogue.live(engine.serves)
        if engine.ready and (live is None or engine.content == live.id):
            await self._let_serve(engine)
        elif live is not None and engine.complete:
            await self._restore([failed for failed in await self._rounds.run(live, [engine]) if not failed.alive])

    async def _let_serve(self, engine: Engine) -> None:
        """Resume an engine that holds what it should: a worker of it may have been left paused by a lost round."""
        try:
            await engine.driver.resume(self._rounds.number, engine.content, self._config.deadlines.resume_seconds)
        except Exception as error:  # task boundary: a plugin's bug concerns its engine alone
            log.warning("engine.resume_failed", engine=engine.name, error=repr(error))

    async def _restore(self, failed: Sequence[Participant]) -> None:
        """Give engines that a round left in doubt what they held before, else what is live; else quarantine them.

        Those that answered when they were dropped come first, those of one version together: they have been paused for
        long enough, and shall not wait for one that hangs.
        """
        groups: dict[tuple[bool, VersionId | None, str], list[Engine]] = {}
        for dropped in sorted(failed, key=lambda dropped: not dropped.let_go):
            groups.setdefault((dropped.let_go, dropped.held, dropped.engine.serves), []).append(dropped.engine)
        for (_, held, serves), engines in groups.items():
            for _ in range(self._config.deadlines.restore_attempts):
                version = self._held(held) or self._catalogue.live(serves)
                if version is not None:
                    await self._rounds.run(version, [engine for engine in engines if engine.in_doubt])
        for dropped in failed:
            if dropped.engine.in_doubt:
                dropped.engine.change(EngineEvent.GIVE_UP, error=dropped.error)
                log.error("engine.quarantined", engine=dropped.engine.name, error=str(dropped.error))

    def _held(self, version: VersionId | None) -> Version | None:
        """The version, if its bytes can be pushed again."""
        known = self._catalogue.find(version) if version is not None else None
        return known if known is not None and known.state in (VersionState.LIVE, VersionState.RETAINED) else None
