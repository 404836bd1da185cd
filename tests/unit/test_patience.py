"""How long a trainer waits for its links."""

from __future__ import annotations

from cpe_daemon.publisher.patience import Patience

GB = 1 << 30
LARGE = 100 * GB
MOST = 1 / 16


def test_link_that_sends_nothing_is_behind_after_a_moment_and_stays_so() -> None:
    patience = Patience(LARGE, 10.0)
    assert patience.left(0, 10.0) == MOST
    assert 0.02 < patience.left(0, 10.03) < 0.04
    for now in (10.07, 10.5, 99.0):
        assert patience.left(0, now) == 0.0


def test_link_that_keeps_up_is_never_behind() -> None:
    patience = Patience(LARGE, 0.0)
    for step in range(1, 10_000):
        assert patience.left(int(step * 0.01 * 1.1 * GB), step * 0.01) > 0.0


def test_burst_makes_up_for_a_pause_but_not_for_more_than_that() -> None:
    patience = Patience(LARGE, 0.0)
    assert patience.left(10 * GB, 0.05) == MOST
    assert patience.left(10 * GB, 0.1) > 0.0
    assert patience.left(10 * GB, 0.12) == 0.0


def test_link_that_is_slow_is_found_behind_once() -> None:
    patience = Patience(LARGE, 0.0)
    waits = [patience.left(int(step * 0.001 * 0.3 * GB), step * 0.001) for step in range(1, 10_000)]
    first = waits.index(0.0)
    assert MOST <= first * 0.001 < 2 * MOST
    assert not any(waits[first:])


def test_link_that_was_behind_has_to_earn_all_of_it_again() -> None:
    patience = Patience(LARGE, 0.0)
    assert patience.left(0, 1.0) == 0.0
    assert patience.left(GB // 100, 1.001) == 0.0
    assert patience.left(GB // 20, 1.002) == 0.0
    assert patience.left(GB // 8, 1.003) == MOST
    assert 0.0 < patience.left(GB // 8, 1.04) < MOST


def test_small_contribution_is_not_worth_a_long_wait() -> None:
    patience = Patience(GB // 1024, 0.0)
    assert patience.left(0, 0.0) == 1 / 1024
    assert patience.left(0, 0.002) == 0.0
    assert Patience(0, 0.0).left(0, 0.0) == 0.0


def test_where_digesting_is_slow_a_slower_link_keeps_up_and_may_be_waited_for_longer() -> None:
    patience = Patience(LARGE, 0.0)
    patience.digested(GB, 1.0)
    assert patience.left(GB // 8, 0.0) == 0.25
    patience = Patience(LARGE, 0.0)
    patience.digested(GB, 1.0)
    for step in range(1, 1000):
        assert patience.left(int(step * 0.01 * 0.2 * GB), step * 0.01) > 0.0
    quick = Patience(LARGE, 0.0)
    quick.digested(100 * GB, 1.0)
    assert [quick.left(int(step * 0.01 * 0.9 * GB), step * 0.01) > 0.0 for step in (1, 100)] == [True, False]
