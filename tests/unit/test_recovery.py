"""What a daemon makes of the journal of the one before it: each engine's fate, who is waited for, the bootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec import structs
from rich.console import Console
from structlog.typing import EventDict

from cpe_daemon.cli.overview import overview
from cpe_daemon.cli.tables import bootstrap_text, journal_text, lag_text
from cpe_daemon.config import BootstrapConfig, load_config
from cpe_daemon.core.admission import History, Used
from cpe_daemon.core.journal import EngineEntry, Identity, ModelEntry, RoundEntry, State, encode
from cpe_daemon.core.recovery import AWAY_SECONDS, Before, remembered, why_not_bootstrap
from cpe_daemon.core.types import VersionId
from cpe_daemon.daemon.bootstrap import Bootstrap
from cpe_daemon.daemon.chronicle import Chronicle
from cpe_daemon.daemon.recovery import Recovery
from cpe_daemon.daemon.returning import Returning
from cpe_daemon.daemon.supervision import state_line
from cpe_daemon.errors import ConfigError, CpeError, MisuseError, VersionRefusedError
from cpe_daemon.journal import Journal
from cpe_daemon.observe.metrics import Readings
from cpe_daemon.readiness import judge
from cpe_daemon.readings import read_versions
from cpe_daemon.wire.messages import EngineSpec, PushRequest
from tests.unit.fake_node import CURRENT, UNKNOWN, FakeNode, number

ONE, TWO, THREE = number(1), number(2), number(3)
DIGEST, OTHER = b"d" * 16, b"o" * 16
LIVE = Identity(TWO, DIGEST)
FOUND = State(
    {"m": ModelEntry(History("r", {"r": Used(2, DIGEST)}), LIVE)},
    {"a": EngineEntry("m", 1, "current", LIVE), "b": EngineEntry("m", 2, "unknown")},
    RoundEntry(Identity(THREE, OTHER), {"a": LIVE, "b": None}),
)
HELLO_SECONDS = 10.0
NOW = 1_700_000_000.0

Logs = list[EventDict]


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    with structlog.testing.capture_logs() as captured:
        yield captured


# --- what an engine may serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "held", "says"),
    [
        ("m", LIVE, ""),
        ("m", Identity(TWO), ""),
        ("", LIVE, ""),
        ("m", Identity(ONE, OTHER), ""),
        ("m", Identity(THREE, OTHER), ""),
        ("m", Identity(TWO, OTHER), "it holds other weights by the name of m@r#2"),
        ("m", None, "it holds no version, and m@r#2, which was live before this daemon, is not here"),
        ("", None, "it holds no version, and m@r#2"),
        ("other", None, ""),
        ("other", Identity(number(7, "other")), ""),
    ],
)
def test_engine_may_serve_a_whole_version_and_nothing_else(model: str, held: Identity | None, says: str) -> None:
    why = Before(FOUND).objection(model, held)
    assert why.startswith(says)
    assert bool(why) == bool(says)


@pytest.mark.parametrize("model", ["m", "other", ""])
def test_what_an_engine_started_with_is_not_served_if_nobody_knows_what_was_live(model: str) -> None:
    before = Before(State(lost=True))
    assert "could not be read" in before.objection(model, None)
    assert before.objection(model, Identity(ONE)) == ""


def test_nothing_was_live_on_a_new_node() -> None:
    assert Before().objection("m", None) == ""
    assert Before().models == []


def test_version_that_goes_live_takes_the_place_of_what_was() -> None:
    before = Before(FOUND)
    before.went_live(number(1, "other"))
    assert before.live("m") == LIVE
    before.went_live(THREE)
    assert (before.live("m"), before.models) == (None, [])


HELD = {"content": TWO, "digest": DIGEST}


@pytest.mark.parametrize(
    ("hello", "held", "state"),
    [
        (HELD, False, (CURRENT, TWO)),
        ({"content": ONE, "digest": OTHER}, False, (CURRENT, ONE)),
        ({"content": THREE, "digest": OTHER}, False, (CURRENT, THREE)),
        ({"content": TWO, "digest": OTHER}, True, (UNKNOWN, None)),
        ({**HELD, "touched": True}, True, (UNKNOWN, None)),
        ({"model": "m"}, True, (UNKNOWN, None)),
        ({}, True, (UNKNOWN, None)),
        ({"model": "other"}, False, (CURRENT, None)),
    ],
)
async def test_engine_that_comes_back_serves_or_is_held(
    hello: dict[str, Any], *, held: bool, state: tuple[str, VersionId | None]
) -> None:
    async with FakeNode.running(found=FOUND) as node:
        worker = node.worker("a", **hello)
        await node.idle()
        assert worker.welcome is not None
        assert worker.welcome.hold is held
        assert worker.paused is held
        assert node.states() == {"a": state}
        (*reasons,) = judge(engines=node.registry).reasons
        assert [reason.code for reason in reasons] == (["engine_unknown"] if held else [])
        if held:
            assert "stays paused until it is given a version" in reasons[0].message


async def test_engine_in_doubt_is_given_the_next_version_and_one_that_is_held_as_well() -> None:
    async with FakeNode.running(found=FOUND) as node:
        workers = [node.worker("a", **HELD, touched=True), node.worker("b", model="m"), node.worker("c", **HELD)]
        await node.publish(THREE)
        assert node.states() == dict.fromkeys("abc", (CURRENT, THREE))
        assert not any(worker.paused for worker in workers)


async def test_live_version_that_comes_again_goes_to_those_alone_that_need_it(logs: Logs) -> None:
    async with FakeNode.running(found=FOUND) as node:
        has, unsure = node.worker("has", **HELD), node.worker("unsure", content=TWO)
        await node.idle()
        record = node.stage(TWO, DIGEST)
        await node.until(lambda: record.state == "live")
        await node.idle()
        assert record.report is not None
        assert {name: one.outcome for name, one in record.report.engines.items()} == {
            "has": "current",
            "unsure": "updated",
        }
        assert "pause" not in has.steps
        assert "finish" in unsure.steps
        assert node.states() == dict.fromkeys(["has", "unsure"], (CURRENT, TWO))


async def test_version_that_every_engine_holds_already_is_live_without_a_push(logs: Logs) -> None:
    async with FakeNode.running(found=FOUND) as node:
        node.worker("has", **HELD)
        await node.idle()
        record = node.stage(TWO, DIGEST)
        await node.until(lambda: record.state == "live")
        assert "version.live_without_engines" not in [entry["event"] for entry in logs]


@pytest.mark.parametrize("model", ["m", ""])
async def test_push_of_what_is_not_here_says_how_to_bring_it_back(model: str) -> None:
    async with FakeNode.running(found=FOUND) as node:
        node.worker("late", model="m")
        with pytest.raises(MisuseError, match="m@r#2 is live, but not resident: publish it again, or set bootstrap"):
            await node.pusher.request(PushRequest(model, engines=("late",)))


async def test_engine_without_a_model_is_refused_where_several_were_live() -> None:
    other = ModelEntry(History("r", {}), Identity(number(1, "n")))
    node = FakeNode(found=State({**FOUND.models, "n": other}))
    with contextlib.closing(node.arena), pytest.raises(MisuseError, match="this node serves m, n"):
        node.worker("a")


# --- who is waited for -----------------------------------------------------------------------------------------------


def returning(node: FakeNode, found: State = FOUND) -> Returning:
    return Returning(found, node.registry, seconds=HELLO_SECONDS, clock=node.clock)


async def test_engines_of_the_daemon_before_are_waited_for_until_they_are_back(logs: Logs) -> None:
    async with FakeNode.running(found=FOUND) as node:
        waited = returning(node)
        waited.look()
        assert sorted(waited.reasons) == ["a", "b"]
        waited.begin()
        assert {"engines.awaited", "round.cut_short"} <= {entry["event"] for entry in logs}
        over = asyncio.ensure_future(waited.over())
        node.worker("a", **HELD)
        assert list(waited.missing) == ["b"]
        node.clock.now += HELLO_SECONDS - 1
        waited.look()
        await asyncio.sleep(0)
        assert not over.done()
        node.worker("b", rank=1, world_size=2, **HELD)  # whose other rank the registry misses from now on
        assert not waited.missing
        waited.look()
        await over
        assert "engine.not_returned" not in [entry["event"] for entry in logs]


async def test_engines_that_do_not_come_back_count_no_longer_unless_they_are_expected(
    tmp_path: Path, logs: Logs
) -> None:
    async with FakeNode.running(found=FOUND, state_dir=tmp_path) as node:
        await node.expected.add(EngineSpec("b", "torch"))
        waited, changes = returning(node), []
        waited.changed = lambda: changes.append(1)
        waited.begin()
        node.clock.now += HELLO_SECONDS
        waited.look()
        await waited.over()
        assert (waited.missing, changes) == ({}, [1])
        said = {entry["engine"]: entry["expected"] for entry in logs if entry["event"] == "engine.not_returned"}
        assert said == {"a": False, "b": True}
        assert [spec.name for spec in node.registry.absent] == ["b"]


async def test_nobody_is_waited_for_on_a_new_node() -> None:
    async with FakeNode.running() as node:
        waited = returning(node, State())
        waited.begin()
        await waited.over()


# --- what is written down --------------------------------------------------------------------------------------------


async def test_journal_is_told_a_digest_that_is_known_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeNode.running(state_dir=tmp_path) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        noted: list[bytes] = []
        live = node.catalogue.live
        monkeypatch.setattr(journal, "note", lambda: noted.append(one.digest if (one := live("m")) else b"none"))
        chronicle = Chronicle(journal, node.catalogue, node.registry, node.before, returning(node, State()))
        record = node.stage(TWO, b"")
        await node.until(lambda: record.state == "live")
        await node.idle()
        node.worker("a", content=TWO, model="m")
        assert noted[-1] == b""
        node.catalogue.learn(record, DIGEST)
        assert noted[-1] == DIGEST
        assert chronicle.look() == State(
            {"m": ModelEntry(History("r", {"r": Used(2, DIGEST)}), LIVE)}, {"a": EngineEntry("m", 1, "current", LIVE)}
        )


async def test_journal_is_told_versions_engines_and_rounds_as_they_are(tmp_path: Path) -> None:
    async with FakeNode.running(state_dir=tmp_path) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        writing = asyncio.create_task(journal.run())
        chronicle = Chronicle(journal, node.catalogue, node.registry, node.before, returning(node, State()))
        node.pusher.write_down(chronicle)
        node.worker("a", model="m")
        decided: list[State] = []
        loaded = node.worker("b", model="m")

        def load(step: Any) -> Any:
            if step.seq == 0:
                decided.append(Journal(journal.path, seconds=HELLO_SECONDS).found)
            return loaded.do(step)

        loaded.script["load"] = load
        for version, digest in ((ONE, OTHER), (TWO, DIGEST)):
            record = node.stage(version, digest)
            await node.until(lambda record=record: record.state == "live")  # type: ignore[misc]
            await node.idle()
        # Before the first bucket it was on the disk what was about to be done, and what each engine held.
        assert [state.round for state in decided] == [
            RoundEntry(Identity(ONE, OTHER), {"a": None, "b": None}),
            RoundEntry(LIVE, {"a": Identity(ONE, OTHER), "b": Identity(ONE, OTHER)}),
        ]
        assert decided[1].models["m"].live == Identity(ONE, OTHER)
        assert decided[1].models["m"].history == History("r", {"r": Used(2, DIGEST)})
        await journal.close()
        writing.cancel()
        state = Journal(journal.path, seconds=HELLO_SECONDS).found
        assert state == State(
            {"m": ModelEntry(History("r", {"r": Used(2, DIGEST)}), LIVE, [Identity(ONE, OTHER)])},
            {name: EngineEntry("m", 1, "current", LIVE) for name in ("a", "b")},
        )


async def test_what_was_known_stays_in_the_journal_until_it_is_known_better(tmp_path: Path) -> None:
    async with FakeNode.running(found=FOUND) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        journal.found = FOUND
        waited = returning(node)
        chronicle = Chronicle(journal, node.catalogue, node.registry, node.before, waited, now=lambda: NOW)
        found = {name: structs.replace(entry, gone_at=NOW) for name, entry in FOUND.engines.items()}
        assert chronicle.look() == State(FOUND.models, found)
        with pytest.raises(VersionRefusedError, match="has staged number 2 already"):
            node.stage(ONE, OTHER)
        with pytest.raises(VersionRefusedError, match="was staged before with other weights"):
            node.stage(TWO, OTHER)
        node.worker("a", **HELD)
        assert chronicle.look().engines["a"] == EngineEntry("m", 1, "current", LIVE)
        await node.publish(THREE)
        assert chronicle.look().models["m"].live == Identity(THREE)
        assert node.before.live("m") is None


async def test_engine_that_is_gone_for_long_is_neither_written_down_nor_awaited(tmp_path: Path) -> None:
    clock = [NOW]
    async with FakeNode.running() as node:
        waited = returning(node, State())
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        chronicle = Chronicle(journal, node.catalogue, node.registry, node.before, waited, now=lambda: clock[0])
        worker = node.worker("a", **HELD)
        node.worker("b", **HELD)
        assert [entry.gone_at for entry in chronicle.look().engines.values()] == [0.0, 0.0]
        worker.die()
        assert {name: entry.gone_at for name, entry in chronicle.look().engines.items()} == {"a": NOW, "b": 0.0}
        clock[0] += AWAY_SECONDS - 1
        said = chronicle.look()
        assert said.engines["a"].gone_at == NOW
        clock[0] += 1
        assert list(chronicle.look().engines) == ["b"]
        worker.attach()
        assert chronicle.look().engines["a"].gone_at == 0.0
    assert list(remembered(said.engines, NOW + AWAY_SECONDS - 1)) == ["a", "b"]
    assert list(remembered(said.engines, NOW + AWAY_SECONDS)) == ["b"]
    assert list(remembered(said.engines, NOW - AWAY_SECONDS)) == ["a", "b"]  # the clock was set back


async def test_time_that_an_engine_is_gone_goes_on_through_restarts(tmp_path: Path) -> None:
    entry = EngineEntry("m", 1, "unknown", None, NOW - AWAY_SECONDS + 10)
    found = State(FOUND.models, {"a": entry, "b": FOUND.engines["b"]})
    async with FakeNode.running(found=found) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        journal.found = found
        waited = returning(node, found)
        chronicle = Chronicle(journal, node.catalogue, node.registry, node.before, waited, now=lambda: NOW)
        assert {name: one.gone_at for name, one in chronicle.look().engines.items()} == {"a": entry.gone_at, "b": NOW}


async def test_engine_that_was_gone_for_long_is_not_waited_for(tmp_path: Path) -> None:
    entry = EngineEntry("m", 1, "unknown", None, time.time() - AWAY_SECONDS)
    async with recovering(tmp_path, encode(State(FOUND.models, {"a": entry, "b": FOUND.engines["b"]}))) as (_, again):
        assert list(again.returning.missing) == ["b"]


async def test_version_that_was_live_may_come_again_after_later_ones_failed(tmp_path: Path) -> None:
    history = History("s", {"r": Used(3, OTHER), "s": Used(0, OTHER)})
    found = State({"m": ModelEntry(history, LIVE)})
    async with FakeNode.running(found=found) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        journal.found = found
        Chronicle(journal, node.catalogue, node.registry, node.before, returning(node, State()))
        late = node.worker("late", model="m")
        record = node.stage(TWO, DIGEST)
        await node.until(lambda: record.state == "live")
        await node.idle()
        assert not late.paused
        assert node.catalogue.numbers.histories["m"] == History("r", history.used)


async def test_version_that_was_live_may_not_come_again_after_a_newer_one(tmp_path: Path) -> None:
    async with FakeNode.running(found=FOUND) as node:
        journal = Journal(tmp_path / "journal.json", seconds=HELLO_SECONDS)
        journal.found = FOUND
        Chronicle(journal, node.catalogue, node.registry, node.before, returning(node, State()))
        await node.publish(THREE)
        with pytest.raises(VersionRefusedError, match="has staged number 3 already"):
            node.stage(TWO, DIGEST)


# --- bootstrap -------------------------------------------------------------------------------------------------------

BASE = VersionId("m", "base", 0)


@pytest.mark.parametrize(
    ("history", "here", "held", "says"),
    [
        (History(), [], [], ""),
        (History("base", {"base": Used(0, DIGEST)}), [], [BASE], ""),
        (History(), [BASE], [], "m@base#0 came first"),
        (History(), [THREE, TWO], [], "m@r#2, m@r#3 came first"),
        (History(), [], [BASE, TWO], "engines hold m@r#2"),
        (History("base", {"base": Used(7)}), [], [], ""),  # its number is refused when it is published
        (History("r", {"r": Used(2)}), [], [], "versions of run 'r' were published since"),
    ],
)
def test_bootstrap_takes_the_place_of_nothing(
    history: History, here: list[VersionId], held: list[VersionId], says: str
) -> None:
    assert why_not_bootstrap(BASE, history, here=here, held=held).startswith(says)
    assert bool(why_not_bootstrap(BASE, history, here=here, held=held)) == bool(says)


def test_bootstrap_may_be_what_was_live_whatever_came_after_it() -> None:
    history = History("r", {"base": Used(0), "r": Used(2)})
    assert why_not_bootstrap(BASE, history, here=[], held=[BASE], live=BASE) == ""
    assert "engines hold" in why_not_bootstrap(BASE, history, here=[], held=[TWO], live=BASE)


class Publishing(Bootstrap):
    """Its thread publishes nothing, but does what the test says."""

    def __init__(self, node: FakeNode, *, settings: BootstrapConfig | None = None) -> None:
        self.look = asyncio.Event()
        self.began = asyncio.Event()
        self.go_on = threading.Event()
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        super().__init__(
            settings=settings or BootstrapConfig.model_construct(dir="/models/base", model="m", run="base", number=0),
            deadlines=node.config.deadlines,
            endpoint="ipc:///nowhere/front.sock",
            catalogue=node.catalogue,
            registry=node.registry,
            returned=self.look.wait,
        )

    def _publish(self) -> None:
        self._loop.call_soon_threadsafe(self.began.set)
        while not self.go_on.wait(0.01):
            self._progress(1, 10)
        if self.error is not None:
            raise self.error

    @property
    def code(self) -> str | None:
        return self.reason.code if self.reason is not None else None


async def test_bootstrap_waits_for_engines_publishes_and_says_so() -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node)
        running = asyncio.create_task(bootstrap.run())
        await asyncio.sleep(0)
        assert (bootstrap.state, bootstrap.code) == ("waiting", "bootstrap")
        bootstrap.look.set()
        await bootstrap.began.wait()
        assert (bootstrap.state, bootstrap.code) == ("publishing", "bootstrap")
        bootstrap.go_on.set()
        await running
        assert (bootstrap.state, bootstrap.code) == ("done", None)
        assert bootstrap.plain() == {
            "state": "done",
            "version": "m@base#0",
            "dir": "/models/base",
            "message": "m@base#0 was published from /models/base",
        }


async def test_no_bootstrap_is_nobody_s_concern() -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node, settings=BootstrapConfig())
        await bootstrap.run()
        assert (bootstrap.plain(), bootstrap.reason) == ({"state": "off"}, None)


@pytest.mark.parametrize(
    ("error", "state", "code", "says"),
    [
        (CpeError("cannot read model.safetensors"), "failed", "bootstrap_failed", "cannot read model.safetensors"),
        (ValueError("what"), "failed", "bootstrap_failed", "ValueError('what')"),
        (VersionRefusedError("number 3 was staged"), "skipped", None, "number 3 was staged"),
    ],
)
async def test_bootstrap_that_fails_keeps_the_node_from_being_ready_until_a_version_is_live(
    error: Exception, state: str, code: str | None, says: str, logs: Logs
) -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node)
        bootstrap.look.set()
        bootstrap.error = error
        bootstrap.go_on.set()
        await bootstrap.run()
        assert (bootstrap.state, bootstrap.code) == (state, code)
        assert f"bootstrap.{state}" in [entry["event"] for entry in logs]
        assert says in bootstrap.message
        await node.publish(ONE)
        assert bootstrap.reason is None


async def test_bootstrap_leaves_engines_alone_that_hold_something_else() -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node)
        running = asyncio.create_task(bootstrap.run())
        node.worker("a", model="m", content=ONE)
        bootstrap.look.set()
        await running
        assert bootstrap.state == "skipped"
        assert "engines hold m@r#1" in bootstrap.message
        assert not bootstrap.began.is_set()


async def test_bootstrap_makes_way_for_a_trainer_s_version() -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node)
        bootstrap.look.set()
        running = asyncio.create_task(bootstrap.run())
        await bootstrap.began.wait()
        await node.publish(number(1, "other"))
        assert bootstrap.state == "publishing"
        await node.publish(ONE)
        await running
        assert (bootstrap.state, bootstrap.reason) == ("skipped", None)
        assert "m@r#1 came first" in bootstrap.message


async def test_bootstrap_ends_with_the_daemon() -> None:
    async with FakeNode.running() as node:
        bootstrap = Publishing(node)
        bootstrap.look.set()
        running = asyncio.create_task(bootstrap.run())
        await bootstrap.began.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


def test_bootstrap_that_cannot_be_read_is_told_with_all_other_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "models/base": "'models/base' is relative",
        str(tmp_path / "none"): "No such file or directory",
        str(tmp_path / "empty"): r"holds no \*\.safetensors file",
    }
    for given, says in cases.items():
        overrides = {"bootstrap.dir": given, "bootstrap.model": "m", "device.slots": -1}
        with pytest.raises(ConfigError, match=rf"2 problems(.|\n)*bootstrap\.dir(.|\n)*{says}"):
            load_config(environ={}, overrides=overrides)


def test_bootstrap_needs_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ConfigError, match=r"bootstrap\.model.*needs the name of its model"):
        load_config(environ={}, overrides={"bootstrap.dir": str(tmp_path)})
    bootstrap = load_config(environ={"CPE_BOOTSTRAP__MODEL": "m"}, overrides={"bootstrap.dir": str(tmp_path)}).bootstrap
    assert (bootstrap.dir, bootstrap.model, bootstrap.run, bootstrap.number) == (str(tmp_path), "m", "bootstrap", 0)


# --- what is told of it ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recovering(tmp_path: Path, found: bytes | None) -> AsyncIterator[tuple[FakeNode, Recovery]]:
    """A node with all that belongs to its recovery; the file of its journal holds ``found``."""
    if found is not None:
        (tmp_path / "journal.json").write_bytes(found)
    config = load_config(environ={}, overrides={"state_dir": str(tmp_path), "node": "n"})
    recovery = Recovery(config)
    async with FakeNode.running(found=recovery.journal.found) as node:
        node.before = recovery.before
        node.registry.adoption.before = recovery.before
        recovery.connect(node.catalogue, node.registry, node.pusher)
        yield node, recovery


async def test_what_was_live_and_is_not_here_is_told_until_another_version_is(tmp_path: Path) -> None:
    async with recovering(tmp_path, encode(FOUND)) as (node, recovery):
        assert [(one.code, one.engine) for one in recovery.reasons] == [
            ("engine_awaited", "a"),
            ("engine_awaited", "b"),
        ]
        assert [one.code for one in recovery.warnings] == ["not_resident"]
        told = recovery.status()
        assert told["not_resident"] == [{"model": "m", "run": "r", "number": 2}]
        assert (told["awaited"], told["lost"], told["error"]) == (["a", "b"], False, None)
        assert recovery.bootstrap.plain() == {"state": "off"}
        assert "m@r#2 live, not here" in state_line(node.catalogue, node.registry)
        readings = Readings()
        node.worker("a", content=ONE, digest=OTHER)
        read_versions(readings, node.catalogue, node.registry, recovery.not_resident)
        recovery.read(readings)
        assert readings.values["cpe_live_version"] == {("m",): 2}
        assert readings.values["cpe_engine_lag_versions"] == {("a", "m"): 1}
        assert readings.values["cpe_journal_failing"] == {(): False}
        node.worker("b", world_size=1, **HELD)
        assert recovery.reasons == []
        await node.publish(THREE)
        assert recovery.warnings == []
        assert recovery.status()["not_resident"] == []


async def test_journal_that_was_lost_is_told_until_a_version_is_live(tmp_path: Path) -> None:
    async with recovering(tmp_path, b"{") as (node, recovery):
        assert [one.code for one in recovery.warnings] == ["journal_lost"]
        assert recovery.status()["lost"]
        held = node.worker("a", model="m")
        assert held.paused
        await node.publish(THREE)
        assert recovery.warnings == []
        assert not held.paused


async def test_loss_of_a_journal_is_made_good_when_every_engine_holds_what_is_live(tmp_path: Path) -> None:
    async with recovering(tmp_path, b"{") as (node, recovery):
        recovery.returning.begin()
        journal = recovery.journal

        def lost() -> bool:
            return journal._look().lost

        held, other = node.worker("a", model="m"), node.worker("b", model="other")
        await node.publish(THREE)
        assert not held.paused
        recovery.returning._seconds = 0.0
        recovery.returning.look()
        assert recovery.returning.settled
        assert lost(), "one holds nothing, and nobody knows whether it should"
        assert other.paused
        await node.publish(number(1, "other"))
        assert not lost()
        assert (recovery.status()["lost"], recovery.warnings) == (False, [])
        await journal.close()
        assert not Journal(journal.path, seconds=HELLO_SECONDS).found.lost


@pytest.mark.parametrize(
    ("settled", "held", "live", "good"),
    [
        (True, [LIVE], ["m"], True),
        (False, [LIVE], ["m"], False),
        (True, [], ["m"], False),
        (True, [LIVE, None], ["m"], False),
        (True, [LIVE], ["other"], False),
    ],
)
def test_loss_is_over_when_nothing_is_left_to_be_known(
    settled: bool, held: list[Identity | None], live: list[str], good: bool
) -> None:
    before = Before(State(lost=True))
    assert before.make_good(settled=settled, held=held, live=live) is good
    assert before.lost is not good
    assert bool(before.objection("m", None)) is not good
    assert not Before(State()).make_good(settled=settled, held=held, live=live)


async def test_new_node_has_nothing_to_tell(tmp_path: Path) -> None:
    async with recovering(tmp_path, None) as (_, recovery):
        assert (recovery.reasons, recovery.warnings) == ([], [])


STATUS: dict[str, Any] = {
    "versions": [],
    "journal": {
        "not_resident": [{"model": "m", "run": "r", "number": 2}],
        "awaited": ["e0", "e1"],
        "error": "cannot write",
    },
    "bootstrap": {"state": "publishing", "version": "m@base#0", "percent": 40, "message": ""},
}


def test_status_shows_what_the_journal_knows_that_is_not_here() -> None:
    assert journal_text(STATUS).splitlines() == [
        "m@r#2 is live, not resident: publish it again or set bootstrap",
        "waits for e0, e1, attached before the restart",
        "NOT WRITTEN: cannot write",
    ]
    assert bootstrap_text(STATUS) == "publishing, 40%: m@base#0"
    assert lag_text(STATUS, {"model": "m", "content": "m@r#1"}) == "1"
    assert lag_text(STATUS, {"model": "m", "content": "m@r#2"}) == "0"
    screen = Console(file=io.StringIO(), width=120)
    screen.print(overview(STATUS, now=datetime(2026, 1, 1, tzinfo=UTC), fold=True))
    assert isinstance(screen.file, io.StringIO)
    assert "m@r#2 is live, not resident" in screen.file.getvalue()
    assert "publishing, 40%" in screen.file.getvalue()


@pytest.mark.parametrize(
    "status", [{}, {"journal": {}, "bootstrap": {"state": "off"}}, {"journal": [], "bootstrap": 1}]
)
def test_status_of_a_daemon_that_says_nothing_of_it_is_shown(status: dict[str, Any]) -> None:
    assert (journal_text(status), bootstrap_text(status)) == ("", "")
