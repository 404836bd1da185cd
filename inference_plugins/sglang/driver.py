"""The daemon's half for SGLang: pauses and resumes a server by its API; its workers load over their own links."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from cpe_daemon.core.driver import Update, Workers
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, DeadlineError, EngineError, PeerLostError, VerificationError
from inference_plugins.server_api import ServerApi, choice

log: Final = logging.getLogger(__name__)

ADMIN_KEY: Final = "CPE_SGLANG_ADMIN_API_KEY"
API_KEY: Final = "CPE_SGLANG_API_KEY"
CA_FILE: Final = "CPE_SGLANG_CA_FILE"
PAUSE_MODE: Final = "CPE_SGLANG_PAUSE_MODE"
CACHE: Final = "CPE_SGLANG_CACHE"
CHECK: Final = "CPE_SGLANG_CHECK"

_MODES: Final = ("retract", "in_place", "abort")
_CACHES: Final = ("flush", "keep")
_CHECKS: Final = ("off", "checksum")
_KEY: Final = "cpe"
"""In ``zmq_handles``: by it the workers' half knows its requests."""
_HARMLESS: Final = "/list_external_corpora"
"""Asks for the key that updates ask for, and does nothing."""
_TELL_AGAIN_SECONDS: Final = 1.0
_TELL_SECONDS: Final = 10.0
_TELL_TRIES: Final = 300
_MOST_CHECKSUMS: Final = 16


class SglangDriver:
    """One server (see `cpe_daemon.core.driver.Driver`).

    While the server starts, its workers take a version before its API is there: then there is nothing to pause.

    What holds for all servers of a node is in the daemon's environment: ``CPE_SGLANG_ADMIN_API_KEY``, or else
    ``CPE_SGLANG_API_KEY``; ``CPE_SGLANG_CA_FILE``, for https; ``CPE_SGLANG_PAUSE_MODE``: requests in flight wait, and
    have their keys and values computed again (``retract``), or keep those (``in_place``), or are aborted (``abort``);
    ``CPE_SGLANG_CACHE``: what other weights made for requests to come is dropped (``flush``) or kept (``keep``);
    ``CPE_SGLANG_CHECK``: after each update the server is asked for the checksums of its weights (``checksum``).

    Args:
        engine: its name.
        workers: of the engine.
    """

    def __init__(self, engine: str, workers: Workers) -> None:
        self.engine = engine
        self._workers = workers
        self._api = ServerApi(engine, workers, kind="sglang", keys=(ADMIN_KEY, API_KEY), ca_file=CA_FILE)
        self._update: asyncio.Task[object] | None = None
        """The call that lasts as long as an update."""
        self._telling: asyncio.Task[None] | None = None
        """Tells a server that has just started which version it serves."""
        self._digest = b""
        self._checksums: dict[bytes, str] = {}
        """Of the server's weights, by the digest of the version that they are."""

    async def check(self, round: int, seconds: float) -> None:
        """See that the server is there and takes our key, and have the workers say whether a version fits."""
        if not self._workers.starting:
            await self._api.within(_HARMLESS, seconds, self._look())
        await self._workers.check(round, seconds)

    async def pause(self, round: int, seconds: float) -> None:
        """Have the server run no more forward passes."""
        self._tell_no_more()
        if not self._workers.starting:
            await self._api.post("/pause_generation", seconds, body={"mode": choice(PAUSE_MODE, _MODES)})
        await self._workers.pause(round, seconds)

    async def begin(self, update: Update, seconds: float) -> None:
        """Bring the schedulers' threads into the update, and have the workers make ready."""
        self._digest = update.digest
        if not self._workers.starting:
            flush = choice(CACHE, _CACHES) == "flush"
            body = {"zmq_handles": {_KEY: ""}, "flush_cache": flush, "weight_version": str(update.version)}
            self._update = asyncio.create_task(self._api.post("/update_weights_from_ipc", None, body=body))
        await self._workers.begin(update, seconds)

    async def finish(self, round: int, seconds: float) -> None:
        """Have the workers complete the update; the server's call returns then, and says what all of them say."""
        await self._workers.finish(round, seconds)
        called = self._update is not None
        await self._leave(seconds)
        if called and choice(CHECK, _CHECKS) == "checksum":
            await self._compare(seconds)

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Have the workers forget the update; the server stays paused."""
        touched = await self._workers.abort(round, reason, seconds)
        try:
            await self._leave(seconds)
        except EngineError as error:  # it says that the version was not taken, which is wanted by now
            log.info("engine %r: %s", self.engine, error.message)
        return touched

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Have the server go on."""
        starting = self._workers.starting
        await self._workers.resume(round, content, seconds)
        if not starting:
            await self._api.post("/continue_generation", seconds, body={})
        elif content is not None:
            self._telling = asyncio.create_task(self._tell(content))

    async def wake(self, seconds: float) -> None:
        """Not known yet."""
        raise EngineError(f"engine {self.engine!r}: an SGLang server that sleeps is to be woken up by who had it sleep")

    # --- the server's call that lasts as long as the update -----------------------------------------------------------

    async def _leave(self, seconds: float) -> None:
        """Await the end of the call.

        Raises:
            CpeError: the call failed, or did not return in time.
        """
        update, self._update = self._update, None
        if update is None:
            return
        try:
            async with asyncio.timeout(seconds):
                await update
        except TimeoutError:
            raise DeadlineError(
                f"engine {self.engine!r}: update_weights_from_ipc did not return within {seconds:g} s"
            ) from None

    # --- what the server says ----------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """See that the server can be paused by us."""
        async with self._api.session() as session, session.get(_HARMLESS) as reply:
            self._api.check_key(reply)
            if reply.status == 404:
                raise EngineError(
                    f"engine {self.engine!r} at {self._workers.url} is no SGLang server that can be paused"
                )

    async def _compare(self, seconds: float) -> None:
        """Have the server hash its weights, and compare that with what it said of this version before, if it did.

        Raises:
            VerificationError: they differ.
        """
        said = await self._api.post("/weights_checker", seconds, body={"action": "checksum"})
        checksum = str(said.get("per_engine_checksum", "")) if isinstance(said, dict) else ""
        if not checksum:
            raise VerificationError(f"engine {self.engine!r} says no checksum of its weights")
        log.info("engine %r: its weights have the checksum %s", self.engine, checksum)
        before = self._checksums.get(self._digest, checksum)
        if before != checksum:
            raise VerificationError(
                f"engine {self.engine!r}: its weights have another checksum ({checksum[:16]}) than when it was last"
                f" given this version ({before[:16]})"
            )
        if self._digest:
            self._checksums[self._digest] = checksum
            for oldest in list(self._checksums)[:-_MOST_CHECKSUMS]:
                del self._checksums[oldest]

    async def _tell(self, content: VersionId) -> None:
        """Tell a server, as soon as its API is there, which version its schedulers took before that."""
        body = {"new_version": str(content), "abort_all_requests": False}
        for _ in range(_TELL_TRIES):
            try:
                await self._api.post("/update_weight_version", _TELL_SECONDS, body=body)
            except (DeadlineError, PeerLostError):
                await asyncio.sleep(_TELL_AGAIN_SECONDS)
            except CpeError as error:
                log.warning("engine %r does not say what it serves: %s", self.engine, error.message)
                return
            else:
                return

    def _tell_no_more(self) -> None:
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
