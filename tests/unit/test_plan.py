"""The plan: carried out on plain bytes, it puts every tensor into every GPU's slots exactly once."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpe_daemon.core.groups import companion_key, fused_key, group_key, module_key
from cpe_daemon.core.manifest import Run, Tensor
from cpe_daemon.core.plan import (
    Base,
    Bucket,
    Copy,
    Gpu,
    PeerCopy,
    Plan,
    Region,
    Topology,
    assign,
    cut,
)
from cpe_daemon.core.types import ALIGNMENT_BYTES, TensorSpec, align
from cpe_daemon.errors import MisuseError
from tests.unit.model_names import MODELS, tensors_of
from tests.unit.planning import ARENA, PEER, addresses_of, in_runs, make_plan, whole

A = ALIGNMENT_BYTES
MIB = 1 << 20
STALE = 0xEE
"""What slots hold before a bucket: a byte that no arena of these tests contains."""

STAND_ALONE = ("embed.weight", "head.weight", "scalar", "layers.0.norm.weight", "layers.1.norm.weight")
LEAVES = (
    "self_attn.q_proj.weight",
    "self_attn.q_proj.weight_scale_inv",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.experts.0.w1.weight",
    "mlp.experts.0.w2.weight",
    "mlp.experts.1.w1.weight",
    "mlp.experts.gate_up_proj_blocks",
    "mlp.experts.gate_up_proj_scales",
    "mlp.experts.gate_up_proj_bias",
)
NAMES = STAND_ALONE + tuple(f"layers.{layer}.{leaf}" for layer in range(3) for leaf in LEAVES)


def spec_of(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name, "uint8", (nbytes,))


def one_gpu() -> Topology:
    return Topology((Gpu("GPU-0"),), peer_access=False)


def gpus(count: int, *, peer_access: bool = True) -> Topology:
    return Topology(tuple(Gpu(f"GPU-{index}") for index in range(count)), peer_access)


def side_by_side(specs: Sequence[TensorSpec], start: int = 0) -> list[Tensor]:
    """Tensors one after another in one extent, as a trainer of one rank lays them out."""
    tensors = []
    for spec in specs:
        tensors.append(whole(spec, start))
        start = align(start + spec.nbytes)
    return tensors


# --- carrying a plan out -----------------------------------------------------------------------------------------


def carried_out(plan: Plan, bucket: Bucket, arena: bytes) -> list[bytearray]:
    """The slots of all GPUs after stage 1 and 2 of a bucket, as a real device has them: exchanges read pulls."""
    slots = [bytearray([STALE]) * plan.slot_bytes for _ in bucket.pulls]
    for slot, pulls in zip(slots, bucket.pulls, strict=True):
        for copy in pulls:
            assert copy.origin == ""
            assert 0 <= copy.slot_offset < copy.slot_offset + copy.nbytes <= bucket.nbytes
            assert 0 <= copy.address < copy.address + copy.nbytes <= len(arena)
            slot[copy.slot_offset : copy.slot_offset + copy.nbytes] = arena[copy.address : copy.address + copy.nbytes]
    pulled = [bytes(slot) for slot in slots]
    for gpu, exchanges in enumerate(bucket.exchanges):
        for peer_copy in exchanges:
            assert peer_copy.gpu != gpu
            reached = slice(peer_copy.slot_offset, peer_copy.slot_offset + peer_copy.nbytes)
            assert 0 <= reached.start < reached.stop <= bucket.nbytes
            slots[gpu][reached] = pulled[peer_copy.gpu][reached]
    return slots


def loaded(plan: Plan, tensors: Sequence[Tensor], arena: bytes, gpu: int) -> dict[int, bytes]:
    """What a worker of a GPU puts together, with the one assembly buffer that it has."""
    whole: dict[int, bytes] = {}
    assembly = bytearray()
    for bucket in plan.buckets:
        slot = carried_out(plan, bucket, arena)[gpu]
        for part in bucket.parts:
            data = bytes(slot[part.slot_offset : part.slot_offset + part.nbytes])
            assert part.tensor not in whole
            assert part.tensor_offset == len(assembly), "another tensor began before the last was whole"
            assembly += data
            if len(assembly) == tensors[part.tensor].spec.nbytes:
                whole[part.tensor] = bytes(assembly)
                assembly.clear()
    assert not assembly
    return whole


def check_structure(plan: Plan, specs: Sequence[TensorSpec]) -> None:
    """Buckets are within their slots; parts are aligned, apart, in order, and cover every tensor once."""
    covered = [0] * len(specs)
    rooms = rooms_of(specs, companion_key)
    seen_in: dict[int, list[int]] = defaultdict(list)
    for index, bucket in enumerate(plan.buckets):
        assert bucket.index == index
        assert bucket.parts
        assert bucket.nbytes <= plan.slot_bytes
        end = 0
        for part in bucket.parts:
            assert part.slot_offset % A == part.tensor_offset % A == 0
            assert covered[part.tensor] == part.tensor_offset
            covered[part.tensor] += part.nbytes
            seen_in[part.tensor].append(index)
            if part.nbytes:
                assert part.slot_offset == end
                end = align(part.slot_offset + part.nbytes)
            else:
                assert part.slot_offset == 0
                assert specs[part.tensor].nbytes == 0
        assert bucket.nbytes == end
    assert covered == [spec.nbytes for spec in specs]
    for tensor, buckets in seen_in.items():
        assert buckets == list(range(buckets[0], buckets[0] + len(buckets)))
        assert len(buckets) == 1 or rooms[companion_key(specs[tensor].name)] > plan.slot_bytes
    assert len(seen_in) == len(specs)
    assert plan.nbytes == sum(spec.nbytes for spec in specs)


def rooms_of(specs: Sequence[TensorSpec], key: Callable[[str], str]) -> dict[str, int]:
    """Bytes that the tensors of a key take in a slot."""
    rooms: dict[str, int] = defaultdict(int)
    for spec in specs:
        rooms[key(spec.name)] += align(spec.nbytes)
    return rooms


def buckets_of(plan: Plan, specs: Sequence[TensorSpec], key: Callable[[str], str]) -> dict[str, set[int]]:
    """In which buckets the tensors of a key are."""
    found: dict[str, set[int]] = defaultdict(set)
    for bucket in plan.buckets:
        for part in bucket.parts:
            found[key(specs[part.tensor].name)].add(bucket.index)
    return found


def check_units_whole(plan: Plan, specs: Sequence[TensorSpec], key: Callable[[str], str]) -> None:
    """Whatever has one key and fits in a slot is in one bucket."""
    rooms = rooms_of(specs, key)
    for unit, indexes in buckets_of(plan, specs, key).items():
        assert len(indexes) == 1 or rooms[unit] > plan.slot_bytes, unit


def pulled_bytes(bucket: Bucket) -> list[int]:
    return [sum(copy.nbytes for copy in pulls) for pulls in bucket.pulls]


# --- any tensors, any topology -----------------------------------------------------------------------------------

sizes = st.one_of(
    st.integers(0, 3),
    st.integers(0, 6 * A),
    st.sampled_from([A, 2 * A, 4 * A, 8 * A, 8 * A + 1]),
    st.integers(0, 30 * A),
)


@st.composite
def topologies(draw: st.DrawFn, arena_bytes: int) -> Topology:
    nodes = st.sampled_from([None, 0, 1])
    count = draw(st.integers(1, 8))
    bounds = draw(st.lists(st.integers(0, arena_bytes), max_size=6, unique=True).map(sorted))
    regions = tuple(
        Region(start, end - start, node) for start, end in pairwise(bounds) if (node := draw(nodes)) is not None
    )
    placed = tuple(Gpu(f"GPU-{index}", draw(nodes)) for index in range(count))
    return Topology(placed, draw(st.booleans()), regions if draw(st.booleans()) else ())


@st.composite
def scattered_tensors(draw: st.DrawFn) -> tuple[list[Tensor], bytes]:
    """Tensors in runs over the extents of several ranks, in any order, with holes; and such an arena."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=14))
    shuffled = random.Random(draw(st.integers(0, 1 << 32)))
    pieces: list[tuple[int, int, int]] = []
    for tensor, size in enumerate(draw(st.lists(sizes, min_size=len(names), max_size=len(names)))):
        bounds = sorted({0, size, *(shuffled.randint(0, size) for _ in range(shuffled.choice((0, 0, 0, 2))))})
        pieces += [(tensor, start, end - start) for start, end in pairwise(bounds)]
        if not size:
            pieces.append((tensor, 0, 0))
    if draw(st.booleans()):
        shuffled.shuffle(pieces)
    runs: dict[int, list[Run]] = defaultdict(list)
    end = 0
    for tensor, offset, nbytes in pieces:
        start = align(end) + shuffled.choice((0, 0, 0, A, 3 * A))
        rank = shuffled.choice([rank for rank in (0, 2, 3) if ARENA[rank].address <= start])
        runs[tensor].append(Run(offset, nbytes, rank, start - ARENA[rank].address))
        end = start + nbytes
    tensors = [
        in_runs(
            spec_of(name, sum(run.nbytes for run in runs[index])),
            *sorted(runs[index], key=lambda run: run.tensor_offset),
        )
        for index, name in enumerate(names)
    ]
    return tensors, bytes(random.Random(end).choices(range(STALE), k=end))


