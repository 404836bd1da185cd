"""An `LLM` whose calls and steps wait for an update, and an update for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import pytest

from cpe_daemon.errors import DeadlineError, EngineError
from inference_plugins.vllm.offline import OfflineEngine

SECONDS = 10.0
SHORT = 0.05


class FakeEngine:
    """Some of an `LLMEngine`: notes what it is asked, and by which thread; a step ends when the test lets it."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.threads: set[str] = set()
        self.stepping = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.asleep = False
        self.error: Exception | None = None

    def _note(self, what: object) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(what)
        if self.error is not None:
            raise self.error

    def step(self) -> str:
        self._note("step")
        self.stepping.set()
        assert self.may_end.wait(SECONDS)
        return "output"

    def collective_rpc(self, method: str, kwargs: object = None) -> None:
        self._note((method, kwargs))

    def sleep(self, level: int, mode: str) -> None:
        self._note(f"sleep {level} {mode}")

    def wake_up(self, tags: list[str]) -> bool:
        self._note(f"wake_up {tags}")
        return True

    def is_sleeping(self) -> bool:
        return self.asleep

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self._note(f"reset {reset_running_requests}")
        return True

    def set_weight_version(self, version: str) -> None:
        self._note(f"version {version}")


class FakeLLM:
    """Generates by two steps, with a rest between that the test may make longer."""

    def __init__(self) -> None:
        self.llm_engine = FakeEngine()
        self.between = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def generate(self) -> list[str]:
        first = self.llm_engine.step()
        self.between.set()
        assert self.go_on.wait(SECONDS)
        return [first, self.llm_engine.step()]


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def engine(llm: FakeLLM, no_leaks: None) -> Iterator[OfflineEngine]:
    made = OfflineEngine(llm, SECONDS)
    yield made
    made.close()
    until(lambda: "cpe-clerk" not in {thread.name for thread in threading.enumerate()})


