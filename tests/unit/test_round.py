"""One push over the engines of a node: barriers, deadlines, who is dropped, and what becomes of an engine then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import structlog

from cpe_daemon.config import DeadlinesConfig
from cpe_daemon.core.copies import Copy
from cpe_daemon.core.driver import Update, Workers
from cpe_daemon.core.lifecycle import EngineState, RoundState
from cpe_daemon.core.pace import Pace
from cpe_daemon.core.plan import assign, cut
from cpe_daemon.core.types import VersionId
from cpe_daemon.engines.engine import Engine
from cpe_daemon.errors import CpeError, DeadlineError, EngineError, ManifestError, PeerLostError, ResourceError
from cpe_daemon.push import driving
from cpe_daemon.push.participant import Participant
from cpe_daemon.push.round import Round
from cpe_daemon.wire.messages import Check, Expect, Load, Pause, Resume, StepDone, StepFailed
from cpe_daemon.wire.reports import ErrorInfo
from inference_plugins.torch.driver import TorchDriver
from tests.unit.fake_node import CURRENT, UNKNOWN, WAIT_SECONDS, FakeNode, FakeWorker, number

OLD, NEW = number(1), number(2)
SHORT = 0.02
WHOLE_ROUND = ["pause", "begin", "load", "load", "load", "finish", "resume"]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    """Its pusher does not run: rounds are made here."""
    made = FakeNode(gpus=2)
    yield made
    made.arena.close()
    wrong = {worker.peer: worker.serving_wrong for worker in made.workers.values() if worker.serving_wrong}
    assert not wrong, wrong


def make_round(node: FakeNode, *engines: str, **deadlines: float) -> Round:
    if not node.device.slot_count:
        node.open_slots()
    version = node.catalogue.find(NEW) or node.stage(NEW)
    limits = DeadlinesConfig.model_validate(deadlines)
    tensors, bases = version.located()
    specs, gpus = [tensor.spec for tensor in tensors], list(range(len(node.device.topology.gpus)))
    plan = assign(cut(specs, node.device.slot_bytes), tensors, bases, node.device.topology)
    participants = [Participant(node.engine(name), 7, limits, node.clock) for name in engines]
    return Round(
        number=7,
        version=NEW,
        specs=specs,
        plan=plan,
        gpus=gpus,
        device=node.device,
        participants=participants,
        deadlines=limits,
        clock=node.clock,
    )


async def run(round: Round) -> dict[str, CpeError | None]:
    """Run to the end; returns why each engine was dropped."""
    async with asyncio.timeout(WAIT_SECONDS):
        await round.run()
    return {participant.engine.name: participant.error for participant in round.participants}


def states(node: FakeNode) -> dict[str, tuple[str, VersionId | None]]:
    return node.states()


# --- the way it should go --------------------------------------------------------------------------------------------


async def test_round_takes_every_worker_through_every_step(node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2, content=OLD) for rank in range(2)]
    workers.append(node.worker("b"))
    round = make_round(node, "a", "b")
    assert states(node) == {"a": ("updating", OLD), "b": ("updating", None)}
    assert await run(round) == {"a": None, "b": None}
    assert round.state is RoundState.DONE
    assert states(node) == {"a": (CURRENT, NEW), "b": (CURRENT, NEW)}
    for worker in workers:
        assert worker.steps == WHOLE_ROUND
        assert (worker.content, worker.touched, worker.paused) == (NEW, False, False)
    assert [p.outcome for p in round.participants] == ["updated", "updated"]


async def test_nobody_loads_before_all_have_paused(node: FakeNode) -> None:
    """One engine that goes on serving the old version while another serves the new would be a mixed node."""
    slow, quick = node.worker("slow", content=OLD), node.worker("quick", content=OLD)
    paused = node.engine("slow")
    release: list[Callable[[], None]] = []

    def later(step: Any) -> None:
        release.append(lambda: slow.say(slow.do(step)))

    slow.script["pause"] = later
    running = asyncio.create_task(run(make_round(node, "slow", "quick")))
    await node.until(lambda: bool(release))
    for _ in range(50):
        await asyncio.sleep(0)
    assert quick.steps == ["pause"]
    assert paused.state is EngineState.UPDATING
    release[0]()
    assert await running == {"slow": None, "quick": None}
    assert quick.steps == slow.steps == WHOLE_ROUND


@pytest.mark.parametrize("phase", ["begin", "finish"])
async def test_next_phase_waits_for_the_last_engine(phase: str, node: FakeNode) -> None:
    slow, quick = node.worker("slow", content=OLD), node.worker("quick", content=OLD)
    release: list[Callable[[], None]] = []

    def later(step: Any) -> None:
        release.append(lambda: slow.say(slow.do(step)))

    slow.script[phase] = later
    running = asyncio.create_task(run(make_round(node, "slow", "quick")))
    await node.until(lambda: bool(release))
    for _ in range(50):
        await asyncio.sleep(0)
    assert quick.steps == WHOLE_ROUND[: WHOLE_ROUND.index(phase) + 1]
    release[0]()
    await running
    assert quick.steps == slow.steps == WHOLE_ROUND


async def test_buckets_say_where_their_tensors_lie(node: FakeNode) -> None:
    worker = node.worker("a")
    await run(make_round(node, "a"))
    loads = [command for command in worker.commands if isinstance(command, Load)]
    assert [load.seq for load in loads] == [0, 1, 2]
    assert sorted({load.slot for load in loads}) == [0, 1]
    parts = [(part.name, part.tensor_offset, part.nbytes, part.slot_offset) for load in loads for part in load.parts]
    assert parts == [(f"layers.{i}.w", 0, 512, 512 * (i % 2)) for i in range(6)]
    assert all(load.round == 7 for load in loads)


async def test_report_tells_phases_and_bytes(node: FakeNode) -> None:
    worker = node.worker("a")

    def takes_a_second(step: Any) -> StepDone:
        node.clock.now += 1.0
        return worker.do(step)

    for step in ("pause", "begin", "load", "finish", "resume"):
        worker.script[step] = takes_a_second
    round = make_round(node, "a")
    await run(round)
    report = round.participants[0].report()
    assert report.outcome == "updated"
    assert report.error is None
    assert report.nbytes == 6 * 512
    took = {"prefetch": 0.0, "check": 0.0, "pause": 1.0, "begin": 1.0, "push": 3.0, "finish": 1.0, "resume": 1.0}
    assert report.phases == took
    assert report.gigabytes_per_second == pytest.approx(6 * 512 / 3.0 / 1e9)


async def test_resume_names_what_the_engine_holds(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    await run(make_round(node, "a"))
    assert worker.commands[-1] == Resume(7, NEW)


# --- when the pause begins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starved", [True, False])
async def test_pause_waits_for_all_slots_only_if_engines_load_faster_than_they_fill(
    starved: bool, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, filled, fetch = node.worker("a", content=OLD), asyncio.Event(), node.device.fetch
    node.open_slots(3)  # for all of the version

    async def slowly(gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        if slot > 0:
            await filled.wait()
        await fetch(gpu, slot, copies)

    monkeypatch.setattr(node.device, "fetch", slowly)
    node.engine("a").pace = Pace(starved)
    running = asyncio.create_task(run(make_round(node, "a")))
    if starved:
        for _ in range(50):
            await asyncio.sleep(0)
        assert worker.steps == []
    else:
        await node.until(lambda: "load" in worker.steps)
    filled.set()
    assert await running == {"a": None}
    assert worker.steps == WHOLE_ROUND


@pytest.mark.parametrize("slow", [True, False])
async def test_round_notes_whether_engines_waited_for_buckets(
    slow: bool, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bucket that comes finds the one before it being loaded, or nothing."""
    worker, fetch, one_by_one = node.worker("a", content=OLD), node.device.fetch, asyncio.Lock()
    later: list[Load] = []

    async def after_the_load(gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        async with one_by_one:
            for _ in range(0 if slow else 100):
                await asyncio.sleep(0)
        await fetch(gpu, slot, copies)

    def load(step: Load) -> StepDone | None:
        if slow and step.seq == 1:
            later.append(step)
            return None
        for held in later:
            worker.say(worker.do(held))
        later.clear()
        return worker.do(step)

    worker.script["load"] = load
    monkeypatch.setattr(node.device, "fetch", after_the_load)
    node.engine("a").pace = Pace(starved=slow)
    assert await run(make_round(node, "a")) == {"a": None}
    assert node.engine("a").pace.starved is not slow


async def test_round_notes_how_long_an_engine_took_to_stop_and_a_slot_to_fill(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock finds it a second later."""
    node.worker("a", content=OLD)
    node.open_slots(3)
    ticks = iter(range(1000))
    monkeypatch.setattr(node, "clock", lambda: float(next(ticks)))
    made = make_round(node, "a")
    assert await run(made) == {"a": None}
    pace, phases = node.engine("a").pace, made.participants[0].phases
    assert pace.stop_seconds > phases["pause"] + phases["begin"] > 0  # it has loaded a bucket by then
    assert pace.fill_seconds > 0


# --- before anybody is paused ----------------------------------------------------------------------------------------


def misfit(worker: FakeWorker) -> None:
    """Have a worker refuse the version as one does that has other tensors."""
    worker.script["check"] = lambda _: ManifestError("no tensor here is called layers.0.w")


async def test_engine_that_a_version_does_not_fit_is_never_paused(node: FakeNode) -> None:
    bad = [node.worker("bad", rank=rank, world_size=2, content=OLD) for rank in range(2)]
    good = node.worker("good", content=OLD)
    misfit(bad[1])
    round = make_round(node, "bad", "good")
    errors = await run(round)
    assert isinstance(errors["bad"], ManifestError)
    reason = "engine 'bad' rank 1 (pid 0, GPU gpu-1) cannot take it: no tensor here is called layers.0.w"
    assert str(errors["bad"]) == reason
    assert [worker.steps for worker in bad] == [[], []]
    assert states(node) == {"bad": (CURRENT, OLD), "good": (CURRENT, NEW)}
    assert not any(worker.touched for worker in node.engine("bad").workers.values())
    assert good.steps == WHOLE_ROUND
    assert round.participants[0].outcome == "kept"


async def test_version_that_fits_no_engine_pauses_none(node: FakeNode) -> None:
    workers = [node.worker(name, content=OLD) for name in ("a", "b")]
    for worker in workers:
        misfit(worker)
    round = make_round(node, "a", "b")
    errors = await run(round)
    assert all(isinstance(error, ManifestError) for error in errors.values())
    assert round.state is RoundState.FAILED
    assert [worker.steps for worker in workers] == [[], []]
    assert states(node) == {"a": (CURRENT, OLD), "b": (CURRENT, OLD)}


async def test_engine_that_does_not_say_whether_it_fits_goes_on_serving(node: FakeNode) -> None:
    silent, good = node.worker("silent", content=OLD), node.worker("good", content=OLD)
    silent.hang("check")
    errors = await run(make_round(node, "silent", "good", check_seconds=SHORT))
    assert str(errors["silent"]) == "engine 'silent' rank 0 (pid 0, GPU gpu-0) did not check within 0.02 s"
    assert (silent.steps, silent.paused) == ([], False)
    assert states(node) == {"silent": (CURRENT, OLD), "good": (CURRENT, NEW)}
    assert good.steps == WHOLE_ROUND


async def test_engine_in_doubt_that_a_version_does_not_fit_stays_in_doubt(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD, touched=True)
    misfit(worker)
    await run(make_round(node, "a"))
    assert states(node) == {"a": (UNKNOWN, None)}
    assert worker.paused


async def test_engine_that_loaded_such_a_version_is_not_asked(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    round = make_round(node, "a")
    for known in round.participants[0].workers:
        known.loaded = round._specs
    assert await run(round) == {"a": None}
    assert not [command for command in worker.commands if isinstance(command, Expect | Check)]


async def test_tensors_are_announced_before_the_question(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    await run(make_round(node, "a"))
    asked = [command for command in worker.commands if isinstance(command, Expect | Check | Pause)]
    assert [type(command) for command in asked] == [Expect, Check, Pause]
    assert isinstance(asked[0], Expect)
    assert [spec.name for spec in asked[0].tensors] == [f"layers.{i}.w" for i in range(6)]
    assert asked[0].round == asked[1].round == 7


async def test_engines_are_asked_while_slots_fill(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, filled, fetch = node.worker("a", content=OLD), asyncio.Event(), node.device.fetch

    async def slowly(gpu: int, slot: int, copies: Sequence[Copy]) -> None:
        await filled.wait()
        await fetch(gpu, slot, copies)

    monkeypatch.setattr(node.device, "fetch", slowly)
    running = asyncio.create_task(run(make_round(node, "a")))
    await node.until(lambda: any(isinstance(command, Check) for command in worker.commands))
    assert worker.steps == []
    filled.set()
    assert await running == {"a": None}


async def test_engine_that_falls_asleep_before_the_pause_is_let_be(node: FakeNode) -> None:
    worker, good = node.worker("a", content=OLD), node.worker("good", content=OLD)

    def nods_off(step: Any) -> StepDone:
        worker.sleep()
        return worker.do(step)

    worker.script["check"] = nods_off
    errors = await run(make_round(node, "a", "good"))
    assert str(errors["a"]) == "engine 'a' rank 0 (pid 0, GPU gpu-0) has gone to sleep"
    assert worker.steps == []
    assert good.steps == WHOLE_ROUND


async def test_engine_that_falls_asleep_as_it_is_paused_is_not_resumed(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)

    def nods_off(step: Any) -> CpeError:
        worker.sleep()
        return CpeError("it is asleep")

    worker.script["pause"] = nods_off
    round = make_round(node, "a")
    await run(round)
    assert worker.steps == ["pause", "abort"]
    assert states(node) == {"a": (CURRENT, OLD)}
    assert round.participants[0].outcome == "failed"


@pytest.mark.parametrize("naps", [1, 2])
async def test_engine_that_slept_and_woke_in_a_round_has_no_part_in_it(naps: int, node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)

    def naps_shortly(step: Any) -> StepDone:
        for _ in range(naps):
            worker.sleep()
            worker.wake_up(kept=True)
        return worker.do(step)

    worker.script["check"] = naps_shortly
    errors = await run(make_round(node, "a"))
    assert str(errors["a"]).endswith("has gone to sleep")
    assert worker.content == OLD
    assert states(node) == {"a": (CURRENT, OLD)}


# --- one engine fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pause", "begin", "load", "finish", "resume"])
@pytest.mark.parametrize("how", ["fails", "hangs", "dies"])
async def test_failing_engine_is_dropped_and_the_others_go_on(phase: str, how: str, node: FakeNode) -> None:
    bad = [node.worker("bad", rank=rank, world_size=2, content=OLD) for rank in range(2)]
    good = node.worker("good", content=OLD)
    match how:
        case "fails":
            bad[1].fail(phase, "out of memory")
        case "hangs":
            bad[1].hang(phase)
        case _:
            bad[1].script[phase] = lambda _: bad[1].die()
    limits = {f"{'bucket' if phase == 'load' else phase}_seconds": SHORT} if how == "hangs" else {}
    errors = await run(make_round(node, "bad", "good", **limits))
    assert errors["good"] is None
    assert states(node)["good"] == (CURRENT, NEW)
    assert good.steps == WHOLE_ROUND
    error = errors["bad"]
    match how:
        case "fails":
            assert isinstance(error, EngineError)
            assert str(error) == f"engine 'bad' rank 1 (pid 0, GPU gpu-1) could not {phase}: out of memory"
        case "hangs":
            assert isinstance(error, DeadlineError)
            what = "load a bucket" if phase == "load" else phase
            assert f"engine 'bad' rank 1 (pid 0, GPU gpu-1) did not {what} within" in str(error)
        case _:
            assert isinstance(error, PeerLostError)
            assert "engine 'bad' rank 1 (pid 0, GPU gpu-1) is gone: its process ended" in str(error)
    assert bad[0].steps.count("abort") == 1


@pytest.mark.parametrize("phase", ["pause", "begin"])
@pytest.mark.parametrize("how", ["fail", "hang"])
async def test_untouched_engine_serves_again_what_it_held(phase: str, how: str, node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    getattr(worker, how)(phase)
    errors = await run(make_round(node, "a", **{f"{phase}_seconds": SHORT}))
    assert states(node) == {"a": (CURRENT, OLD)}
    assert worker.steps == [*WHOLE_ROUND[: WHOLE_ROUND.index(phase) + 1], "abort", "resume"]
    assert worker.commands[-1] == Resume(7, OLD)
    assert not worker.paused
    assert node.engine("a").error is errors["a"]


@pytest.mark.parametrize("phase", ["load", "finish", "resume"])
async def test_touched_engine_stays_paused_and_its_content_is_unknown(phase: str, node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    worker.fail(phase)
    if phase == "load":  # the first bucket is loaded, and then one fails
        worker.script["load"] = lambda step: worker.do(step) if step.seq == 0 else CpeError("no such layer")
    round = make_round(node, "a")
    await run(round)
    assert states(node) == {"a": (UNKNOWN, None)}
    assert worker.steps[-1] == "abort"
    assert worker.paused
    assert node.engine("a").in_doubt
    assert round.participants[0].outcome == "failed"
    assert round.state is RoundState.FAILED


async def test_engine_that_has_finished_when_its_answer_is_late_is_not_called_old(node: FakeNode) -> None:
    """It holds the new version whole, and would serve it under the old one's name."""
    worker = node.worker("a", content=OLD)

    def finish_silently(step: Any) -> None:
        worker.do(step)

    worker.script["finish"] = finish_silently
    await run(make_round(node, "a", finish_seconds=SHORT))
    assert worker.content == NEW
    assert states(node) == {"a": (UNKNOWN, None)}
    assert worker.paused


async def test_engine_in_doubt_before_is_not_resumed_although_untouched(node: FakeNode) -> None:
    """Untouched by this round it still holds whatever an earlier one left."""
    worker = node.worker("a", content=OLD, touched=True)
    worker.fail("begin")
    await run(make_round(node, "a"))
    assert states(node) == {"a": (UNKNOWN, None)}
    assert "resume" not in worker.steps


@pytest.mark.parametrize("how", ["fail", "hang"])
async def test_engine_that_cannot_abort_either_is_in_doubt(how: str, node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    worker.fail("begin")
    getattr(worker, how)("abort")
    await run(make_round(node, "a", abort_seconds=SHORT))
    assert states(node) == {"a": (UNKNOWN, None)}


async def test_untouched_engine_that_does_not_resume_is_in_doubt(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    worker.fail("begin")
    worker.fail("resume")
    await run(make_round(node, "a"))
    assert states(node) == {"a": (UNKNOWN, None)}


async def test_one_touched_worker_puts_the_whole_engine_in_doubt(node: FakeNode) -> None:
    workers = [node.worker("a", rank=rank, world_size=2, content=OLD) for rank in range(2)]
    workers[0].script["load"] = lambda step: CpeError("refused before it wrote")
    await run(make_round(node, "a"))
    assert workers[1].touched
    assert not workers[0].touched
    assert states(node) == {"a": (UNKNOWN, None)}
    assert all(worker.steps[-1] == "abort" for worker in workers)


async def test_no_bucket_goes_to_an_engine_that_was_dropped(node: FakeNode) -> None:
    bad, good = node.worker("bad", content=OLD), node.worker("good", content=OLD)
    bad.script["load"] = lambda step: CpeError("full") if step.seq == 0 else bad.do(step)
    await run(make_round(node, "bad", "good"))
    assert "finish" not in bad.steps
    assert "resume" not in bad.steps
    assert good.steps == WHOLE_ROUND


async def test_worker_that_died_and_is_back_does_not_count_as_updated(node: FakeNode) -> None:
    """Its new process has none of the buckets."""
    dying = node.worker("a", content=OLD)
    good = node.worker("good", content=OLD)
    back: list[FakeWorker] = []

    def restart(step: Any) -> None:
        dying.die()
        back.append(node.worker("a", incarnation="a/0/again"))

    dying.script["begin"] = restart
    errors = await run(make_round(node, "a", "good"))
    assert isinstance(errors["a"], PeerLostError)
    assert states(node)["a"] == (CURRENT, None)
    assert "load" not in back[0].steps
    assert good.content == NEW


async def test_survivor_of_a_lost_worker_is_told_and_what_it_holds_is_noted(node: FakeNode) -> None:
    """When the lost one is back, the two must not pass for an engine that holds one version."""
    survivor, dying = (node.worker("a", rank=rank, world_size=2, content=OLD) for rank in range(2))
    dying.script["finish"] = lambda _: dying.die()
    await run(make_round(node, "a"))
    assert survivor.steps[-1] == "abort"
    assert survivor.content == NEW
    assert states(node) == {"a": (UNKNOWN, None)}
    node.worker("a", rank=1, world_size=2, content=OLD)
    assert node.engine("a").in_doubt


async def test_survivor_that_no_bucket_had_reached_still_holds_what_it_held(node: FakeNode) -> None:
    survivor, dying = (node.worker("a", rank=rank, world_size=2, content=OLD) for rank in range(2))
    dying.script["pause"] = lambda _: dying.die()
    await run(make_round(node, "a"))
    assert survivor.steps == ["pause", "abort"]
    node.worker("a", rank=1, world_size=2, content=OLD)
    assert states(node) == {"a": (CURRENT, OLD)}


async def test_worker_that_is_back_before_its_engine_s_first_round_ends_leaves_it_as_it_was(node: FakeNode) -> None:
    """Nothing could be restored to it, so it would stay paused for ever."""
    survivor, dying = (node.worker("a", rank=rank, world_size=2) for rank in range(2))

    def restart(step: Any) -> None:
        dying.die()
        node.worker("a", rank=1, world_size=2, incarnation="a/1/again")

    dying.script["pause"] = restart
    errors = await run(make_round(node, "a"))
    assert isinstance(errors["a"], PeerLostError)
    assert survivor.steps == ["pause", "abort"]
    assert states(node) == {"a": (CURRENT, None)}
    assert node.engine("a").error is errors["a"]


async def test_worker_that_is_back_does_not_vouch_for_a_survivor_that_was_touched(node: FakeNode) -> None:
    _, dying = (node.worker("a", rank=rank, world_size=2) for rank in range(2))

    def restart(step: Any) -> None:
        dying.die()
        node.worker("a", rank=1, world_size=2, incarnation="a/1/again")

    dying.script["load"] = restart
    await run(make_round(node, "a"))
    assert states(node) == {"a": (UNKNOWN, None)}


async def test_worker_whose_queue_is_full_is_dropped(node: FakeNode) -> None:
    worker, good = node.worker("a", content=OLD), node.worker("good", content=OLD)

    def deaf(step: Any) -> StepDone:
        worker.takes_messages = False
        return worker.do(step)

    worker.script["begin"] = deaf
    errors = await run(make_round(node, "a", "good"))
    assert "takes no messages" in str(errors["a"])
    assert good.content == NEW


# --- all fail, or the node itself does -------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pause", "begin", "load", "finish", "resume"])
async def test_round_whose_last_engine_fails_ends(phase: str, node: FakeNode) -> None:
    for name in ("a", "b"):
        node.worker(name, content=OLD).fail(phase)
    round = make_round(node, "a", "b")
    errors = await run(round)
    assert all(isinstance(error, EngineError) for error in errors.values())
    assert round.state is RoundState.FAILED
    assert not round.alive


async def test_copy_that_fails_drops_every_engine_and_resumes_those_untouched(node: FakeNode) -> None:
    worker = node.worker("a", content=OLD)
    node.device.error = ResourceError("bytes of node-7 are not on this node")
    round = make_round(node, "a")
    errors = await run(round)
    assert str(errors["a"]) == "bytes of node-7 are not on this node"
    assert round.state is RoundState.FAILED
    assert states(node) == {"a": (CURRENT, OLD)}
    assert not worker.paused


async def test_copy_that_fails_while_the_last_engine_does_ends_the_round_once(node: FakeNode) -> None:
    """Two reasons to abandon a round, in the same turn of the loop."""
    worker = node.worker("a", content=OLD)
    release: list[Callable[[], None]] = []
    worker.script["pause"] = lambda step: release.append(lambda: worker.say(_failed(step)))
    failing = asyncio.Event()

    async def fetch(gpu: int, slot: int, copies: Any) -> None:
        if copies and copies[0].address >= 2048:  # of the last bucket, for which a slot must have come free
            await failing.wait()
            raise ResourceError("out of luck")

    node.device.fetch = fetch  # type: ignore[method-assign]
    node.open_slots(3)
    round = make_round(node, "a")
    round._pipeline._primed.set()  # as if the slots were two
    running = asyncio.create_task(run(round))
    await node.until(lambda: bool(release))
    release[0]()
    failing.set()
    errors = await running
    assert errors["a"] is not None
    assert round.state is RoundState.FAILED
    assert states(node) == {"a": (CURRENT, OLD)}


def _failed(step: Any) -> StepFailed:
    return StepFailed(step.round, str(step.__struct_config__.tag), ErrorInfo("engine", "no"), getattr(step, "seq", 0))


# --- drivers ---------------------------------------------------------------------------------------------------------


class BrokenDriver(TorchDriver):
    """A plugin with a bug in one step."""

    broken = ""

    def __init__(self, engine: str, workers: Workers) -> None:
        super().__init__(engine, workers)

    def _maybe(self, step: str) -> None:
        if self.broken == step:
            raise KeyError("no such route")

    async def pause(self, round: int, seconds: float) -> None:
        self._maybe("pause")
        await super().pause(round, seconds)

    async def begin(self, update: Update, seconds: float) -> None:
        self._maybe("begin")
        await super().begin(update, seconds)

    async def finish(self, round: int, seconds: float) -> None:
        self._maybe("finish")
        await super().finish(round, seconds)

    async def resume(self, round: int, content: VersionId | None, seconds: float) -> None:
        self._maybe("resume")
        await super().resume(round, content, seconds)

    async def abort(self, round: int, reason: str, seconds: float) -> bool:
        self._maybe("abort")
        return await super().abort(round, reason, seconds)


@pytest.mark.parametrize("step", ["pause", "begin", "finish", "resume"])
async def test_bug_in_a_driver_ends_its_engine_s_part_alone(step: str, node: FakeNode) -> None:
    node.drivers["broken"] = BrokenDriver
    node.worker("bad", kind="broken", content=OLD)
    good = node.worker("good", content=OLD)
    round = make_round(node, "bad", "good")
    node.engine("bad").driver.broken = step  # type: ignore[attr-defined]
    errors = await run(round)
    assert str(errors["bad"]) == f"engine 'bad' could not {step}: KeyError: 'no such route'"
    assert errors["good"] is None
    assert good.content == NEW
    untouched = step in ("pause", "begin")
    assert states(node)["bad"] == ((CURRENT, OLD) if untouched else (UNKNOWN, None))


async def test_bug_in_a_driver_s_abort_leaves_its_engine_in_doubt(node: FakeNode) -> None:
    node.drivers["broken"] = BrokenDriver
    bad = node.worker("bad", kind="broken", content=OLD)
    bad.fail("begin")
    round = make_round(node, "bad")
    node.engine("bad").driver.broken = "abort"  # type: ignore[attr-defined]
    await run(round)
    assert states(node)["bad"] == (UNKNOWN, None)


async def test_driver_that_hangs_is_cut_off_a_moment_after_its_deadline(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "MARGIN_SECONDS", SHORT)

    class Hanging(TorchDriver):
        async def begin(self, update: Update, seconds: float) -> None:
            await asyncio.Event().wait()

    node.drivers["hanging"] = Hanging
    node.worker("bad", kind="hanging", content=OLD)
    good = node.worker("good", content=OLD)
    errors = await run(make_round(node, "bad", "good", begin_seconds=SHORT))
    assert isinstance(errors["bad"], DeadlineError)
    assert str(errors["bad"]) == "engine 'bad' did not begin within 0.02 s"
    assert good.content == NEW


# --- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pause", "begin", "load", "finish", "resume", ""])
async def test_no_worker_is_left_busy(phase: str, node: FakeNode) -> None:
    """A worker that counts as busy is not given up for being silent."""
    workers = [node.worker("a", rank=rank, world_size=2, content=OLD) for rank in range(2)]
    if phase:
        workers[0].fail(phase)
    engine: Engine = node.engine("a")
    await run(make_round(node, "a"))
    await asyncio.sleep(0)
    assert not any(worker.busy for worker in engine.workers.values())
