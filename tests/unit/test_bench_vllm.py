"""The clock that a benchmark puts into a vLLM server."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_meter import Clock


async def answer(scope: Any, receive: object, send: Callable[[Any], Awaitable[None]]) -> None:
    """As an application does."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"{}"})


async def no_request() -> None:
    """Nothing comes."""


async def no_one(message: object) -> None:
    """Nobody listens."""


async def test_clock_notes_each_pause_from_its_reply_to_the_call_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPE_METER", str(tmp_path / "pauses"))
    clock = Clock(answer)
    await clock({"type": "lifespan"}, no_request, no_one)
    routes = ["/cpe/resume", "/cpe/pause", "/cpe/update_weights", "/cpe/resume", "/cpe/resume", "/pause", "/resume"]
    for route in routes:
        await clock({"type": "http", "path": route}, no_request, no_one)
    noted = [json.loads(line) for line in (tmp_path / "pauses").read_text().splitlines()]
    assert len(noted) == 2
    assert all(0 < seconds < 10 for seconds in noted)
