"""Each model's share of a node: its own retention, its own quota, and never the room of another one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.arena import Arena
from cpe_daemon.cli.tables import show_status
from cpe_daemon.core.keeping import Keeping
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import merge
from cpe_daemon.core.retention import shortage
from cpe_daemon.core.types import ALIGNMENT_BYTES, Shard, VersionId, align
from cpe_daemon.errors import ArenaFullError
from cpe_daemon.observe.metrics import Readings
from cpe_daemon.readings import read_models
from cpe_daemon.status import models_status
from cpe_daemon.version import Version
from cpe_daemon.versions import Catalogue
from cpe_daemon.wire.reports import VersionReport

A = ALIGNMENT_BYTES


class Shelf:
    """A catalogue of two models: ``big`` has a quota of 24 blocks, and ``small`` keeps two versions."""

    def __init__(self, arena_bytes: int = 64 * A, **models: Keeping) -> None:
        self.arena = Arena(arena_bytes)
        self.ticks = count(1)
        self.numbers = count(1)
        models = models or {"big": Keeping(1, 24 * A), "small": Keeping(2)}
        self.catalogue = Catalogue(self.arena, retain=1, clock=lambda: float(next(self.ticks)), models=models)

    def receive(self, model: str, *parts: int) -> Version:
        version = self.catalogue.open(VersionId(model, "run", next(self.numbers)), max(1, len(parts)))
        for rank, nbytes in enumerate(parts):
            self.catalogue.contribute(version, rank, [Shard(f"w{rank}", "uint8", (nbytes,))], nbytes)
        return version

    def live(self, model: str, *parts: int) -> Version:
        version = self.receive(model, *parts)
        shards = [part.shards for part in version.contributions.values()]
        self.catalogue.stage(version, merge(version.id, shards))
        self.catalogue.begin_push(version)
        self.catalogue.go_live(version, VersionReport(version.id, version.nbytes, 1))
        return version

    def held(self, model: str) -> list[tuple[int, str]]:
        return [(v.id.number, str(v.state)) for v in self.catalogue if v.id.model == model and v.contributions]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.arena.close()


def test_each_model_keeps_as_many_versions_as_it_shall(shelf: Shelf) -> None:
    for _ in range(4):
        shelf.live("small", 2 * A)
        shelf.live("big", 2 * A)
        shelf.live("other", 2 * A)
    assert [state for _, state in shelf.held("small")] == ["retained", "retained", "live"]
    assert [state for _, state in shelf.held("big")] == ["retained", "live"]
    assert [state for _, state in shelf.held("other")] == ["retained", "live"]  # as by default


def test_quota_counts_all_extents_of_the_model_and_nobody_elses(shelf: Shelf) -> None:
    shelf.live("other", 30 * A)
    shelf.live("big", 8 * A, 4 * A)
    coming = shelf.receive("big", 8 * A, 3 * A + 1)
    assert shelf.catalogue.used_bytes("big") == 24 * A  # as many as may be: what alignment adds counts
    assert shelf.catalogue.used_bytes("other") == 30 * A
    assert coming.nbytes == 11 * A + 1


def test_version_over_the_quota_evicts_what_its_own_model_retains(shelf: Shelf) -> None:
    shelf.live("small", 2 * A)
    shelf.live("small", 2 * A)
    shelf.live("big", 8 * A)
    shelf.live("big", 8 * A)
    assert [state for _, state in shelf.held("big")] == ["retained", "live"]
    shelf.receive("big", 16 * A)
    assert [state for _, state in shelf.held("big")] == ["live", "receiving"]
    assert [state for _, state in shelf.held("small")] == ["retained", "live"]
    assert shelf.arena.free_bytes >= 30 * A  # it was the quota, and not the arena


def test_version_over_the_quota_is_refused_naming_quota_need_and_use(shelf: Shelf) -> None:
    shelf.live("big", 8 * A)
    shelf.live("big", 8 * A)
    with pytest.raises(ArenaFullError) as caught:
        shelf.receive("big", 17 * A - 1)
    for named in (f"{24 * A} bytes", f"{17 * A} bytes", f"{16 * A} bytes", "models.big.quota_bytes", "model big"):
        assert named in caught.value.message
    error = caught.value
    assert (error.model, error.quota_bytes, error.need_bytes, error.free_bytes) == ("big", 24 * A, 17 * A, 8 * A)
    # what does not fit even then costs no rollback
    assert [state for _, state in shelf.held("big")] == ["retained", "live"]


def test_a_rank_that_goes_over_the_quota_is_refused_and_the_others_stay(shelf: Shelf) -> None:
    version = shelf.catalogue.open(VersionId("big", "run", 1), 2)
    shelf.catalogue.contribute(version, 0, [Shard("a", "uint8", (20 * A,))], 20 * A)
    with pytest.raises(ArenaFullError, match=r"models\.big\.quota_bytes"):
        shelf.catalogue.contribute(version, 1, [Shard("b", "uint8", (5 * A,))], 5 * A)
    assert list(version.contributions) == [0]
    shelf.catalogue.contribute(version, 1, [Shard("b", "uint8", (4 * A,))], 4 * A)


def test_a_retained_version_that_is_read_is_not_evicted_for_the_quota(shelf: Shelf) -> None:
    first = shelf.live("big", 8 * A)
    shelf.live("big", 8 * A)
    with shelf.catalogue.lease(first), pytest.raises(ArenaFullError, match="quota"):
        shelf.receive("big", 9 * A)
    assert first.state is VersionState.RETAINED


def test_neither_quota_nor_arena_takes_another_models_versions(shelf: Shelf) -> None:
    shelf.live("small", 20 * A)
    shelf.live("small", 20 * A)
    shelf.live("big", 12 * A)
    with pytest.raises(ArenaFullError, match="the arena has no room") as caught:
        shelf.receive("other", 13 * A)
    assert not caught.value.model
    with pytest.raises(ArenaFullError, match="quota"):
        shelf.receive("big", 13 * A)
    assert [state for _, state in shelf.held("small")] == ["retained", "live"]


def test_retained_is_not_given_up_where_quota_allows_and_the_arena_does_not() -> None:
    shelf = Shelf(30 * A, big=Keeping(1, 24 * A))
    shelf.live("other", 14 * A)
    shelf.live("big", 7 * A)
    shelf.live("big", 7 * A)
    with pytest.raises(ArenaFullError):
        shelf.receive("big", 12 * A)
    assert [state for _, state in shelf.held("big")] == ["retained", "live"]
    shelf.arena.close()


def test_only_the_models_own_pushes_make_room_in_its_quota(shelf: Shelf) -> None:
    version = shelf.receive("small", A)
    shelf.catalogue.stage(version, merge(version.id, [version.contributions[0].shards]))
    assert shelf.catalogue.may_make_room()
    assert shelf.catalogue.may_make_room("small")
    assert not shelf.catalogue.may_make_room("big")


def test_status_says_quota_and_use_by_model(shelf: Shelf) -> None:
    shelf.live("big", 8 * A)
    shelf.live("other", 2 * A)
    assert models_status(shelf.catalogue) == [
        {"model": "big", "used_bytes": 8 * A, "quota_bytes": 24 * A, "versions": 1},
        {"model": "other", "used_bytes": 2 * A, "quota_bytes": 0, "versions": 1},
        {"model": "small", "used_bytes": 0, "quota_bytes": 0, "versions": 2},
    ]


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from(["big", "small", "other"]), st.lists(st.integers(0, 12 * A), min_size=1, max_size=3)),
        max_size=20,
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_model_is_ever_over_its_quota_nor_loses_what_it_serves(arrivals: list[tuple[str, list[int]]]) -> None:
    shelf = Shelf()
    serving: dict[str, Version] = {}
    for model, parts in arrivals:
        before = {name: shelf.held(name) for name in ("big", "small", "other") if name != model}
        try:
            serving[model] = shelf.live(model, *parts)
        except ArenaFullError:
            partial = next(v for v in shelf.catalogue if v.state is VersionState.RECEIVING)
            shelf.catalogue.fail(partial, ArenaFullError("no room"))
        assert shelf.catalogue.used_bytes("big") <= 24 * A
        assert {name: shelf.held(name) for name in before} == before
        for version in serving.values():
            assert version.state is VersionState.LIVE
            assert len(version.contributions) == version.world_size
        used = sum(align(part.extent.nbytes) for v in shelf.catalogue for part in v.contributions.values())
        assert used == shelf.arena.nbytes - shelf.arena.free_bytes
    shelf.arena.close()


def test_metrics_tell_each_models_use_and_quota(shelf: Shelf) -> None:
    shelf.live("big", 8 * A)
    readings = Readings()
    read_models(readings, shelf.catalogue)
    assert readings.values == {
        "cpe_model_bytes": {("big",): 8 * A, ("small",): 0},
        "cpe_model_quota_bytes": {("big",): 24 * A, ("small",): 0},
    }


def test_status_shows_models_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"model": "policy", "used_bytes": 3 << 30, "quota_bytes": 0, "versions": 1}
    show_status({"models": [one]})
    assert "Models" not in capsys.readouterr().out
    show_status({"models": [one | {"quota_bytes": 8 << 30}]})
    assert "8.00 GiB" in capsys.readouterr().out
    show_status({"models": [one, one | {"model": "critic"}]})
    shown = capsys.readouterr().out
    assert "critic" in shown
    assert "none" in shown
    assert "kept for rollback" in shown


def test_shortage_names_the_quota_where_that_is_what_is_short() -> None:
    assert not shortage("big", 4 << 30, 64 << 30)
    said = shortage("big", 40 << 30, 1 << 40, 64 << 30)
    assert "the quota of 64.00 GiB" in said
    assert "Set models.big.quota_bytes to 80.00 GiB" in said
    assert "the arena of 64.00 GiB" in shortage("big", 40 << 30, 64 << 30, 1 << 40)
