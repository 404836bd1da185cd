"""Token buckets: bursts pass, floods do not, and strangers who come and go cost no memory."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cpe_daemon.core.rates import Rates


def test_burst_passes_and_no_more() -> None:
    rates = Rates(10, burst=5)
    assert [rates.take(b"a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2


def test_bucket_fills_again() -> None:
    rates = Rates(10, burst=5)
    while rates.take(b"a", 0.0):
        continue
    assert not rates.take(b"a", 0.05)
    assert [rates.take(b"a", 0.2) for _ in range(3)] == [True, True, False]
    assert [rates.take(b"a", 100.0) for _ in range(6)] == [True] * 5 + [False]


def test_what_is_refused_takes_nothing() -> None:
    rates = Rates(1, burst=1)
    assert rates.take(b"a", 0.0)
    assert not any(rates.take(b"a", time / 1000) for time in range(999))
    assert rates.take(b"a", 1.0)


def test_peers_do_not_share_a_bucket() -> None:
    rates = Rates(1, burst=1)
    assert rates.take(b"a", 0.0)
    assert rates.take(b"b", 0.0)
    assert not rates.take(b"a", 0.0)


@given(
    per_second=st.integers(1, 1000),
    burst=st.integers(1, 100),
    pauses=st.lists(st.floats(0, 0.1, allow_nan=False), min_size=1, max_size=300),
)
def test_rate_is_kept_over_any_stretch(per_second: int, burst: int, pauses: list[float]) -> None:
    rates = Rates(per_second, burst)
    times = [time for time in itertools.accumulate(pauses) if rates.take(b"a", time)]
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + per_second * (times[last] - times[first]) + 1e-3


def test_peers_with_full_buckets_are_forgotten() -> None:
    rates = Rates(10, burst=5, most_peers=100)
    for number in range(10_000):
        rates.take(b"%d" % number, number * 0.02)
        assert len(rates) <= 100


def test_a_crowd_of_new_peers_is_bounded_and_served() -> None:
    rates = Rates(0.001, burst=1, most_peers=100)
    assert all(rates.take(b"%d" % number, 0.0) for number in range(1000))
    assert len(rates) == 100
    assert not rates.take(b"999", 0.0)
