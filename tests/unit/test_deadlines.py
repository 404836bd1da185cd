"""Every wait of a push ends at its deadline, at the default that ships, and says who was late. Time is virtual.

docs/DEADLINES.md lists all waits, and `cpe_daemon.config.waits` the tests that exercise them.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cpe_daemon.config.deadlines import DeadlinesConfig
from cpe_daemon.config.waits import WAITS, Wait, seconds_of
from cpe_daemon.core.types import VersionId
from cpe_daemon.errors import CpeError, DeadlineError
from cpe_daemon.observe.inventory import INSTRUMENTS
from cpe_daemon.push.retries import Retries
from tests.unit.fake_node import CURRENT, QUARANTINED, FakeNode, FakeWorker, number

ROOT = Path(__file__).parents[2]
ONE, TWO = number(1), number(2)
DEFAULTS = DeadlinesConfig()
NO_WAITS = {
    "cpe_daemon.core.recovery.AWAY_SECONDS",
    "cpe_daemon.daemon.accounts._LAG_SECONDS",
    "cpe_daemon.daemon.daemon._CANCEL_SECONDS",
    "cpe_daemon.daemon.front._STATUS_SECONDS",
    "cpe_daemon.daemon.last_resort._SAYING_SECONDS",
    "cpe_daemon.daemon.service._SWITCH_SECONDS",
    "cpe_daemon.daemon.supervision._EXTEND_SECONDS",
    "cpe_daemon.daemon.supervision._LOOK_SECONDS",
    "cpe_daemon.daemon.supervision._PROGRESS_SECONDS",
    "cpe_daemon.daemon.waiting._LONGEST_SECONDS",
    "cpe_daemon.engines.engine._ANSWER_SECONDS",
    "cpe_daemon.ingest.digesting._LOOK_SECONDS",
    "cpe_daemon.journal._RETRY_SECONDS",
    "cpe_daemon.journal._SETTLE_SECONDS",
    "cpe_daemon.links.handoff._RETRY_SECONDS",
    "cpe_daemon.links.handshake._TRYING_SECONDS",
    "cpe_daemon.links.router._TELL_SECONDS",
    "cpe_daemon.observe.http._LAST_SECONDS",
    "cpe_daemon.observe.http._PAUSE_SECONDS",
    "cpe_daemon.observe.http._RETRY_SECONDS",
    "cpe_daemon.observe.pages._PACE_SECONDS",
    "cpe_daemon.publisher.asking._MARGIN_SECONDS",
    "cpe_daemon.push.arrival._LOOK_AGAIN_SECONDS",
    "inference_plugins.server_api._IDLE_SECONDS",
    "cpe_daemon.publisher.handle._LONGEST_WAIT_SECONDS",
    "cpe_daemon.devices.copypool._START_SECONDS",
    "cpe_daemon.publisher.link._FENCE_SECONDS",
    "cpe_daemon.publisher.link._FIRST_PAUSE_SECONDS",
    "cpe_daemon.publisher.link._GOODBYE_SECONDS",
    "cpe_daemon.publisher.link._GRACE_SECONDS",
    "cpe_daemon.publisher.link._LONGEST_PAUSE_SECONDS",
    "cpe_daemon.publisher.link._REFUSED_PAUSE_SECONDS",
    "cpe_daemon.publisher.patience._LONGEST_SECONDS",
    "cpe_daemon.publisher.publisher._LOOK_SECONDS",
    "cpe_daemon.publisher.sending.MARGIN_SECONDS",
    "cpe_daemon.publisher.session._LAST_WORDS_SECONDS",
    "cpe_daemon.publisher.session._MARGIN_SECONDS",
    "cpe_daemon.publisher.session._SEND_SECONDS",
    "cpe_daemon.publisher.session._SLICE_SECONDS",
    "cpe_daemon.publisher.stream._SWITCH_SECONDS",
    "cpe_daemon.push.driving.MARGIN_SECONDS",
    "cpe_daemon.wire.operator.WAIT_AGAIN_SECONDS",
    "inference_plugins.errands._MARGIN_SECONDS",
    "inference_plugins.learned.comparison._LOOKING_SECONDS",
    "inference_plugins.learned.loading._WATCHING_SECONDS",
    "inference_plugins.receiver._GOODBYE_SECONDS",
    "inference_plugins.steps._PAUSE_AGAIN_SECONDS",
    "inference_plugins.testing.attached._LOOK_SECONDS",
    "inference_plugins.testing.daemon._START_SECONDS",
    "inference_plugins.testing.plugin._CLOSE_SECONDS",
    "inference_plugins.torch.attachment._CLOSE_SECONDS",
}
"""Paces, margins and steps: how often something is looked at, said or tried, and what a deadline is let run over."""

MARGIN_SECONDS = 1.0
"""What a driver gets beyond its workers' deadline."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log nothing, and try nothing again: engines that hang for ever would be asked for ever."""
    monkeypatch.setattr(Retries, "look", lambda retries, participants: None)
    with structlog.testing.capture_logs():
        yield


