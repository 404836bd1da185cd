"""How the tensors of models were cut is remembered, of so many models as there may be room for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from cpe_daemon.core.manifest import Manifest, Tensor, layout, merge
from cpe_daemon.core.needs import Needs, Span, describe
from cpe_daemon.core.plan import HERE, Base, Costs, Cut, Gpu, Plan, Topology, Wants, assign, cut
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.push import planner
from cpe_daemon.push.planner import Planner

TOPOLOGY = Topology((Gpu("gpu-0"),), peer_access=True)


def manifest(names: str = "ab") -> Manifest:
    shards = [Shard(name, "uint8", (512,)) for name in names]
    assert layout(shards).nbytes
    return merge(VersionId("m", "r", 1), [shards])


def specs(made: Planner, model: str, names: str = "ab") -> object:
    return made.plan(model, manifest(names).tensors, [Base(HERE, 0)], TOPOLOGY)[0]


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each cut that is made."""
    made: list[int] = []

    def counted(specs: Sequence[TensorSpec], slot_bytes: int) -> Cut:
        made.append(1)
        return cut(specs, slot_bytes)

    monkeypatch.setattr(planner, "cut", counted)
    return made


def test_same_tensors_are_cut_once_for_each_model(cuts: list[int]) -> None:
    made = Planner(1024)
    first = specs(made, "m")
    assert specs(made, "m") is first
    assert specs(made, "m", "abc") is not first
    assert specs(made, "n", "abc") == specs(made, "m", "abc")
    assert len(cuts) == 3


def test_version_at_a_place_that_was_planned_for_needs_no_other_plan() -> None:
    made, tensors = Planner(1024), manifest().tensors

    def planned(start: int, topology: Topology = TOPOLOGY, tensors: Sequence[Tensor] = tensors) -> Plan:
        return made.plan("m", tensors, [Base(HERE, start)], topology)[1]

    first, second = planned(0), planned(4096)
    assert first != second
    assert planned(0) is first
    assert planned(4096, tensors=manifest().tensors) is second
    assert planned(0, Topology((Gpu("gpu-0"), Gpu("gpu-1")), peer_access=True)) != first
    split = [Shard(name, "uint8", (512,), (at,), (256,)) for name in "ab" for at in (0, 256)]
    by_two = merge(VersionId("m", "r", 1), [split[::2], split[1::2]]).tensors
    bases = [Base(HERE, 0), Base(HERE, 4096)]
    assert made.plan("m", by_two, bases, TOPOLOGY)[1] == assign(
        cut([t.spec for t in by_two], 1024), by_two, bases, TOPOLOGY
    )


def test_plans_of_long_ago_are_forgotten() -> None:
    made, tensors = Planner(1024), manifest().tensors
    first = made.plan("m", tensors, [Base(HERE, 0)], TOPOLOGY)[1]
    for number in range(1, 5):
        made.plan("m", tensors, [Base(HERE, number * 4096)], TOPOLOGY)
    again = made.plan("m", tensors, [Base(HERE, 0)], TOPOLOGY)[1]
    assert again == first
    assert again is not first


def test_models_planned_long_ago_are_forgotten(cuts: list[int]) -> None:
    made = Planner(1024)
    kept = specs(made, "kept")
    for index in range(50):
        specs(made, f"m{index}")
        assert specs(made, "kept") is kept
    assert len(cuts) == 51
    assert len(made._cuts) <= 8
    specs(made, "m0")
    assert len(cuts) == 52


# --- what workers need -----------------------------------------------------------------------------------------------

PAIR = Topology((Gpu("gpu-0"), Gpu("gpu-1")), peer_access=True)


def halves(names: str = "ab", nbytes: int = 512) -> list[list[Needs | None]]:
    """Two workers, each of which needs one half of every tensor."""
    return [
        [
            describe(
                {
                    name: (TensorSpec(name, "uint8", (nbytes,)), [Rectangle(0, rank * nbytes // 2, nbytes // 2)])
                    for name in names
                }
            )
        ]
        for rank in range(2)
    ]


def sliced(made: Planner, needs: Sequence[Sequence[Needs | None]]) -> tuple[bool, str]:
    """Whether less than everything is sent, and by needs of which tensors."""
    _, plan, schema = made.plan("m", manifest().tensors, [Base(HERE, 0)], PAIR, needs)
    return any(bucket.sliced for bucket in plan.buckets), schema


def test_plan_goes_by_what_workers_need() -> None:
    made, needs = Planner(1024), halves()
    assert needs[0][0] is not None
    assert sliced(made, needs) == (True, needs[0][0].schema)
    assert sliced(made, [[None], [None]]) == (False, "")
    assert sliced(made, [[], []]) == (False, "")


def test_needs_of_other_tensors_do_not_count() -> None:
    made = Planner(1024)
    assert sliced(made, halves("abc")) == (False, "")
    assert sliced(made, halves("ab", 1024)) == (False, "")
    assert sliced(made, halves("xy")) == (False, "")


def test_worker_that_said_nothing_gets_everything() -> None:
    first, second = halves()
    _, plan, _ = Planner(1024).plan("m", manifest().tensors, [Base(HERE, 0)], PAIR, [first, [*second, None]])
    (bucket,) = plan.buckets
    if bucket.sliced is not None:
        sent = [copy for copies in (bucket.sliced.pulls[1], bucket.sliced.exchanges[1]) for copy in copies]
        assert sum(copy.nbytes for copy in sent) == plan.nbytes


def test_needs_that_make_no_sense_are_needs_of_everything() -> None:
    made, needs = Planner(1024), halves()
    spoilt = [[structs.replace(one, kinds=[[Span(0, 1 << 40)]]) for one in several if one] for several in needs]
    assert sliced(made, spoilt) == (False, "")
    other = [[structs.replace(one, digest="other") for one in several if one] for several in needs]
    assert sliced(made, other)[0]


def test_what_is_needed_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, needs, counted = Planner(1024), halves(), list[int]()

    def count(buckets: Cut, order: Sequence[int], workers: Sequence[Sequence[Needs | None]], costs: Costs) -> Wants:
        counted.append(1)
        return Wants(buckets, order, workers, costs)

    monkeypatch.setattr(planner, "Wants", count)
    for _ in range(3):
        assert sliced(made, needs)[0]
    assert len(counted) == 1
    assert sliced(made, list(reversed(needs)))[0]
    assert len(counted) == 2
