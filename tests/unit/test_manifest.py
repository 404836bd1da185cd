"""The manifest: ranks' parts join into whole tensors, and whatever does not is refused."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.dtypes import ITEMSIZE, itemsize
from cpe_daemon.core.manifest import (
    MAX_DIMS,
    MAX_NAME_CHARS,
    MAX_TENSOR_BYTES,
    Layout,
    Manifest,
    Run,
    checked_nbytes,
    layout,
    merge,
)
from cpe_daemon.core.types import ALIGNMENT_BYTES, Shard, TensorSpec, VersionId, align
from cpe_daemon.errors import ManifestError

VERSION = VersionId("model", "run", 7)
dtypes = st.sampled_from(sorted(ITEMSIZE))
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def joined(*contributions: list[Shard]) -> Manifest:
    return merge(VERSION, contributions)


def rows(name: str, shape: tuple[int, ...], first: int, count: int, dtype: str = "bfloat16") -> Shard:
    """``count`` rows of the first dimension, as FSDP contributes them."""
    return Shard(name, dtype, shape, (first, *[0] * (len(shape) - 1)), (count, *shape[1:]))


# --- types -------------------------------------------------------------------------------------------------------


@given(nbytes=st.integers(0, 1 << 50))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_align_is_the_next_multiple(nbytes: int) -> None:
    assert align(nbytes) % ALIGNMENT_BYTES == 0
    assert 0 <= align(nbytes) - nbytes < ALIGNMENT_BYTES


@given(dtype=dtypes, shape=shapes)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_whole_shard_is_its_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    shard = Shard("w", dtype, shape)
    assert shard.spec == TensorSpec("w", dtype, shape)
    assert shard.nbytes == shard.spec.nbytes == math.prod(shape) * ITEMSIZE[dtype]
    assert shard.box == ((0,) * len(shape), shape)


def test_nouns_name_themselves_to_a_person() -> None:
    assert str(VERSION) == "model@run#7"
    assert str(TensorSpec("w", "int8", (2, 3))) == "w (int8, [2, 3])"
    assert TensorSpec("scalar", "float32", ()).nbytes == 4


def test_versions_of_a_run_are_ordered_by_number() -> None:
    assert VersionId("m", "r", 9) < VersionId("m", "r", 10)


def test_unknown_dtypes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ManifestError, match=r"unknown dtype 'bf16'; known: .*bfloat16"):
        itemsize("bf16")


def test_itemsizes_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for name, size in ITEMSIZE.items():
        if hasattr(torch, name):
            assert getattr(torch, name).itemsize == size, name


# --- layout ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(dtypes, shapes), max_size=12))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_layout_is_aligned_dense_and_in_order(kinds: list[tuple[str, tuple[int, ...]]]) -> None:
    shards = [Shard(f"t{index}", dtype, shape) for index, (dtype, shape) in enumerate(kinds)]
    placed = layout(shards)
    assert len(placed.offsets) == len(shards)
    end = 0
    for shard, offset in zip(shards, placed.offsets, strict=True):
        assert offset == end
        end = align(offset + shard.nbytes)
    assert placed.nbytes == end


def test_layout_of_nothing_takes_nothing() -> None:
    assert layout([]) == Layout((), (), 0)


def test_layout_places_a_part_by_its_own_size() -> None:
    assert layout([rows("w", (100, 128), 10, 2), Shard("b", "int8", (1,))]) == Layout((0, 512), (512, 1), 768)


@pytest.mark.parametrize(
    ("shard", "complaint"),
    [
        (Shard("", "int8", ()), "name of 0 characters"),
        (Shard("n" * (MAX_NAME_CHARS + 1), "int8", ()), "name of 1025 characters"),
        (Shard("w", "int7", ()), "unknown dtype"),
        (Shard("w", "int8", (2, -1)), "w: impossible shape"),
        (Shard("w", "int8", (1,) * (MAX_DIMS + 1)), "w: impossible shape"),
        (Shard("w", "int16", (MAX_TENSOR_BYTES // 2 + 1,)), "w: .* is over"),
        (Shard("w", "int8", (4, 4), (0,), (4, 4)), "w: .* lies outside"),
        (Shard("w", "int8", (4, 4), (0, 0), (4,)), "w: .* lies outside"),
        (Shard("w", "int8", (4, 4), (3, 0), (2, 4)), "w: .* lies outside"),
        (Shard("w", "int8", (4, 4), (-1, 0), (1, 4)), "w: .* lies outside"),
        (Shard("w", "int8", (4, 4), (0, 0), (-1, 4)), "w: .* lies outside"),
        (Shard("w", "int8", (4, 4), (1, 0)), "w: .* lies outside"),
    ],
)
def test_malformed_shards_are_refused_by_name(shard: Shard, complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        checked_nbytes(shard)
    with pytest.raises(ManifestError, match=complaint):
        layout([shard])
    with pytest.raises(ManifestError, match=complaint):
        joined([shard])


@pytest.mark.parametrize(
    "shard",
    [
        Shard("n" * MAX_NAME_CHARS, "int8", ()),
        Shard("w", "int8", (1,) * MAX_DIMS),
        Shard("w", "int8", (MAX_TENSOR_BYTES,)),
        Shard("w", "int8", (0, 5)),
        Shard("w", "int8", (4, 4), (4, 0), (0, 4)),
        Shard("w", "int8", (4, 4), None, (2, 4)),
        Shard("w", "int8", (4, 4), (0, 0)),
    ],
)
def test_shards_at_the_bounds_are_accepted(shard: Shard) -> None:
    checked_nbytes(shard)


# --- merge -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32), world_size=st.integers(1, 5), count=st.integers(0, 8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_parting_over_ranks_joins_to_the_tensors_bytes(seed: int, world_size: int, count: int) -> None:
    """Rows dealt out at will, empty parts among them: what `locate` finds in the extents is each tensor."""
    rng = random.Random(seed)
    contributions: list[list[Shard]] = [[] for _ in range(world_size)]
    payloads: list[list[bytes]] = [[] for _ in range(world_size)]
    whole: dict[str, bytes] = {}
    for name in (f"t{index}" for index in range(count)):
        dtype = rng.choice(sorted(ITEMSIZE))
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 3)))
        row_bytes = math.prod(shape[1:]) * ITEMSIZE[dtype]
        data = whole[name] = rng.randbytes(shape[0] * row_bytes)
        bounds = sorted([0, shape[0], *(rng.randint(0, shape[0]) for _ in range(rng.choice((0, 0, 1, 3))))])
        for first, last in pairwise(bounds):
            rank = rng.randrange(world_size)
            contributions[rank].append(rows(name, shape, first, last - first, dtype))
            payloads[rank].append(data[first * row_bytes : last * row_bytes])
    order = [rng.sample(range(len(shards)), len(shards)) for shards in contributions]
    contributions = [[shards[at] for at in by] for shards, by in zip(contributions, order, strict=True)]
    payloads = [[data[at] for at in by] for data, by in zip(payloads, order, strict=True)]

    manifest = joined(*contributions)
    arena, extent_offsets = bytearray(b"\xee" * 256), []
    for shards, datas in zip(contributions, payloads, strict=True):
        extent_offsets.append(len(arena))
        for data in datas:
            arena += data + b"\xee" * (align(len(data)) - len(data))
        assert len(arena) - extent_offsets[-1] == layout(shards).nbytes
    found = {
        tensor.spec.name: b"".join(arena[extent_offsets[run.rank] + run.offset :][: run.nbytes] for run in tensor.runs)
        for tensor in manifest.tensors
    }
    assert found == whole
    assert manifest.nbytes == sum(map(len, whole.values()))


def test_tensors_come_in_the_order_of_their_first_rank() -> None:
    manifest = joined([Shard("b", "int8", (1,)), Shard("a", "int8", (1,))], [Shard("c", "int8", (1,))])
    assert [tensor.spec.name for tensor in manifest.tensors] == ["b", "a", "c"]
    assert manifest.version == VERSION


def test_runs_carry_rank_and_place() -> None:
    shape = (4, 100)
    manifest = joined(
        [Shard("x", "int8", (300,)), rows("w", shape, 2, 2, "int8")],
        [rows("w", shape, 0, 2, "int8")],
    )
    tensor = manifest.tensors[1]
    assert tensor.runs == (Run(0, 200, 1, 0), Run(200, 200, 0, 512))


def test_ranks_without_tensors_are_fine() -> None:
    assert joined([], [Shard("w", "int8", (1,))], []).nbytes == 1
    assert joined().tensors == ()


def test_empty_and_zero_dimensional_tensors_are_kept() -> None:
    manifest = joined([Shard("none", "int8", (0, 5)), Shard("scale", "float32", ())])
    assert [tensor.spec.nbytes for tensor in manifest.tensors] == [0, 4]
    assert manifest.nbytes == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Shard("w", "int8", (4,)), Shard("w", "int8", (4,))),
        (Shard("w", "int8", (0,)), Shard("w", "int8", (0,))),
        (rows("w", (4,), 0, 3, "int8"), rows("w", (4,), 2, 2, "int8")),
        (rows("w", (4,), 0, 4, "int8"), rows("w", (4,), 1, 1, "int8")),
    ],
)
def test_bytes_contributed_twice_are_refused(first: Shard, second: Shard) -> None:
    for contributions in (([first], [second]), ([second], [first])):
        with pytest.raises(ManifestError, match=re.escape("w is contributed more than once (by ranks [0, 1])")):
            joined(*contributions)
    with pytest.raises(ManifestError, match=re.escape("(by ranks [0])")):
        joined([first, second])


@pytest.mark.parametrize(
    ("parts", "gap"),
    [([(0, 2)], 2), ([(1, 3)], 0), ([(0, 1), (2, 2)], 1), ([(0, 0)], 0), ([(0, 1), (3, 1)], 1)],
)
def test_missing_bytes_are_refused(parts: list[tuple[int, int]], gap: int) -> None:
    shards = [rows("w", (4,), first, count, "int8") for first, count in parts]
    with pytest.raises(ManifestError, match=f"w: no rank contributes bytes {gap} onwards of 4"):
        joined(*[[shard] for shard in shards])


@pytest.mark.parametrize("other", [Shard("w", "int8", (8,)), Shard("w", "uint8", (4,)), Shard("w", "int8", (2, 2))])
def test_ranks_that_differ_on_a_tensor_are_refused(other: Shard) -> None:
    with pytest.raises(ManifestError, match=r"rank 1 contributes w .*, another rank w \(int8, \[4\]\)"):
        joined([Shard("w", "int8", (4,))], [other])


def test_contiguous_boxes_of_any_depth_are_supported() -> None:
    shape = (2, 3, 4)
    boxes = [((0, 0, 0), (1, 3, 4)), ((1, 0, 0), (1, 2, 4)), ((1, 2, 0), (1, 1, 3)), ((1, 2, 3), (1, 1, 1))]
    manifest = joined(*[[Shard("w", "int16", shape, start, local)] for start, local in reversed(boxes)])
    assert [(run.tensor_offset, run.nbytes, run.rank) for run in manifest.tensors[0].runs] == [
        (0, 24, 3),
        (24, 16, 2),
        (40, 6, 1),
        (46, 2, 0),
    ]


@pytest.mark.parametrize(("start", "local"), [((0, 0), (4, 2)), ((0, 2), (4, 2)), ((1, 1), (2, 3)), ((0, 0), (2, 3))])
def test_parts_of_inner_dimensions_are_refused_with_what_is_supported(
    start: tuple[int, ...], local: tuple[int, ...]
) -> None:
    with pytest.raises(ManifestError, match=r"w: .* splits an inner dimension; only contiguous parts"):
        joined([Shard("w", "int8", (4, 4), start, local)])


def test_a_manifest_does_not_change() -> None:
    manifest = joined([Shard("w", "int8", (4,))])
    with pytest.raises(AttributeError):
        manifest.nbytes = 0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        manifest.tensors[0].runs[0].offset = 1  # type: ignore[misc]
    assert manifest == joined([Shard("w", "int8", (4,))])
