"""The engines that an operator expects: what is taken, what is kept over a restart, and what is never guessed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from cpe_daemon import statefile
from cpe_daemon.engines.expected import Expected, check_fit
from cpe_daemon.errors import BusyError, ConfigError, DeadlineError, MisuseError, ResourceError
from cpe_daemon.wire.messages import EngineSpec

KINDS = ("torch", "vllm")
TORCH = EngineSpec("e0", "torch")
VLLM = EngineSpec("v0", "vllm", "policy", "http://127.0.0.1:8000", 8)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file in a directory that nobody has made."""
    return tmp_path / "state" / "engines.json"


def expected(path: Path, kinds: tuple[str, ...] = KINDS) -> Expected:
    return Expected(path, kinds)


def held(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def is_there(path: Path) -> bool:
    return path.exists()


def touched(path: Path) -> int:
    return path.stat().st_mtime_ns


# --- kept over restarts ----------------------------------------------------------------------------------------------


async def test_nothing_is_expected_and_nothing_is_written_at_first(path: Path) -> None:
    assert list(expected(path)) == []
    assert not is_there(path.parent)


async def test_engines_are_expected_after_a_restart(path: Path) -> None:
    first = expected(path)
    await first.add(TORCH)
    await first.add(VLLM)
    assert list(first) == list(expected(path)) == [TORCH, VLLM]
    await expected(path).remove("e0")
    assert list(expected(path)) == [VLLM]


async def test_file_is_the_daemon_s_alone_and_says_its_format(path: Path) -> None:
    await expected(path).add(TORCH)
    assert os.stat(path.parent).st_mode & 0o777 == 0o750
    assert os.stat(path).st_mode & 0o777 == 0o640
    assert json.loads(held(path)) == {"format": 1, "engines": [{"name": "e0", "kind": "torch"}]}
    assert os.listdir(path.parent) == ["engines.json"]


async def test_same_engine_again_is_no_change(path: Path) -> None:
    engines = expected(path)
    await engines.add(TORCH)
    before = touched(path)
    await engines.add(TORCH)
    assert touched(path) == before
    await engines.remove("unheard-of")
    assert touched(path) == before


async def test_several_at_once_are_all_kept(path: Path) -> None:
    engines = expected(path)
    specs = [EngineSpec(f"e{index}", "torch") for index in range(8)]
    await asyncio.gather(*(engines.add(spec) for spec in specs))
    assert list(expected(path)) == specs


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (EngineSpec("", "torch"), "name of 1 to 256"),
        (EngineSpec("n" * 257, "torch"), "name of 1 to 256"),
        (EngineSpec("e\n", "torch"), "printable"),
        (EngineSpec(" e", "torch"), "printable"),
        (EngineSpec("e", ""), "needs a kind"),
        (EngineSpec("e", "sglang"), "no plugin for engines of kind 'sglang' is installed; there is: torch, vllm"),
        (EngineSpec("e", "torch", "m" * 257), "model's name"),
        (EngineSpec("e", "torch", world_size=-1), "world size of -1"),
        (EngineSpec("e", "torch", world_size=4097), "world size of 4097"),
    ],
)
async def test_terms_that_no_engine_has_are_refused(spec: EngineSpec, says: str, path: Path) -> None:
    engines = expected(path)
    with pytest.raises(MisuseError, match=says):
        await engines.add(spec)
    assert list(engines) == []
    assert not is_there(path)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://gpu-17.cluster:30000/v1", "http://[::1]:8000/", "unix:///run/vllm/v.sock"]
)
async def test_url_of_a_server_is_taken(url: str, path: Path) -> None:
    await expected(path).add(EngineSpec("v", "vllm", url=url))


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost:8000",
        "ftp://127.0.0.1:8000",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:http",
        "http://:8000",
        "http:///x",
        "http://[::1:8000",
        "http://a b:8000",
        "http://a\n:8000",
        "http://user:secret@a:8000",
        "http://a:8000/?token=1",
        "http://a:8000/#x",
        "unix://run/v.sock",
        "unix:///",
        "unix:///run/v.sock?token=1",
    ],
)
async def test_url_of_no_server_is_refused(url: str, path: Path) -> None:
    with pytest.raises(MisuseError, match="write http://HOST:PORT"):
        await expected(path).add(EngineSpec("v", "vllm", url=url))


async def test_engine_that_is_expected_otherwise_is_not_replaced_silently(path: Path) -> None:
    engines = expected(path)
    await engines.add(TORCH)
    with pytest.raises(MisuseError, match="expected already, otherwise; say `cpe engine remove e0` first"):
        await engines.add(EngineSpec("e0", "torch", "policy"))
    assert list(engines) == list(expected(path)) == [TORCH]


