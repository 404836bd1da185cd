"""What a plugin's two halves agree on: the steps of a round as an engine goes through them.

The daemon's half of a plugin is a `Driver`, found by the entry-point group ``cpe_daemon.engines`` and made with the
`Workers` of one engine. A torch engine's driver only passes the steps on; a server's driver (vLLM, SGLang) pauses and
resumes it by its own API.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cpe_daemon.core.types import VersionId


@dataclass(frozen=True, slots=True)
class Update:
    """What a round is about to load: its number, the version, how much is to come, and its fold, if workers verify.

    ``digest`` is the version's (`cpe_daemon.core.identity`); ``b""``: not known.
    """

    round: int
    version: VersionId
    tensors: int
    nbytes: int
    fold: int | None = None
    digest: bytes = b""


class Steps(Protocol):
    """The steps of a round for one engine, in their order. Each raises `CpeError` if it fails or passes its deadline.

    Between `begin` and `finish` buckets are loaded by the workers directly. `abort` may come after any step from
    `pause` on, and leaves the engine paused; `resume` then follows only when it holds a whole version.
    """

    async def check(self, round: int, seconds: float) -> None:
        """Say whether a version whose tensors the workers were told under this number fits; the engine serves on.

        Raises:
            ManifestError: it does not; names the differences. A number below 0 is no round's.
        """
        ...

    async def pause(self, round: int, seconds: float) -> None:
        """Stop serving between two forward passes."""
        ...

    async def begin(self, update: Update, seconds: float) -> None:
        """Make ready to load buckets."""
        ...

    async def finish(self, round: int, seconds: float) -> None:
        """Post-process, and check that every tensor was consumed."""
        ...

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Forget the round; return whether the engine's weights may be others than before it."""
        ...

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Serve again; the engine holds ``content`` (None: what it started with)."""
        ...

    async def wake(self, seconds: float) -> None:
        """Have an engine that sleeps wake up; it may have lost its weights, and does not serve before `resume`."""
        ...


class Workers(Protocol):
    """The steps, as messages to all workers of an engine at once."""

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    @property
    def url(self) -> str:
        """Where the engine's own API is, as an operator or the engine says; "" if nobody does."""
        ...

    @property
    def starting(self) -> bool:
        """Whether the engine has not served yet: its API may not be there, and nothing has to be paused."""
        ...

    async def check(self, round: int, seconds: float) -> None:
        """As `Steps.check`."""
        ...

    async def halt(self, round: int, seconds: float) -> int | None:
        """Let no worker begin a further forward pass; return how many any of them has begun since the last update.

        None: their numbers cannot be compared.
        """
        ...

    async def pause(self, round: int, seconds: float, passes: int | None = None) -> None:
        """As `Steps.pause`; after ``passes`` forward passes as `halt` counts them, or (None) as soon as may be."""
        ...

    async def begin(self, update: Update, seconds: float) -> None:
        """As `Steps.begin`."""
        ...

    async def finish(self, round: int, seconds: float) -> None:
        """As `Steps.finish`."""
        ...

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """As `Steps.abort`."""
        ...

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """As `Steps.resume`."""
        ...

    async def wake(self, seconds: float) -> None:
        """As `Steps.wake`."""
        ...


class Driver(Steps, Protocol):
    """The daemon's half of a plugin, for one engine."""

    def __init__(self, engine: str, workers: Workers) -> None: ...


@runtime_checkable
class Arriving(Protocol):
    """What a driver may have besides: its engine is a server that takes calls some time after its workers are there."""

    @property
    def arrived(self) -> bool:
        """Whether the server has answered since its workers were let serve, or need not, as they were not yet."""
        ...

    async def answers(self) -> bool:
        """Ask the server whether it takes calls now, if only to refuse them; if so, it has arrived."""
        ...
