"""What a daemon has from the one before it, and leaves to the one after it: the journal, and what follows from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from msgspec import structs

from cpe_daemon.config import JOURNAL_FILE, Config
from cpe_daemon.core.recovery import Before, remembered
from cpe_daemon.core.types import VersionId
from cpe_daemon.daemon.bootstrap import Bootstrap
from cpe_daemon.daemon.chronicle import Chronicle
from cpe_daemon.daemon.returning import Returning
from cpe_daemon.engines.registry import Registry
from cpe_daemon.journal import Journal
from cpe_daemon.observe.metrics import Readings
from cpe_daemon.push.pusher import Pusher
from cpe_daemon.readiness import Reason
from cpe_daemon.versions import Catalogue


class Recovery:
    """The daemon's memory beyond its process. Belongs to the event loop.

    Args:
        config: its settings.

    Raises:
        ConfigError: the journal is there and cannot be read.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.journal = Journal(config.state_dir / JOURNAL_FILE, seconds=config.deadlines.journal_seconds)
        self.before = Before(self.journal.found)

    def connect(self, catalogue: Catalogue, registry: Registry, pusher: Pusher) -> None:
        """Tell the daemon's parts what was, and have the journal written from now on. Nothing is staged yet."""
        config, found = self._config, self.journal.found
        found = structs.replace(found, engines=remembered(found.engines, time.time()))
        self._catalogue = catalogue
        self.returning = Returning(found, registry, seconds=config.deadlines.hello_seconds, clock=time.monotonic)
        pusher.write_down(Chronicle(self.journal, catalogue, registry, self.before, self.returning))
        self.bootstrap = Bootstrap(
            settings=config.bootstrap,
            deadlines=config.deadlines,
            endpoint=config.front_endpoint,
            catalogue=catalogue,
            registry=registry,
            returned=self._returned,
        )

    def begin(self, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """The doors are open. ``spawn`` begins what runs as long as the daemon does."""
        self.returning.begin()
        self.journal.note()  # at once: then it is known whether it can be written
        spawn(self.journal.run())
        spawn(self.bootstrap.run())

    async def _returned(self) -> None:
        """Wait for the engines that may hold something. Without a journal nobody knows which those are."""
        if self.journal.existed and not self.journal.found.lost:
            await self.returning.over()
        else:
            await asyncio.sleep(self._config.deadlines.hello_seconds)

    # --- what is told of it ------------------------------------------------------------------------------------------

    @property
    def not_resident(self) -> list[VersionId]:
        """The versions that were live before this daemon, and are not here."""
        return [live.version for model in self.before.models if (live := self.before.live(model)) is not None]

    @property
    def reasons(self) -> list[Reason]:
        """What keeps the node from being ready."""
        awaited = [Reason("engine_awaited", why, name) for name, why in self.returning.reasons.items()]
        return awaited + ([self.bootstrap.reason] if self.bootstrap.reason is not None else [])

    @property
    def warnings(self) -> list[Reason]:
        """What an operator should know."""
        warnings = [Reason("not_resident", f"{live} is live, and not here: {_MEND}") for live in self.not_resident]
        if self.journal.trouble:
            warnings.append(Reason("journal", f"what is done is not written down: {self.journal.trouble}"))
        if self.before.lost and not self._catalogue.live_models():
            warnings.append(Reason("journal_lost", f"a journal could not be read: {_LOST}"))
        if self.bootstrap.state == "skipped":
            warnings.append(Reason("bootstrap_skipped", self.bootstrap.message))
        return warnings

    def status(self) -> dict[str, Any]:
        """The journal as plain values."""
        return {
            "path": str(self.journal.path),
            "error": self.journal.trouble or None,
            "written_at": self.journal.written_at or None,
            "lost": self.before.lost,
            "not_resident": [{"model": v.model, "run": v.run, "number": v.number} for v in self.not_resident],
            "awaited": sorted(self.returning.missing),
        }

    def read(self, readings: Readings) -> None:
        """The journal as values of metrics."""
        readings.add("cpe_journal_failing", bool(self.journal.trouble))


_LOST: Final = "engines that hold no version stay paused until one is live (see journal.json.unreadable-*)"
_MEND: Final = "a rollback to it, and engines that restart, wait until it is published again (or set bootstrap)"
