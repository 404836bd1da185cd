"""Decides which round comes next: staged versions in their order, then what operators ask for, then engines in need.

An engine in need has become complete, and must have the live version to serve at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from cpe_daemon.config import Config
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.verdict import Verdict, judge_push
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.engine import Engine
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import BusyError, CpeError, EngineError, PeerLostError
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.push.arrival import Arrivals
from cpe_daemon.push.compatibility import Compatibility
from cpe_daemon.push.driving import let_serve
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.repair import Repair
from cpe_daemon.push.request import Request, choose_version, only_model
from cpe_daemon.push.retries import Retries
from cpe_daemon.push.rollback import Rollback, already_live, choose_retained
from cpe_daemon.push.round import Round
from cpe_daemon.push.rounds import Decisions, Rounds
from cpe_daemon.push.targets import Targets, without
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
        self.compatibility = Compatibility(registry, config.deadlines)
        """Asks engines whether a version fits them."""
        self._repair = Repair(catalogue, self._rounds, attempts=config.deadlines.restore_attempts)
        self._metrics = metrics
        self._clock = clock
        self._due: deque[Version] = deque()
        self._asked: deque[Request] = deque()
        self._joined: deque[Engine] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._retries = Retries(self._on_joined)
        self._arrivals = Arrivals(registry, config.deadlines, self._wake.set)
        catalogue.watch(self._on_version)
        registry.on_joined(self._on_joined)

    def write_down(self, decisions: Decisions) -> None:
        """Have every round written down before it is carried out."""
        self._rounds.decisions = decisions

    async def run(self) -> None:
        """Carry out what is due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._arrivals.look_in(tasks)
            while True:
                await self._woken()
                self._wake.clear()
                await self._carry_out()

    async def _carry_out(self) -> None:
        """Do one after the other what is due by now, until nothing is."""
        while (self._is_due() or self._asked or self._joined) and not self._draining:
            self._idle.clear()
            if self._asked and self._asked[0].urgent:
                await self._serve(self._asked.popleft())
            elif self._is_due():
                version = self._due.popleft()
                if version.state is VersionState.STAGED:  # it may have been superseded while it waited
                    await self._push(version, self._targets(version))
            elif self._asked:
                await self._serve(self._asked.popleft())
            elif self._joined:
                await self._bring_up(self._joined.popleft())
            self._idle.set()

    def _is_due(self) -> bool:
        """Whether a version is to be pushed now: there is one, and it does not wait for a server that starts."""
        return bool(self._due) and not self._arrivals.waits(self._due[0].id)

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
        self._retries.close()
        self._arrivals.close()
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

    async def request(self, wanted: PushRequest | Rollback) -> VersionReport:
        """Push a version that is held here, when what was asked for or staged before is done; say what came of it.

        A rollback waits for the round in flight alone: what engines serve is wrong, and what waits may be no better.

        Raises:
            MisuseError: no such version can be pushed, or no such engine is there.
            BusyError: it is not whole yet, or this daemon stops; or another version went live before a rollback's turn.
            EngineError: none of the engines that were named is there; or, of a rollback, what was live stays live.
        """
        if self._draining:
            raise BusyError("this daemon stops; nothing was pushed")
        request = Request(self._seen(wanted) if isinstance(wanted, Rollback) else wanted)
        urgent = sum(other.urgent for other in self._asked)
        self._asked.insert(urgent if request.urgent else len(self._asked), request)
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
        return sum(version.state is VersionState.STAGED for version in self._due) + len(self._asked)

    def _on_version(self, version: Version) -> None:
        if version.state is VersionState.STAGED and self._config.push.automatic:
            self._due.append(version)
            self._wake.set()

    def _on_joined(self, engine: Engine) -> None:
        self._joined.append(engine)
        self._wake.set()

    # --- a version for all, or for some ------------------------------------------------------------------------------

    async def _serve(self, request: Request) -> None:
        """Carry out what was asked for, unless nobody waits for it any more."""
        if request.outcome.done():
            return
        try:
            wanted = request.wanted
            if isinstance(wanted, Rollback):
                request.finish(await self._roll_back(wanted))
                return
            version = choose_version(self._catalogue, wanted, self._registry.adoption.before.live(wanted.model))
            if wanted.dry_run:
                targets = Targets(self._registry, version, wanted.engines)
                request.finish(await self.compatibility.report(version, targets))
            else:
                request.finish(await self._push(version, self._targets(version, wanted.engines), asked=True))
        except CpeError as error:
            request.fail(error)

    def _targets(self, version: Version, names: Sequence[str] = ()) -> Targets:
        return Targets(self._registry, version, names, defer=self._config.push.asleep == "defer")

    def _seen(self, wanted: Rollback) -> Rollback:
        """Note what is live when a rollback is asked for: it is from there that somebody wants to go back.

        Raises:
            MisuseError: no model is named, and there is not one alone.
        """
        model = wanted.model or only_model(self._catalogue)
        live = self._catalogue.live(model)
        return replace(wanted, model=model, seen=live.id if live is not None else None)

    async def _roll_back(self, wanted: Rollback) -> VersionReport:
        """Push a retained version into all engines of its model.

        Raises:
            MisuseError: there is none; says why.
            BusyError: another version is live than when it was asked for, and none was named.
            EngineError: no engine took it, or not all: what was live stays live.
        """
        model, live = wanted.model, self._catalogue.live(wanted.model)
        if wanted.number < 0 and live is not None and live.id != wanted.seen:
            raise BusyError(f"{live.id} went live before the rollback's turn came: nothing was pushed; ask again")
        version = choose_retained(self._catalogue, model, wanted, kept=self._catalogue.keeping(model).versions)
        if version.state is VersionState.LIVE:
            return already_live(version, self._registry)
        log.info("version.rolling_back", version=str(version.id), live=str(live.id) if live else None)
        report = await self._push(version, self._targets(version), asked=True)
        if self._catalogue.live(model) is not version:
            stays = f"{live.id} stays live" if live else "no version is live"
            raise EngineError(f"{version.id} was not rolled back to: {_failures(report)}; {stays}")
        self._metrics.rollbacks.labels(wanted.cause).inc()
        return report

    async def _push(self, version: Version, targets: Targets, *, asked: bool = False) -> VersionReport:
        """Push a staged version, a retained one, or the live one again.

        Engines that it left in doubt are restored afterwards: the others serve already, and the trainer is told so.
        With push.partial: rollback, those that took what others did not get back what they held, with those in doubt.
        """
        began = self._clock()
        before = version.state
        if before is VersionState.STAGED:
            self._catalogue.begin_push(version)
        new = before is not VersionState.LIVE
        participants = await self._rounds.run(version, targets.engines, undoable=new)
        self._retries.look(participants)
        report = targets.report(participants, self._clock() - began)
        verdict = self._judge(version, participants) if new else Verdict.LIVE
        if new:
            self._settle(version, verdict, participants, report, asked=asked)
        failed = [participant for participant in participants if not participant.alive]
        if verdict is not Verdict.TAKE_BACK:
            self._retries.look(await self._repair.restore(failed))
            return report
        taken = [participant for participant in participants if participant.alive]
        self._metrics.rollbacks.labels("partial").inc()
        self._retries.look(await self._repair.restore([*failed, *taken], version))
        return without(report, version, [participant.engine for participant in taken])

    def _judge(self, version: Version, participants: Sequence[Participant]) -> Verdict:
        """Decide what becomes of a version. A daemon that stops takes nothing back: that might not end in time."""
        took = [participant for participant in participants if participant.alive]
        returnable = all(self._repair.before(participant) is not None for participant in took)
        all_or_none = self._config.push.partial == "rollback" and self._rounds.undoing is None
        verdict = judge_push(
            took=len(took), failed=len(participants) - len(took), all_or_none=all_or_none, returnable=returnable
        )
        if verdict is Verdict.LIVE and all_or_none and len(took) < len(participants):
            log.warning("version.cannot_be_taken_back", version=str(version.id), engines=[p.engine.name for p in took])
        return verdict

    def _settle(
        self,
        version: Version,
        verdict: Verdict,
        participants: Sequence[Participant],
        report: VersionReport,
        *,
        asked: bool,
    ) -> None:
        """A version is live if any engine took it, or if there is none. Otherwise it has failed.

        Whoever asked for it may ask again, when the engines are well: then it waits as it did before. A retained one
        stays what it is.
        """
        if verdict is Verdict.LIVE:
            if not participants and not any(one.outcome == "current" for one in report.engines.values()):
                log.warning("version.live_without_engines", version=str(version.id))
            self._catalogue.go_live(version, report)
            return
        error = self._rounds.undoing or EngineError(_why_not(version, verdict, participants))
        if version.state is VersionState.RETAINED:
            log.warning("version.not_rolled_back", version=str(version.id), error=error.message)
        elif asked and self._rounds.undoing is None:
            log.warning("version.waits_again", version=str(version.id), error=error.message)
            self._catalogue.put_back(version)
        else:
            self._metrics.failures.labels(code=error.code).inc()
            self._catalogue.fail(version, error)

    # --- engines in need ---------------------------------------------------------------------------------------------

    async def _bring_up(self, engine: Engine) -> None:
        """Give an engine that has just become complete the live version, unless it holds that already."""
        if engine.asleep:
            await self._rounds.slots.give_back_unused()
            return
        await self._rounds.slots.provide(engine.workers.values(), 0)  # now, for a push would have to wait for them
        live = self._catalogue.live(engine.serves)
        if engine.ready and (live is None or engine.holds(live.id, live.digest)):
            await let_serve(engine, self._rounds.number, self._config.deadlines.resume_seconds)
        elif live is not None and engine.complete:
            participants = await self._rounds.run(live, [engine])
            self._retries.look(participants)
            failed = [participant for participant in participants if not participant.alive]
            self._retries.look(await self._repair.restore(failed))


def _failures(report: VersionReport) -> str:
    said = {name: one.error.message if one.error else "" for name, one in report.engines.items()}
    return "; ".join(f"{name} ({report.engines[name].outcome}): {why}" for name, why in said.items())


def _why_not(version: Version, verdict: Verdict, participants: Sequence[Participant]) -> str:
    """Why a version is in no engine, naming those that failed, and those that had taken it."""
    reasons = "; ".join(str(participant.error) for participant in participants if not participant.alive)
    if verdict is Verdict.NOT_TAKEN:
        return f"no engine took {version.id}: {reasons}"
    failed = ", ".join(participant.engine.name for participant in participants if not participant.alive)
    took = ", ".join(participant.engine.name for participant in participants if participant.alive)
    return (
        f"{version.id} was taken back from {took} (push.partial: rollback), since {failed} did not take it: {reasons}"
    )