@given(data=st.data(), slot_blocks=st.sampled_from([1, 2, 3, 8, 16, 64]))
@settings(max_examples=220, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_plan_brings_every_byte_to_every_gpu_exactly_once(data: st.DataObject, slot_blocks: int) -> None:
    tensors, arena = data.draw(scattered_tensors())
    topology = data.draw(topologies(len(arena)))
    plan = make_plan(tensors, slot_bytes=slot_blocks * A, topology=topology)
    specs = [tensor.spec for tensor in tensors]
    check_structure(plan, specs)
    for key in (group_key, fused_key, module_key, companion_key):
        check_units_whole(plan, specs, key)
    expected = {
        index: b"".join(arena[address : address + nbytes] for _, nbytes, address in addresses_of(tensor))
        for index, tensor in enumerate(tensors)
    }
    for gpu in range(len(topology.gpus)):
        assert loaded(plan, tensors, arena, gpu) == expected
    for bucket in plan.buckets:
        check_copies(bucket, tensors, topology)


def check_copies(bucket: Bucket, tensors: Sequence[Tensor], topology: Topology) -> None:
    """No GPU writes a slot byte twice; shares are within the quota, aligned, and of the right number."""
    count = len(topology.gpus)
    assert len(bucket.pulls) == len(bucket.exchanges) == count
    readable = readable_ranges(bucket, tensors)
    for gpu in range(count):
        written = [(copy.slot_offset, copy.nbytes) for copy in bucket.pulls[gpu]]
        written += [(copy.slot_offset, copy.nbytes) for copy in bucket.exchanges[gpu]]
        assert all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(sorted(written)))
        for copy in bucket.pulls[gpu]:
            within = [r for r in readable if r[0] <= copy.address and copy.address + copy.nbytes <= r[1]]
            assert within, "a copy reads what no run, nor the padding between two, holds"
    for exchanges in bucket.exchanges:
        assert all(copy.slot_offset % A == copy.nbytes % A == 0 for copy in exchanges)
    if topology.peer_access:
        quota = align(-(-bucket.nbytes // count))
        assert all(nbytes <= quota for nbytes in pulled_bytes(bucket))
    else:
        assert bucket.exchanges == ((),) * count
        assert len(set(bucket.pulls)) == 1


def readable_ranges(bucket: Bucket, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Arena ranges that hold the bucket's runs, and paddings of less than an alignment between two of them."""
    ranges: list[tuple[int, int]] = []
    for start, end in sorted(
        (max(offset, first) + shift, min(offset + nbytes, last) + shift)
        for part in bucket.parts
        for first, last in [(part.tensor_offset, part.tensor_offset + part.nbytes)]
        for offset, nbytes, address in addresses_of(tensors[part.tensor])
        for shift in [address - offset]
        if offset < last and first < offset + nbytes
    ):
        if ranges and start - ranges[-1][1] < A:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_cut_serves_every_topology(data: st.DataObject) -> None:
    tensors, arena = data.draw(scattered_tensors())
    buckets = cut([tensor.spec for tensor in tensors], 8 * A)
    for _ in range(3):
        topology = data.draw(topologies(len(arena)))
        assert assign(buckets, tensors, ARENA, topology) == make_plan(tensors, slot_bytes=8 * A, topology=topology)


# --- packing -----------------------------------------------------------------------------------------------------


def packed(slot_blocks: int, *tensors: tuple[str, int]) -> list[list[tuple[str, int, int]]]:
    """By bucket (name, tensor offset, bytes) of each part, in blocks where they are whole."""
    specs = [spec_of(name, int(blocks * A)) for name, blocks in tensors]
    plan = make_plan(side_by_side(specs), slot_bytes=slot_blocks * A, topology=one_gpu())
    check_structure(plan, specs)
    return [
        [(specs[p.tensor].name, p.tensor_offset // A, -(-p.nbytes // A)) for p in bucket.parts]
        for bucket in plan.buckets
    ]


def test_no_tensors_give_no_buckets() -> None:
    plan = make_plan([], slot_bytes=A, topology=gpus(8))
    assert (plan.buckets, plan.nbytes) == ((), 0)


def test_groups_are_gathered_and_come_by_first_appearance() -> None:
    assert packed(4, ("a.w", 1), ("b.w", 1), ("a.b", 1), ("c.w", 2), ("b.b", 1)) == [
        [("a.w", 0, 1), ("a.b", 0, 1), ("b.w", 0, 1), ("b.b", 0, 1)],
        [("c.w", 0, 2)],
    ]


def test_a_group_that_does_not_fit_beside_others_begins_a_bucket() -> None:
    assert packed(4, ("a.w", 2), ("b.w", 2), ("b.s", 1), ("c.w", 1)) == [
        [("a.w", 0, 2)],
        [("b.w", 0, 2), ("b.s", 0, 1), ("c.w", 0, 1)],
    ]


def test_a_split_tensor_fills_the_bucket_at_hand_and_lets_others_follow() -> None:
    assert packed(4, ("a.w", 3), ("b.w", 6), ("c.w", 3)) == [
        [("a.w", 0, 3), ("b.w", 0, 1)],
        [("b.w", 1, 4)],
        [("b.w", 5, 1), ("c.w", 0, 3)],
    ]


@pytest.mark.parametrize("before", range(5))
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("blocks", [4, 5, 6, 7, 8, 9])
def test_the_last_part_of_a_split_weight_has_its_scale_beside_it(before: int, scale: int, blocks: int) -> None:
    buckets = packed(4, ("a.w", before), ("q.weight_scale_inv", scale), ("q.weight", blocks))
    last = next(bucket for bucket in buckets if any(name == "q.weight_scale_inv" for name, *_ in bucket))
    assert any(name == "q.weight" and offset + nbytes == blocks for name, offset, nbytes in last)
    assert len(buckets) <= -(-(before + blocks + scale) // 4) + 1


def test_a_weight_too_large_only_with_its_scale_is_split_too() -> None:
    assert packed(4, ("q.weight", 4), ("q.weight_scale_inv", 1)) == [
        [("q.weight", 0, 3)],
        [("q.weight", 3, 1), ("q.weight_scale_inv", 0, 1)],
    ]


def test_leaves_of_which_no_two_fit_are_left_whole() -> None:
    assert packed(4, ("q.weight", 3), ("q.bias", 3), ("q.scale", 3)) == [
        [("q.weight", 0, 3)],
        [("q.bias", 0, 3)],
        [("q.scale", 0, 3)],
    ]


def test_a_scale_that_fills_a_slot_by_itself_follows_its_weight() -> None:
    assert packed(2, ("q.weight", 3), ("q.scale", 2)) == [
        [("q.weight", 0, 2)],
        [("q.weight", 2, 1)],
        [("q.scale", 0, 2)],
    ]


def test_a_group_larger_than_a_slot_falls_to_pairs_then_modules() -> None:
    layer = "model.layers.0.self_attn"
    names = [f"{layer}.{p}_proj.{leaf}" for p in "qkvo" for leaf in ("weight", "weight_scale_inv")]
    specs = [spec_of(name, 2 * A if name.endswith("weight") else 1) for name in names]
    for slot_blocks, keys in ((12, [group_key]), (9, [fused_key, module_key]), (3, [module_key])):
        plan = make_plan(side_by_side(specs), slot_bytes=slot_blocks * A, topology=one_gpu())
        check_structure(plan, specs)
        for key in keys:
            assert all(len(found) == 1 for found in buckets_of(plan, specs, key).values())


def test_empty_tensors_are_in_the_bucket_of_their_group() -> None:
    assert packed(2, ("a.w", 2), ("a.none", 0), ("b.none", 0), ("c.w", 2), ("c.none", 0)) == [
        [("a.w", 0, 2), ("a.none", 0, 0), ("b.none", 0, 0)],
        [("c.w", 0, 2), ("c.none", 0, 0)],
    ]
    assert packed(1, ("only.none", 0)) == [[("only.none", 0, 0)]]


def test_zero_dimensional_tensors_are_one_element() -> None:
    spec = TensorSpec("input_scale", "float32", ())
    plan = make_plan([whole(spec, 100)], slot_bytes=A, topology=one_gpu())
    assert plan.buckets[0].pulls == ((Copy("", 100, 0, 4),),)
    assert plan.buckets[0].nbytes == A


# --- copies ------------------------------------------------------------------------------------------------------


def test_neighbours_in_the_arena_are_one_copy() -> None:
    specs = [spec_of(f"layers.0.mlp.{leaf}", nbytes) for leaf, nbytes in (("a", 10), ("b", 300), ("c", 256))]
    plan = make_plan(side_by_side(specs, start=5 * A), slot_bytes=8 * A, topology=one_gpu())
    assert plan.buckets[0].pulls == ((Copy("", 5 * A, 0, 4 * A),),)


def test_a_copy_ends_with_its_last_run_and_not_with_the_padding() -> None:
    plan = make_plan(side_by_side([spec_of("a", 10)]), slot_bytes=A, topology=one_gpu())
    assert plan.buckets[0].pulls == ((Copy("", 0, 0, 10),),)


def test_runs_of_other_origins_are_copies_of_their_own() -> None:
    spec = spec_of("a", 3 * A)
    runs = (Run(0, A, 0, 0), Run(A, A, 1, A), Run(2 * A, A, 0, 2 * A))
    plan = make_plan([in_runs(spec, *runs)], slot_bytes=4 * A, topology=one_gpu())
    assert [(c.origin, c.address, c.nbytes) for c in plan.buckets[0].pulls[0]] == [
        ("", 0, A),
        ("node-7", A, A),
        ("", 2 * A, A),
    ]


def test_bytes_apart_in_the_arena_are_not_joined() -> None:
    specs = [spec_of("x.a", A), spec_of("x.b", A)]
    tensors = [whole(specs[0], 0), whole(specs[1], 2 * A)]
    plan = make_plan(tensors, slot_bytes=4 * A, topology=one_gpu())
    assert plan.buckets[0].pulls == ((Copy("", 0, 0, A), Copy("", 2 * A, A, A)),)


def test_gpus_with_peer_access_pull_equal_shares_and_exchange_them() -> None:
    plan = make_plan(side_by_side([spec_of("a", 8 * A)]), slot_bytes=8 * A, topology=gpus(4))
    bucket = plan.buckets[0]
    assert bucket.pulls == tuple((Copy("", 2 * g * A, 2 * g * A, 2 * A),) for g in range(4))
    assert [[copy.gpu for copy in copies] for copies in bucket.exchanges] == [
        [1, 2, 3],
        [2, 3, 0],
        [3, 0, 1],
        [0, 1, 2],
    ]
    assert bucket.exchanges[3][0] == PeerCopy(0, 0, 2 * A)


def test_a_bucket_smaller_than_its_gpus_is_pulled_by_some() -> None:
    plan = make_plan(side_by_side([spec_of("a", 2 * A)]), slot_bytes=8 * A, topology=gpus(8))
    bucket = plan.buckets[0]
    assert [len(pulls) for pulls in bucket.pulls] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert [len(copies) for copies in bucket.exchanges] == [1, 1, 2, 2, 2, 2, 2, 2]


def test_without_peer_access_each_gpu_pulls_everything() -> None:
    plan = make_plan(side_by_side([spec_of("a", 8 * A)]), slot_bytes=8 * A, topology=gpus(3, peer_access=False))
    assert plan.buckets[0].pulls == ((Copy("", 0, 0, 8 * A),),) * 3
    assert plan.buckets[0].exchanges == ((),) * 3


def numa_topology(*regions: Region, nodes: Sequence[int | None] = (0, 0, 1, 1)) -> Topology:
    return Topology(tuple(Gpu(f"GPU-{i}", node) for i, node in enumerate(nodes)), True, regions)


def test_gpus_pull_from_memory_near_to_them_first() -> None:
    """The arena's first half is near GPUs 2 and 3: they pull it, in spite of their order."""
    topology = numa_topology(Region(0, 4 * A, 1), Region(4 * A, 4 * A, 0))
    plan = make_plan(side_by_side([spec_of("a", 8 * A)]), slot_bytes=8 * A, topology=topology)
    starts = [[copy.address // A for copy in pulls] for pulls in plan.buckets[0].pulls]
    assert starts == [[4], [6], [0], [2]]


def test_far_memory_goes_to_whoever_has_quota_left() -> None:
    topology = numa_topology(Region(0, 8 * A, 0))
    plan = make_plan(side_by_side([spec_of("a", 8 * A)]), slot_bytes=8 * A, topology=topology)
    assert pulled_bytes(plan.buckets[0]) == [2 * A] * 4


def test_memory_outside_of_every_region_is_near_to_none() -> None:
    topology = numa_topology(Region(6 * A, 2 * A, 0), nodes=(None, 0))
    plan = make_plan(side_by_side([spec_of("a", 8 * A)]), slot_bytes=8 * A, topology=topology)
    assert plan.buckets[0].pulls[1] == (
        Copy("", 4 * A, 4 * A, 4 * A),
    )  # its near 2 blocks, and 2 of those that are near to none, in one copy
    assert pulled_bytes(plan.buckets[0]) == [4 * A] * 2


def test_a_peers_bytes_are_near_to_no_gpu() -> None:
    """Their addresses are in the peer's arena, not in this node's regions."""
    topology = numa_topology(Region(0, 8 * A, 1), nodes=(0, 1))
    for rank, origin, first in ((0, "", 4), (1, PEER, 0)):
        tensor = in_runs(spec_of("a", 8 * A), Run(0, 8 * A, rank, 0))
        plan = make_plan([tensor], slot_bytes=8 * A, topology=topology)
        assert plan.buckets[0].pulls[0] == (Copy(origin, first * A, first * A, 4 * A),)


@given(data=st.data(), address=st.integers(0, 60), nbytes=st.integers(1, 60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_topology_knows_the_node_of_every_arena_byte(data: st.DataObject, address: int, nbytes: int) -> None:
    regions = data.draw(topologies(100)).regions
    walk = list(Topology((Gpu("GPU-0"),), True, regions[::-1]).nodes(address, nbytes))
    assert [start for start, _ in walk] == sorted({start for start, _ in walk})
    assert walk[0][0] == address
    for byte in range(address, address + nbytes):
        expected = [r.numa_node for r in regions if r.offset <= byte < r.offset + r.nbytes]
        found = [node for start, node in walk if start <= byte][-1]
        assert found == (expected[0] if expected else None)


# --- misuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_bytes", [0, -A, A - 1, A + 1])
def test_slots_must_be_a_positive_multiple_of_the_alignment(slot_bytes: int) -> None:
    with pytest.raises(MisuseError, match="positive multiple of 256"):
        make_plan([], slot_bytes=slot_bytes, topology=one_gpu())


def test_a_topology_needs_gpus_each_named_once() -> None:
    with pytest.raises(MisuseError, match="without GPUs"):
        Topology((), peer_access=True)
    with pytest.raises(MisuseError, match="twice: GPU-1, GPU-1"):
        Topology((Gpu("GPU-1"), Gpu("GPU-1")), peer_access=True)


def test_regions_must_not_overlap() -> None:
    with pytest.raises(MisuseError, match="overlap"):
        Topology((Gpu("GPU-1"),), True, (Region(10, 10, 1), Region(0, 11, 0)))


@pytest.mark.parametrize(
    "runs",
    [
        (),
        (Run(0, 9, 0, 0),),
        (Run(0, 11, 0, 0),),
        (Run(1, 9, 0, 0),),
        (Run(1, 10, 0, 0),),
        (Run(0, 9, 1, 0),),
        (Run(0, 5, 0, 0), Run(6, 4, 0, 0)),
        (Run(0, 5, 0, 0), Run(4, 6, 0, 0)),
        (Run(5, 5, 0, 0), Run(0, 5, 0, 0)),
        (Run(0, 12, 0, 0), Run(12, -2, 0, 0)),
        (Run(0, 10, 0, 0), Run(9, 0, 0, 0)),
    ],
)
def test_runs_must_cover_their_tensor_exactly(runs: tuple[Run, ...]) -> None:
    with pytest.raises(MisuseError, match=r"layers\.0\.q"):
        make_plan([in_runs(spec_of("layers.0.q", 10), *runs)], slot_bytes=A, topology=one_gpu())


def test_a_cut_is_refused_for_other_tensors() -> None:
    buckets = cut([spec_of("a", 10)], A)
    with pytest.raises(MisuseError, match="2 tensors for a cut of 1"):
        assign(buckets, side_by_side([spec_of("a", 10), spec_of("b", 10)]), ARENA, one_gpu())
    with pytest.raises(MisuseError, match="cover 11 of 10"):
        assign(buckets, side_by_side([spec_of("a", 11)]), ARENA, one_gpu())


# --- where a manifest's tensors lie ------------------------------------------------------------------------------


def test_runs_lie_in_their_ranks_extents_and_empty_ones_nowhere() -> None:
    specs = [spec_of("a", 20), spec_of("a.none", 0), spec_of("b", 3)]
    runs = (Run(0, 10, 1, 0), Run(10, 0, 0, 0), Run(10, 10, 0, 256), Run(20, 0, 1, 256))
    tensors = [in_runs(specs[0], *runs), in_runs(specs[1], Run(0, 0, 0, 512)), in_runs(specs[2], Run(0, 3, 1, 256))]
    plan = assign(cut(specs, 4 * A), tensors, (Base("", 1000), Base(PEER, 5000)), one_gpu())
    assert plan.buckets[0].pulls == ((Copy(PEER, 5000, 0, 10), Copy("", 1256, 10, 10), Copy(PEER, 5256, A, 3)),)


# --- the tensors of real models ----------------------------------------------------------------------------------


def real_plans(model: str) -> Iterator[tuple[Plan, list[TensorSpec]]]:
    specs = tensors_of(model, layers=3)
    for slot_bytes in (32 * MIB, 256 * MIB):
        yield make_plan(side_by_side(specs), slot_bytes=slot_bytes, topology=gpus(8)), specs


@pytest.mark.parametrize("model", MODELS)
def test_real_models_have_their_module_groups_whole(model: str) -> None:
    for plan, specs in real_plans(model):
        check_structure(plan, specs)
        for key in (group_key, fused_key, module_key, companion_key):
            check_units_whole(plan, specs, key)


@pytest.mark.parametrize("model", MODELS)
def test_real_models_have_each_weight_with_its_scale(model: str) -> None:
    """Where the weight is split, the scale is beside its last part."""
    for plan, specs in real_plans(model):
        last = {part.tensor: bucket.index for bucket in plan.buckets for part in bucket.parts}
        ends: dict[str, set[int]] = defaultdict(set)
        for tensor, spec in enumerate(specs):
            ends[companion_key(spec.name)].add(last[tensor])
        assert all(len(buckets) == 1 for buckets in ends.values())


@pytest.mark.parametrize("model", [model for model in MODELS if model != "Llama-3.1-405B"])
def test_real_models_have_the_attention_of_a_layer_in_one_bucket(model: str) -> None:
    specs = tensors_of(model, layers=3)
    plan = make_plan(side_by_side(specs), slot_bytes=256 * MIB, topology=gpus(8))
    found = buckets_of(plan, specs, lambda name: name.partition("self_attn")[0] if "self_attn" in name else "")
    del found[""]
    assert len(found) >= 3
    assert all(len(indexes) == 1 for indexes in found.values())


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "DeepSeek-V3", "Kimi-K2"])
def test_real_experts_are_never_parted(model: str) -> None:
    specs = tensors_of(model, layers=4)
    plan = make_plan(side_by_side(specs), slot_bytes=64 * MIB, topology=gpus(8))
    experts = {unit: found for unit, found in buckets_of(plan, specs, group_key).items() if ".experts." in unit}
    assert len(experts) >= 128
    assert all(len(indexes) == 1 for indexes in experts.values())


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Kimi-K2"])
def test_real_buckets_are_well_filled_and_one_copy_a_gpu(model: str) -> None:
    """Tensors that are neighbours in the arena cost one copy a bucket and GPU, however many they are."""
    specs = tensors_of(model, layers=3)
    plan = make_plan(side_by_side(specs), slot_bytes=256 * MIB, topology=gpus(8))
    assert sum(bucket.nbytes for bucket in plan.buckets) > 0.85 * len(plan.buckets) * plan.slot_bytes
    for bucket in plan.buckets:
        assert all(len(pulls) <= 1 for pulls in bucket.pulls)
        pulled = pulled_bytes(bucket)
        assert max(pulled) - min(pulled) <= 8 * A


def test_plan_does_not_depend_on_the_order_of_unrelated_groups_for_what_is_together() -> None:
    specs = tensors_of("DeepSeek-V3", layers=2)
    random.Random(7).shuffle(specs)
    plan = make_plan(side_by_side(specs), slot_bytes=256 * MIB, topology=gpus(8))
    check_structure(plan, specs)
    check_units_whole(plan, specs, group_key)
