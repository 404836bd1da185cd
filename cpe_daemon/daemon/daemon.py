"""The composition root: builds the parts, starts them, and takes them down in order.

The only module that names a concrete device or transport.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import zmq

from cpe_daemon import __version__
from cpe_daemon.arena import Arena
from cpe_daemon.config import ENGINES_FILE, ENGINES_SOCKET, HANDOFF_SOCKET, Config, DeviceConfig
from cpe_daemon.config.models import keeping
from cpe_daemon.core.journal import Identity
from cpe_daemon.daemon.accounts import Accounts
from cpe_daemon.daemon.drain import Drain
from cpe_daemon.daemon.front import Front, io_threads
from cpe_daemon.daemon.health import Health
from cpe_daemon.daemon.operations import Operations
from cpe_daemon.daemon.recovery import Recovery
from cpe_daemon.daemon.striping import place, settle
from cpe_daemon.daemon.waiting import Waiting
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.cuda.device import CudaDevice
from cpe_daemon.devices.device import Device
from cpe_daemon.devices.shm import ShmDevice
from cpe_daemon.engines.drivers import load_drivers
from cpe_daemon.engines.expected import Expected
from cpe_daemon.engines.registry import Registry
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.links.router import Router
from cpe_daemon.observe.http import Listener
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.observe.tls import Certificate
from cpe_daemon.push.eviction import evict
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.codec import MAX_HEADER_BYTES
from cpe_daemon.wire.messages import WorkerMessage

log = structlog.get_logger(__name__)

_ENGINES_QUEUE: Final = 4096
_CANCEL_SECONDS: Final = 2.0


class Daemon:
    """All parts of one daemon. Every method belongs to the event loop.

    Args:
        config: its settings.
        tasks: owns everything that runs in the background.
    """

    def __init__(self, config: Config, tasks: asyncio.TaskGroup) -> None:
        self._config = config
        self._tasks = tasks
        self._running: list[asyncio.Task[None]] = []
        self.generation = secrets.token_hex(8)
        self.metrics = Metrics()
        drivers = load_drivers()
        expected = Expected(config.state_dir / ENGINES_FILE, drivers)  # first: a file that is damaged ends it here
        self.recovery = Recovery(config)
        runtime, count_error = config.runtime_dir, self.metrics.count_protocol_error
        self.arena = Arena(config.arena.size_bytes)
        self.catalogue = Catalogue(
            self.arena,
            retain=config.retention.versions,
            clock=time.monotonic,
            automatic=config.push.automatic,
            supersede=config.push.newer == "supersede",
            models=keeping(config.models, config.retention.versions),
        )
        self.handoff = HandoffServer(runtime / HANDOFF_SOCKET, tasks, on_protocol_error=count_error)
        self.lost = asyncio.Event()
        """Set when no GPU takes calls of this process any more: only another process can go on."""
        self.device = _device(config.device, self.arena, self.handoff, self.lost.set)
        self._pool = CopyPool(config.ingest.copy_thread_count, "cpe-copy")
        self.health = Health(
            {
                "in": lambda: self._pool.stuck_seconds,
                "out": lambda: self.device.stuck_seconds,
            },
            stuck_seconds=config.deadlines.stuck_seconds,
        )
        self.trainers = Trainers(
            config=config,
            generation=self.generation,
            boot_id=_boot_id(),
            handoff=self.handoff,
            metrics=self.metrics,
            clock=time.monotonic,
        )
        self.ingest = Ingest(
            config=config,
            trainers=self.trainers,
            catalogue=self.catalogue,
            arena=self.arena,
            pool=self._pool,
            tasks=tasks,
            metrics=self.metrics,
            clock=time.monotonic,
        )
        self.registry = Registry(
            config=config,
            generation=self.generation,
            device=self.device,
            handoff=self.handoff,
            drivers=drivers,
            expected=expected,
            live=self._live,
            live_models=self.catalogue.live_models,
            clock=time.monotonic,
            before=self.recovery.before,
        )
        self.pusher = Pusher(
            config=config,
            catalogue=self.catalogue,
            registry=self.registry,
            device=self.device,
            metrics=self.metrics,
            clock=time.monotonic,
        )
        self.recovery.connect(self.catalogue, self.registry, self.pusher)
        self.catalogue.on_digest(self._tell_engines)
        self.ingest.examine = self.pusher.compatibility.examine
        self.operations = Operations(
            pusher=self.pusher,
            registry=self.registry,
            tasks=tasks,
            session=self.trainers.session,
            evict=partial(evict, self.catalogue, self.registry, before=self.recovery.before),
        )
        self.waiting = Waiting(
            self.catalogue,
            session=self.trainers.session,
            automatic=config.push.automatic,
            before=lambda: self.recovery.not_resident,
        )
        self.accounts = Accounts(
            config=config,
            generation=self.generation,
            metrics=self.metrics,
            arena=self.arena,
            catalogue=self.catalogue,
            device=self.device,
            registry=self.registry,
            trainers=self.trainers,
            ingest=self.ingest,
            pusher=self.pusher,
            handoff=self.handoff,
            health=self.health,
            recovery=self.recovery,
        )
        self._http: Listener | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=io_threads(config))
        self._front = Front(
            config,
            self._context,
            handlers={
                **self.trainers.handlers(),
                **self.ingest.handlers(),
                **self.operations.handlers(),
                **self.waiting.handlers(),
            },
            status=self.accounts.status,
            trainers=self.trainers,
            operations=self.operations,
            on_protocol_error=count_error,
        )
        self._engines = Router(
            "engines",
            self._context,
            accepts=WorkerMessage,
            handlers=self.registry.handlers(),
            max_frame_bytes=MAX_HEADER_BYTES,
            queue=_ENGINES_QUEUE,
            on_protocol_error=count_error,
        )
        self.accounts.routers = (*self._front.routers, self._engines)
        self.accounts.warnings = self._front.warnings

    async def start(self, progress: Callable[[str, int, int], None]) -> None:
        """Provide the memory, then open the doors.

        Args:
            progress: called with what is being done, and the bytes that are done and in all.

        Raises:
            ConfigError: the keys or an endpoint cannot be had.
            ResourceError: the memory, a GPU or an address cannot be had now.
        """
        await self._front.load_keys()
        self._front.check_addresses()  # `open` binds them when the memory is there, which may take minutes
        self._listen()
        settings = self._config.arena
        await asyncio.to_thread(place, settings.numa, self.arena, self.device)
        await self.arena.prefault(settings.prefault_thread_count, partial(progress, "prefaulting the arena"))
        await asyncio.to_thread(settle, self.arena, self.device)
        await self.device.open(partial(progress, "pinning the arena"))
        self.trainers.connect(self._front)
        self.operations.connect(self._front)
        self.waiting.connect(self._front)
        self.registry.connect(self._engines)
        runtime = self._config.runtime_dir
        self.accounts.endpoints += self._front.open(self._spawn)
        self.accounts.routers = (*self._front.routers, self._engines)
        self.accounts.endpoints.append(self._engines.bind(f"ipc://{runtime / ENGINES_SOCKET}"))
        self.handoff.start()
        self._front.start()
        self._engines.start()
        self._spawn(self.pusher.run())
        self._spawn(self.ingest.digesting.run())
        self._spawn(self._watch_clock())
        self._spawn(self.accounts.watch_loop())
        self.recovery.begin(self._spawn)
        self.accounts.started = True
        log.info(
            "daemon.ready",
            version=__version__,
            pid=os.getpid(),
            generation=self.generation,
            endpoints=self.accounts.endpoints,
        )

    async def drain(self, hurried: asyncio.Event, tell: Callable[[str], None]) -> None:
        """Bring what is in flight to its end, or undo it, in bounded time; see `cpe_daemon.daemon.drain`.

        Args:
            hurried: set when a push in flight shall be undone at once.
            tell: says in a line how far it is.
        """
        self.accounts.draining = True
        drain = Drain(
            deadlines=self._config.deadlines,
            ingest=self.ingest,
            pusher=self.pusher,
            trainers=self.trainers,
            registry=self.registry,
            journal=self.recovery.journal,
            tell=tell,
        )
        await drain.run(hurried)

    async def close(self) -> None:
        """Close the doors and give the memory back."""
        self.recovery.journal.freeze()
        if self._http is not None:
            await self._http.close()
        for task in self._running:
            task.cancel()
        if self._running:  # their copies end before the memory goes that they use
            await asyncio.wait(self._running, timeout=_CANCEL_SECONDS)
        self.operations.close()
        self.waiting.close()
        self.trainers.close()
        self.registry.close()
        self._front.close()
        self._engines.close()
        await asyncio.to_thread(self._context.term)
        self.handoff.close()  # after the last messages: a client that sees its tether cut listens no more
        await asyncio.to_thread(self._pool.shutdown)
        await self.device.close()
        await asyncio.to_thread(self.arena.close)  # minutes, for some terabytes
        if self.accounts.started:
            log.info("daemon.stopped")

    def _listen(self) -> None:
        """Listen for probes and scrapers, before memory is provided: that may take minutes, and is watched."""
        settings = self._config.http
        if settings.address is None:
            return
        certificate = Certificate(settings.tls_certificate, settings.tls_key) if settings.tls_certificate else None
        self._http = Listener(
            settings.address,
            self.accounts.pages(),
            self._tasks,
            certificate=certificate,
            on_protocol_error=lambda: self.metrics.count_protocol_error("http"),
        )
        self._http.start()
        self.accounts.endpoints.append(self._http.url)
        log.info("http.listening", url=self._http.url)
        if settings.exposed:
            log.warning("http.exposed", url=self._http.url, mend="listen on 127.0.0.1, or set http.tls_certificate")

    def _live(self, model: str) -> Identity | None:
        live = self.catalogue.live(model)
        return Identity(live.id, live.digest) if live else None

    def _tell_engines(self, version: Version) -> None:
        for engine in self.registry:
            engine.learn(version.id, version.digest)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._running.append(self._tasks.create_task(work))

    async def _watch_clock(self) -> None:
        """Look at every wait for a peer, at the heartbeat's pace."""
        while True:
            await asyncio.sleep(self._config.deadlines.heartbeat_interval_seconds)
            self.trainers.drop_silent()
            self.registry.check_deadlines()
            self.recovery.returning.look()
            self.ingest.fail_stalled()


def _device(config: DeviceConfig, arena: Arena, handoff: HandoffServer, on_lost: Callable[[], None]) -> Device:
    """The device that the settings name.

    Raises:
        ConfigError: no host could have it.
        ResourceError: this host does not have it now.
    """
    if config.kind == "shm":
        return ShmDevice(gpus=config.gpus, slot_bytes=config.slot_bytes, source=arena.address, handoff=handoff)
    return CudaDevice(
        uuids=config.uuids,
        slot_bytes=config.slot_bytes,
        source=arena.address,
        source_bytes=arena.nbytes,
        on_lost=on_lost,
    )


def _boot_id() -> str:
    """Equal for all processes of this host, until it restarts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
