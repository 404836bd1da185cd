"""Engines that are asleep when a version is pushed: passed over, refused, or woken up, as push.asleep says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import CpeError, EngineError
from cpe_daemon.push.driving import drive


async def rouse(engines: Iterable[Engine], seconds: float | None) -> dict[Engine, CpeError]:
    """Wake up those that sleep; return the ones that sleep on, each with the reason.

    Args:
        engines: those that a version is about to be pushed into.
        seconds: how long each may take; None: they are not to be woken up.
    """
    asleep = [engine for engine in engines if engine.asleep]
    if seconds is None:
        return {engine: EngineError(f"engine {engine.name!r} is asleep") for engine in asleep}
    errors = await asyncio.gather(*(_wake(engine, seconds) for engine in asleep))
    return {engine: error for engine, error in zip(asleep, errors, strict=True) if error is not None}


async def _wake(engine: Engine, seconds: float) -> CpeError | None:
    error = await drive(engine, "wake up", lambda: engine.driver.wake(seconds), seconds)
    if error is not None:
        return error
    return EngineError(f"engine {engine.name!r} is asleep still") if engine.asleep else None
