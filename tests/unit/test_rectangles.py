"""Rectangles of bytes: strided tensors become such, and parts go where the whole does; numpy knows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.rectangles import Rectangle, clip, overlap, strided
from cpe_daemon.errors import MisuseError

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def carry_out(rectangles: list[Rectangle], source: Bytes, destination: Bytes) -> None:
    for whole in rectangles:
        assert whole.nbytes > 0
        assert whole.rows > 0
        for row in range(whole.rows):
            at, to = whole.source + row * whole.source_pitch, whole.destination + row * whole.destination_pitch
            assert 0 <= at <= at + whole.nbytes <= source.nbytes
            assert 0 <= to <= to + whole.nbytes <= destination.nbytes
            destination[to : to + whole.nbytes] = source[at : at + whole.nbytes]


def numbered(nbytes: int) -> Bytes:
    return np.random.default_rng(nbytes).integers(1, 256, nbytes, dtype=np.uint8)


rectangles = st.builds(
    lambda to, at, nbytes, rows, gap, other: Rectangle(to, at, nbytes, rows, nbytes + gap, nbytes + other),
    *(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 5), st.integers(0, 5)),
)


@given(whole=rectangles, cuts=st.lists(st.integers(0, 110), max_size=6))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_parts_of_a_rectangle_go_where_the_whole_does(whole: Rectangle, cuts: list[int]) -> None:
    source = numbered(128)
    expected, got = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    carry_out([whole], source, expected)
    bounds = [0, *sorted(cuts), source.nbytes]
    copied = 0
    for first, end in itertools.pairwise(bounds):
        clipped = clip(whole, first, end)
        assert len(clipped) <= 3
        assert all(first <= part.source and part.source_end <= end for part in clipped)
        copied += sum(part.total_bytes for part in clipped)
        carry_out(clipped, source, got)
    assert bytes(got) == bytes(expected)
    assert copied == whole.total_bytes


def test_nothing_is_clipped_from_outside_and_between_rows() -> None:
    whole = Rectangle(0, 10, 4, 3, 4, 8)
    assert clip(whole, 0, 10) == clip(whole, 14, 18) == clip(whole, 30, 99) == clip(whole, 12, 12) == []
    assert clip(whole, 18, 22) == [Rectangle(4, 18, 4)]
    assert clip(whole, 10, 22) == [Rectangle(0, 10, 4, 2, 4, 8)]
    assert clip(whole, 0, 99) == [whole]


@st.composite
def slices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Views of the same shape into two arrays, whose elements are in the same order."""
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.int64]))
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    views = []
    for _ in range(2):
        bounds = [(draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.sampled_from([1, 1, 2]))) for _ in shape]
        sizes = [low + size * step + high for size, (low, high, step) in zip(shape, bounds, strict=True)]
        whole = numbered(math.prod(sizes) * np.dtype(dtype).itemsize).view(dtype).reshape(sizes)
        cut = [slice(low, low + size * step, step) for size, (low, _, step) in zip(shape, bounds, strict=True)]
        index: tuple[Any, ...] = (..., *cut)
        views.append(whole[index])
    return views[0], views[1]


def buffer_of(view: np.ndarray) -> tuple[Bytes, int]:
    """The bytes that a view is of, and where in them it begins."""
    whole = view.base
    assert isinstance(whole, np.ndarray)
    assert whole.dtype == np.uint8
    return whole, view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]


@given(pair=slices())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_strided_tensors_become_rectangles(pair: tuple[np.ndarray, np.ndarray]) -> None:
    cut_out, into = pair
    source, at = buffer_of(cut_out)
    destination, to = buffer_of(into)
    found = strided(cut_out.shape, cut_out.itemsize, to, into.strides, at, cut_out.strides)
    got = destination.copy()
    destination[:] = ~destination
    got[:] = destination
    carry_out(found, source, got)
    into[...] = cut_out
    assert bytes(got) == bytes(destination)


@pytest.mark.parametrize(
    ("shape", "to", "at", "expected"),
    [
        ((), (), (), [Rectangle(100, 7, 2)]),
        ((0, 4), (8, 2), (8, 2), []),
        ((6, 4), (8, 2), (8, 2), [Rectangle(100, 7, 48)]),
        ((6, 1, 4), (8, 99, 2), (8, 1, 2), [Rectangle(100, 7, 48)]),
        ((6, 4), (8, 2), (16, 2), [Rectangle(100, 7, 8, 6, 8, 16)]),
        ((3, 6, 4), (48, 8, 2), (96, 16, 2), [Rectangle(100, 7, 8, 18, 8, 16)]),
        ((6, 1), (2, 2), (16, 2), [Rectangle(100, 7, 2, 6, 2, 16)]),
        ((2, 6, 4), (99, 8, 2), (192, 16, 2), [Rectangle(100, 7, 8, 6, 8, 16), Rectangle(199, 199, 8, 6, 8, 16)]),
    ],
    ids=str,
)
def test_rectangles_are_as_few_as_may_be(
    shape: tuple[int, ...], to: tuple[int, ...], at: tuple[int, ...], expected: list[Rectangle]
) -> None:
    assert strided(shape, 2, 100, to, 7, at) == expected


@pytest.mark.parametrize(
    ("shape", "to", "at", "reason"),
    [
        ((4, 4), (2, 8), (8, 2), "order"),
        ((2, 3, 4), (8, 16, 2), (24, 8, 2), "order"),
        ((4, 4), (8, 2), (0, 2), "repeated"),
        ((4, 4), (8, 2), (2, 0), "repeated"),
        ((4, 4), (0, 2), (8, 2), "repeated"),
        ((4, 4), (4, 2), (8, 2), "order"),
        ((4, 4), (8, 2), (4, 2), "order"),
        ((1 << 17, 2, 2), (16, 8, 2), (32, 8, 2), "pieces"),
    ],
    ids=str,
)
def test_what_is_no_plain_copy_is_refused(
    shape: tuple[int, ...], to: tuple[int, ...], at: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(MisuseError, match=reason):
        strided(shape, 2, 0, to, 0, at)


@given(
    several=st.lists(rectangles, min_size=1, max_size=5), shifts=st.lists(st.integers(0, 60), min_size=5, max_size=5)
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_what_is_said_not_to_overlap_does_not(several: list[Rectangle], shifts: list[int]) -> None:
    moved = [whole.moved(shift, 0) for whole, shift in zip(several, shifts, strict=False)]
    count = np.zeros(256, np.int64)
    for whole in moved:
        for row in range(whole.rows):
            to = whole.destination + row * whole.destination_pitch
            count[to : to + whole.nbytes] += 1
    if not overlap(moved):
        assert count.max() <= 1


def test_columns_and_neighbours_do_not_overlap() -> None:
    columns = [Rectangle(8 * column, 0, 8, 5, 32, 8) for column in range(4)]
    assert not overlap(columns)
    assert overlap([*columns, Rectangle(60, 0, 1)])
    assert overlap([columns[0], columns[1].moved(-1, 0)])
    assert not overlap([Rectangle(0, 0, 8), Rectangle(8, 0, 8), Rectangle(4, 0, 0), Rectangle(16, 0, 4, 2, 8, 4)])
    assert overlap([Rectangle(0, 0, 8), Rectangle(7, 0, 8)])
    assert overlap([Rectangle(0, 0, 8), Rectangle(0, 0, 8)])
    assert not overlap([])
