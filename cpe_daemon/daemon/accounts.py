"""What the daemon tells of itself: its status, and the counting of what becomes of versions.

Reads every room and changes none. All of it belongs to the event loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cpe_daemon import __version__
from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.devices.device import Device
from cpe_daemon.engines.registry import Registry
from cpe_daemon.ingest.session import Session
from cpe_daemon.links.router import Router
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.status import (
    arena_status,
    device_status,
    engines_status,
    states,
    trainer_status,
    version_status,
)
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import PROTOCOL


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
        trainers: Iterable[Session],
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
        self._clock = clock
        self._started_at = clock()
        self.endpoints: list[str] = []
        """Where the daemon listens; whoever binds adds to it."""
        self.routers: Sequence[Router] = ()
        """The sockets, as soon as there are any."""
        self.told_at = 0.0
        """When somebody was last told of a change of a version."""
        catalogue.watch(self._count_version)

    def status(self) -> dict[str, Any]:
        """The state of everything, as plain values."""
        now = self._clock()
        self._metrics.arena_free.set(self._arena.free_bytes)
        self._metrics.set_engines(states(self._registry))
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
            "arena": arena_status(self._arena),
            "device": device_status(self._device),
            "versions": [version_status(version, now) for version in self._catalogue],
            "engines": engines_status(self._registry),
            "trainers": [trainer_status(session) for session in self._trainers],
            "counters": {
                **self._metrics.snapshot(),
                "unknown_fields": sum(router.unknown_fields for router in self.routers),
            },
        }

    def _count_version(self, version: Version) -> None:
        """Keep the metrics of versions; called at every change of one."""
        self.told_at = self._clock()
        if version.state is VersionState.STAGED:
            self._metrics.observe_phases(version.id.model, "", {"stage": version.stage_seconds})
        elif version.state is VersionState.LIVE:
            self._metrics.live_version.labels(model=version.id.model).set(version.id.number)
        if version.state in (VersionState.LIVE, VersionState.FAILED) and self._catalogue.find(version.id):
            self._metrics.versions.labels(model=version.id.model, outcome=str(version.state)).inc()
