"""How full slots are when engines are asked to pause."""

from __future__ import annotations

import pytest

from cpe_daemon.core.pace import Pace, slowest


@pytest.mark.parametrize(
    ("slots", "buckets", "starved", "full"),
    [(1, 9, True, 0), (3, 9, True, 1), (4, 9, True, 2), (8, 9, True, 6), (9, 9, True, 9), (9, 9, False, 0)],
)
def test_two_slots_are_left_to_be_filled_where_nobody_knows_better(
    slots: int, buckets: int, starved: bool, full: int
) -> None:
    assert Pace(starved).prefill(slots, buckets) == full


@pytest.mark.parametrize(
    ("stop", "fill", "full"), [(0.004, 0.002, 6), (0.0041, 0.002, 5), (0.5, 0.002, 0), (0.0001, 0.002, 7)]
)
def test_slots_that_fill_while_an_engine_stops_are_not_waited_for(stop: float, fill: float, full: int) -> None:
    assert Pace(True, stop, fill).prefill(8, 100) == full
    assert Pace(True, stop, fill).prefill(8, 8) == 8
    assert Pace(False, stop, fill).prefill(8, 100) == 0


def test_nothing_is_to_be_full_where_there_is_nothing() -> None:
    assert Pace().prefill(3, 0) == 0


def test_several_engines_are_as_slow_as_the_slowest() -> None:
    assert slowest([Pace(False, 1.0, 3.0), Pace(True, 2.0, 1.0)]) == Pace(True, 2.0, 3.0)
    assert slowest([Pace(False)]) == Pace(False)
