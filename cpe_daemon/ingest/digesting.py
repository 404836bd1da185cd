"""Digests what was only copied, from the arena: as late as it may be, and as soon as it has to be.

Where a trainer's GPUs fold all that it sends, engines are held to that fold, and digests verify nothing more. They only
tell a version from another by its name (`cpe_daemon.core.identity`), which nobody asks before it is live. So such a
version is staged without, and digested when nothing else needs processors and memory: its bytes are leased until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from cpe_daemon.arena import Arena
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import layout
from cpe_daemon.core.types import VersionId
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.devices.digests import Digests
from cpe_daemon.ingest.news import FINAL
from cpe_daemon.ingest.whole import digest_of
from cpe_daemon.ingest.writer import check_digests
from cpe_daemon.versions import Catalogue, Contribution, Version

_CHUNK_BYTES: Final = 16 << 20
"""Digested in one go: some milliseconds, after which whatever is more urgent has its turn."""

_LOOK_SECONDS: Final = 0.1
_PATIENCE_SECONDS: Final = 10.0
"""For how long others come first. A daemon that is killed meanwhile leaves a version that cannot come again."""


class Digesting:
    """The versions that were staged without digests. Belongs to the event loop; threads of ``pool`` read.

    Args:
        catalogue: leases versions, and is told their digests.
        arena: where their bytes are.
        pool: threads that copy and digest.
        threads: how many of them at most digest at once.
        clock: seconds, monotonic.
        short: whether anything waits for room, which may be that of a version to be digested.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        arena: Arena,
        pool: CopyPool,
        threads: int,
        clock: Callable[[], float],
        short: Callable[[], bool],
    ) -> None:
        self._catalogue = catalogue
        self._arena = arena
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._short = short
        self._due: dict[Version, contextlib.ExitStack] = {}
        """In the order in which they were staged, each with its lease."""
        self._wanted: set[Version] = set()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def __contains__(self, version: Version) -> bool:
        return version in self._due

    @property
    def due(self) -> list[VersionId]:
        """What is to be digested, or being digested."""
        return [version.id for version in self._due]

    def put(self, version: Version) -> None:
        """Have a version digested that was staged without, and keep its bytes until that is done."""
        lease = contextlib.ExitStack()
        lease.enter_context(self._catalogue.lease(version))
        self._due[version] = lease
        self._idle.clear()
        self._changed.set()

    def want(self, version: Version) -> None:
        """Somebody waits for a version's digests: nothing comes first any more."""
        if version in self._due:
            self._wanted.add(version)
            self._changed.set()

    async def finish(self) -> None:
        """Return when all that was put is digested, without waiting for anything else. The caller sets a deadline."""
        for version in self._due:
            self.want(version)
        await self._idle.wait()

    async def run(self) -> None:
        """Digest one version after the other, until cancelled."""
        while True:
            while not self._due:
                self._changed.clear()
                await self._changed.wait()
            version = next((gone for gone in self._due if gone.state in FINAL), next(iter(self._due)))
            try:
                await self._digest_later(version, functools.partial(self._turn, version, self._clock()))
            finally:
                self._wanted.discard(version)
                self._due.pop(version).close()
            if not self._due:
                self._idle.set()

    async def before_staging(self, version: Version, progress: Callable[[Version], None]) -> None:
        """Make those digests now that something has to be compared with before a sealed version is staged.

        They are what a rank says its digests are, though it need not, and what is known of a version that comes again.

        Args:
            version: held by the caller.
            progress: called again and again.

        Raises:
            DigestError: bytes differ from what the trainer digested; names the tensors.
            VersionRefusedError: its number is used up.
        """

        async def turn() -> bool:
            progress(version)
            return version.state is VersionState.RECEIVING

        again = self._catalogue.numbers.admit(version.id, force=version.forced) is not None
        for part in version.contributions.copy().values():
            if part.digests is not None or not (again or part.claimed):
                continue
            digests = await self._digest(part, turn)
            if digests is not None and part.claimed:
                check_digests(part.shards, digests, part.claimed)
            part.digests = digests

    async def _digest_later(self, version: Version, turn: Callable[[], Awaitable[bool]]) -> None:
        parts = [version.contributions[rank] for rank in range(version.world_size)]
        for part in parts:
            if part.digests is None:
                part.digests = await self._digest(part, turn)
            if part.digests is None:
                return
        self._catalogue.learn(version, await asyncio.to_thread(digest_of, parts))

    async def _digest(self, part: Contribution, turn: Callable[[], Awaitable[bool]]) -> Sequence[bytes] | None:
        """Digest a contribution, chunk by chunk, each when ``turn`` says so; None if it said that this is over."""
        plan = await asyncio.to_thread(layout, part.shards)
        view = self._arena.view[part.extent.offset : part.extent.offset + plan.nbytes]
        digests = Digests(plan, _CHUNK_BYTES, lasting=True)
        chunks = iter(range(-(-plan.nbytes // _CHUNK_BYTES)))

        async def take_chunks() -> bool:
            for chunk in chunks:  # shared: each takes the next one that nobody has
                if not await turn():
                    return False
                await asyncio.wrap_future(self._pool.submit(_digest_chunk, digests, chunk, view))
            return True

        async with asyncio.TaskGroup() as tasks:
            taking = [tasks.create_task(take_chunks()) for _ in range(self._threads)]
        return digests.found if all(took.result() for took in taking) else None

    async def _turn(self, version: Version, since: float) -> bool:
        """Wait for a chunk's turn; False if nobody will ever ask for the digest of a version that is gone."""
        while version.state not in FINAL or version in self._wanted or self._may_return(version):
            if self._is_urgent() or self._clock() - since >= _PATIENCE_SECONDS or self._is_quiet():
                return True
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._changed.wait()
        return False

    def _may_return(self, version: Version) -> bool:
        return self._catalogue.numbers.lacks_digest(version.id)

    def _is_urgent(self) -> bool:
        """Whether somebody waits for a digest, or for room that one would make; or may soon: bytes are to be let go."""
        if self._wanted or any(version.state in FINAL for version in self._due):
            return True
        return self._short() and any(version.state is VersionState.RETAINED for version in self._due)

    def _is_quiet(self) -> bool:
        """Whether nobody else moves bytes of a version, as far as can be told."""
        others = any(version.leases > (version in self._due) for version in self._catalogue)
        return not others and not self._catalogue.moving


def _digest_chunk(digests: Digests, chunk: int, view: memoryview) -> None:
    start = chunk * digests.chunk_bytes
    digests.chunk(chunk, view[start : start + digests.chunk_bytes]).end()