async def settled(node: FakeNode, seconds: float = 3600.0) -> None:
    """Let an hour pass."""
    await asyncio.sleep(seconds)
    await node.idle()


class Lateness:
    """When an engine was dropped, counted from the moment that its worker was asked for the step that it hangs in."""

    def __init__(self, worker: FakeWorker, step: str) -> None:
        self.asked_at = 0.0
        worker.script[step] = self._hang

    def _hang(self, _: object) -> None:
        self.asked_at = self.asked_at or asyncio.get_running_loop().time()


PHASES = [
    ("check", "check_seconds", "check"),
    ("pause", "pause_seconds", "pause"),  # its answer gets half a second more, for a worker that says why
    ("begin", "begin_seconds", "begin"),
    ("load", "bucket_seconds", "load a bucket"),
    ("finish", "finish_seconds", "finish"),
    ("resume", "resume_seconds", "resume"),
]


@pytest.mark.parametrize(("step", "setting", "said"), PHASES, ids=[step for step, _, _ in PHASES])
async def test_engine_that_hangs_in_a_phase_is_dropped_at_its_deadline(step: str, setting: str, said: str) -> None:
    seconds: float = getattr(DEFAULTS, setting)
    async with FakeNode.running() as node:
        worker, other = node.worker("late"), node.worker("other")
        lateness = Lateness(worker, step)
        version = node.stage(ONE)
        await asyncio.sleep(0.5)
        assert lateness.asked_at, "it was asked"
        await asyncio.sleep(lateness.asked_at + seconds - 0.1 - asyncio.get_running_loop().time())
        assert version.state == "pushing", "it is waited for until its deadline"
        await settled(node)
        assert version.state == "live", "the other engine does not suffer"
        assert other.content == ONE
        assert version.report is not None
        report = version.report.engines["late"]
        assert report.error is not None
        assert report.error.code == DeadlineError.code
        late = "60.5" if step == "pause" else f"{seconds:g}"
        assert report.error.message == f"engine 'late' rank 0 (pid 0, GPU gpu-0) did not {said} within {late} s"
        phase = "push" if step == "load" else step
        assert report.phases.get(phase, 0.0) <= seconds + MARGIN_SECONDS
        assert node.metrics.snapshot()['cpe_engine_failures_total{code="deadline"}'] >= 1


async def test_ranks_that_do_not_halt_are_dropped_at_the_deadline_of_a_pause() -> None:
    async with FakeNode.running(gpus=2) as node:
        workers = [node.worker("pair", rank=rank, world_size=2) for rank in range(2)]
        lateness = Lateness(workers[1], "halt")
        version = node.stage(ONE)
        await asyncio.sleep(0.5)
        assert lateness.asked_at
        await asyncio.sleep(DEFAULTS.pause_seconds - 1.0)
        assert version.state == "pushing"
        await settled(node)
        assert version.state == "failed"
        assert "rank 1" in str(version.error)
        assert "did not halt within 60 s" in str(version.error)


