"""The catalogue: which versions it takes, when their bytes go, and that no two versions ever share one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count, pairwise

import msgspec
import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cpe_daemon.arena import Arena
from cpe_daemon.core.admission import History, Used, admit
from cpe_daemon.core.extents import Extent
from cpe_daemon.core.keeping import Keeping
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import Manifest, layout, merge
from cpe_daemon.core.plan import HERE
from cpe_daemon.core.types import ALIGNMENT_BYTES, Shard, VersionId, align
from cpe_daemon.errors import (
    ArenaFullError,
    LifecycleError,
    MisuseError,
    PeerLostError,
    PublishError,
    VersionRefusedError,
)
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.reports import VersionReport

A = ALIGNMENT_BYTES
ARENA_BYTES = 64 * A
ONE, OTHER = bytes([1]) * 16, bytes([2]) * 16


def number(n: int, run: str = "r", model: str = "m") -> VersionId:
    return VersionId(model, run, n)


def shards_of(nbytes: int, rank: int = 0) -> list[Shard]:
    return [Shard(f"w{rank}", "uint8", (nbytes,))]


def manifest_of(version: Version) -> Manifest:
    parts = [version.contributions[rank] for rank in range(version.world_size)]
    return merge(version.id, [part.shards for part in parts])


def seal(version: Version) -> None:
    for part in version.contributions.values():
        part.sealed = True


EXAMPLES = int(os.environ.get("CPE_TEST_EXAMPLES", "40"))
"""How often anything happens in any order."""


class Shelf:
    """A catalogue over a small arena, with the way to each state."""

    def __init__(
        self,
        arena_bytes: int = ARENA_BYTES,
        retain: int = 1,
        *,
        automatic: bool = True,
        models: Mapping[str, Keeping] | None = None,
    ) -> None:
        self.arena = Arena(arena_bytes)
        self.ticks = count(1)
        self.catalogue = Catalogue(
            self.arena, retain=retain, clock=lambda: float(next(self.ticks)), automatic=automatic, models=models
        )
        self.told: list[tuple[str, str]] = []
        self.catalogue.watch(lambda version: self.told.append((str(version.id), str(version.state))))

    def receive(self, version: VersionId, nbytes: int = 8 * A, *, force: bool = False) -> Version:
        receiving = self.catalogue.open(version, 1, force=force)
        self.catalogue.contribute(receiving, 0, shards_of(nbytes), nbytes)
        return receiving

    def stage(self, version: VersionId, nbytes: int = 8 * A, *, force: bool = False, digest: bytes = b"") -> Version:
        staged = self.receive(version, nbytes, force=force)
        seal(staged)
        self.catalogue.stage(staged, manifest_of(staged), digest=digest)
        return staged

    def push(self, version: VersionId, nbytes: int = 8 * A, *, digest: bytes = b"") -> Version:
        pushing = self.stage(version, nbytes, digest=digest)
        self.catalogue.begin_push(pushing)
        return pushing

    def live(self, version: VersionId, nbytes: int = 8 * A, *, digest: bytes = b"") -> Version:
        live = self.push(version, nbytes, digest=digest)
        self.catalogue.go_live(live, report(live))
        return live

    def states(self) -> dict[str, str]:
        return {str(version.id): str(version.state) for version in self.catalogue}

    @property
    def used_bytes(self) -> int:
        return self.arena.nbytes - self.arena.free_bytes


def report(version: Version) -> VersionReport:
    return VersionReport(version.id, version.nbytes, 1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Log nothing: thousands of versions change here."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.arena.close()


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("staged", "version", "force", "taken"),
    [
        ([], number(0), False, True),
        ([number(1)], number(2), False, True),
        ([number(1)], number(9), False, True),
        ([number(1)], number(1), False, False),
        ([number(1)], number(1), True, False),
        ([number(3)], number(2), False, False),
        ([number(3)], number(2), True, False),
        ([number(3)], number(0, run="s"), False, True),
        ([number(3), number(0, run="s")], number(4), False, False),
        ([number(3), number(0, run="s")], number(4), True, True),
        ([number(3), number(0, run="s")], number(3), True, False),
        ([number(3), number(0, run="s"), number(4)], number(1, run="s"), False, False),
        ([number(3)], number(1, model="other"), False, True),
    ],
)
def test_admission_by_run_and_number(staged: list[VersionId], version: VersionId, *, force: bool, taken: bool) -> None:
    history = History()
    for used in staged:
        if used.model == version.model:
            history = history.after(used)
    with contextlib.nullcontext() if taken else pytest.raises(VersionRefusedError, match="refused"):
        admit(history, version, force=force)


def test_refusal_says_which_number_would_be_taken() -> None:
    with pytest.raises(VersionRefusedError, match="run 'r' has staged number 7 already; publish 8 or higher"):
        admit(History().after(number(7)), number(5))


def test_refusal_of_a_superseded_run_says_by_which_and_how_to_return() -> None:
    history = History().after(number(7)).after(number(0, run="s"))
    with pytest.raises(VersionRefusedError, match="superseded by run 's'; publish with force"):
        admit(history, number(8))


def test_history_keeps_the_highest_number_of_a_run() -> None:
    assert History().after(number(7), ONE).after(number(5), OTHER).used == {"r": Used(7, ONE)}


def test_history_keeps_the_digest_that_its_number_was_staged_with() -> None:
    assert History().after(number(7), ONE).after(number(7), OTHER).used == {"r": Used(7, ONE)}


def test_history_learns_the_digest_of_what_was_staged_without_and_of_nothing_else() -> None:
    history = History().after(number(3), OTHER).after(number(7)).after(number(0, run="s"))
    assert not history.lacks_digest(number(3))
    assert history.lacks_digest(number(7))
    learned = history.learned(number(7), ONE)
    assert learned == History("s", {"r": Used(7, ONE), "s": Used(0)})
    for version in (number(3), number(7), number(8), number(1, run="s"), number(7, run="t")):
        assert learned.learned(version, OTHER) == learned


def test_version_whose_digest_is_known_later_may_come_again_from_then_on(shelf: Shelf) -> None:
    told: list[Version] = []
    shelf.catalogue.on_digest(told.append)
    version = shelf.push(number(1))
    with shelf.catalogue.lease(version):
        shelf.catalogue.fail(version, PeerLostError("no engine took it"))
        with pytest.raises(VersionRefusedError, match="failed: its last bytes are still being let go; try again"):
            shelf.catalogue.open(number(1), 1)
        before = list(shelf.told)
        shelf.catalogue.learn(version, ONE)
        assert (told, version.digest, shelf.told) == ([version], ONE, before)
    with pytest.raises(VersionRefusedError, match="staged before with other weights"):
        shelf.stage(number(1), digest=OTHER)
    shelf.catalogue.fail(shelf.catalogue.open(number(1), 1), PeerLostError("gone"))
    assert shelf.stage(number(1), digest=ONE).held


def test_number_is_used_up_when_it_is_staged_not_before(shelf: Shelf) -> None:
    failed = shelf.receive(number(1))
    shelf.catalogue.fail(failed, PeerLostError("gone"))
    assert shelf.catalogue.numbers.histories == {}
    again = shelf.stage(number(1), digest=ONE)
    assert again is not failed
    assert shelf.catalogue.numbers.histories == {"m": History("r", {"r": Used(1, ONE)})}


@pytest.mark.parametrize("state", ["staged", "pushing", "live", "retained"])
def test_version_that_is_held_is_found_not_received(shelf: Shelf, state: str) -> None:
    held = {"staged": shelf.stage, "pushing": shelf.push}.get(state, shelf.live)(number(1))
    if state == "retained":
        shelf.live(number(2))
    told, used = list(shelf.told), shelf.used_bytes
    assert held.held
    assert shelf.catalogue.open(number(1), 1) is shelf.catalogue.open(number(1), 1, force=True) is held
    assert (str(held.state), shelf.told, shelf.used_bytes) == (state, told, used)
    with pytest.raises(VersionRefusedError, match="is held from 1 ranks; this one says 2"):
        shelf.catalogue.open(number(1), 2)


def test_version_that_failed_to_be_pushed_may_come_again_as_it_was(shelf: Shelf) -> None:
    failed = shelf.push(number(1), digest=ONE)
    shelf.catalogue.fail(failed, PeerLostError("no engine took it"))
    again = shelf.push(number(1), digest=ONE)
    assert again is not failed
    shelf.catalogue.go_live(again, report(again))
    assert shelf.catalogue.numbers.histories == {"m": History("r", {"r": Used(1, ONE)})}


def test_version_that_failed_to_be_pushed_may_not_come_again_as_another(shelf: Shelf) -> None:
    shelf.catalogue.fail(shelf.push(number(1), digest=ONE), PeerLostError("no engine took it"))
    other = shelf.receive(number(1))
    seal(other)
    with pytest.raises(
        VersionRefusedError, match=r"other weights \(digest 010101010101, now 020202020202\); publish 2"
    ):
        shelf.catalogue.stage(other, manifest_of(other), digest=OTHER)
    assert (other.state, other.manifest, other.digest) == (VersionState.RECEIVING, None, b"")
    shelf.catalogue.fail(other, VersionRefusedError("other weights"))
    assert shelf.stage(number(1), digest=ONE).held


def test_version_whose_digest_nobody_knows_may_not_come_again(shelf: Shelf) -> None:
    shelf.catalogue.fail(shelf.push(number(1)), PeerLostError("no engine took it"))
    with pytest.raises(VersionRefusedError, match="publish 2"):
        shelf.catalogue.open(number(1), 1)


def test_evicted_version_may_come_again_only_if_no_higher_number_was_staged(shelf: Shelf) -> None:
    shelf.live(number(1), digest=ONE)
    shelf.live(number(2), digest=OTHER)
    shelf.live(number(3), digest=ONE)
    assert shelf.states()["m@r#1"] == "evicted"
    with pytest.raises(VersionRefusedError, match="has staged number 3 already; publish 4 or higher"):
        shelf.catalogue.open(number(1), 1)


def test_version_whose_bytes_are_still_being_let_go_is_refused(shelf: Shelf) -> None:
    failed = shelf.push(number(1), digest=ONE)
    with shelf.catalogue.lease(failed):
        shelf.catalogue.fail(failed, PeerLostError("no engine took it"))
        with pytest.raises(VersionRefusedError, match="failed: its last bytes are still being let go"):
            shelf.catalogue.open(number(1), 1)
    assert shelf.catalogue.open(number(1), 1) is not failed


def test_history_that_was_written_down_counts(shelf: Shelf) -> None:
    before = Shelf()
    before.stage(number(3), digest=ONE)
    before.stage(number(0, run="s"), digest=OTHER)
    written = msgspec.json.encode(before.catalogue.numbers.histories)
    before.arena.close()
    for model, history in msgspec.json.decode(written, type=dict[str, History]).items():
        shelf.catalogue.numbers.remember(model, history)
    with pytest.raises(VersionRefusedError, match="superseded by run 's'"):
        shelf.catalogue.open(number(4), 1)
    with pytest.raises(VersionRefusedError, match="digest 010101010101"):
        shelf.stage(number(3), digest=OTHER, force=True)
    assert shelf.stage(number(0, run="s"), digest=OTHER).held
    assert shelf.catalogue.numbers.histories == before.catalogue.numbers.histories


def test_history_is_not_remembered_over_what_was_staged_here(shelf: Shelf) -> None:
    shelf.stage(number(1), digest=ONE)
    with pytest.raises(MisuseError, match="of m have used numbers up"):
        shelf.catalogue.numbers.remember("m", History())
    shelf.catalogue.numbers.remember("other", History())


def test_new_run_is_accepted_and_logged() -> None:
    shelf = Shelf()
    with structlog.testing.capture_logs() as logs:
        shelf.stage(number(3))
        shelf.stage(number(4))
        shelf.stage(number(0, run="s"))
        shelf.stage(number(5), force=True)
    accepted = [(line["run"], line["superseded"]) for line in logs if line["event"] == "run.accepted"]
    assert accepted == [("r", None), ("s", "r"), ("r", "s")]
    shelf.arena.close()


def test_lower_number_may_be_received_but_not_staged_after_a_higher_one(shelf: Shelf) -> None:
    slow, fast = shelf.receive(number(1)), shelf.receive(number(2))
    seal(fast)
    shelf.catalogue.stage(fast, manifest_of(fast))
    seal(slow)
    with pytest.raises(VersionRefusedError):
        shelf.catalogue.stage(slow, manifest_of(slow))
    assert (slow.state, slow.manifest, slow.staged_at) == (VersionState.RECEIVING, None, 0.0)


@pytest.mark.parametrize("force", [False, True])
def test_version_of_a_run_that_is_superseded_while_it_is_received_needs_force(shelf: Shelf, *, force: bool) -> None:
    """A trainer that was thought to be gone ends its last publish: its successor must not be refused for that."""
    shelf.stage(number(1))
    late = shelf.receive(number(2), force=force)
    shelf.stage(number(0, run="s"))
    seal(late)
    if force:
        shelf.catalogue.stage(late, manifest_of(late))
        return
    with pytest.raises(VersionRefusedError, match="run 'r' was superseded by run 's'; publish with force"):
        shelf.catalogue.stage(late, manifest_of(late))
    assert late.state is VersionState.RECEIVING
    assert shelf.stage(number(1, run="s")).held


def test_open_joins_the_ranks_of_one_version(shelf: Shelf) -> None:
    first = shelf.catalogue.open(number(1), 2)
    assert shelf.catalogue.open(number(1), 2) is first
    with pytest.raises(VersionRefusedError, match="from 2 ranks; this one says 3"):
        shelf.catalogue.open(number(1), 3)


def test_rank_contributes_once(shelf: Shelf) -> None:
    version = shelf.receive(number(1))
    used = shelf.used_bytes
    with pytest.raises(VersionRefusedError, match="rank 0 contributes"):
        shelf.catalogue.contribute(version, 0, shards_of(A), A)
    assert shelf.used_bytes == used


def test_nobody_contributes_to_a_version_that_is_not_received(shelf: Shelf) -> None:
    version = shelf.stage(number(1))
    with pytest.raises(VersionRefusedError, match="staged, not receiving"):
        shelf.catalogue.contribute(version, 1, shards_of(A), A)


def test_sealed_needs_every_rank(shelf: Shelf) -> None:
    version = shelf.catalogue.open(number(1), 2)
    for rank in range(2):
        assert not version.sealed
        shelf.catalogue.contribute(version, rank, shards_of(A, rank), A)
        version.contributions[rank].sealed = True
    assert version.sealed


# --- the life of a version -------------------------------------------------------------------------------------------


def test_version_goes_live_and_the_one_before_is_retained(shelf: Shelf) -> None:
    first, second = shelf.live(number(1)), shelf.live(number(2))
    assert shelf.states() == {"m@r#1": "retained", "m@r#2": "live"}
    assert shelf.catalogue.live("m") is shelf.catalogue.live("") is second
    assert second.report == report(second)
    assert first.manifest is not None
    assert [told for told in shelf.told if told[0] == "m@r#1"] == [
        ("m@r#1", state) for state in ("receiving", "staged", "pushing", "live", "retained")
    ]


def test_retained_version_goes_live_again(shelf: Shelf) -> None:
    first, second = shelf.live(number(1)), shelf.live(number(2))
    shelf.catalogue.go_live(first, report(first))
    assert (first.state, second.state) == (VersionState.LIVE, VersionState.RETAINED)
    assert shelf.catalogue.live("m") is first
    assert shelf.used_bytes == first.nbytes + second.nbytes


def test_version_that_was_live_last_is_retained_the_longest(shelf: Shelf) -> None:
    """After a rollback that is the one with the lower number: what it replaced is what nobody wants."""
    first, second = shelf.live(number(1)), shelf.live(number(2))
    shelf.catalogue.go_live(first, report(first))
    shelf.live(number(3))
    assert (first.state, second.state) == (VersionState.RETAINED, VersionState.EVICTED)


def test_seconds_from_open_to_staged(shelf: Shelf) -> None:
    version = shelf.receive(number(1))
    assert version.stage_seconds == 0.0
    seal(version)
    shelf.catalogue.stage(version, manifest_of(version))
    assert version.stage_seconds == 1.0  # the clock ticks once each time it is asked


@pytest.mark.parametrize("retain", [0, 1, 3])
def test_retention_keeps_so_many_previous_versions_of_each_model(retain: int) -> None:
    shelf = Shelf(retain=retain)
    for n in range(1, 5):
        for model in ("a", "b"):
            shelf.live(number(n, model=model), 2 * A)
    for model in ("a", "b"):
        kept = [v.id.number for v in shelf.catalogue if v.id.model == model and v.state is VersionState.RETAINED]
        assert kept == [1, 2, 3][3 - retain :]
    assert shelf.used_bytes == 2 * (1 + retain) * 2 * A
    shelf.arena.close()


def test_live_of_several_models_must_be_named(shelf: Shelf) -> None:
    assert shelf.catalogue.live("") is None
    a = shelf.live(number(1, model="a"))
    assert shelf.catalogue.live("") is a
    b = shelf.live(number(1, model="b"))
    assert shelf.catalogue.live("") is None
    assert (shelf.catalogue.live("a"), shelf.catalogue.live("b")) == (a, b)
    assert shelf.catalogue.live("c") is None


def test_failed_version_gives_its_bytes_back_and_is_remembered(shelf: Shelf) -> None:
    version = shelf.receive(number(1))
    error = PeerLostError("trainer rank 0 is gone")
    shelf.catalogue.fail(version, error)
    assert shelf.used_bytes == 0
    assert shelf.catalogue.find(number(1)) is None
    assert shelf.catalogue.last(number(1)) is version
    assert (version.error, version.nbytes, version.manifest) == (error, 0, None)


def test_memory_of_versions_without_bytes_is_bounded(shelf: Shelf) -> None:
    for n in range(1, 40):
        shelf.catalogue.fail(shelf.receive(number(n)), PeerLostError("gone"))
    numbers = [version.id.number for version in shelf.catalogue]
    assert numbers == list(range(24, 40))
    assert shelf.catalogue.last(number(3)) is None


def test_last_is_the_newest_of_one_name(shelf: Shelf) -> None:
    shelf.catalogue.fail(shelf.receive(number(1)), PeerLostError("first"))
    second = shelf.receive(number(1))
    assert shelf.catalogue.last(number(1)) is second
    shelf.catalogue.fail(second, PeerLostError("second"))
    assert shelf.catalogue.last(number(1)) is second


@pytest.mark.parametrize("event", ["stage", "begin_push", "go_live", "fail"])
@pytest.mark.parametrize("state", ["receiving", "staged", "pushing", "live", "retained", "evicted", "failed"])
def test_illegal_event_raises_and_changes_nothing(event: str, state: str, shelf: Shelf) -> None:
    legal = {("receiving", "stage"), ("receiving", "fail"), ("staged", "begin_push"), ("staged", "fail")}
    legal |= {("pushing", "go_live"), ("pushing", "fail"), ("retained", "go_live")}
    if (state, event) in legal:
        return
    version = in_state(shelf, state)
    before = describe(version), shelf.states(), shelf.used_bytes, len(shelf.told)
    apply: dict[str, Callable[[], None]] = {
        "stage": lambda: shelf.catalogue.stage(version, Manifest(version.id, (), 0)),
        "begin_push": lambda: shelf.catalogue.begin_push(version),
        "go_live": lambda: shelf.catalogue.go_live(version, VersionReport(version.id, 7, 7)),
        "fail": lambda: shelf.catalogue.fail(version, PeerLostError("too late")),
    }
    with pytest.raises((LifecycleError, VersionRefusedError)):
        apply[event]()
    assert (describe(version), shelf.states(), shelf.used_bytes, len(shelf.told)) == before


def in_state(shelf: Shelf, state: str) -> Version:
    match state:
        case "receiving":
            return shelf.receive(number(1))
        case "staged":
            return shelf.stage(number(1))
        case "pushing":
            return shelf.push(number(1))
        case "live":
            return shelf.live(number(1))
        case "failed":
            version = shelf.receive(number(1))
            shelf.catalogue.fail(version, PeerLostError("gone"))
            return version
    version = shelf.live(number(1))
    shelf.live(number(2))
    if state == "evicted":
        shelf.live(number(3))
    assert version.state == state
    return version


def describe(version: Version) -> tuple[object, ...]:
    return version.state, version.manifest, version.error, version.report, version.staged_at, version.nbytes


def test_tensors_of_a_version_that_is_not_staged_is_misuse(shelf: Shelf) -> None:
    with pytest.raises(MisuseError, match="not staged"):
        shelf.receive(number(1)).located()


def test_tensors_lie_where_their_ranks_extents_do(shelf: Shelf) -> None:
    version = shelf.catalogue.open(number(1), 2)
    shards = {0: [Shard("a", "uint8", (3,)), Shard("b", "uint8", (4, 2), (2, 0), (2, 2))]}
    shards[1] = [Shard("b", "uint8", (4, 2), (0, 0), (2, 2)), Shard("none", "uint8", (0,))]
    for rank in (1, 0):
        shelf.catalogue.contribute(version, rank, shards[rank], layout(shards[rank]).nbytes)
    seal(version)
    shelf.catalogue.stage(version, manifest_of(version))
    zero, one = (version.contributions[rank].extent.offset for rank in range(2))
    tensors, bases = version.located()
    assert {base.origin for base in bases} == {HERE}
    placed = {
        tensor.spec.name: [(run.tensor_offset, run.nbytes, bases[run.rank].address + run.offset) for run in tensor.runs]
        for tensor in tensors
    }
    assert placed == {"a": [(0, 3, zero)], "b": [(0, 4, one), (4, 4, zero + A)], "none": [(0, 0, one + A)]}


# --- leases and room -------------------------------------------------------------------------------------------------


def test_lease_delays_the_release_of_a_failed_version(shelf: Shelf) -> None:
    version = shelf.receive(number(1))
    used = shelf.used_bytes
    with shelf.catalogue.lease(version):
        with shelf.catalogue.lease(version):
            shelf.catalogue.fail(version, PeerLostError("gone"))
            assert shelf.used_bytes == used
        assert shelf.used_bytes == used
        with pytest.raises(VersionRefusedError, match="still being let go"):
            shelf.catalogue.open(number(1), 1)
        shelf.told.clear()
    assert shelf.used_bytes == 0
    assert shelf.told == [("m@r#1", "failed")]  # whoever waits for room is told when it comes
    assert shelf.catalogue.open(number(1), 1) is not version


def test_lease_delays_the_release_of_an_evicted_version(shelf: Shelf) -> None:
    first = shelf.live(number(1))
    shelf.live(number(2))
    with shelf.catalogue.lease(first):
        shelf.live(number(3))
        assert first.state is VersionState.EVICTED
        assert shelf.used_bytes == 3 * 8 * A
        assert first.manifest is not None
    assert shelf.used_bytes == 2 * 8 * A


def test_lease_ends_with_an_error_too(shelf: Shelf) -> None:
    version = shelf.receive(number(1))
    with pytest.raises(ZeroDivisionError), shelf.catalogue.lease(version):
        raise ZeroDivisionError
    assert version.leases == 0


def test_full_arena_names_need_and_free(shelf: Shelf) -> None:
    shelf.live(number(1), 40 * A)
    version = shelf.catalogue.open(number(2), 1)
    with pytest.raises(ArenaFullError, match=r"no room for 7\.5 KiB") as caught:
        shelf.catalogue.contribute(version, 0, shards_of(30 * A), 30 * A)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (30 * A, 24 * A)
    assert not version.contributions


def test_retained_versions_are_evicted_for_room_the_oldest_first() -> None:
    shelf = Shelf(retain=3)
    for n in range(1, 5):
        shelf.live(number(n), 16 * A)
    shelf.receive(number(5), 20 * A)
    assert shelf.states() == {
        "m@r#1": "evicted",
        "m@r#2": "evicted",
        "m@r#3": "retained",
        "m@r#4": "live",
        "m@r#5": "receiving",
    }
    shelf.arena.close()


def test_live_is_never_evicted_for_room(shelf: Shelf) -> None:
    live = shelf.live(number(1), 60 * A)
    with pytest.raises(ArenaFullError):
        shelf.receive(number(2), 8 * A)
    assert live.state is VersionState.LIVE
    assert shelf.used_bytes == 60 * A


def test_rollback_is_not_given_up_for_what_does_not_fit_even_then(shelf: Shelf) -> None:
    """With the live version in the middle, evicting the first leaves 16 and 32 apart."""
    first = shelf.live(number(1), 16 * A)
    shelf.live(number(2), 16 * A)
    version = shelf.catalogue.open(number(3), 1)
    for nbytes in (33 * A, 48 * A, 65 * A, 1 << 40):
        with pytest.raises(ArenaFullError):
            shelf.catalogue.contribute(version, 0, shards_of(nbytes), nbytes)
        assert first.state is VersionState.RETAINED
    shelf.catalogue.contribute(version, 0, shards_of(32 * A), 32 * A)
    assert first.state is VersionState.RETAINED
    other = shelf.catalogue.open(number(4), 1)
    shelf.catalogue.contribute(other, 0, shards_of(16 * A), 16 * A)
    assert shelf.states()["m@r#1"] == "evicted"


def test_version_that_is_read_is_not_evicted_for_room(shelf: Shelf) -> None:
    first = shelf.live(number(1), 16 * A)
    shelf.live(number(2), 16 * A)
    with shelf.catalogue.lease(first):
        with pytest.raises(ArenaFullError):
            shelf.receive(number(3), 40 * A)
        assert first.state is VersionState.RETAINED


def test_one_model_is_not_evicted_for_another() -> None:
    shelf = Shelf(retain=1)
    for n in (1, 2):
        shelf.live(number(n, model="a"), 24 * A)
    with pytest.raises(ArenaFullError):
        shelf.receive(number(1, model="b"), 24 * A)
    assert shelf.states()["a@r#1"] == "retained"
    shelf.arena.close()


@pytest.mark.parametrize(
    ("state", "leased", "expected"),
    [
        ("receiving", False, False),
        ("receiving", True, False),
        ("staged", False, True),
        ("pushing", False, True),
        ("live", False, False),
        ("live", True, False),
        ("retained", False, False),
        ("retained", True, True),
    ],
)
def test_may_make_room_while_bytes_are_about_to_go(state: str, *, leased: bool, expected: bool, shelf: Shelf) -> None:
    version = in_state(shelf, state)
    with shelf.catalogue.lease(version) if leased else contextlib.nullcontext():
        assert shelf.catalogue.may_make_room() is expected


# --- versions that wait to be asked for ------------------------------------------------------------------------------


@pytest.fixture
def waiting() -> Iterator[Shelf]:
    """Nothing is pushed by itself."""
    made = Shelf(automatic=False)
    yield made
    made.arena.close()


def test_newer_version_takes_the_place_of_the_one_that_waits(waiting: Shelf) -> None:
    older, other = waiting.stage(number(1)), waiting.stage(number(1, model="other"))
    newer = waiting.stage(number(2))
    assert waiting.states() == {"m@r#1": "evicted", "other@r#1": "staged", "m@r#2": "staged"}
    assert isinstance(older.error, PublishError)
    assert older.error.message == "m@r#1 was superseded by m@r#2 before anybody pushed it"
    assert waiting.used_bytes == newer.nbytes + other.nbytes
    assert waiting.told[-3:] == [("m@r#2", "staged"), ("m@r#1", "evicted"), ("m@r#1", "evicted")]


def test_older_number_by_force_takes_the_place_too(waiting: Shelf) -> None:
    waiting.stage(number(5, run="a"))
    waiting.stage(number(1, run="b"))
    waiting.stage(number(6, run="a"), force=True)
    assert waiting.states() == {"m@a#5": "evicted", "m@b#1": "evicted", "m@a#6": "staged"}


def test_version_that_is_pushed_by_itself_is_not_superseded(shelf: Shelf) -> None:
    shelf.stage(number(1))
    shelf.stage(number(2))
    assert shelf.states() == {"m@r#1": "staged", "m@r#2": "staged"}


def test_version_that_is_being_pushed_is_not_superseded(waiting: Shelf) -> None:
    waiting.push(number(1))
    waiting.stage(number(2))
    assert waiting.states() == {"m@r#1": "pushing", "m@r#2": "staged"}


def test_version_that_no_engine_took_may_be_put_back(waiting: Shelf) -> None:
    version = waiting.push(number(1))
    waiting.catalogue.put_back(version)
    assert (version.state, version.error, version.pushes) == (VersionState.STAGED, None, 1)
    assert waiting.used_bytes == version.nbytes
    waiting.catalogue.begin_push(version)
    waiting.catalogue.go_live(version, report(version))
    assert waiting.states() == {"m@r#1": "live"}


def test_version_that_is_put_back_behind_a_newer_one_is_superseded(waiting: Shelf) -> None:
    version = waiting.push(number(1))
    waiting.stage(number(2))
    waiting.catalogue.put_back(version)
    assert waiting.states() == {"m@r#1": "evicted", "m@r#2": "staged"}
    assert version.error is not None


def test_version_that_waits_makes_no_room_by_itself_and_is_named(waiting: Shelf) -> None:
    waiting.live(number(1), 24 * A)
    kept = waiting.stage(number(2), 32 * A)
    assert not waiting.catalogue.may_make_room()
    with pytest.raises(ArenaFullError, match=r"no room .*; held until `cpe push` .*: m@r#2 \(8192 bytes\)") as caught:
        waiting.receive(number(3), 16 * A)
    assert caught.value.need_bytes == 16 * A
    assert kept.state is VersionState.STAGED


# --- anything in any order -------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, in any order: bytes belong to one version, and stay its own while it has them or is leased."""

    @initialize(retain=st.integers(0, 2), automatic=st.booleans(), quota=st.sampled_from([0, 12 * A]))
    def begin(self, retain: int, quota: int, *, automatic: bool) -> None:
        self.quota = quota or 24 * A
        self.shelf = Shelf(24 * A, retain, automatic=automatic, models={"b": Keeping(retain, quota)})
        self.automatic = automatic
        self.catalogue, self.arena = self.shelf.catalogue, self.shelf.arena
        self.retain = retain
        self.leases: list[tuple[Version, contextlib.ExitStack]] = []
        self.history: dict[str, History] = {}
        self.stamps: dict[Extent, int] = {}
        self.next_stamp = count(1)

    def teardown(self) -> None:
        if hasattr(self, "shelf"):
            for _, lease in self.leases:
                lease.close()
            self.arena.close()

    def versions(self, *states: VersionState) -> list[Version]:
        return [version for version in self.catalogue if version.state in states]

    @rule(
        model=st.sampled_from("ab"),
        run=st.sampled_from("rs"),
        n=st.integers(0, 6),
        world_size=st.integers(1, 2),
        force=st.booleans(),
    )
    def open(self, model: str, run: str, n: int, world_size: int, *, force: bool) -> None:
        version = VersionId(model, run, n)
        known = self.catalogue.find(version)
        try:
            opened = self.catalogue.open(version, world_size, force=force)
        except VersionRefusedError:
            if known is None:
                with pytest.raises(VersionRefusedError):
                    admit(self.history.get(model, History()), version, force=force)
            return
        if known is not None:
            assert opened is known
            assert opened.held or opened.state is VersionState.RECEIVING
        else:
            assert opened.state is VersionState.RECEIVING
            admit(self.history.get(model, History()), version, force=force)

    @precondition(lambda self: self.versions(VersionState.RECEIVING))
    @rule(data=st.data(), rank=st.integers(0, 1), nbytes=st.integers(0, 9 * A))
    def contribute(self, data: st.DataObject, rank: int, nbytes: int) -> None:
        version = data.draw(st.sampled_from(self.versions(VersionState.RECEIVING)))
        if rank >= version.world_size:
            return
        retained = self.versions(VersionState.RETAINED)
        try:
            extent = self.catalogue.contribute(version, rank, shards_of(nbytes, rank), nbytes).extent
        except ArenaFullError:
            over_quota = version.id.model == "b" and self.taken("b") + align(nbytes) > self.quota
            assert over_quota or align(nbytes) > self.arena.largest_free_bytes
            assert all(v.state is VersionState.RETAINED for v in retained)
        except VersionRefusedError:
            assert rank in version.contributions
        else:
            stamp = self.stamps[extent] = next(self.next_stamp) % 251
            self.arena.view[extent.offset : extent.end] = bytes([stamp]) * extent.nbytes
        assert all(v.id.model == version.id.model for v in retained if v.state is VersionState.EVICTED)

    @precondition(lambda self: self.versions(VersionState.RECEIVING))
    @rule(data=st.data(), digest=st.sampled_from([b"", ONE, OTHER]))
    def stage(self, data: st.DataObject, digest: bytes) -> None:
        version = data.draw(st.sampled_from(self.versions(VersionState.RECEIVING)))
        if len(version.contributions) < version.world_size:
            return
        seal(version)
        history = self.history.get(version.id.model, History())
        try:
            self.catalogue.stage(version, manifest_of(version), digest=digest)
        except VersionRefusedError:
            highest = history.used[version.id.run]
            if history.run == version.id.run or version.forced:
                assert highest.number >= version.id.number
                assert highest != Used(version.id.number, digest) or not digest
            assert version.state is VersionState.RECEIVING
        else:
            assert version.forced or history.run in (None, version.id.run) or version.id.run not in history.used
            assert history.used.get(version.id.run) != Used(version.id.number, b"")
            self.history[version.id.model] = history.after(version.id, digest)

    @precondition(lambda self: self.versions(VersionState.STAGED))
    @rule(data=st.data())
    def begin_push(self, data: st.DataObject) -> None:
        self.catalogue.begin_push(data.draw(st.sampled_from(self.versions(VersionState.STAGED))))

    @precondition(lambda self: self.versions(VersionState.PUSHING))
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        self.catalogue.put_back(data.draw(st.sampled_from(self.versions(VersionState.PUSHING))))

    @precondition(lambda self: self.versions(VersionState.PUSHING))
    @rule(data=st.data())
    def go_live(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.versions(VersionState.PUSHING)))
        previous = self.catalogue.live(version.id.model)
        self.catalogue.go_live(version, report(version))
        assert self.catalogue.live(version.id.model) is version
        if previous is not None:
            kept = VersionState.RETAINED if self.retain else VersionState.EVICTED
            assert previous.state is kept
        assert len([v for v in self.versions(VersionState.RETAINED) if v.id.model == version.id.model]) <= self.retain

    @precondition(lambda self: self.versions(VersionState.RETAINED))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.versions(VersionState.RETAINED)))
        previous = self.catalogue.live(version.id.model)
        self.catalogue.go_live(version, report(version))
        assert self.catalogue.live(version.id.model) is version
        assert previous is not None
        assert previous.state is VersionState.RETAINED

    @precondition(lambda self: self.versions(VersionState.RECEIVING, VersionState.STAGED, VersionState.PUSHING))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        going = self.versions(VersionState.RECEIVING, VersionState.STAGED, VersionState.PUSHING)
        self.catalogue.fail(data.draw(st.sampled_from(going)), PeerLostError("gone"))

    @precondition(lambda self: any(self.catalogue.find(v.id) is v for v in self.catalogue))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([v for v in self.catalogue if self.catalogue.find(v.id) is v]))
        stack = contextlib.ExitStack()
        stack.enter_context(self.catalogue.lease(version))
        self.leases.append((version, stack))

    @precondition(lambda self: bool(self.leases))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases.pop(at)[1].close()

    def taken(self, model: str) -> int:
        """Bytes of the arena that a model's versions take."""
        mine = [version for version in self.catalogue if version.id.model == model]
        return sum(align(part.extent.nbytes) for version in mine for part in version.contributions.values())

    @property
    def held(self) -> list[Extent]:
        return [part.extent for version in self.catalogue for part in version.contributions.values()]

    @invariant()
    def extents_do_not_overlap_and_free_and_used_make_the_arena(self) -> None:
        held = sorted((extent for extent in self.held if extent.nbytes), key=lambda extent: extent.offset)
        for extent, following in pairwise(held):
            assert align(extent.end) <= following.offset
        assert all(extent.offset >= 0 and extent.end <= self.arena.nbytes for extent in held)
        assert self.arena.free_bytes + sum(align(extent.nbytes) for extent in held) == self.arena.nbytes

    @invariant()
    def bytes_are_those_that_were_written(self) -> None:
        for extent in self.held:
            stamp = self.stamps[extent]
            assert self.arena.view[extent.offset : extent.end] == bytes([stamp]) * extent.nbytes

    @invariant()
    def quota_is_kept(self) -> None:
        assert self.taken("b") <= self.quota

    @invariant()
    def leased_version_has_its_bytes(self) -> None:
        for version, _ in self.leases:
            assert self.catalogue.find(version.id) is version

    @invariant()
    def one_version_of_a_model_waits(self) -> None:
        waiting = [version.id.model for version in self.versions(VersionState.STAGED)]
        assert self.automatic or len(waiting) == len(set(waiting))

    @invariant()
    def one_version_of_a_model_is_live_and_stays_until_another_is(self) -> None:
        for model in "ab":
            live = [v for v in self.versions(VersionState.LIVE) if v.id.model == model]
            went_live = [told for told in self.shelf.told if told[1] == "live" and told[0].startswith(model)]
            assert [str(v.id) for v in live] == [told[0] for told in went_live[-1:]]


AnyOrder.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None, derandomize=True)
test_anything_in_any_order = AnyOrder.TestCase
