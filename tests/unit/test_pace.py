"""How full slots are when engines are asked to pause."""

from __future__ import annotations

import pytest

from cpe_daemon.core.pace import Pace, Prefill, slowest


@pytest.mark.parametrize(
    ("slots", "buckets", "starved", "full"),
    [(1, 9, True, 0), (3, 9, True, 0), (4, 9, True, 1), (8, 9, True, 5), (9, 9, True, 9), (9, 9, False, 0)],
)
def test_three_slots_are_left_to_be_filled_where_nobody_knows_better(
    slots: int, buckets: int, starved: bool, full: int
) -> None:
    assert Pace(starved).prefill(slots, buckets) == Prefill(full)


@pytest.mark.parametrize(
    ("stop", "fill", "full", "more"),
    [
        (0.5, 0.25, 5, 0.0),
        (0.625, 0.25, 4, 0.125),
        (128.0, 0.25, 0, 0.0),
        (0.0625, 0.25, 6, 0.1875),
        (1.75, 0.25, 0, 0),
    ],
)
def test_what_fills_while_an_engine_stops_is_not_waited_for_nor_one_slot_more(
    stop: float, fill: float, full: int, more: float
) -> None:
    assert Pace(True, stop, fill).prefill(8, 100) == Prefill(full, more)
    assert Pace(True, stop, fill).prefill(8, 8) == Prefill(8)


def test_a_slow_engine_is_asked_at_once_so_that_it_can_load_the_first_bucket_when_that_is_there() -> None:
    assert Pace(False, 1.0, 0.25).prefill(8, 100) == Prefill(0)
    assert Pace(False, 0.0625, 0.25).prefill(8, 100) == Prefill(0)


def test_nothing_is_to_be_full_where_there_is_nothing() -> None:
    assert Pace().prefill(3, 0) == Prefill(0)


def test_several_engines_are_as_slow_as_the_slowest() -> None:
    assert slowest([Pace(False, 1.0, 3.0), Pace(True, 2.0, 1.0)]) == Pace(True, 2.0, 3.0)
    assert slowest([Pace(False)]) == Pace(False)
