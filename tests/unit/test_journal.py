"""The journal: what it says, what is never believed of it, and what becomes of a node whose disk is not well."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.typing import EventDict
from xxhash import xxh3_128

from cpe_daemon.core.admission import History, Used
from cpe_daemon.core.journal import EngineEntry, Identity, ModelEntry, RoundEntry, State, decode, encode
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import ConfigError
from cpe_daemon.journal import Journal

SECONDS = 10.0
SHORT_SECONDS = 0.02
LIVE = Identity(VersionId("m", "r", 7), b"d" * 16)
NEXT = Identity(VersionId("m", "r", 8), b"e" * 16)
STATE = State(
    {
        "m": ModelEntry(
            History("r", {"q": Used(40), "r": Used(7, LIVE.digest)}), LIVE, [Identity(VersionId("m", "r", 6))]
        )
    },
    {"e": EngineEntry("m", 2, "current", LIVE), "f": EngineEntry("m", 1, "unknown")},
)
ROUND = RoundEntry(NEXT, {"e": LIVE, "f": None})

Logs = list[EventDict]


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file in a directory that nobody has made."""
    return tmp_path / "state" / "journal.json"


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def held(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def read(path: Path) -> State:
    return decode(held(path))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


class Disk:
    """Counts the writes, and fails or holds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: OSError | None = None
        self.writes = 0
        self.holding: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self._to_thread = asyncio.to_thread
        self._fsync = os.fsync
        monkeypatch.setattr("cpe_daemon.statefile.asyncio.to_thread", self._held)
        monkeypatch.setattr("cpe_daemon.statefile.os.fsync", self._sync)

    async def _held(self, *call: Any) -> Any:
        self.writes += 1
        self.asked.set()
        if self.holding is not None:
            await self.holding.wait()
        return await self._to_thread(*call)

    def _sync(self, fd: int) -> None:
        if self.error is not None:
            raise self.error
        self._fsync(fd)


@pytest.fixture
async def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@contextlib.asynccontextmanager
async def running(path: Path, seconds: float = SECONDS, look: State = STATE) -> AsyncIterator[Journal]:
    """A journal that writes."""
    journal = Journal(path, seconds=seconds)
    journal.connect(lambda: look)
    task = asyncio.create_task(journal.run())
    try:
        yield journal
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - of no event: it is about turns of the loop
            await asyncio.sleep(0)


# --- what is written -------------------------------------------------------------------------------------------------


async def test_journal_says_to_the_next_daemon_what_was_decided(path: Path) -> None:
    async with running(path) as journal:
        assert journal.found == State()
        assert not journal.existed
        await journal.decide(ROUND)
        assert read(path) == State(STATE.models, STATE.engines, ROUND)
        journal.over()
        await until(lambda: read(path) == STATE)
    later = Journal(path, seconds=SECONDS)
    assert (later.found, later.existed, later.trouble) == (STATE, True, "")
    assert names(path) == ["journal.json"]
    assert mode(path) == 0o640


versions = st.builds(VersionId, st.text(max_size=8), st.text(max_size=8), st.integers(0, 2**63 - 1))
identities = st.builds(Identity, versions, st.binary(max_size=16))
histories = st.builds(
    History, st.none() | st.text(max_size=8), st.dictionaries(st.text(max_size=8), st.builds(Used, st.integers(0, 99)))
)
maybe = st.none() | identities
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    st.builds(
        State,
        st.dictionaries(texts, st.builds(ModelEntry, histories, maybe, st.lists(identities, max_size=2)), max_size=3),
        st.dictionaries(texts, st.builds(EngineEntry, texts, st.integers(1, 9), texts, maybe), max_size=3),
        st.none() | st.builds(RoundEntry, identities, st.dictionaries(texts, maybe, max_size=3)),
        st.booleans(),
    )
)
def test_what_is_read_is_what_was_written(state: State) -> None:
    assert decode(encode(state)) == state


async def test_fields_of_a_later_release_do_not_hinder(path: Path) -> None:
    file = json.loads(encode(STATE))
    file["state"]["peers"] = {"n": 1}
    file["state"]["engines"]["e"]["asleep"] = True
    body = json.dumps(file["state"], separators=(",", ":"), ensure_ascii=False).encode()
    file["checksum"] = xxh3_128(body).hexdigest()
    assert decode(json.dumps(file).encode()) == STATE


# --- what is not believed --------------------------------------------------------------------------------------------

WHOLE = encode(STATE)


def flipped(name: bytes, other: bytes) -> bytes:
    assert WHOLE.count(name)
    return WHOLE.replace(name, other, 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b"\0" * 64, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 5000, "damaged"),
        (b"[]", "damaged"),
        (b'{"format": 2, "whatever": 1}', "it has format 2, and this release reads 1"),
        (b'{"format": 1}', "damaged"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        (WHOLE[:-3], "damaged"),
        (flipped(b'"number": 7', b'"number": 9'), "its checksum does not match what it says"),
        (flipped(b'"live"', b'"lime"'), "its checksum does not match what it says"),
    ],
)
async def test_file_that_is_none_of_ours_is_put_aside_and_nothing_of_it_is_believed(
    content: bytes, says: str, path: Path, logs: Logs
) -> None:
    put(path, content)
    journal = Journal(path, seconds=SECONDS)
    assert journal.found == State(lost=True)
    assert journal.existed
    said = next(entry for entry in logs if entry["event"] == "journal.unreadable")
    assert said["path"] == str(path)
    assert says in said["error"]
    assert held(said["kept_as"]) == content
    assert names(path) == [Path(said["kept_as"]).name]
    journal.connect(lambda: State(STATE.models, STATE.engines, lost=True))
    await journal.close()
    assert read(path) == State(STATE.models, STATE.engines, lost=True)  # the next daemon has to know of the loss, too
    assert Journal(path, seconds=SECONDS).found.lost
    assert len(names(path)) == 2


@given(st.data())
def test_no_damage_makes_another_state(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(WHOLE) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    damaged = WHOLE[:at] + bytes([WHOLE[at] ^ bit]) + WHOLE[at + 1 :]
    try:
        found = decode(damaged)
    except ConfigError:
        return
    assert found == STATE  # white space


def test_directory_that_cannot_be_read_ends_the_start(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot read .*journal\.json"):
        Journal(path, seconds=SECONDS)


# --- one write after another -----------------------------------------------------------------------------------------


async def test_burst_of_changes_costs_one_write_and_those_during_it_one_more(path: Path, disk: Disk) -> None:
    seen = itertools.chain([State()], itertools.repeat(STATE))
    disk.holding = asyncio.Event()
    async with running(path) as journal:
        journal.connect(lambda: next(seen))
        for _ in range(100):
            journal.note()
        await disk.asked.wait()
        for _ in range(100):
            journal.note()
        disk.holding.set()
        await until(lambda: journal.writes == 2)
        await until(lambda: not journal._dirty.is_set())
    assert disk.writes == 2
    assert read(path) == STATE


async def test_decision_is_written_at_once_with_what_came_before_it(path: Path, disk: Disk) -> None:
    async with running(path) as journal:
        journal.note()
        journal.note()
        await journal.decide(ROUND)
        assert disk.writes == 1
        assert read(path).round == ROUND


async def test_what_is_on_disk_already_is_not_written_again(path: Path, disk: Disk) -> None:
    async with running(path) as journal:
        for _ in range(3):
            journal.note()
            await until(lambda: not journal._dirty.is_set())
        await until(lambda: journal.writes == 3)
    assert disk.writes == 1


async def test_decision_is_not_answered_by_a_write_that_began_before_it(path: Path, disk: Disk) -> None:
    disk.holding = asyncio.Event()
    async with running(path) as journal:
        journal.note()
        await disk.asked.wait()
        deciding = asyncio.create_task(journal.decide(ROUND))
        await until(lambda: journal._waiting)
        disk.holding.set()
        await deciding
        assert read(path).round == ROUND


# --- a disk that is not well -----------------------------------------------------------------------------------------


async def test_full_disk_stops_no_round_and_is_told_until_it_is_over(path: Path, disk: Disk, logs: Logs) -> None:
    async with running(path) as journal:
        disk.error = OSError(28, "No space left on device")
        await journal.decide(ROUND)
        assert "No space left on device" in journal.trouble
        assert str(path) in journal.trouble
        journal.over()
        await until(lambda: journal.failures >= 2)
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["journal.not_written"]
        disk.error = None
        journal.note()
        await until(lambda: not journal.trouble)
    assert read(path) == STATE
    assert "journal.written_again" in [entry["event"] for entry in logs]
    assert names(path) == ["journal.json"]


async def test_failed_write_is_tried_again_by_itself(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpe_daemon.journal._RETRY_SECONDS", SHORT_SECONDS)
    async with running(path) as journal:
        disk.error = OSError(5, "Input/output error")
        journal.note()
        await until(lambda: journal.trouble)
        disk.error = None
        async with asyncio.timeout(SECONDS):
            while journal.trouble:  # noqa: ASYNC110 - a clock is waited for
                await asyncio.sleep(SHORT_SECONDS)
    assert read(path) == STATE


async def test_stuck_disk_costs_rounds_one_deadline_and_not_one_each(path: Path, disk: Disk, logs: Logs) -> None:
    disk.holding = asyncio.Event()
    async with running(path, SHORT_SECONDS) as journal:
        await journal.decide(ROUND)
        await until(lambda: "was not written within" in journal.trouble)
        journal.over()
        deciding = asyncio.create_task(journal.decide(ROUND))
        await asyncio.sleep(0)
        assert deciding.done()
        journal._seconds = SECONDS  # now it has to be written, however slow the disk is
        disk.holding.set()
        journal.note()
        await until(lambda: not journal.trouble)
    assert read(path).round == ROUND
    assert [entry["event"] for entry in logs if entry["event"] == "journal.not_written"] == ["journal.not_written"]


async def test_file_of_another_daemon_is_left_alone_and_told(path: Path) -> None:
    async with running(path) as journal:
        await Journal(path, seconds=SECONDS).close()
        theirs = held(path)
        await journal.decide(ROUND)
        assert "was changed since this daemon read it" in journal.trouble
        assert held(path) == theirs


async def test_journal_that_somebody_removed_is_written_anew(path: Path) -> None:
    async with running(path) as journal:
        await journal.decide(ROUND)
        os.unlink(path)
        journal.over()
        await until(lambda: journal.writes == 2)
        assert read(path) == STATE


async def test_late_write_does_not_have_the_last_word(path: Path, disk: Disk) -> None:
    async with running(path) as journal:
        journal.note()
        await until(lambda: journal.writes == 1)
        journal._seconds = SHORT_SECONDS
        disk.holding = asyncio.Event()
        await journal.decide(ROUND)
        await until(lambda: journal.trouble)
        journal.over()  # what there is now is what was written before the disk got stuck
        await until(lambda: journal.failures == 2)
        journal._seconds = SECONDS
        disk.holding.set()
        journal.note()
        await until(lambda: not journal.trouble)
        assert read(path) == STATE


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_what_follows_the_last_write_is_not_written(path: Path, disk: Disk) -> None:
    async with running(path) as journal:
        await journal.close()
        assert read(path) == STATE
        journal.connect(State)
        journal.note()
        await journal.decide(ROUND)
        journal.over()
        await asyncio.sleep(0)
    assert read(path) == STATE
    assert disk.writes == 1
