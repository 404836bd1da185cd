"""The lock between forward passes and updates: who waits for whom, and who is told what."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cpe_daemon.errors import DeadlineError, EngineError
from inference_plugins.torch import ServingLock

WAIT_SECONDS = 20.0
SHORT = 0.01


@pytest.fixture
def lock() -> ServingLock:
    """Open, as of an engine that serves."""
    made = ServingLock(WAIT_SECONDS)
    made.open()
    return made


@pytest.fixture
def pool(no_leaks: None) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


class Holder:
    """A thread in a forward pass until it is let go."""

    def __init__(self, pool: ThreadPoolExecutor, lock: ServingLock, times: int = 1) -> None:
        self.inside = threading.Event()
        self.release = threading.Event()
        self.done: Future[None] = pool.submit(self._run, lock, times)
        self.times = times

    def _run(self, lock: ServingLock, times: int) -> None:
        for _ in range(times):
            lock.acquire()
        self.inside.set()
        assert self.release.wait(WAIT_SECONDS)
        for _ in range(times):
            lock.release()

    def enter(self) -> Holder:
        assert self.inside.wait(WAIT_SECONDS)
        return self

    def leave(self) -> None:
        self.release.set()
        self.done.result(WAIT_SECONDS)


def reason(lock: ServingLock) -> str | None:
    """Why it is shut: by a function, for mypy takes an attribute to stay what it was."""
    return lock.shut_because


def waiting(lock: ServingLock, number: int) -> Callable[[], bool]:
    """Whether so many threads wait at the lock."""
    return lambda: len(lock._changed._waiters) >= number  # type: ignore[attr-defined]


def until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until something is so."""
    checked = threading.Event()
    for _ in range(20_000):
        if condition():
            return
        checked.wait(0.001)
    pytest.fail("it never was so")


def test_new_lock_is_shut_until_the_daemon_says_more() -> None:
    lock = ServingLock(SHORT)
    assert reason(lock) == "it is not attached to a daemon yet"
    with pytest.raises(EngineError, match=r"not serving for 0\.01 s: it is not attached"):
        lock.acquire()
    lock.open()
    assert reason(lock) is None
    with lock:
        pass


