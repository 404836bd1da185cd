"""How the tensors of models were cut is remembered, of so many models as there may be room for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cpe_daemon.core.manifest import Manifest, layout, merge
from cpe_daemon.core.plan import HERE, Base, Cut, Gpu, Topology, cut
from cpe_daemon.core.types import Shard, TensorSpec, VersionId
from cpe_daemon.push import planner
from cpe_daemon.push.planner import Planner

TOPOLOGY = Topology((Gpu("gpu-0"),), peer_access=True)


def manifest(names: str = "ab") -> Manifest:
    shards = [Shard(name, "uint8", (512,)) for name in names]
    assert layout(shards).nbytes
    return merge(VersionId("m", "r", 1), [shards], [[bytes(16)] * len(shards)])


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
