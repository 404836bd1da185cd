"""Stripes of the arena: every GPU pulls its part of a bucket from memory of its own NUMA node, in few copies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.plan import Bucket, Gpu, Plan, Region, Topology
from cpe_daemon.core.stripes import MOST_STRIPES, STRIPE_BYTES, stripes, why_not
from cpe_daemon.core.types import ALIGNMENT_BYTES, align
from cpe_daemon.devices.cuda.device import PIN_BYTES
from cpe_daemon.devices.cuda.gpus import numa_node
from cpe_daemon.devices.numa import memory_nodes
from tests.unit.model_names import tensors_of
from tests.unit.planning import make_plan, whole

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
SLOT_BYTES = 256 * MIB
TWO_SOCKETS = (0, 0, 0, 0, 1, 1, 1, 1)
HOSTS = Path(__file__).parents[1] / "data" / "topologies"
STRIPED = {
    "dgx-h100": [0, 0, 0, 0, 1, 1, 1, 1],
    "hgx-h200": [0, 0, 0, 0, 1, 1, 1, 1],
    "hgx-h200-snc2": [0, 0, 1, 1, 2, 2, 3, 3],
    "dgx-a100-nps4": [3, 3, 1, 1, 7, 7, 5, 5],
}
UNSTRIPED = {"one-root": "same NUMA node", "vm-without-topology": "does not say"}


@dataclass(frozen=True)
class Host:
    nodes: list[int | None]
    memory_nodes: frozenset[int]


def host(name: str, root: Path) -> Host:
    """Read a recorded host as the daemon reads its own: from files."""
    recorded = json.loads((HOSTS / f"{name}.json").read_text())
    for path, text in recorded["sysfs"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    status = root / "status"
    status.write_text(f"Mems_allowed:\t3\nMems_allowed_list:\t{recorded['mems_allowed']}\n")
    nodes = [numa_node(gpu, root / "bus" / "pci" / "devices") for gpu in recorded["gpus"]]
    return Host(nodes, memory_nodes(status))


def striped(nodes: Sequence[int], arena_bytes: int, slot_bytes: int = SLOT_BYTES) -> Topology:
    placed = tuple(Gpu(f"GPU-{index}", node) for index, node in enumerate(nodes))
    return Topology(placed, peer_access=True, regions=stripes(arena_bytes, nodes, slot_bytes))


def in_extent(model: str, start: int) -> tuple[list[Tensor], int]:
    """The tensors of a model's first layers one after another from an arena offset on, and where they end."""
    tensors = []
    for spec in tensors_of(model, layers=4):
        tensors.append(whole(spec, start))
        start = align(start + spec.nbytes)
    return tensors, start


def near_bytes(bucket: Bucket, topology: Topology) -> list[int]:
    """By GPU, how many bytes it pulls from memory of its own node."""
    return [
        sum(nbytes for copy in pulls for node, nbytes in _by_node(copy.address, copy.nbytes, topology) if node == near)
        for (_, near), pulls in zip(topology.gpus, bucket.pulls, strict=True)
    ]


def _by_node(address: int, nbytes: int, topology: Topology) -> Iterator[tuple[int | None, int]]:
    bounds = [*topology.nodes(address, nbytes), (address + nbytes, None)]
    for (start, node), (end, _) in pairwise(bounds):
        yield node, end - start


def pulled_bytes(bucket: Bucket) -> list[int]:
    return [sum(copy.nbytes for copy in pulls) for pulls in bucket.pulls]


def check_bytes_once(plan: Plan) -> None:
    """Every byte of a bucket is pulled by one GPU, and every GPU has all of them after the exchange."""
    for bucket in plan.buckets:
        pulled = sorted((copy.slot_offset, copy.nbytes) for pulls in bucket.pulls for copy in pulls)
        assert all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(pulled))
        needed = sum(part.nbytes for part in bucket.parts)
        assert needed <= sum(nbytes for _, nbytes in pulled) <= bucket.nbytes
        for pulls, exchanges in zip(bucket.pulls, bucket.exchanges, strict=True):
            got = [(copy.slot_offset, copy.nbytes) for copy in pulls]
            got = sorted([*got, *((copy.slot_offset, copy.nbytes) for copy in exchanges)])
            assert all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(got))
            assert needed <= sum(nbytes for _, nbytes in got) <= bucket.nbytes


# --- recorded hosts ----------------------------------------------------------------------------------------------