def until(look: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if look():
            return
        pause.wait(0.01)
    pytest.fail("it never was so")


def run(*work: Coroutine[Any, Any, object]) -> list[object]:
    async def all_of_it() -> list[object]:
        return [await one for one in work]

    return asyncio.run(asyncio.wait_for(all_of_it(), SECONDS))


def in_thread(work: Callable[[], object]) -> Future[object]:
    future: Future[object] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return future


def pause(engine: OfflineEngine, mode: str = "keep") -> Coroutine[Any, Any, None]:
    return engine.pause_generation(mode=mode, clear_cache=False)


def test_update_in_its_order_by_one_thread(engine: OfflineEngine, llm: FakeLLM) -> None:
    request = SimpleNamespace(update_info={"seconds": 1})
    run(
        pause(engine),
        engine.start_weight_update(),
        engine.update_weights(request),
        engine.finish_weight_update("m@r#1"),
        engine.reset_prefix_cache(reset_running_requests=True),
        engine.resume_generation(),
    )
    assert llm.llm_engine.calls == [
        "sleep 0 keep",
        ("start_weight_update", None),
        ("update_weights", {"update_info": {"seconds": 1}}),
        ("finish_weight_update", None),
        "version m@r#1",
        "reset True",
        "wake_up ['scheduling']",
    ]
    assert llm.llm_engine.threads == {"cpe-clerk"}
    assert llm.generate() == ["output", "output"]


def test_session_that_is_begun_before_the_pause_begins_in_it(engine: OfflineEngine, llm: FakeLLM) -> None:
    """Before that the engine is its user's."""
    run(engine.start_weight_update())
    assert llm.llm_engine.calls == []
    run(pause(engine), pause(engine))
    assert llm.llm_engine.calls == ["sleep 0 keep", ("start_weight_update", None), "sleep 0 keep"]


def test_calls_wait_while_it_is_paused(engine: OfflineEngine, llm: FakeLLM) -> None:
    assert run(engine.is_paused(), pause(engine), engine.is_paused()) == [False, None, True]
    call = in_thread(llm.generate)
    asked = in_thread(lambda: llm.llm_engine.collective_rpc("theirs"))
    assert not wait([call, asked], 0.1).done
    assert llm.llm_engine.calls == ["sleep 0 keep"]
    run(engine.resume_generation())
    assert call.result(SECONDS) == ["output", "output"]
    asked.result(SECONDS)


def test_update_comes_between_two_steps_of_a_call(engine: OfflineEngine, llm: FakeLLM) -> None:
    llm.llm_engine.may_end.clear()
    call = in_thread(llm.generate)
    assert llm.llm_engine.stepping.wait(SECONDS)
    paused = in_thread(lambda: run(pause(engine)))
    assert not wait([paused], 0.1).done
    llm.llm_engine.may_end.set()
    paused.result(SECONDS)
    assert llm.between.wait(SECONDS)
    assert not wait([call], 0.1).done
    assert llm.llm_engine.calls == ["step", "sleep 0 keep"]
    run(engine.resume_generation())
    assert call.result(SECONDS) == ["output", "output"]
    assert llm.llm_engine.calls[-1] == "step"


def test_update_that_is_to_wait_comes_between_two_calls(engine: OfflineEngine, llm: FakeLLM) -> None:
    llm.go_on.clear()
    call = in_thread(llm.generate)
    assert llm.between.wait(SECONDS)
    paused = in_thread(lambda: run(pause(engine, "wait")))
    assert not wait([paused], 0.1).done
    llm.go_on.set()
    assert call.result(SECONDS) == ["output", "output"]
    paused.result(SECONDS)
    assert llm.llm_engine.calls == ["step", "step", "sleep 0 keep"]
    run(engine.resume_generation())
    assert llm.generate() == ["output", "output"]


def test_pause_that_never_comes_to_be_lets_everybody_go_on(llm: FakeLLM) -> None:
    engine = OfflineEngine(llm, SHORT)
    for mode in ("keep", "wait"):
        llm.llm_engine.may_end.clear()
        llm.llm_engine.stepping.clear()
        call = in_thread(llm.generate)
        assert llm.llm_engine.stepping.wait(SECONDS)
        with pytest.raises(DeadlineError, match=r"held the serving lock for more than 0\.\d s"):
            run(pause(engine, mode))
        llm.llm_engine.may_end.set()
        assert call.result(SECONDS) == ["output", "output"]
        assert run(engine.is_paused()) == [False]
    engine.close()


def test_call_that_waits_for_too_long_says_why(llm: FakeLLM) -> None:
    engine = OfflineEngine(llm, SHORT)
    run(pause(engine))
    with pytest.raises(EngineError, match=r"not serving for 0\.05 s: its weights are being updated"):
        llm.generate()
    engine.close()


def test_engine_that_sleeps_is_not_updated(engine: OfflineEngine, llm: FakeLLM) -> None:
    """Its weights have no memory; whoever had it sleep wakes it up."""
    llm.llm_engine.asleep = True
    with pytest.raises(EngineError, match="it sleeps: its weights have no memory"):
        run(pause(engine))
    assert llm.llm_engine.calls == []
    assert llm.generate() == ["output", "output"]


def test_pause_by_abort_is_refused(engine: OfflineEngine, llm: FakeLLM) -> None:
    with pytest.raises(EngineError, match="cannot be paused by 'abort': set keep or wait"):
        run(pause(engine, "abort"))
    assert llm.generate() == ["output", "output"]


def test_pause_and_resume_may_come_twice(engine: OfflineEngine, llm: FakeLLM) -> None:
    """As from a daemon that was started again."""
    run(pause(engine), pause(engine), engine.resume_generation(), engine.resume_generation())
    assert llm.llm_engine.calls == ["sleep 0 keep", "sleep 0 keep", "wake_up ['scheduling']"]
    assert llm.generate() == ["output", "output"]


def test_what_vllm_raises_is_told(engine: OfflineEngine, llm: FakeLLM) -> None:
    llm.llm_engine.error = RuntimeError("engine dead")
    with pytest.raises(EngineError, match="RuntimeError: engine dead"):
        run(engine.finish_weight_update())
    llm.llm_engine.error = None
    run(engine.finish_weight_update())


def test_closed_it_leaves_the_llm_as_it_was(llm: FakeLLM) -> None:
    before = dict(vars(llm)), set(vars(llm.llm_engine))
    engine = OfflineEngine(llm, SHORT)
    assert set(vars(llm.llm_engine)) > before[1]
    engine.close()
    assert (dict(vars(llm)), set(vars(llm.llm_engine))) == before
