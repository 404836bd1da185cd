"""The daemon's half for vLLM: pauses and resumes a server by its API; its workers load over their own links."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any, Final

import aiohttp

from cpe_daemon.core.driver import Update, Workers
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import DeadlineError, EngineError, PeerLostError
from inference_plugins.server_api import ServerApi, choice

API_KEY: Final = "CPE_VLLM_API_KEY"
CA_FILE: Final = "CPE_VLLM_CA_FILE"
PAUSE_MODE: Final = "CPE_VLLM_PAUSE_MODE"
CACHE: Final = "CPE_VLLM_CACHE"

_PREFIXES: Final = ("/cpe", "")
"""Of our own routes, and of vLLM's for developers; the first that answers is used."""
_ONE_CALL: Final = 2
"""The first version of our own routes in which one call is an update: the others take three."""

_MODES: Final = ("keep", "wait", "abort")
_CACHES: Final = ("recompute", "reset", "keep")


class VllmDriver:
    """One server (see `cpe_daemon.core.driver.Driver`).

    While the server starts, its workers take a version before its API is there: then there is nothing to pause.

    What holds for all servers of a node is in the daemon's environment: ``CPE_VLLM_API_KEY``; ``CPE_VLLM_CA_FILE``,
    for https; ``CPE_VLLM_PAUSE_MODE``: requests in flight wait (``keep``), end first (``wait``) or are aborted;
    ``CPE_VLLM_CACHE``: what becomes of keys and values that other weights made: requests in flight compute theirs
    again (``recompute``), only those of ended requests are dropped (``reset``), or none (``keep``).

    Args:
        engine: its name.
        workers: of the engine.
    """

    def __init__(self, engine: str, workers: Workers) -> None:
        self.engine = engine
        self._workers = workers
        self._api = ServerApi(engine, workers, kind="vllm", keys=(API_KEY,), ca_file=CA_FILE)
        self._calls: list[asyncio.Task[None]] = []
        """Those to the server that end with the update."""
        self._version: VersionId | None = None
        """What it is told that it holds, once it does."""
        self._fresh = False
        """Whether nothing is left of what other weights made."""
        self._prefix: str | None = None
        self._one_call = False
        self._arrived = False

    @property
    def arrived(self) -> bool:
        """Whether the server has answered since its workers were let serve, or need not (`Arriving`)."""
        return self._arrived or self._workers.starting

    async def answers(self) -> bool:
        """Whether the server takes calls by now: its workers are there first."""
        try:
            await self._api.within("/is_paused", None, self._look())
        except PeerLostError:
            return False
        except EngineError:  # whoever calls it next hears why
            self._arrived = True
        return True

    async def check(self, round: int, seconds: float) -> None:
        """See that the server can be paused, and have the workers say whether a version fits."""
        if not self._workers.starting:
            choice(PAUSE_MODE, _MODES)
            choice(CACHE, _CACHES)
            await self._api.within("/is_paused", seconds, self._look())
        await self._workers.check(round, seconds)

    async def pause(self, round: int, seconds: float) -> None:
        """Have the server run no more forward passes. What can be said before that is: a pause is to be short."""
        self._fresh = False
        if self._workers.starting:
            await self._workers.pause(round, seconds)
            return
        paused = {"mode": choice(PAUSE_MODE, _MODES), "clear_cache": "false"}
        if await self._api.within("/is_paused", seconds, self._known()):
            paused["session"] = "true"
        else:
            await self._post("/start_weight_update", seconds)
        await _both(self._post("/pause", seconds, params=paused), self._workers.pause(round, seconds))

    async def begin(self, update: Update, seconds: float) -> None:
        """Bring the workers' threads into the update, and have them make ready.

        vLLM does one thing after the other: once the workers are in the update, what it is asked for comes after that.
        """
        self._version = update.version
        if not self._workers.starting:
            self._calls = [asyncio.create_task(self._update())]
        await self._workers.begin(update, seconds)
        if self._calls and not self._one_call:
            self._calls.append(asyncio.create_task(self._drop(None)))

    async def finish(self, round: int, seconds: float) -> None:
        """Have the workers complete the update; the server's call returns then."""
        await self._workers.finish(round, seconds)
        self._fresh = await self._left(seconds, {"weight_version": str(self._version)})

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        """Have the workers undo what they can; the server stays paused."""
        try:
            touched = await self._workers.abort(round, reason, seconds)
            await self._left(seconds, {})
        finally:
            await self._api.part()
        return touched

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        """Have the server go on, and tell the workers meanwhile: what they hold is whole by now."""
        if self._workers.starting:
            self._arrived = False
            await self._workers.resume(round, content, seconds)
            return
        try:
            await _both(self._workers.resume(round, content, seconds), self._resume(content, seconds))
        finally:
            await self._api.part()

    async def _resume(self, content: VersionId | None, seconds: float) -> None:
        """Have the server go on; it may have been paused by a daemon before this one."""
        if await self._api.within("/is_paused", seconds, self._known()):
            body = {"cache": "keep" if self._fresh else choice(CACHE, _CACHES)}
            await self._post("/resume", seconds, body=body | ({"weight_version": str(content)} if content else {}))
            return
        if not self._fresh:
            await self._drop(seconds)
        await self._post("/resume", seconds)

    async def wake(self, seconds: float) -> None:
        """Not known yet."""
        raise EngineError(f"engine {self.engine!r}: a vLLM server that sleeps is to be woken up by who had it sleep")

    # --- the server's call that lasts as long as the update -----------------------------------------------------------

    async def _update(self) -> None:
        if await self._known():
            await self._post("/update", None, params={"cache": choice(CACHE, _CACHES)})
        else:
            await self._post("/update_weights", None, body={"update_info": {}})

    async def _left(self, seconds: float, news: Mapping[str, str]) -> bool:
        """Await the end of the update and of what was asked for meanwhile, and of the session; False if there is none.

        Args:
            seconds: at the most.
            news: what the server holds now, if that is another version than before.

        Raises:
            CpeError: a call failed, or did not return in time.
        """
        calls, self._calls = self._calls, []
        if not calls:
            return False
        if not self._one_call:
            calls.append(asyncio.create_task(self._post("/finish_weight_update", None, body=news)))
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*calls)
        except TimeoutError:
            raise DeadlineError(f"engine {self.engine!r}: update_weights did not return within {seconds:g} s") from None
        finally:
            for call in calls:
                call.cancel()
        return True

    async def _drop(self, seconds: float | None) -> None:
        """Have the server forget what other weights made, as far as it is to."""
        cache = choice(CACHE, _CACHES)
        if cache != "keep":
            recompute = str(cache == "recompute").lower()
            await self._post("/reset_prefix_cache", seconds, params={"reset_running_requests": recompute})

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _post(
        self,
        path: str,
        seconds: float | None,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        """Call the server."""

        async def call() -> None:
            await self._known()
            await self._api.posted(await self._api.kept(), f"{self._prefix}{path}", path, params=params, body=body)

        await self._api.within(path, seconds, call())

    async def _known(self) -> bool:
        """Find the server's routes, if they are not known; whether an update is one call."""
        if self._prefix is None:
            await self._look()
        return self._one_call

    async def _look(self) -> None:
        """See which routes the server has: it may have been started again, with others."""
        async with self._api.session() as session:
            for prefix in _PREFIXES:
                async with session.get(f"{prefix}/is_paused") as reply:
                    self._api.check_key(reply)
                    if reply.status != 404:
                        self._prefix, self._one_call = prefix, bool(prefix) and await _version(reply) >= _ONE_CALL
                        self._arrived = True
                        return
        raise EngineError(
            f"engine {self.engine!r} at {self._workers.url} cannot be paused by its API: start vLLM with"
            " VLLM_PLUGINS=cpe, or with VLLM_SERVER_DEV_MODE=1"
        )


async def _version(reply: aiohttp.ClientResponse) -> int:
    """Of our own routes, as the server says."""
    try:
        said = json.loads(await reply.read())
    except ValueError:
        return 0
    version = said.get("version") if isinstance(said, dict) else 0
    return version if isinstance(version, int) else 0


async def _both(one: Awaitable[None], other: Awaitable[None]) -> None:
    """Await two at once, to their ends; raise what the first of them raised that failed."""
    for failure in await asyncio.gather(one, other, return_exceptions=True):
        if failure is not None:
            raise failure
