"""Publishes the checkpoint of the settings to this daemon itself, as a trainer would, if nothing on the node holds one.

It waits until the engines of the daemon before have come back and said what they hold: a checkpoint on a disk must not
take the place of what a trainer sent. What it does, and why it does not, is told in status and in readiness.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from cpe_daemon.config import BootstrapConfig, DeadlinesConfig
from cpe_daemon.core.admission import History
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.recovery import why_not_bootstrap
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.registry import Registry
from cpe_daemon.errors import BusyError, CpeError, VersionRefusedError
from cpe_daemon.readiness import Reason
from cpe_daemon.versions import Catalogue, Version

if TYPE_CHECKING:
    from cpe_daemon.publisher import Publisher

log = structlog.get_logger(__name__)

_PERCENT_STEP: Final = 10
_UNDER_WAY: Final = ("waiting", "publishing")


class Bootstrap:
    """One attempt, at the start. Belongs to the event loop; the publishing has a thread of its own.

    Args:
        settings: what is published.
        deadlines: of a publish.
        endpoint: where this daemon listens.
        catalogue: asked for what is here.
        registry: asked for what engines hold.
        returned: returns when engines that may come back have.

    Attributes:
        state: off, waiting (for engines), publishing, done (it is staged), skipped or failed.
        message: why, for a person.
    """

    def __init__(
        self,
        *,
        settings: BootstrapConfig,
        deadlines: DeadlinesConfig,
        endpoint: str,
        catalogue: Catalogue,
        registry: Registry,
        returned: Callable[[], Awaitable[object]],
    ) -> None:
        self.version = VersionId(settings.model, settings.run, settings.number)
        self.state = "waiting" if settings.dir else "off"
        self.message = ""
        self._dir = Path(settings.dir)
        self._deadlines = deadlines
        self._endpoint = endpoint
        self._catalogue = catalogue
        self._registry = registry
        self._returned = returned
        self._percent = 0
        self._given_up: CpeError | None = None
        self._publisher: Publisher | None = None
        self._closing: asyncio.Future[None] | None = None
        catalogue.watch(self._on_version)

    async def run(self) -> None:
        """Publish, if there is something to be published and nothing against it; never raises but when cancelled."""
        if self.state == "off":
            return
        try:
            await self._returned()
            if why := self._why_not():
                self._end("skipped", f"{self.version} was not published from {self._dir}: {why}")
                return
            self.state = "publishing"
            log.info("bootstrap.publishing", version=str(self.version), dir=str(self._dir))
            await self._send()
            self._end("done", f"{self.version} was published from {self._dir}")
        except VersionRefusedError as error:
            self._end("skipped", f"{self.version} was not published from {self._dir}: {error.message}")
        except CpeError as error:
            self._end("failed", f"{self.version} could not be published from {self._dir}: {error.message}")
        except Exception as error:  # task boundary: a checkpoint's trouble must not end a daemon that serves
            log.exception("bootstrap.raised")
            self._end("failed", f"{self.version} could not be published from {self._dir}: {error!r}")

    def plain(self) -> dict[str, Any]:
        """As plain values, for status."""
        if self.state == "off":
            return {"state": "off"}
        told = {"state": self.state, "version": str(self.version), "dir": str(self._dir), "message": self.message}
        return told | ({"percent": self._percent} if self.state == "publishing" else {})

    @property
    def reason(self) -> Reason | None:
        """What keeps the node from being ready."""
        if self.state in _UNDER_WAY:
            what = "waits until engines have said what they hold" if self.state == "waiting" else "is being published"
            return Reason("bootstrap", f"{self.version} {what} (bootstrap.dir: {self._dir})")
        if self.state == "failed" and self._catalogue.live(self.version.model) is None:
            return Reason("bootstrap_failed", self.message)
        return None

    def _why_not(self) -> str:
        model = self.version.model
        workers = [worker for engine in self._registry if engine.takes(model) for worker in engine.workers.values()]
        return why_not_bootstrap(
            self.version,
            self._catalogue.numbers.histories.get(model, History()),
            here=[version.id for version in self._catalogue if version.id.model == model and version.contributions],
            held=[worker.content for worker in workers if worker.content is not None],
            live=live.version if (live := self._registry.adoption.before.live(model)) is not None else None,
        )

    async def _send(self) -> None:
        sending = asyncio.ensure_future(asyncio.to_thread(self._publish))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            self._give_up(BusyError("this daemon stops"))
            await asyncio.wait((sending,))
            sending.exception()  # nobody is to hear it any more
            raise
        except CpeError as error:
            raise self._given_up or error from None

    def _publish(self) -> None:
        """Publish, and wait until it is staged. Runs in a thread."""
        from cpe_daemon.publisher import Publisher  # it imports torch, which a daemon does without otherwise

        version, limits = self.version, self._deadlines
        with Publisher(
            self._endpoint,
            model=version.model,
            run=version.run,
            connect_timeout=limits.hello_seconds,
            send_timeout=limits.receive_idle_seconds,
        ) as publisher:
            self._publisher = publisher
            if self._given_up is not None:
                raise self._given_up
            handle = publisher.publish(self._dir, version=version.number, progress=self._progress)
            handle.staged(timeout=limits.receive_total_seconds)

    def _progress(self, done: int, total: int) -> None:
        """Say how far it is; called by the publishing thread, for every chunk."""
        if self._given_up is not None:
            raise self._given_up
        percent = done * 100 // max(total, 1)
        if percent // _PERCENT_STEP > self._percent // _PERCENT_STEP:
            log.info("bootstrap.progress", version=str(self.version), percent=percent, done_bytes=done)
        self._percent = percent

    def _on_version(self, version: Version) -> None:
        """A trainer's version that is staged meanwhile comes first: the bootstrap's run must not supersede its run."""
        theirs = version.id.model == self.version.model and version.id != self.version
        if self.state == "publishing" and theirs and version.state is VersionState.STAGED:
            self._give_up(VersionRefusedError(f"{version.id} came first"))

    def _give_up(self, error: CpeError) -> None:
        self._given_up = self._given_up or error
        publisher = self._publisher
        if publisher is not None:
            self._closing = asyncio.ensure_future(asyncio.to_thread(publisher.close))  # it waits for its threads

    def _end(self, state: str, message: str) -> None:
        self.state, self.message = state, message
        say = {"done": log.info, "skipped": log.warning}.get(state, log.error)
        say(f"bootstrap.{state}", version=str(self.version), message=message)
