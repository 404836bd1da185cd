"""The allocator: extents never overlap, and what is freed comes back as one run."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.extents import EMPTY, Extent, ExtentAllocator
from cpe_daemon.core.types import ALIGNMENT_BYTES, align
from cpe_daemon.errors import ArenaFullError, MisuseError

A = ALIGNMENT_BYTES
GIB = 1 << 30


def check_consistent(arena: ExtentAllocator) -> None:
    """Live extents are aligned, inside, apart; the free bytes are all others."""
    end = 0
    for extent in arena.extents:
        assert extent.offset % A == 0
        assert extent.offset >= end
        end = align(extent.end)
    assert end <= arena.capacity_bytes
    taken = sum(align(extent.nbytes) for extent in arena.extents)
    assert arena.free_bytes == arena.capacity_bytes - taken
    assert arena.largest_free_bytes == largest_free(arena)


def free_runs(arena: ExtentAllocator) -> list[tuple[int, int]]:
    """(bytes, offset) of what lies between the live extents."""
    ends = [0, *(align(extent.end) for extent in arena.extents)]
    starts = [*(extent.offset for extent in arena.extents), arena.capacity_bytes]
    return [(start - end, end) for end, start in zip(ends, starts, strict=True) if start > end]


def largest_free(arena: ExtentAllocator) -> int:
    return max((size for size, _ in free_runs(arena)), default=0)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_extents_live_never_overlap_and_freed_coalesce(data: st.DataObject) -> None:
    arena = ExtentAllocator(data.draw(st.integers(0, 60 * A)))
    live: list[Extent] = []
    for take in data.draw(st.lists(st.booleans(), max_size=40)):
        if take or not live:
            nbytes = data.draw(st.integers(0, 12 * A))
            if align(nbytes) <= largest_free(arena):
                live.append(arena.allocate(nbytes))
                assert live[-1].nbytes == nbytes
            else:
                with pytest.raises(ArenaFullError) as caught:
                    arena.allocate(nbytes)
                assert caught.value.need_bytes == align(nbytes)
                assert caught.value.free_bytes == arena.free_bytes
                assert caught.value.largest_bytes == arena.largest_free_bytes
        else:
            arena.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        check_consistent(arena)
    for extent in live:
        arena.free(extent)
    assert arena.free_bytes == arena.largest_free_bytes == arena.capacity_bytes


@given(sizes=st.lists(st.integers(1, 9 * A), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_allocate_takes_the_smallest_run_that_fits_the_lowest_of_equals(sizes: list[int]) -> None:
    arena = ExtentAllocator(400 * A)
    extents = [arena.allocate(nbytes) for nbytes in sizes]
    for extent in extents[::2]:
        arena.free(extent)
    chosen = min(run for run in free_runs(arena) if run[0] >= align(sizes[0]))
    assert arena.allocate(sizes[0]).offset == chosen[1]


def test_allocate_of_zero_bytes_takes_no_room() -> None:
    arena = ExtentAllocator(0)
    assert arena.allocate(0) == EMPTY
    assert EMPTY.end == EMPTY.offset == 0
    arena.free(EMPTY)
    arena.free(EMPTY)
    assert arena.extents == ()


def test_extent_end_is_behind_the_bytes_asked_for() -> None:
    arena = ExtentAllocator(4 * A)
    arena.allocate(1)
    assert arena.allocate(A + 7) == Extent(A, A + 7)
    assert Extent(A, A + 7).end == 2 * A + 7


def test_capacity_beyond_the_last_aligned_offset_stays_unused() -> None:
    arena = ExtentAllocator(3 * A - 1)
    assert arena.capacity_bytes == arena.free_bytes == 2 * A


@pytest.mark.parametrize(
    "stray", [Extent(0, A - 1), Extent(A, A), Extent(3 * A, 1), Extent(2 * A, A), Extent(5, 0), Extent(-A, A)]
)
def test_free_of_what_is_not_allocated_changes_nothing(stray: Extent) -> None:
    arena = ExtentAllocator(8 * A)
    arena.allocate(A)
    arena.allocate(A // 2)
    arena.free(arena.allocate(2 * A))
    before = (arena.extents, arena.free_bytes, arena.largest_free_bytes)
    with pytest.raises(MisuseError, match="not allocated"):
        arena.free(stray)
    assert (arena.extents, arena.free_bytes, arena.largest_free_bytes) == before


def test_free_twice_is_misuse() -> None:
    arena = ExtentAllocator(8 * A)
    extent = arena.allocate(10)
    arena.free(extent)
    with pytest.raises(MisuseError, match="freed before"):
        arena.free(extent)
    assert arena.largest_free_bytes == 8 * A


def test_full_arena_says_how_much_is_needed_and_free() -> None:
    arena = ExtentAllocator(12 * GIB)
    arena.allocate(10 * GIB)
    with pytest.raises(ArenaFullError) as caught:
        arena.allocate(3 * GIB - 5)
    error = caught.value
    assert (error.need_bytes, error.free_bytes, error.largest_bytes) == (3 * GIB, 2 * GIB, 2 * GIB)
    assert "3.0 GiB (3221225472 bytes)" in error.message
    assert "2.0 GiB (2147483648 bytes) free" in error.message
    assert "fragmented" not in error.message


def test_fragmented_arena_says_so() -> None:
    arena = ExtentAllocator(6 * A)
    for extent in [arena.allocate(A) for _ in range(6)][::2]:
        arena.free(extent)
    with pytest.raises(ArenaFullError, match="fragmented: the largest free run is 256 bytes") as caught:
        arena.allocate(2 * A)
    assert (caught.value.free_bytes, caught.value.largest_bytes) == (3 * A, A)


@pytest.mark.parametrize("nbytes", [-1, -A])
def test_negative_sizes_are_misuse(nbytes: int) -> None:
    with pytest.raises(MisuseError):
        ExtentAllocator(nbytes)
    with pytest.raises(MisuseError):
        ExtentAllocator(A).allocate(nbytes)


def test_thousands_of_extents_are_cheap() -> None:
    arena = ExtentAllocator(1 << 40)
    began = time.process_time()
    extents = [arena.allocate(1 + index % 7 * A) for index in range(4_000)]
    for extent in extents[::2] + extents[1::2]:
        arena.free(extent)
    assert time.process_time() - began < 1.0
    assert arena.largest_free_bytes == 1 << 40