def test_any_number_of_threads_serve_at_once(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    holders = [Holder(pool, lock).enter() for _ in range(8)]
    for holder in holders:
        holder.leave()


def test_update_waits_until_all_have_let_go(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    holders = [Holder(pool, lock).enter() for _ in range(3)]
    shutting = pool.submit(lock.shut, "an update", WAIT_SECONDS)
    for holder in holders:
        until(waiting(lock, 1))
        assert not shutting.done()
        holder.leave()
    shutting.result(WAIT_SECONDS)
    assert reason(lock) == "an update"


def test_newcomers_wait_while_an_update_waits(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    """Otherwise a busy engine, which always has a forward pass in flight, would never be updated."""
    holder = Holder(pool, lock).enter()
    shutting = pool.submit(lock.shut, "an update", WAIT_SECONDS)
    until(waiting(lock, 1))
    newcomer = Holder(pool, lock)
    until(waiting(lock, 2))
    assert not newcomer.inside.is_set()
    holder.leave()
    shutting.result(WAIT_SECONDS)
    assert not newcomer.inside.is_set()
    lock.open()
    newcomer.enter().leave()


def test_thread_may_hold_it_several_times(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    with lock, lock:
        lock.acquire()
        lock.release()
    holder = Holder(pool, lock, times=3).enter()
    with pytest.raises(DeadlineError):
        lock.shut("an update", SHORT)
    holder.leave()
    lock.shut("an update", SHORT)


def test_holder_may_enter_again_while_an_update_waits(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    """A forward pass that takes the lock inside itself must not wait for the update that waits for it."""
    entered, again, leave = threading.Event(), threading.Event(), threading.Event()

    def nested() -> None:
        with lock:
            entered.set()
            until(waiting(lock, 1))
            with lock:
                again.set()
                assert leave.wait(WAIT_SECONDS)

    holding = pool.submit(nested)
    assert entered.wait(WAIT_SECONDS)
    shutting = pool.submit(lock.shut, "an update", WAIT_SECONDS)
    assert again.wait(WAIT_SECONDS)
    assert not shutting.done()
    leave.set()
    holding.result(WAIT_SECONDS)
    shutting.result(WAIT_SECONDS)


def test_shutting_that_fails_leaves_it_as_it_was(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    holder = Holder(pool, lock).enter()
    with pytest.raises(DeadlineError, match="a forward pass held the serving lock for more than"):
        lock.shut("an update", SHORT)
    assert reason(lock) is None
    other = Holder(pool, lock).enter()
    other.leave()
    holder.leave()


def test_newcomer_that_waited_for_a_failed_update_serves(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    holder = Holder(pool, lock).enter()
    failing = pool.submit(lock.shut, "an update", 2.0)
    until(waiting(lock, 1))
    newcomer = Holder(pool, lock)
    with pytest.raises(DeadlineError):
        failing.result(WAIT_SECONDS)
    newcomer.enter().leave()
    holder.leave()


def test_shutting_twice_keeps_the_last_reason(lock: ServingLock) -> None:
    lock.shut("the first", SHORT)
    lock.shut("the second", SHORT)
    assert reason(lock) == "the second"
    lock.open()
    assert reason(lock) is None


def test_explain_changes_the_reason_of_a_shut_lock_only(lock: ServingLock) -> None:
    lock.explain("nobody asked")
    assert reason(lock) is None
    lock.shut("an update", SHORT)
    lock.explain("the weights may be a mixture")
    assert reason(lock) == "the weights may be a mixture"
    with pytest.raises(EngineError, match="may be a mixture"):
        lock.acquire(SHORT)


def test_who_waits_too_long_is_told_why_and_for_how_long(lock: ServingLock) -> None:
    lock.shut("its weights are being updated", SHORT)
    with pytest.raises(EngineError, match=r"not serving for 0\.01 s: its weights are being updated"):
        lock.acquire(SHORT)
    with pytest.raises(EngineError, match="not serving for 0 s"):
        lock.acquire(0)


def test_release_without_holding_is_refused(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()
    holder = Holder(pool, lock).enter()
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()  # somebody does, but not this thread
    holder.leave()


def test_lock_is_let_go_when_a_forward_pass_raises(lock: ServingLock) -> None:
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    lock.shut("an update", SHORT)


# --- engines of several workers --------------------------------------------------------------------------------------


def test_passes_are_counted_by_their_beginning(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    with lock, lock:  # one pass
        holder = Holder(pool, lock).enter()
        assert lock.halt("an update") == 2
    holder.leave()
    assert lock.halt("an update") == 2
    lock.open()
    lock.recount()
    assert lock.halt("an update") == 0


def test_halted_lock_keeps_newcomers_out_and_holders_in(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    holder = Holder(pool, lock).enter()
    lock.halt("an update")
    with pytest.raises(EngineError, match="an update"):
        lock.acquire(SHORT)
    holder.leave()


def test_lock_lets_in_the_passes_that_siblings_have_begun(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    for _ in range(3):
        with lock:
            pass
    assert lock.halt("an update") == 3
    newcomers = [Holder(pool, lock) for _ in range(3)]
    shutting = pool.submit(lock.shut, "an update", WAIT_SECONDS, 5)
    until(lambda: sum(newcomer.inside.is_set() for newcomer in newcomers) == 2)
    assert not shutting.done()
    served = [newcomer for newcomer in newcomers if newcomer.inside.is_set()]
    for newcomer in served:
        newcomer.leave()
    shutting.result(WAIT_SECONDS)
    (late,) = [newcomer for newcomer in newcomers if newcomer not in served]
    assert not late.inside.is_set()
    lock.open()
    late.enter().leave()


def test_passes_that_do_not_come_are_not_waited_for_until_the_deadline(lock: ServingLock) -> None:
    """The count of a worker that was restarted is not that of its siblings."""
    lock.halt("an update")
    lock.shut("an update", 0.1, 100)
    assert reason(lock) == "an update"
    with pytest.raises(EngineError):
        lock.acquire(SHORT)


def test_shutting_after_passes_that_were_begun_already_waits_for_no_other(lock: ServingLock) -> None:
    with lock:
        pass
    lock.shut("an update", WAIT_SECONDS, 1)
    assert reason(lock) == "an update"


def test_many_passes_and_updates_never_overlap(lock: ServingLock, pool: ThreadPoolExecutor) -> None:
    """Eight threads serve and one updates, as fast as they can, until each has had its turns."""
    weights = [0, 0]
    passes = [0] * 8
    stop = threading.Event()
    torn: list[tuple[int, int]] = []

    def serve(number: int) -> None:
        while not stop.is_set():
            with lock:
                first, second = weights
                if first != second:
                    torn.append((first, second))
            passes[number] += 1

    serving = [pool.submit(serve, number) for number in range(8)]
    deadline = time.monotonic() + WAIT_SECONDS
    for version in itertools.count(1):
        if version > 200 and (all(passes) or time.monotonic() > deadline):
            break
        lock.shut("an update", WAIT_SECONDS)
        weights[0] = version
        weights[1] = version
        lock.open()
    stop.set()
    for served in serving:
        served.result(WAIT_SECONDS)
    assert all(passes)
    assert torn == []