def test_every_recorded_host_is_judged_here() -> None:
    assert {path.stem for path in HOSTS.glob("*.json")} == {*STRIPED, *UNSTRIPED}


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "DeepSeek-V3"])
@pytest.mark.parametrize("name", STRIPED)
def test_gpus_pull_their_share_from_their_own_node(name: str, model: str, tmp_path: Path) -> None:
    seen = host(name, tmp_path)
    assert seen.nodes == STRIPED[name]
    assert not why_not(seen.nodes, seen.memory_nodes)
    tensors, end = in_extent(model, start=3 * GIB + 12_345 * ALIGNMENT_BYTES)
    topology = striped(STRIPED[name], align(end) + GIB)
    plan = make_plan(tensors, slot_bytes=SLOT_BYTES, topology=topology)
    check_bytes_once(plan)
    near, pulled = [0] * 8, [0] * 8
    for bucket in plan.buckets:
        quota = align(-(-bucket.nbytes // 8))
        shares = pulled_bytes(bucket)
        assert max(shares) <= quota
        assert min(shares) >= quota - 9 * ALIGNMENT_BYTES  # the padding after a tensor, and what rounding left
        near = [sum(pair) for pair in zip(near, near_bytes(bucket, topology), strict=True)]
        pulled = [sum(pair) for pair in zip(pulled, shares, strict=True)]
    assert all(own >= 0.95 * all_ for own, all_ in zip(near, pulled, strict=True)), (near, pulled)


@pytest.mark.parametrize("name", UNSTRIPED)
def test_hosts_without_several_known_nodes_are_not_striped(name: str, tmp_path: Path) -> None:
    seen = host(name, tmp_path)
    assert UNSTRIPED[name] in why_not(seen.nodes, seen.memory_nodes)


def test_a_node_whose_memory_may_not_be_had_ends_it() -> None:
    assert "no memory of NUMA node 1, 3" in why_not([0, 1, 2, 3], {0, 2})
    assert not why_not([0, 2], {0, 1, 2})


# --- where stripes lie -------------------------------------------------------------------------------------------


@given(
    arena_bytes=st.integers(1, 4 * TIB),
    nodes=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    slot_bytes=st.sampled_from([4096, MIB, 64 * MIB, SLOT_BYTES, 16 * GIB]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_stripes_cover_the_arena_once_in_sizes_that_pins_and_pages_allow(
    arena_bytes: int, nodes: list[int], slot_bytes: int
) -> None:
    regions = stripes(arena_bytes, nodes, slot_bytes)
    assert regions[0].offset == 0
    assert all(one.offset + one.nbytes == after.offset for one, after in pairwise(regions))
    assert regions[-1].offset + regions[-1].nbytes == arena_bytes
    assert len(regions) <= MOST_STRIPES
    assert {region.numa_node for region in regions} <= set(nodes)
    for region in regions[:-1]:
        assert region.nbytes % STRIPE_BYTES == 0
        assert region.offset // PIN_BYTES == (region.offset + region.nbytes - 1) // PIN_BYTES
        assert region.nbytes == regions[0].nbytes
    assert stripes(arena_bytes, nodes, slot_bytes) == regions


def test_a_stripe_is_what_one_gpu_pulls_of_a_bucket() -> None:
    assert stripes(TIB // 4, TWO_SOCKETS, SLOT_BYTES)[0].nbytes == 32 * MIB
    assert stripes(GIB, TWO_SOCKETS, 4096)[0].nbytes == STRIPE_BYTES
    assert stripes(2 * TIB, TWO_SOCKETS, SLOT_BYTES)[0].nbytes == 128 * MIB  # no more stripes than mappings


def test_nodes_take_turns_as_often_as_gpus_are_beside_them() -> None:
    def turns(*nodes: int) -> list[int]:
        return [region.numa_node for region in stripes(8 * STRIPE_BYTES, nodes, 4096)]

    assert turns(0, 0, 1, 1) == [0, 1] * 4
    assert turns(1, 0) == [0, 1] * 4
    assert turns(0, 0, 0, 0, 0, 0, 1, 1) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert turns(5) == [5] * 8


def test_stripes_are_regions_of_a_topology() -> None:
    topology = striped(TWO_SOCKETS, GIB)
    assert topology.has_near_memory
    assert topology.regions[:2] == (Region(0, 32 * MIB, 0), Region(32 * MIB, 32 * MIB, 1))


# --- what they cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [TWO_SOCKETS, (0, 0, 1, 1, 2, 2, 3, 3)])
def test_stripes_cost_less_than_twice_the_copies(nodes: Sequence[int]) -> None:
    """A bucket in one run costs eight GPUs eight copies without stripes; each of these also costs seven exchanges."""
    tensors, end = in_extent("Qwen3-30B-A3B", start=12_345 * ALIGNMENT_BYTES)
    plain = Topology(tuple(Gpu(f"GPU-{index}") for index in range(8)), peer_access=True)
    before = make_plan(tensors, slot_bytes=SLOT_BYTES, topology=plain)
    after = make_plan(tensors, slot_bytes=SLOT_BYTES, topology=striped(nodes, align(end)))
    for count, bucket in zip(map(_pulls, before.buckets), after.buckets, strict=True):
        assert count <= 8 + 1
        assert _pulls(bucket) <= 16 + 1
        assert sum(map(len, bucket.exchanges)) <= 7 * 17


def _pulls(bucket: Bucket) -> int:
    return sum(map(len, bucket.pulls))