async def test_worker_that_does_not_open_slots_is_left_out() -> None:
    async with FakeNode.running() as node:
        worker = FakeWorker(node, "late")
        worker.hang("open_slots")
        worker.attach()
        began = asyncio.get_running_loop().time()
        version = node.stage(ONE)
        await settled(node, DEFAULTS.begin_seconds * 2 + 1.0)
        assert version.state == "failed"
        assert f"did not open_slots within {DEFAULTS.begin_seconds:g} s" in str(version.error)
        assert asyncio.get_running_loop().time() - began < 3 * DEFAULTS.begin_seconds


async def test_engine_that_does_not_let_go_of_a_failed_round_is_in_doubt_after_a_deadline() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("a")
        await node_with(node, ONE)
        worker.fail("finish")
        lateness = Lateness(worker, "abort")
        version = node.stage(TWO)
        await asyncio.sleep(0.5)
        assert lateness.asked_at
        assert version.state == "pushing"
        await settled(node)
        assert version.state == "failed"
        assert node.engine("a").state == QUARANTINED
        assert worker.paused, "nobody knows what it holds: it does not serve"


async def test_engine_that_does_not_wake_up_is_passed_over_at_its_deadline() -> None:
    async with FakeNode.running(push={"asleep": "wake"}) as node:
        worker = node.worker("a")
        worker.sleep()
        lateness = Lateness(worker, "wake")
        version = node.stage(ONE)
        await asyncio.sleep(0.5)
        assert lateness.asked_at
        await asyncio.sleep(DEFAULTS.wake_seconds - 1.0)
        assert version.state == "pushing"
        await settled(node)
        assert version.state in ("live", "failed")
        assert worker.content is None


async def test_phases_that_take_just_less_are_no_failure() -> None:
    async with FakeNode.running() as node:
        worker = node.worker("slow")
        loop = asyncio.get_running_loop()
        for step, setting, _ in PHASES:

            def late(message: object, seconds: float = getattr(DEFAULTS, setting) - 0.5) -> None:
                loop.call_later(seconds, lambda: worker.say(worker.do(message)))

            worker.script[step] = late
        version = node.stage(ONE)
        await settled(node)
        assert version.state == "live"
        assert node.states()["slow"] == (CURRENT, ONE)


async def node_with(node: FakeNode, version: VersionId) -> None:
    """Have a version live."""
    node.stage(version)
    await settled(node, 1.0)
    assert node.catalogue.live(version.model) is not None


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_deadline_of_the_settings_is_in_the_table() -> None:
    listed = {wait.where.removeprefix("deadlines.") for wait in WAITS if wait.where.startswith("deadlines.")}
    fields = {name for name in DeadlinesConfig.model_fields if name.endswith("_seconds")}
    assert listed == fields - {"heartbeat_interval_seconds"}


def test_every_wait_with_a_time_of_its_own_is_in_the_table() -> None:
    """Constants that end in _SECONDS are waits, unless they are named as something else."""
    listed = {wait.where for wait in WAITS}
    found = set()
    for room in ("cpe_daemon", "inference_plugins"):
        for path in (ROOT / room).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if any(part in module for part in (".demo.", ".cli.", ".doctor.", ".vllm.", ".sglang.", ".config.units")):
                continue
            for node in ast.parse(path.read_text()).body:
                target = node.target if isinstance(node, ast.AnnAssign) else None
                if isinstance(target, ast.Name) and target.id.endswith("_SECONDS"):
                    found.add(f"{module}.{target.id}")
    assert found - listed == NO_WAITS


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.where)
def test_wait_of_the_table_is_what_it_says(wait: Wait) -> None:
    assert seconds_of(wait) > 0
    codes = {kind.code for kind in _kinds(CpeError)}
    assert wait.error in codes | {"-"}
    assert wait.metric in {*INSTRUMENTS, "-"}
    path, _, name = wait.test.partition("::")
    tests = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}
    assert name in tests


def _kinds(kind: type[CpeError]) -> Iterator[type[CpeError]]:
    yield kind
    for special in kind.__subclasses__():
        yield from _kinds(special)
