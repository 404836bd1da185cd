"""The pages of the HTTP listener: who is asked for each, how often, and how the answer becomes a status of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final

from cpe_daemon.observe.http import Answer, Page, as_json

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


class Paced:
    """A page that is made once at a time, and not more often than every ``seconds``.

    However many ask meanwhile, they wait for one and the same answer, which is begun after the last of them has asked.

    Args:
        page: the page; called with one of ``kinds``, or with nothing.
        seconds: between two answers.
        kinds: media types that a request may accept, and then gets an answer of its own kind.
    """

    def __init__(self, page: Page, seconds: float, kinds: Collection[str] = ()) -> None:
        self._page = page
        self._seconds = seconds
        self._kinds = kinds
        self._turn = asyncio.Lock()
        self._next = 0.0
        self._begun = 0
        self._made: dict[str, tuple[int, Answer]] = {}
        """By kind, the last answer and how many had been begun with it."""

    async def __call__(self, accept: str) -> Answer:
        """The page, in its turn."""
        kind = next((kind for kind in self._kinds if kind in accept), "")
        asked = self._begun
        async with self._turn:
            number, answer = self._made.get(kind, (0, None))
            if answer is None or number <= asked:
                answer = await self._make(kind)
            return answer

    async def _make(self, kind: str) -> Answer:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._next - loop.time())
        self._begun += 1
        number = self._begun
        try:
            answer = await self._page(kind)
        finally:
            self._next = loop.time() + self._seconds
        self._made[kind] = number, answer
        return answer