async def test_number_of_engines_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpe_daemon.engines.expected._MAX_ENGINES", 1)
    engines = expected(path)
    await engines.add(TORCH)
    with pytest.raises(BusyError, match="1 engines are expected here already"):
        await engines.add(VLLM)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"kind": "torch"}, "with kind vllm and has kind torch"),
        ({"model": "other"}, "with model policy and has model other"),
        ({"world_size": 4}, "with world size 8 and has world size 4"),
        (
            {"kind": "torch", "model": "x", "world_size": 1},
            "kind vllm, model policy, world size 8 and has kind torch, model x, world size 1",
        ),
    ],
)
def test_engine_that_is_another_one_is_refused(engine: dict[str, Any], says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        check_fit(VLLM, **{"kind": "vllm", "model": "policy", "world_size": 8, **engine})


@pytest.mark.parametrize("model", ["policy", ""])
def test_engine_as_expected_or_that_leaves_it_open_fits(model: str) -> None:
    check_fit(VLLM, kind="vllm", model=model, world_size=8)
    check_fit(TORCH, kind="torch", model=model, world_size=3)


# --- a file that is not as it should be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"{}", "is damaged .*missing required field `format`"),
        (b'{"format": 1}', "is damaged .*missing required field `engines`"),
        (b'{"format": 1, "engines": [{"name": "e"}]}', r"is damaged .*`kind`.*\$.engines\[0\]"),
        (b'{"format": 1, "engines": {}}', "is damaged"),
        (b'{"format": 1, "engines": [], "fleet": 3}', "is damaged .*unknown field `fleet`"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": 2, "hosts": {}}', "has format 2, and this release reads 1: upgrade, or"),
        (b'{"format": 1, "engines": [{"name": "", "kind": "torch"}]}', "needs a name"),
        (b'{"format": 1, "engines": [{"name": "e", "kind": "vllm", "url": "x"}]}', "'x' is not a URL"),
        (
            b'{"format": 1, "engines": [{"name": "e", "kind": "torch"}, {"name": "e", "kind": "vllm"}]}',
            "names e more than once",
        ),
    ],
)
async def test_broken_file_ends_the_start_and_says_the_mend(content: bytes, says: str, path: Path) -> None:
    put(path, content)
    with pytest.raises(ConfigError, match=says) as caught:
        expected(path)
    assert str(path) in caught.value.message
    assert "remove it and add the engines anew" in caught.value.message
    assert held(path) == content


async def test_file_that_cannot_be_read_ends_the_start(path: Path) -> None:
    os.makedirs(path)
    with pytest.raises(ConfigError, match=r"cannot read .*engines.json: Is a directory"):
        expected(path)


async def test_engine_whose_plugin_is_gone_stays_expected_and_says_so(path: Path) -> None:
    await expected(path).add(VLLM)
    later = expected(path, ("torch",))
    assert list(later) == [VLLM]
    assert later.why_absent(VLLM) == "expected, but no plugin for engines of kind 'vllm' is installed"
    assert later.why_absent(TORCH) == "expected, but none of its workers has attached to this daemon"


async def test_file_that_somebody_else_has_changed_is_left_as_it_is(path: Path) -> None:
    ours, theirs = expected(path), expected(path)
    await theirs.add(TORCH)
    with pytest.raises(BusyError, match="was changed since this daemon read it"):
        await ours.add(VLLM)
    assert list(ours) == []
    assert list(expected(path)) == [TORCH]


async def test_directory_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match="Not a directory"):
        expected(tmp_path / "state" / "engines.json")
    engines = expected(tmp_path / "later" / "engines.json")
    (tmp_path / "later").write_text("a file")
    with pytest.raises(ResourceError, match=r"cannot write .*: File exists; it is as it was"):
        await engines.add(TORCH)
    assert list(engines) == []


async def test_write_that_fails_leaves_the_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = expected(path)
    await engines.add(TORCH)
    before = held(path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpe_daemon.statefile.os.fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        await engines.add(VLLM)
    assert list(engines) == [TORCH]
    assert held(path) == before
    assert os.listdir(path.parent) == ["engines.json"]


async def test_stuck_disk_is_a_deadline(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = expected(path)
    asked, release = asyncio.Event(), asyncio.Event()

    async def stuck(*_: object) -> None:
        asked.set()
        await release.wait()

    monkeypatch.setattr(statefile, "_WRITE_SECONDS", 0.01)
    monkeypatch.setattr("cpe_daemon.statefile.asyncio.to_thread", stuck)
    with pytest.raises(DeadlineError, match=r"was not written within 0\.01 s"):
        await engines.add(TORCH)
    assert asked.is_set()
    assert list(engines) == []
