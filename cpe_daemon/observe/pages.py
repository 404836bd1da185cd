"""The pages of the HTTP listener: who is asked for each, and how the answer becomes a status of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from cpe_daemon.observe.http import Answer, Paced, Page, as_json

OPENMETRICS: Final = "application/openmetrics-text"
_UNAVAILABLE: Final = 503
_PACE_SECONDS: Final = 0.05
"""A page that takes milliseconds is made 20 times a second at most; probes wait for nobody."""


def make_pages(
    *,
    metrics: Callable[[str], Awaitable[tuple[bytes, str]]],
    health: Callable[[], list[str]],
    readiness: Callable[[], Mapping[str, Any]],
    status: Callable[[], Mapping[str, Any]],
) -> dict[str, Page]:
    """Return the pages by path. All functions are called on the event loop.

    Args:
        metrics: by what is accepted, `OPENMETRICS` or nothing, the text and its content type.
        health: what is wrong with the daemon itself; empty if nothing is.
        readiness: plain values, of which ``ready`` decides.
        status: plain values.
    """

    async def metrics_page(accept: str) -> Answer:
        return Answer(*await metrics(accept))

    async def health_page(_: str) -> Answer:
        """That it is answered says that the loop goes round."""
        reasons = health()
        return as_json({"healthy": not reasons, "reasons": reasons}, _UNAVAILABLE if reasons else 200)

    async def readiness_page(_: str) -> Answer:
        verdict = readiness()
        return as_json(verdict, 200 if verdict["ready"] else _UNAVAILABLE)

    async def status_page(_: str) -> Answer:
        return await asyncio.to_thread(as_json, status())

    return {
        "/metrics": Paced(metrics_page, _PACE_SECONDS, [OPENMETRICS]),
        "/healthz": health_page,
        "/readyz": readiness_page,
        "/status": Paced(status_page, _PACE_SECONDS),
    }
