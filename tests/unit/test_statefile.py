"""A small file that is replaced whole: what a stuck disk and a killed process leave."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from cpe_daemon.errors import DeadlineError
from cpe_daemon.statefile import StateFile

SHORT_SECONDS = 0.01
SECONDS = 10.0


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


async def test_write_that_was_given_up_ends_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, calls, to_thread = asyncio.Event(), [], asyncio.to_thread

    async def held(*call: Any) -> Any:
        calls.append(call[2])
        await go_on.wait()
        return await to_thread(*call)

    monkeypatch.setattr("cpe_daemon.statefile.asyncio.to_thread", held)
    file = StateFile(tmp_path / "x.json")
    with pytest.raises(DeadlineError, match="is its disk well"):
        await file.replace(b"one", SHORT_SECONDS)
    assert file.stuck
    with pytest.raises(DeadlineError):
        await file.replace(b"two", SHORT_SECONDS)
    assert calls == [b"one"]
    later = asyncio.create_task(file.replace(b"three", SECONDS))
    await asyncio.sleep(0)
    go_on.set()
    await later
    assert calls == [b"one", b"three"]  # and the first one was not taken for a stranger's
    assert (file.content, file.stuck) == (b"three", False)
    assert names(tmp_path) == ["x.json"]


async def test_what_a_killed_process_was_about_to_write_is_removed(tmp_path: Path) -> None:
    for name in (".x.json-abc", "x.json", ".y.json-abc"):
        (tmp_path / name).write_text("half")
    StateFile(tmp_path / "x.json")
    assert names(tmp_path) == [".y.json-abc", "x.json"]
