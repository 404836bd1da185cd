"""What the daemon tells of itself: status, metrics, health and readiness, and the counting of what versions become.

Reads every room and changes none. All of it belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from cpe_daemon import __version__
from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.retention import shortage
from cpe_daemon.daemon.build import build
from cpe_daemon.daemon.health import Health
from cpe_daemon.daemon.recovery import Recovery
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.registry import Registry
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.links.router import Router
from cpe_daemon.observe.http import Page
from cpe_daemon.observe.metrics import Metrics, Readings
from cpe_daemon.observe.pages import make_pages
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.readiness import Readiness, Reason, judge
from cpe_daemon.readings import (
    read_arena,
    read_copies,
    read_engines,
    read_models,
    read_push,
    read_traffic,
    read_trainers,
    read_versions,
)
from cpe_daemon.status import (
    arena_status,
    device_status,
    engines_status,
    models_status,
    push_status,
    rollback_status,
    states,
    trainer_status,
    version_status,
)
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import PROTOCOL

log = structlog.get_logger(__name__)

_LAG_SECONDS: Final = 0.5
_MODELS: Final = 64


class Accounts:
    """The daemon's books.

    Args:
        config: its settings.
        generation: of its process.
        metrics: instruments.
        arena: the memory for versions.
        catalogue: the versions.
        device: the slots.
        registry: the engines.
        trainers: the links of trainer ranks.
        ingest: what they send.
        pusher: the rounds.
        handoff: memory that is passed on.
        health: whether copies go on.
        recovery: what was before, and the journal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        config: Config,
        generation: str,
        metrics: Metrics,
        arena: Arena,
        catalogue: Catalogue,
        device: Device,
        registry: Registry,
        trainers: Trainers,
        ingest: Ingest,
        pusher: Pusher,
        handoff: HandoffServer,
        health: Health,
        recovery: Recovery,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._generation = generation
        self._metrics = metrics
        self._arena = arena
        self._catalogue = catalogue
        self._device = device
        self._registry = registry
        self._trainers = trainers
        self._ingest = ingest
        self._pusher = pusher
        self._handoff = handoff
        self._health = health
        self._recovery = recovery
        self._clock = clock
        self._started_at = clock()
        self._build = build()
        self.endpoints: list[str] = []
        """Where the daemon listens; whoever binds adds to it."""
        self.routers: Sequence[Router] = ()
        """The sockets, as soon as there are any."""
        self.warnings: Callable[[], list[str]] = list
        """What else strangers could reach, or an operator should know of keys, each in a line."""
        self._short: dict[str, str] = {}
        """What was said of models that the arena cannot hold twice; once for each size."""
        self.started = False
        """Whether the doors are open."""
        self.draining = False
        """Whether the daemon stops."""
        catalogue.watch(self._count_version)

    # --- state -------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The state of everything, as plain values."""
        now = self._clock()
        return {
            "daemon": {
                "version": __version__,
                "node": self._config.node,
                "pid": os.getpid(),
                "generation": self._generation,
                "uptime_seconds": now - self._started_at,
                "protocol": PROTOCOL,
                "endpoints": self.endpoints,
            },
            "readiness": self.readiness().plain(),
            "arena": arena_status(self._arena),
            "device": device_status(self._device),
            "models": models_status(self._catalogue),
            "versions": [version_status(version, now) for version in self._catalogue],
            "rollback": rollback_status(self._catalogue),
            "push": push_status(self._pusher, now, automatic=self._config.push.automatic),
            "engines": engines_status(self._registry),
            "journal": self._recovery.status(),
            "bootstrap": self._recovery.bootstrap.plain(),
            "trainers": [trainer_status(session) for session in self._trainers],
            "counters": self._metrics.snapshot(self._readings()),
        }

    def readiness(self) -> Readiness:
        """Whether the node is ready for work."""
        arena = self._arena
        starting = ""
        if arena.prefaulted_bytes < arena.nbytes:
            starting = f"the host has provided {arena.prefaulted_bytes} of the arena's {arena.nbytes} bytes"
        elif not self.started:
            starting = "the sockets are not open yet"
        return judge(
            starting=starting,
            draining=self.draining,
            engines=self._registry,
            absent=[spec.name for spec in self._registry.absent if spec.name not in self._recovery.returning.missing],
            failed_gpus=[error.message for error in self._device.failures.values()],
            reasons=self._recovery.reasons,
            warnings=(*self._recovery.warnings, *self._shortages()),
            insecure=[*_insecure(self._config), *self.warnings()],
        )

    def _shortages(self) -> list[Reason]:
        """The models of which the arena cannot keep the version before."""
        said: dict[str, str] = {}
        for version in self._catalogue:
            if version.held:
                said[version.id.model] = self._shortage(version)
        return [Reason("no_rollback", line) for line in said.values() if line]

    def _shortage(self, version: Version) -> str:
        model = version.id.model
        return shortage(model, version.nbytes, self._arena.nbytes, self._catalogue.keeping(model).quota_bytes)

    def _readings(self) -> Readings:
        """Everything that metrics mirror, as it is now."""
        readings, versions = Readings(), list(self._catalogue)
        read_arena(readings, self._arena, versions)
        read_models(readings, self._catalogue)
        read_versions(readings, versions, self._registry, self._recovery.not_resident)
        read_engines(readings, self._registry, states(self._registry))
        read_trainers(readings, self._trainers)
        read_push(readings, self._device, self._pusher)
        read_copies(readings, self._health.ages())
        read_traffic(readings, self._pusher, self._ingest.received)
        self._recovery.read(readings)
        readings.add("cpe_build_info", 1, *self._build)
        readings.add("cpe_ready", self.readiness().ready)
        readings.add("cpe_handoff_claims_total", self._handoff.claims)
        for router in self.routers:
            readings.add("cpe_unknown_fields_total", router.unknown_fields, router.name)
        return readings

    def pages(self) -> dict[str, Page]:
        """What the HTTP listener shows, by path."""
        return make_pages(
            metrics=self._metrics_text,
            health=self._health.reasons,
            readiness=lambda: self.readiness().plain(),
            status=self.status,
        )

    async def _metrics_text(self, accept: str) -> tuple[bytes, str]:
        """Read on the loop, written down beside it: with many engines that takes a while."""
        self._metrics.keep_engines([engine.name for engine in self._registry])
        return await asyncio.to_thread(self._metrics.encode, self._readings(), accept)

    # --- counting ----------------------------------------------------------------------------------------------------

    async def watch_loop(self) -> None:
        """Measure by how much the event loop is late, until cancelled."""
        while True:
            due = self._clock() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._metrics.observe_lag(max(0.0, self._clock() - due))

    def _count_version(self, version: Version) -> None:
        """Keep the metrics of versions; called at every change of one."""
        if version.state is VersionState.STAGED and not version.pushes:
            said = self._shortage(version)
            if said and said != self._short.get(version.id.model):
                log.warning("arena.keeps_no_previous", model=version.id.model, reason=said)
                self._short = {**self._short, version.id.model: said} if len(self._short) < _MODELS else {}
            self._metrics.observe_phases(version.id.model, "", {"publish": version.stage_seconds})
        if version.state in (VersionState.LIVE, VersionState.FAILED) and self._catalogue.find(version.id):
            self._metrics.count_version(version.id.model, str(version.state))


def _insecure(config: Config) -> list[str]:
    """Listeners that strangers could reach."""
    lines = []
    if config.http.exposed:
        lines.append(f"http.listen {config.http.listen} shows this node's state to whoever reaches it, without TLS")
    return lines
