"""Calls to an engine's driver, which may be anybody's plugin: each has an end, and an error of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import CpeError, DeadlineError, EngineError

log = structlog.get_logger(__name__)

MARGIN_SECONDS: Final = 1.0


async def drive(engine: Engine, what: str, work: Callable[[], Awaitable[object]], seconds: float) -> CpeError | None:
    """Have an engine's driver do something; return what went wrong, if anything did. Nothing is raised.

    Args:
        engine: whose.
        what: it does, as a verb; for the error and the log.
        work: calls the driver.
        seconds: the workers' own deadline. A driver gets a little more, so that the error that arrives is the one that
            names the worker; one that has no deadline of its own ends here.
    """
    try:
        async with asyncio.timeout(seconds + MARGIN_SECONDS):
            await work()
    except CpeError as error:  # before TimeoutError: a DeadlineError is one too, and knows who was late
        return error
    except TimeoutError:
        return DeadlineError(f"engine {engine.name!r} did not {what} within {seconds:g} s")
    except Exception as error:  # task boundary: a plugin's bug concerns its engine alone, and not the daemon
        log.exception("engine.driver_failed", engine=engine.name, phase=what)
        return EngineError(f"engine {engine.name!r} could not {what}: {type(error).__name__}: {error}")
    return None


async def let_serve(engine: Engine, round: int, seconds: float) -> None:
    """Resume an engine that holds what it should: a worker of it may have been left paused by a lost round.

    One that starts says no if it is to wait for a version.
    """
    error = await drive(engine, "resume", lambda: engine.driver.resume(round, engine.content, seconds), seconds)
    if engine.starting and isinstance(error, EngineError):
        log.info("engine.waits", engine=engine.name, why=error.message)
    elif error is not None:
        log.warning("engine.resume_failed", engine=engine.name, error=error.message)
