"""Routes of our own in vLLM's server, for pausing and updating without its routes for developers.

An entry point of ``vllm.endpoint_plugins``; vLLM loads it if ``VLLM_PLUGINS`` names ``cpe``. vLLM has its ``--api-key``
guard ``/v1`` and the like, not what plugins add, nor its routes for developers: these routes ask for the same key
themselves. `attach` offers them for an engine in its own process.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Query
from starlette.datastructures import State

from inference_plugins.vllm.compat import pause
from inference_plugins.vllm.keys import Keys

PREFIX: Final = "/cpe"
VERSION: Final = 2
"""Of these routes, as ``/is_paused`` says it: since 2 there is ``/update``, and ``/resume`` ends what it began."""

_CACHES: Final = ("keep", "reset", "recompute")


class CpeEndpoints:
    """What vLLM makes when it starts its server (its ``EndpointPlugin``)."""

    name = "cpe"
    required_tasks = None

    def __init__(self) -> None:
        self._client: Any = None
        self._keys = Keys()
        self._session = False
        """Whether a session was begun by `pause`, and not ended yet."""

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        router = APIRouter(prefix=PREFIX, dependencies=[Depends(self._admit)])
        router.get("/is_paused")(self.is_paused)
        for path, route in (
            ("/pause", self.pause),
            ("/resume", self.resume),
            ("/update", self.update),
            ("/start_weight_update", self.start_weight_update),
            ("/start_draft_weight_update", self.start_draft_weight_update),
            ("/update_weights", self.update_weights),
            ("/finish_weight_update", self.finish_weight_update),
            ("/reset_prefix_cache", self.reset_prefix_cache),
        ):
            router.post(path)(route)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep the way to the engine, None where there is none, and the server's keys."""
        self.serve(engine_client, Keys.of_server(args))

    def serve(self, engine_client: Any, keys: Keys) -> None:
        """Call an engine for whoever shows one of these keys."""
        self._client, self._keys = engine_client, keys

    async def _admit(self, authorization: Annotated[str | None, Header()] = None) -> None:
        if not self._keys.admit(authorization):
            raise HTTPException(401, "Unauthorized")

    @property
    def _engine(self) -> Any:
        if self._client is None:
            raise HTTPException(503, "this server has no engine")
        return self._client

    async def is_paused(self) -> dict[str, Any]:
        """Whether the scheduler is paused."""
        return {"is_paused": await self._engine.is_paused(), "version": VERSION}

    async def pause(
        self, mode: Annotated[str, Query()] = "keep", clear_cache: bool = False, session: bool = False
    ) -> dict[str, str]:
        """Run no more forward passes; if it is asked for, begin a session before that."""
        if session:
            await self._engine.start_weight_update()
            self._session = True
        await pause(self._engine, mode, clear_cache=clear_cache)
        return {"status": "paused"}

    async def update(self, cache: Annotated[str, Query()] = "keep") -> dict[str, str]:
        """Stay in the update until it has ended, and drop what other weights made, as far as is asked for."""
        await asyncio.gather(self.update_weights({}), self._drop(cache))  # the engine does one after the other
        return {"status": "ended"}

    async def resume(
        self,
        weight_version: Annotated[str | None, Body(embed=True)] = None,
        cache: Annotated[str, Body(embed=True)] = "keep",
    ) -> dict[str, str]:
        """Go on, with what other weights made dropped, and as this version, if they are given; end a session."""
        engine = self._engine
        await self._drop(cache)
        if weight_version is not None and hasattr(engine, "update_weight_version"):
            await asyncio.gather(engine.update_weight_version(weight_version), engine.resume_generation())
        else:
            await engine.resume_generation()
        if self._session:
            self._session = False
            await engine.finish_weight_update()
        return {"status": "resumed"}

    async def _drop(self, cache: str) -> None:
        if cache not in _CACHES:
            raise HTTPException(422, f"cache is {cache!r}; it may be {', '.join(_CACHES)}")
        if cache != "keep":
            await self._engine.reset_prefix_cache(cache == "recompute")

    async def start_weight_update(self) -> dict[str, str]:
        """Begin a session."""
        await self._engine.start_weight_update()
        return {"status": "started"}

    async def start_draft_weight_update(self) -> dict[str, str]:
        """Begin a session for the draft model."""
        await self._engine.start_draft_weight_update()
        return {"status": "started"}

    async def update_weights(self, update_info: Annotated[dict[str, Any], Body(embed=True)]) -> dict[str, str]:
        """Stay in the update until it has ended."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(request=WeightTransferUpdateRequest(update_info=update_info))
        return {"status": "ended"}

    async def finish_weight_update(
        self, weight_version: Annotated[str | None, Body(embed=True)] = None
    ) -> dict[str, str]:
        """End a session, and note which version came, if this vLLM can."""
        engine = self._engine
        self._session = False
        if weight_version is not None and hasattr(engine, "update_weight_version"):
            await engine.finish_weight_update(weight_version)
        else:
            await engine.finish_weight_update()
        return {"status": "finished"}

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> dict[str, bool]:
        """Drop what other weights made."""
        return {"success": bool(await self._engine.reset_prefix_cache(reset_running_requests))}
