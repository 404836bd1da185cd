"""The journal of a node: one small file that tells the next daemon what this one knew (`cpe_daemon.core.journal`).

It is written by a thread, one write after another; changes that come while one is under way are written by the next,
all at once. A journal that cannot be written stops nothing: what engines hold they say themselves, and one that is
older than the truth only makes the next daemon know less. It is told everywhere, and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from msgspec import structs

from cpe_daemon.core.journal import RoundEntry, State, decode, encode
from cpe_daemon.errors import ConfigError, CpeError
from cpe_daemon.statefile import StateFile

log = structlog.get_logger(__name__)

_RETRY_SECONDS: Final = 5.0
_SETTLE_SECONDS: Final = 0.05
"""For changes that come together to be written together. A decision is written at once, with what came before it."""


class Journal:
    """The journal of one daemon. Belongs to the event loop.

    A file that cannot be understood is kept under another name, and nothing is believed of it.

    Args:
        path: of the file; it need not exist, nor its directory.
        seconds: that a round waits for its decision to be on disk, and that a write may take before it has failed.

    Raises:
        ConfigError: the file is there and cannot be read at all.

    Attributes:
        found: what the daemon before this one knew.
        trouble: why the last write failed; "" if it did not.
        writes: that have succeeded.
        failures: writes that have not.
        written_at: Unix time of the last one that did; 0.0 before the first.
    """

    def __init__(self, path: Path, *, seconds: float) -> None:
        self._file = StateFile(path, recreate=True)
        self._seconds = seconds
        self.existed = self._file.content is not None
        """Whether there was a file, whatever it held."""
        self.found = self._read()
        self.trouble = ""
        self.writes = self.failures = 0
        self.written_at = 0.0
        self._look: Callable[[], State] = lambda: self.found
        self._round: RoundEntry | None = None
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        self._noted = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._turn = asyncio.Lock()
        self._frozen = False

    @property
    def path(self) -> Path:
        """Where it is."""
        return self._file.path

    def connect(self, look: Callable[[], State]) -> None:
        """Write down what ``look`` sees from now on; the round is added here."""
        self._look = look

    def note(self) -> None:
        """Something has changed: have it written soon."""
        if not self._frozen:
            self._noted += 1
            self._dirty.set()

    async def run(self) -> None:
        """Write whenever something has changed, and again after a failure, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_RETRY_SECONDS if self.trouble else None):
                    await self._dirty.wait()
            except TimeoutError:
                log.debug("journal.tried_again", path=str(self.path))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_SECONDS):
                    await self._urgent.wait()
            await self._write()

    async def decide(self, entry: RoundEntry) -> None:
        """A round is decided on: returns when that would survive a crash, or when it has failed to, at the deadline.

        It never raises: a round goes on without its decision on disk, see ARCHITECTURE.md.
        """
        self._round = entry
        self.note()
        if self._frozen or self._stuck:
            return  # known, and told; to wait at each round would not mend it
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._noted, written))
        self._urgent.set()
        try:
            async with asyncio.timeout(self._seconds):
                await written
        except TimeoutError:
            log.warning("journal.late", version=str(entry.version), seconds=self._seconds)

    def over(self) -> None:
        """The round is over, however it ended."""
        self._round = None
        self.note()

    def freeze(self) -> None:
        """Keep what is known now, and take no notice of what follows: that is the end of the daemon."""
        if not self._frozen:
            state, self._frozen = self._look(), True
            self._look = lambda: state

    async def close(self) -> None:
        """`freeze`, if that was not done, and write it down, within the deadline."""
        self.freeze()
        await self._write()

    @property
    def _stuck(self) -> bool:
        return bool(self.trouble) and self._file.stuck

    async def _write(self) -> None:
        """Write what there is now, and tell those who wait for what had been noted by then."""
        async with self._turn:
            self._dirty.clear()
            self._urgent.clear()
            noted = self._noted
            try:
                await self._put(encode(structs.replace(self._look(), round=self._round)))
            finally:
                waiting, self._waiting = self._waiting, []
                for number, written in waiting:
                    if number > noted:
                        self._waiting.append((number, written))
                    elif not written.done():
                        written.set_result(None)

    async def _put(self, content: bytes) -> None:
        try:
            if content != self._file.content or self._file.stuck:
                await self._file.replace(content, self._seconds)
        except CpeError as error:
            self.failures += 1
            if not self.trouble:
                log.error("journal.not_written", path=str(self.path), error=error.message, retry_seconds=_RETRY_SECONDS)
            self.trouble = error.message
            return
        if self.trouble:
            log.info("journal.written_again", path=str(self.path), failures=self.failures)
        self.trouble = ""
        self.writes += 1
        self.written_at = time.time()

    def _read(self) -> State:
        """Return what the file says; if that cannot be told, put it aside."""
        content = self._file.content
        if content is None:
            return State()
        try:
            return decode(content)
        except ConfigError as error:
            aside = self.path.with_name(f"{self.path.name}.unreadable-{time.time_ns()}")
            try:
                self.path.rename(aside)
                self._file.content = None
            except OSError as problem:
                aside = self.path
                log.warning("journal.not_put_aside", path=str(self.path), error=str(problem))
            log.error(
                "journal.unreadable",
                path=str(self.path),
                error=error.message,
                kept_as=str(aside),
                consequence="what was live is not known: engines that hold no version stay paused until one is live",
            )
            return State(lost=True)
