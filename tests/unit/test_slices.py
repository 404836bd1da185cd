"""What GPUs are sent of buckets: carried out on plain bytes, it is all that their workers need, and nothing else."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpe_daemon.core.manifest import Tensor
from cpe_daemon.core.needs import (
    Needs,
    Runs,
    Span,
    by_name,
    describe,
    intersect,
    kinds_of,
    merge,
    runs_of,
    schema_of,
)
from cpe_daemon.core.plan import Bucket, Costs, Gpu, Plan, Region, Topology, Transfers, Wants, assign, cut
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.slices import slice_bucket
from cpe_daemon.core.topology import equal_shares
from cpe_daemon.core.types import ALIGNMENT_BYTES, TensorSpec, align
from cpe_daemon.errors import MisuseError
from tests.unit.planning import ARENA, whole

A = ALIGNMENT_BYTES
MIB = 1 << 20
NOWHERE = -1


def spec_of(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name, "uint8", (nbytes,))


def said(needed: dict[str, tuple[int, Sequence[Rectangle] | None]]) -> Needs | None:
    """What is said of tensors of so many bytes."""
    return describe({name: (spec_of(name, nbytes), some) for name, (nbytes, some) in needed.items()})


def needed_bytes(needs: Needs | None, specs: Sequence[TensorSpec]) -> list[set[int]]:
    """By tensor, every byte that is needed."""
    if needs is None:
        return [set(range(spec.nbytes)) for spec in specs]
    found: list[set[int]] = [set() for _ in specs]
    for index, kind in zip(by_name(specs), kinds_of(needs, len(specs)), strict=True):
        runs = runs_of(needs.kinds[kind - 1], specs[index].nbytes, 0) if kind else ((0, specs[index].nbytes),)
        found[index] = {at for start, end in runs for at in range(start, end)}
    return found


# --- what is said -------------------------------------------------------------------------------------------------


@st.composite
def rectangles(draw: st.DrawFn, nbytes: int) -> list[Rectangle] | None:
    """Where bytes of a tensor are copied from."""
    if draw(st.booleans()):
        return None
    found = []
    for _ in range(draw(st.integers(0, 3))):
        width = draw(st.integers(1, max(nbytes, 1)))
        if width > nbytes:
            continue
        start = draw(st.integers(0, nbytes - width))
        pitch = draw(st.integers(width, max(width, nbytes)))
        rows = draw(st.integers(1, min(1 + (nbytes - start - width) // pitch, 40)))
        found.append(Rectangle(7, start, width, rows, width if rows > 1 else 0, pitch if rows > 1 else 0))
    return found


@st.composite
def versions(draw: st.DrawFn) -> list[TensorSpec]:
    count = draw(st.integers(1, 8))
    names = draw(st.permutations([f"layers.{index}.w" for index in range(count)]))
    return [spec_of(name, draw(st.sampled_from([0, 1, 100, 256, 700, 1500, 1500, 3000]))) for name in names]


@st.composite
def workers(draw: st.DrawFn, specs: Sequence[TensorSpec]) -> Needs | None:
    if draw(st.booleans()):
        return None
    return describe({spec.name: (spec, draw(rectangles(spec.nbytes))) for spec in specs})


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_what_is_said_holds_every_byte_that_is_copied(data: st.DataObject) -> None:
    specs = data.draw(versions())
    copied = {spec.name: (spec, data.draw(rectangles(spec.nbytes))) for spec in specs}
    told = describe(copied)
    if told is not None:
        told = msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Needs)
        assert told.schema == schema_of([specs[index] for index in by_name(specs)])
    for spec, found in zip(specs, needed_bytes(told, specs), strict=True):
        some = copied[spec.name][1]
        if some is None:
            assert found == set(range(spec.nbytes))
            continue
        exactly = {
            rectangle.source + row * rectangle.source_pitch + at
            for rectangle in some
            for row in range(rectangle.rows)
            for at in range(rectangle.nbytes)
        }
        assert exactly == found


def test_digest_is_of_what_is_needed_and_of_which_tensors() -> None:
    half, other = [Rectangle(0, 0, 50)], [Rectangle(0, 50, 50)]
    one = said({"a": (100, half), "b": (100, None)})
    again = said({"b": (100, None), "a": (100, [Rectangle(900, 0, 50)])})
    assert one is not None
    assert one == again, "where bytes go does not matter"
    others = [said({"a": (100, other), "b": (100, None)}), said({"a": (100, half), "c": (100, None)})]
    assert len({one.digest} | {needs.digest for needs in others if needs is not None}) == 3


def test_nothing_is_said_where_everything_is_needed() -> None:
    everything = [Rectangle(0, 0, 60), Rectangle(99, 60, 40)]
    assert said({"a": (100, None), "b": (100, everything), "c": (100, [Rectangle(0, 0, 10, 10, 10, 10)])}) is None


def test_model_of_140_000_tensors_is_told_in_some_kilobytes() -> None:
    needed: dict[str, tuple[int, Sequence[Rectangle] | None]] = {}
    for layer in range(60):
        for expert in range(384):
            for leaf in ("gate", "up"):
                needed[f"layers.{layer}.experts.{expert}.{leaf}"] = (4096, [Rectangle(0, 1024, 1024)])
                needed[f"layers.{layer}.experts.{expert}.{leaf}.scale"] = (64, [Rectangle(0, 16, 16)])
            needed[f"layers.{layer}.experts.{expert}.down"] = (4096, [Rectangle(0, 16, 16, 64, 16, 64)])
            needed[f"layers.{layer}.experts.{expert}.down.scale"] = (64, None)
    told = said(needed)
    assert told is not None
    assert len(needed) > 138_000
    assert len(msgspec.msgpack.encode(told)) < 64 << 10


def test_tensors_in_too_many_pieces_or_kinds_are_needed_whole() -> None:
    pieces = [Rectangle(0, 10 * index, 5) for index in range(20)]
    assert said({"a": (1000, pieces)}) is None
    told = said({f"{index:05}": (10_000, [Rectangle(0, index, 1)]) for index in range(5000)})
    assert told is not None
    assert len(told.kinds) < 5000
    assert list(kinds_of(told, 5000)).count(0) == 5000 - len(told.kinds)


def broken(needs: Needs, numbers: Sequence[int]) -> Needs:
    return msgspec.structs.replace(needs, tensors=zlib.compress(array("H", numbers).tobytes()))


@pytest.mark.parametrize(
    "what", ["not packed", "too few", "too many", "no such kind", "outside", "negative", "many kinds", "many spans"]
)
def test_needs_that_make_no_sense_are_refused(what: str) -> None:
    needs = said({"a": (100, [Rectangle(0, 0, 50)]), "b": (100, None)})
    assert needs is not None
    wrong = {
        "not packed": msgspec.structs.replace(needs, tensors=b"no"),
        "too few": broken(needs, [1]),
        "too many": broken(needs, [1] * 10_000_000),
        "no such kind": broken(needs, [2, 0]),
        "many kinds": msgspec.structs.replace(needs, kinds=[[Span(0, 50)]] * 10_000),
        "many spans": msgspec.structs.replace(needs, kinds=[[Span(0, 50)] * 10]),
        "outside": msgspec.structs.replace(needs, kinds=[[Span(60, 50)]]),
        "negative": msgspec.structs.replace(needs, kinds=[[Span(-1, 50)]]),
    }
    made = cut([spec_of("a", 100), spec_of("b", 100)], A * 4)
    with pytest.raises(MisuseError):
        Wants(made, [0, 1], [[wrong[what]]], Costs())


def test_rows_that_lie_close_together_are_one_run() -> None:
    rows = [Span(10, 4, 3, 10)]
    assert runs_of(rows, 100, 5) == ((10, 14), (20, 24), (30, 34))
    assert runs_of(rows, 100, 6) == ((10, 34),)
    assert runs_of([Span(0, 1, 1_000_000, 2)], 2_000_000, 0) == ((0, 1_999_999),)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9))),
)
def test_runs_are_merged_and_intersected_like_sets(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    def members(runs: Sequence[tuple[int, int]]) -> set[int]:
        return {at for start, end in runs for at in range(start, end)}

    some, others = ([(start, start + count) for start, count in runs] for runs in (one, two))
    merged, merged_others = merge(sorted(some), 0), merge(sorted(others), 0)
    assert members(merged) == members(some)
    assert all(first[1] < second[0] for first, second in pairwise(merged))
    assert members(list(intersect(merged, merged_others))) == members(some) & members(others)


# --- what is sent -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    specs: list[TensorSpec]
    tensors: list[Tensor]
    arena: bytes
    workers: list[list[Needs | None]]
    topology: Topology
    plan: Plan


@st.composite
def cases(draw: st.DrawFn) -> Case:
    specs = draw(versions())
    gap = draw(st.sampled_from([0, 0, A, 3 * A]))
    tensors, end = [], 0
    for spec in specs:
        tensors.append(whole(spec, end))
        end = align(end + spec.nbytes) + gap
    count = draw(st.integers(1, 4))
    costs = draw(st.sampled_from([Costs(), Costs(1, 1), Costs(64, 20), Costs(20, 300, 8.0), Costs(4000, 4000)]))
    near = draw(st.booleans())
    regions = (Region(0, end // 2, 0), Region(end // 2, end, 1)) if near and end > 1 else ()
    gpus = tuple(Gpu(f"GPU-{index}", index % 2 if near else None) for index in range(count))
    topology = Topology(gpus, draw(st.booleans()), regions, costs)
    several = [[draw(workers(specs)) for _ in range(draw(st.integers(1, 2)))] for _ in range(count)]
    made = cut(specs, draw(st.sampled_from([2 * A, 4 * A, 16 * A])))
    plan = assign(made, tensors, ARENA, topology, Wants(made, by_name(specs), several, costs))
    return Case(specs, tensors, random.Random(end).randbytes(max(end, 1)), several, topology, plan)


def sent(transfers: Transfers, bucket: Bucket, arena: bytes) -> list[list[int]]:
    """By GPU, what is in a slot, byte by byte, after stage 1 and 2."""
    slots = [[NOWHERE] * bucket.nbytes for _ in transfers.pulls]
    for slot, pulls in zip(slots, transfers.pulls, strict=True):
        for copy in pulls:
            assert copy.nbytes > 0
            assert 0 <= copy.slot_offset < copy.slot_offset + copy.nbytes <= bucket.nbytes
            slot[copy.slot_offset : copy.slot_offset + copy.nbytes] = arena[copy.address : copy.address + copy.nbytes]
    pulled = [list(slot) for slot in slots]
    for gpu, exchanges in enumerate(transfers.exchanges):
        for peer_copy in exchanges:
            assert peer_copy.gpu != gpu
            reached = slice(peer_copy.slot_offset, peer_copy.slot_offset + peer_copy.nbytes)
            slots[gpu][reached] = pulled[peer_copy.gpu][reached]
    return slots


def sent_bytes(transfers: Transfers) -> int:
    pulled = sum(copy.nbytes for copies in transfers.pulls for copy in copies)
    return pulled + sum(peer_copy.nbytes for copies in transfers.exchanges for peer_copy in copies)


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_gpu_gets_what_its_workers_need_byte_for_byte(case: Case) -> None:
    needed = [[needed_bytes(needs, case.specs) for needs in several] for several in case.workers]
    for bucket in case.plan.buckets:
        if bucket.sliced is None:
            continue
        entire = sent(bucket.whole, bucket, case.arena)
        for gpu, slot in enumerate(sent(bucket.sliced, bucket, case.arena)):
            inside = {part.slot_offset + at for part in bucket.parts for at in range(part.nbytes)}
            for at in inside:
                assert slot[at] in (NOWHERE, entire[gpu][at]), "what was sent is what belongs there"
            for part in bucket.parts:
                for several in needed[gpu]:
                    for at in several[part.tensor]:
                        if part.tensor_offset <= at < part.tensor_offset + part.nbytes:
                            place = part.slot_offset + at - part.tensor_offset
                            address = case.tensors[part.tensor].runs[0].offset + at
                            assert slot[place] == case.arena[address]


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_copies_are_no_more_than_the_bytes_that_they_save_are_worth(case: Case) -> None:
    costs, count = case.topology.costs, len(case.topology.gpus)
    for bucket in case.plan.buckets:
        if bucket.sliced is None or costs.exchange_speed != 1.0 or case.topology.has_near_memory:
            continue
        copies = [len(copies) for copies in (*bucket.sliced.pulls, *bucket.sliced.exchanges)]
        cost = min(costs.fetch_bytes, costs.exchange_bytes)
        largest = max(costs.fetch_bytes, costs.exchange_bytes)
        padding = A * len(
            bucket.parts
        )  # between tensors that lie apart in the arena: whole buckets have those copies too
        assert max(copies) * cost <= 3 * (bucket.nbytes + count * largest) + cost * len(bucket.parts) + padding


def halves(count: int, tensors: int, nbytes: int) -> list[Runs]:
    """What each of ``count`` ranks needs where tensors are parted among them in rows."""
    part = nbytes // count
    return [
        tuple((index * nbytes + gpu * part, index * nbytes + (gpu + 1) * part) for index in range(tensors))
        for gpu in range(count)
    ]


def test_ranks_that_share_tensors_each_pull_their_own_and_exchange_nothing() -> None:
    made = slice_bucket(64 * MIB, halves(2, 16, 4 * MIB), equal_shares(64 * MIB, 2), Costs(16 << 10, 16 << 10))
    assert made is not None
    assert made.pulls == tuple(halves(2, 16, 4 * MIB))
    assert made.exchanges == ((), ())


def test_gpus_that_issue_copies_slowly_pull_as_ever_and_exchange_what_is_needed() -> None:
    costs = Costs(512 << 10, 64 << 10, 2.0)
    made = slice_bucket(64 * MIB, halves(2, 64, MIB), equal_shares(64 * MIB, 2), costs)
    assert made is not None
    assert made.pulls == (((0, 32 * MIB),), ((32 * MIB, 64 * MIB),))
    assert [sum(copy.nbytes for copy in copies) for copies in made.exchanges] == [16 * MIB, 16 * MIB]


def test_many_tiny_slices_are_not_worth_their_copies() -> None:
    costs = Costs(16 << 10, 16 << 10)
    assert slice_bucket(MIB, halves(2, 256, 4096), equal_shares(MIB, 2), costs) is None
    assert slice_bucket(MIB, halves(2, 256, 4096), (), costs) is None


def test_gpus_without_peer_access_pull_what_they_need() -> None:
    made = slice_bucket(64 * MIB, halves(4, 16, 4 * MIB), (), Costs(256 << 10))
    assert made is not None
    assert made.pulls == tuple(halves(4, 16, 4 * MIB))


def test_what_nobody_needs_is_not_sent_and_the_rest_is_pulled_by_all_alike() -> None:
    needed: Runs = ((0, 8 * MIB),)
    made = slice_bucket(64 * MIB, [needed, needed], equal_shares(64 * MIB, 2), Costs())
    assert made is not None
    assert [sum(end - start for start, end in runs) for runs in made.pulls] == [4 * MIB, 4 * MIB]
    assert [sum(copy.nbytes for copy in copies) for copies in made.exchanges] == [4 * MIB, 4 * MIB]
    nothing = slice_bucket(64 * MIB, [(), ()], equal_shares(64 * MIB, 2), Costs())
    assert nothing == (((), ()), ((), ()))


def test_engine_that_needs_everything_beside_one_that_does_not_takes_as_long_and_less_work() -> None:
    wants: list[Runs] = [((0, 64 * MIB),), ((0, MIB),)]
    made = slice_bucket(64 * MIB, wants, equal_shares(64 * MIB, 2), Costs(1024, 1024))
    assert made is not None
    assert [sum(end - start for start, end in runs) for runs in made.pulls] == [32 * MIB, 32 * MIB]
    assert [sum(copy.nbytes for copy in copies) for copies in made.exchanges] == [32 * MIB, MIB]


def test_plan_of_tensors_that_are_needed_whole_is_the_plan_without() -> None:
    specs = [spec_of("a", 700), spec_of("b", 700)]
    tensors = [whole(spec, index * 1024) for index, spec in enumerate(specs)]
    topology = Topology((Gpu("0"), Gpu("1")), peer_access=True)
    made = cut(specs, 16 * A)
    plan = assign(made, tensors, ARENA, topology)
    assert assign(made, tensors, ARENA, topology, Wants(made, [0, 1], [[None], [None]], Costs())) == plan
    assert plan.buckets[0].sliced is None


def test_bytes_that_are_sent_are_fewer() -> None:
    specs = [spec_of(str(index), 4096) for index in range(8)]
    tensors = [whole(spec, index * 4096) for index, spec in enumerate(specs)]
    several: list[list[Needs | None]] = [
        [describe({spec.name: (spec, [Rectangle(0, rank * 2048, 2048)]) for spec in specs})] for rank in range(2)
    ]
    topology = Topology((Gpu("0"), Gpu("1")), peer_access=True)
    made = cut(specs, 1 << 16)
    plan = assign(made, tensors, ARENA, topology, Wants(made, by_name(specs), several, topology.costs))
    (bucket,) = plan.buckets
    assert bucket.sliced is not None
    assert sent_bytes(bucket.sliced) == plan.nbytes
    assert sent_bytes(bucket.whole) == 2 * plan.nbytes
