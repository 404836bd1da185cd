"""Room in the arena for contributions: waits for it as long as some is about to be released."""

from __future__ import annotations

import asyncio

from cpe_daemon.arena import Arena
from cpe_daemon.errors import ArenaFullError, DeadlineError
from cpe_daemon.ingest.stream import Stream
from cpe_daemon.versions import Catalogue, Contribution, Version


class Room:
    """Who waits for it. Belongs to the event loop.

    Args:
        catalogue: gives room, and says when that may have changed.
        arena: where it is.
        seconds: for which a rank waits at most.
    """

    def __init__(self, catalogue: Catalogue, arena: Arena, seconds: float) -> None:
        self._catalogue = catalogue
        self._arena = arena
        self._seconds = seconds
        self._changed = asyncio.Event()
        self.waiting: set[Stream] = set()
        """Those that wait: nothing can come of them meanwhile."""
        catalogue.watch(self._on_version)
        catalogue.on_digest(self._on_version)  # nobody reads its bytes any more

    def is_short(self) -> bool:
        """Whether anybody waits."""
        return bool(self.waiting)

    async def reserve(self, stream: Stream, nbytes: int) -> Contribution:
        """Give a stream its extent.

        Raises:
            ArenaFullError: there is no room, and none is about to be released.
            DeadlineError: none came free in time.
            VersionRefusedError: the rank contributes already, or the version is not being received any more.
        """
        self.waiting.add(stream)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._reserve(stream, nbytes)
        except TimeoutError:
            raise DeadlineError(f"no room for {nbytes} bytes of {stream.version.id} came free in time") from None
        finally:
            self.waiting.discard(stream)

    async def _reserve(self, stream: Stream, nbytes: int) -> Contribution:
        while True:
            self._changed.clear()
            try:
                return self._catalogue.contribute(stream.version, stream.rank, stream.shards, nbytes)
            except ArenaFullError as error:
                if nbytes > (error.quota_bytes or self._arena.nbytes) or not self._catalogue.may_make_room(error.model):
                    raise
            await self._changed.wait()

    def _on_version(self, _: Version) -> None:
        self._changed.set()
