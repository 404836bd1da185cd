"""When the daemon is not well: a copy that does not end, seen from outside the thread that is in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import structlog

from cpe_daemon.daemon.health import Health
from cpe_daemon.devices import copypool
from cpe_daemon.devices.copypool import CopyPool, longest

_SECONDS = 20.0


class Copy:
    """Work that is in flight until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.going_on = threading.Event()

    def __call__(self, result: str = "copied", *, fail: bool = False) -> str:
        self.begun.set()
        assert self.going_on.wait(_SECONDS)
        if fail:
            raise OSError("bad address")
        return result


@pytest.fixture
def pool(no_leaks: None) -> Iterator[CopyPool]:
    made = CopyPool(2, "cpe-test")
    yield made
    made.shutdown()


def test_pool_without_work_is_stuck_in_nothing(pool: CopyPool) -> None:
    assert pool.stuck_seconds == 0.0
    assert pool.submit(int, "7").result(_SECONDS) == 7
    assert pool.stuck_seconds == 0.0
    assert longest([]) == longest([pool]) == 0.0


def test_work_that_is_cancelled_while_it_waits_keeps_nobody_from_going_on(pool: CopyPool) -> None:
    blocking = [Copy(), Copy()]
    copying = [pool.submit(copy) for copy in blocking]
    for copy in blocking:
        assert copy.begun.wait(_SECONDS)
    waiting = pool.submit(Copy())
    assert not pool.go_on()
    assert waiting.cancel()
    assert pool.go_on()
    del pool._began[threading.get_ident()]
    for copy in blocking:
        copy.going_on.set()
    assert [future.result(_SECONDS) for future in copying] == ["copied"] * 2
    assert pool.go_on()
    del pool._began[threading.get_ident()]


def test_age_is_that_of_the_oldest_copy_in_flight(pool: CopyPool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(copypool, "time", SimpleNamespace(monotonic=lambda: now))
    first, second, waiting = Copy(), Copy(), Copy()
    copying = [pool.submit(first, "one")]
    assert first.begun.wait(_SECONDS)
    now = 103.0
    copying.append(pool.submit(second))
    assert second.begun.wait(_SECONDS)
    copying.append(pool.submit(waiting))  # no thread is free for it, so nothing of it is in flight
    now = 110.0
    assert pool.stuck_seconds == 10.0
    assert longest([pool, pool]) == 10.0
    first.going_on.set()
    assert copying[0].result(_SECONDS) == "one"
    assert waiting.begun.wait(_SECONDS)
    assert pool.stuck_seconds == 7.0
    second.going_on.set()
    waiting.going_on.set()
    assert [future.result(_SECONDS) for future in copying[1:]] == ["copied", "copied"]


def test_copy_that_fails_is_not_in_flight_any_more(pool: CopyPool) -> None:
    copy = Copy()
    copying = pool.submit(copy, fail=True)
    copy.going_on.set()
    with pytest.raises(OSError, match="bad address"):
        copying.result(_SECONDS)
    assert pool.submit(int, "1").result(_SECONDS) == 1
    assert longest([pool]) == 0.0


def test_daemon_is_well_until_a_copy_is_too_old_and_says_so_once() -> None:
    ages = {"in": 0.0, "out": 0.0}
    health = Health({name: partial(ages.__getitem__, name) for name in ages}, stuck_seconds=30.0)
    with structlog.testing.capture_logs() as logs:
        assert health.reasons() == []
        ages["out"] = 30.0
        assert health.reasons() == []
        ages["out"] = 31.2
        expected = ["a copy out of the arena has been in flight for 31 s (deadlines.stuck_seconds: 30)"]
        assert health.reasons() == expected
        ages["out"] = 32.4
        assert len(health.reasons()) == 1
        ages["in"] = 45.0
        assert len(health.reasons()) == 2
        ages.update({"out": 0.0, "in": 0.0})
        assert health.reasons() == []
    assert [(entry["log_level"], entry["event"], entry["copies"]) for entry in logs] == [
        ("error", "daemon.stuck", "out"),
        ("error", "daemon.stuck", "in"),
        *[("warning", "daemon.goes_on", what) for what in [entry["copies"] for entry in logs[2:]]],
    ]
    assert {entry["copies"] for entry in logs[2:]} == {"out", "in"}
