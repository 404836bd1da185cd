"""The fold: what `core.fold` says, numpy over an extent and torch over slots agree on, and what changes it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from cpe_daemon.core.buckets import Cut, cut
from cpe_daemon.core.extents import Extent
from cpe_daemon.core.fold import ROW_BYTES, WEIGHTS, mix
from cpe_daemon.core.manifest import Manifest, layout, merge
from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.errors import ProtocolError
from cpe_daemon.ingest import fold as ingest_fold
from cpe_daemon.ingest.fold import ExtentFold, fold_seams
from cpe_daemon.ingest.folding import fold_of
from cpe_daemon.versions import Contribution
from cpe_daemon.wire.messages import TensorPart
from inference_plugins import fold as plugin_fold
from inference_plugins.fold import Folder

MODULUS = 1 << 64
SIZES = st.lists(st.sampled_from([0, 1, 7, 8, 9, 255, 256, 257, 511, 512, 777, 1024, 5000]), min_size=1, max_size=6)
STEPS = st.sampled_from([100, 256, 300, 512, 2304, 1 << 20])


def reference(tensors: Mapping[str, bytes]) -> int:
    """The fold as the documents have it, in plain integers."""
    total = 0
    for name, data in tensors.items():
        seed = xxh3_64_intdigest(name.encode())
        for row, begin in enumerate(range(0, len(data), 256)):
            filled = data[begin : begin + 256].ljust(256, b"\0")
            words = [int.from_bytes(filled[at : at + 8], "little") for at in range(0, 256, 8)]
            value = sum(word * weight for word, weight in zip(words, WEIGHTS, strict=True))
            value = (value + (seed + row) * 0x9E3779B97F4A7C15) % MODULUS
            value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
            value = (value ^ (value >> 27)) * 0x94D049BB133111EB % MODULUS
            total += value ^ (value >> 31)
    return total % MODULUS


def random_tensors(sizes: Sequence[int], seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"layers.{index}.w": rng.randbytes(nbytes) for index, nbytes in enumerate(sizes)}


def in_torch(
    tensors: Mapping[str, bytes], slot_bytes: int = 1 << 14, folder: Folder | None = None, device: str = "cpu"
) -> int:
    """Fold through buckets as the daemon cuts them; whatever a slot holds besides is noise."""
    specs = [TensorSpec(name, "uint8", (len(data),)) for name, data in tensors.items()]
    made: Cut = cut(specs, slot_bytes)
    folder = folder or Folder()
    folder.begin()
    for seq, filling in enumerate(made.fillings):
        slot = bytearray(random.Random(seq).randbytes(slot_bytes))
        parts = []
        for part in filling.parts:
            spec = specs[part.tensor]
            data = tensors[spec.name][part.tensor_offset : part.tensor_offset + part.nbytes]
            slot[part.slot_offset : part.slot_offset + part.nbytes] = data
            parts.append(
                TensorPart(spec.name, spec.dtype, spec.shape, part.tensor_offset, part.nbytes, part.slot_offset)
            )
        content = torch.frombuffer(bytearray(slot), dtype=torch.uint8).to(device)
        folder.add(seq, parts, content)
        assert bytes(content.tolist()) == slot
    return folder.result()


def add(fold: ExtentFold, offset: int, nbytes: int) -> None:
    """Bring a chunk in three pieces."""
    chunk = fold.chunk(offset, nbytes)
    for came in (nbytes // 3, nbytes // 2, nbytes):
        chunk.upto(came)
    chunk.end()


def in_arena(ranks: Sequence[Sequence[tuple[Shard, bytes]]], step: int = 1 << 20) -> int:
    """Fold extents as they are staged, ``step`` bytes at a time, and what lies around seams at the end."""
    shards = [[shard for shard, _ in rank] for rank in ranks]
    manifest: Manifest = merge(VersionId("m", "r", 1), shards)
    total, extents = 0, []
    for number, rank in enumerate(ranks):
        plan = layout(shards[number])
        extent = bytearray(random.Random(number).randbytes(plan.nbytes))
        for (_, data), offset in zip(rank, plan.offsets, strict=True):
            extent[offset : offset + len(data)] = data
        fold = ExtentFold(memoryview(extent), shards[number], plan)
        pieces = list(range(0, plan.nbytes, step))
        random.Random(number).shuffle(pieces)
        for begin in pieces:
            add(fold, begin, min(step, plan.nbytes - begin))
        total += fold.total
        extents.append(memoryview(extent))
    return (total + fold_seams(manifest.tensors, extents)) % MODULUS


def whole(tensors: Mapping[str, bytes]) -> list[tuple[Shard, bytes]]:
    return [(Shard(name, "uint8", (len(data),)), data) for name, data in tensors.items()]


def shared(tensors: Mapping[str, bytes], cuts: Sequence[Sequence[int]]) -> list[list[tuple[Shard, bytes]]]:
    """Each tensor cut at its own offsets, its parts dealt out to as many ranks as the most cut one has."""
    ranks: list[list[tuple[Shard, bytes]]] = [[] for _ in range(max(len(at) for at in cuts) + 1)]
    for (name, data), offsets in zip(tensors.items(), cuts, strict=True):
        bounds = [0, *offsets, len(data)]
        for rank, (begin, end) in zip(ranks, itertools.pairwise(bounds), strict=False):
            rank.append((Shard(name, "uint8", (len(data),), (begin,), (end - begin,)), data[begin:end]))
    return ranks


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[dict[str, bytes], list[list[int]]]:
    tensors = random_tensors(draw(SIZES), draw(st.integers(0, 9)))
    cuts = []
    for data in tensors.values():
        inside = st.integers(1, len(data) - 1) | st.integers(1, (len(data) - 1) // 256).map(lambda row: 256 * row)
        cuts.append(sorted(draw(st.sets(inside, max_size=4))) if len(data) > 512 else [])
    return tensors, cuts


# --- one number, however it is come by --------------------------------------------------------------------------------


def test_fold_is_what_it_was() -> None:
    """Daemon and workers may be of different releases: a change of the fold is a change of the protocol."""
    assert mix(1) == 0x5692161D100B05E5
    assert tuple(mix(odd) // 64 * 64 + odd for odd in range(1, 64, 2)) == WEIGHTS
    assert reference({"w": bytes(range(256)) + b"tail", "b": b"", "é": b"\x01"}) == 11479923048015890683


def test_weights_are_odd_and_differ_modulo_64() -> None:
    assert [weight % 64 for weight in WEIGHTS] == list(range(1, 64, 2))
    assert max(WEIGHTS) < MODULUS


@given(sizes=SIZES, seed=st.integers(0, 99), step=STEPS, slot_rows=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_fold_in_arena_and_in_slots_is_the_reference(sizes: list[int], seed: int, step: int, slot_rows: int) -> None:
    tensors = random_tensors(sizes, seed)
    assert in_arena([whole(tensors)], step) == reference(tensors)
    assert in_torch(tensors, slot_rows * ROW_BYTES) == reference(tensors)


@given(cut_tensors(), STEPS)
@example(({"w": bytes(range(250)) * 5}, [[1, 2, 255, 257, 600]]), 100)
@settings(deadline=None, max_examples=40)
def test_fold_in_arena_is_the_reference_wherever_ranks_cut_a_tensor(
    cut_up: tuple[dict[str, bytes], list[list[int]]], step: int
) -> None:
    tensors, cuts = cut_up
    assert in_arena(shared(tensors, cuts), step) == reference(tensors)


def test_fold_of_many_rows_takes_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_fold, "_ROWS", 3)
    tensors = random_tensors([10_000, 300, 2_000_000])
    assert in_arena([whole(tensors)]) == in_torch(tensors, 1 << 20) == reference(tensors)
    assert in_arena(shared(tensors, [[999], [], [5_000, 8_001]])) == reference(tensors)


def test_extent_fold_takes_rows_from_several_threads() -> None:
    tensors = random_tensors([100_000, 77, 50_000])
    shards = [shard for shard, _ in whole(tensors)]
    plan = layout(shards)
    extent = bytearray(plan.nbytes)
    for data, offset in zip(tensors.values(), plan.offsets, strict=True):
        extent[offset : offset + len(data)] = data
    fold = ExtentFold(memoryview(extent), shards, plan)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: add(fold, at, min(1000, plan.nbytes - at)), range(0, plan.nbytes, 1000)))
    assert fold.total == reference(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [40, 1 << 13])
def test_fold_on_a_gpu_is_the_reference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_fold, "_CUDA_ROWS", 1000)
    folder = Folder()
    for seed in range(2):
        tensors = random_tensors([0, 1, 7, 777, 5000, 300_000, 256, 3_000_001], seed)
        assert in_torch(tensors, rows * ROW_BYTES, folder, device="cuda") == reference(tensors)


@pytest.mark.gpu
def test_folder_on_a_gpu_takes_a_fraction_of_a_slot_of_memory() -> None:
    slot = torch.randint(0, 256, (256 << 20,), dtype=torch.uint8, device="cuda")
    part = TensorPart("w", "uint8", (slot.numel(),), 0, slot.numel() - 3, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    folder = Folder()
    folder.add(0, [part], slot)
    shard = Shard("w", "uint8", (part.nbytes,))
    fold = ExtentFold(memoryview(slot.cpu().numpy().data), [shard], layout([shard]))
    add(fold, 0, slot.numel())
    assert folder.result() == fold.total
    assert torch.cuda.max_memory_allocated() - before < slot.numel() // 3
    folder.begin()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_folder_begins_anew_and_sees_when_a_bucket_holds_something_else() -> None:
    folder = Folder()
    assert folder.result() == 0
    for sizes in ([3000, 20], [3000, 20], [20, 3000], [500]):
        tensors = random_tensors(sizes, sum(sizes))
        assert in_torch(tensors, folder=folder) == reference(tensors)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("a", 0, 8, 0), ("b", 0, 8, 512)], "byte 0 of b at 512 of a slot: not in rows"),
        ([("a", 128, 8, 0)], "byte 128 of a at 0 of a slot: not in rows"),
        ([("a", 0, 1025, 0)], "1280 bytes for a slot of 1024"),
    ],
    ids=["gap", "within-a-row", "too-large"],
)
def test_folder_refuses_parts_that_are_no_rows(parts: list[tuple[str, int, int, int]], said: str) -> None:
    given_parts = [TensorPart(name, "uint8", (4096,), *numbers) for name, *numbers in parts]
    with pytest.raises(ProtocolError, match=said):
        Folder().add(0, given_parts, torch.zeros(1024, dtype=torch.uint8))


def test_version_has_a_fold_if_all_of_its_contributions_were_folded() -> None:
    tensors = random_tensors([5000, 777])
    ranks = shared(tensors, [[300], [256]])
    arena, extents, folds, base = bytearray(1 << 14), [], [], 512
    for rank in ranks:
        plan = layout([shard for shard, _ in rank])
        for (_, data), offset in zip(rank, plan.offsets, strict=True):
            arena[base + offset : base + offset + len(data)] = data
        fold = ExtentFold(memoryview(arena)[base : base + plan.nbytes], [shard for shard, _ in rank], plan)
        add(fold, 0, plan.nbytes)
        folds.append(fold.total)
        extents.append(Extent(base, plan.nbytes))
        base += plan.nbytes + 512
    shards = [[shard for shard, _ in rank] for rank in ranks]
    manifest = merge(VersionId("m", "r", 1), shards)
    parts = [Contribution(some, extent, fold=fold) for some, extent, fold in zip(shards, extents, folds, strict=True)]
    assert fold_of(manifest, parts, memoryview(arena)) == reference(tensors)
    parts[1].fold = None
    assert fold_of(manifest, parts, memoryview(arena)) is None


# --- what changes it --------------------------------------------------------------------------------------------------


def folds(tensors: Iterable[Mapping[str, bytes]]) -> list[int]:
    """Of each, by torch; the reference agrees."""
    return [in_torch(some) for some in tensors]


@given(nbytes=st.integers(1, 2000), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=40)
def test_fold_changes_with_every_bit(nbytes: int, seed: int, data: st.DataObject) -> None:
    content = bytearray(random.Random(seed).randbytes(nbytes))
    before = bytes(content)
    bit = data.draw(st.integers(0, 8 * nbytes - 1))
    content[bit // 8] ^= 1 << bit % 8
    first, second = folds([{"w": before}, {"w": bytes(content)}])
    assert first != second
    assert in_arena([whole({"w": before})]) != in_arena([whole({"w": bytes(content)})])


@given(unit=st.sampled_from([1, 2, 4, 8, 256]), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=40)
def test_fold_changes_when_two_places_are_exchanged(unit: int, seed: int, data: st.DataObject) -> None:
    content = random.Random(seed).randbytes(2048)
    count = len(content) // unit
    one, other = data.draw(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)))
    pieces = [content[at : at + unit] for at in range(0, len(content), unit)]
    pieces[one], pieces[other] = pieces[other], pieces[one]
    first, second = folds([{"w": content}, {"w": b"".join(pieces)}])
    assert (first == second) == (content == b"".join(pieces))


def one_hot(lane: int) -> bytes:
    return bytes(2 * lane) + b"\x80\x3f" + bytes(254 - 2 * lane)


def test_fold_changes_when_rows_of_the_same_words_are_exchanged() -> None:
    """As those of an identity matrix are: their plain sums, by row and by column, stay the same."""
    rows = [one_hot(lane) for lane in range(128)]
    orders = [rows, [rows[4], *rows[1:4], rows[0], *rows[5:]], rows[::-1], rows[1:] + rows[:1]]
    assert len(set(folds({"eye": b"".join(order)} for order in orders))) == len(orders)


def test_fold_changes_with_names_and_with_what_is_missing() -> None:
    a, b, zeros = b"a" * 300, b"b" * 300, bytes(512)
    sets: list[dict[str, bytes]] = [
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a},
        {"a": a, "b": b, "z": zeros},
        {"a": a, "b": b, "y": zeros},
        {"a": a, "b": b, "z": zeros[:256]},
    ]
    assert len(set(folds(sets))) == len(sets)


def test_fold_does_not_depend_on_the_order_of_tensors() -> None:
    tensors = random_tensors([100, 700, 3000])
    assert in_torch(tensors) == in_torch(dict(reversed(tensors.items())))


def test_warming_up_leaves_nothing_behind() -> None:
    folder, slot = Folder(), torch.arange(4 * ROW_BYTES, dtype=torch.uint8)
    part = TensorPart("w", "uint8", (300,), 0, 300, 0)
    folder.begin()
    folder.add(0, [part], slot)
    found = folder.result()
    folder.warm_up(slot)
    assert folder.result() == 0
    folder.add(0, [part], slot)
    assert folder.result() == found
