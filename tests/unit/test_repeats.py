"""A version that comes again: nothing happens if it is what is held, and it is refused if it is anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from cpe_daemon.arena import Arena
from cpe_daemon.config import Config
from cpe_daemon.core.identity import content_digest
from cpe_daemon.core.lifecycle import VersionState
from cpe_daemon.core.manifest import layout, merge
from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.copypool import CopyPool
from cpe_daemon.errors import BusyError, DeadlineError, EngineError, ProtocolError, VersionRefusedError
from cpe_daemon.ingest.ingest import Ingest
from cpe_daemon.ingest.trainers import Trainers
from cpe_daemon.links.handoff import HandoffServer
from cpe_daemon.observe.metrics import Metrics
from cpe_daemon.versions import Catalogue, Version
from cpe_daemon.wire.messages import (
    PROTOCOL,
    Abandon,
    Chunk,
    ChunkDone,
    ErrorReply,
    ManifestPart,
    Message,
    OpenVersion,
    Seal,
    TrainerHello,
    VersionOpened,
    VersionStatus,
)
from cpe_daemon.wire.reports import VersionReport

W, B = Shard("w", "float32", (4, 2)), Shard("b", "float32", (2,))
ONE, TWO, THREE = (bytes([value]) * 16 for value in (1, 2, 3))
V1 = VersionId("m", "r", 1)


class NoHandoff:
    path = Path("handoff.sock")

    def withdraw(self, token: bytes) -> None:
        """Nothing was offered."""


@dataclass
class Desk:
    """What trainers talk to, without sockets."""

    handlers: dict[type[Message], object]
    catalogue: Catalogue
    ingest: Ingest
    arena: Arena
    sent: list[tuple[bytes, Message]] = field(default_factory=list)
    now: float = 0.0

    def send(self, peer: bytes, message: Message, *_: object) -> bool:
        self.sent.append((peer, message))
        return True

    def say(self, message: Message, peer: bytes = b"t0") -> list[Message]:
        """Have a message handled; what is answered by then. Raises what it is refused with."""
        before = len(self.sent)
        self.handlers[type(message)](peer, message, [])  # type: ignore[operator]
        return [answer for to, answer in self.sent[before:] if to == peer]

    def greet(self, peer: bytes = b"t0", rank: int = 0, world_size: int = 1, run: str = "r") -> None:
        self.say(TrainerHello(PROTOCOL, "m", run, rank, world_size), peer)

    def hold(self, parts: list[list[Shard]], digests: list[list[bytes]], version: VersionId = V1) -> Version:
        """Stage a version behind the trainers' back."""
        record = self.catalogue.open(version, len(parts))
        for rank, shards in enumerate(parts):
            part = self.catalogue.contribute(record, rank, shards, layout(shards).nbytes)
            part.sealed, part.digests = True, digests[rank]
        self.catalogue.stage(record, merge(version, parts), digest=content_digest(parts, digests))
        return record

    def bring(self, record: Version, state: str) -> None:
        """Take a staged version on."""
        if state == "staged":
            return
        self.catalogue.begin_push(record)
        if state == "failed":
            self.catalogue.fail(record, EngineError("no engine took it"))
        elif state != "pushing":
            self.catalogue.go_live(record, VersionReport(record.id, 40, 2))
        if state in ("retained", "evicted"):
            later = VersionId("m", "r", record.id.number + 1)
            self.bring(self.hold([[W]], [[THREE]], later), "retained" if state == "evicted" else "live")


@pytest.fixture
def desk() -> Iterator[Desk]:
    arena = Arena(1 << 16)
    config = Config.model_validate({"runtime_dir": Path("/tmp/cpe-desk")})
    made: Desk
    catalogue = Catalogue(arena, retain=1, clock=lambda: made.now)
    trainers = Trainers(
        config=config,
        generation="g",
        boot_id="this host",
        handoff=cast("HandoffServer", NoHandoff()),
        metrics=Metrics(),
        clock=lambda: made.now,
    )
    ingest = Ingest(
        config=config,
        trainers=trainers,
        catalogue=catalogue,
        arena=arena,
        pool=cast("CopyPool", None),
        tasks=cast("asyncio.TaskGroup", None),
        metrics=Metrics(),
        clock=lambda: made.now,
    )
    made = Desk({**trainers.handlers(), **ingest.handlers()}, catalogue, ingest, arena)
    trainers.connect(made)
    yield made
    arena.close()


@pytest.mark.parametrize("state", ["staged", "pushing", "live", "retained"])
def test_same_version_again_is_told_what_became_of_it_and_brings_no_bytes(desk: Desk, state: str) -> None:
    record = desk.hold([[W, B]], [[ONE, TWO]])
    desk.bring(record, state)
    free, leases = desk.arena.free_bytes, record.leases
    desk.greet()
    assert desk.say(OpenVersion(1, V1, 2, 512)) == []
    assert desk.say(ManifestPart(1, 0, [W])) == []
    assert desk.say(ManifestPart(1, 1, [B])) == [VersionOpened(1, held=True)]
    assert desk.say(Seal(1, ONE + TWO)) == [VersionStatus(V1, state, None, record.report, stream=1)]
    assert (str(record.state), record.leases, desk.arena.free_bytes) == (state, leases, free)


def test_repeated_version_s_later_states_are_told(desk: Desk) -> None:
    record = desk.hold([[W]], [[ONE]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 1, 256))
    desk.say(ManifestPart(1, 0, [W]))
    desk.say(Seal(1, ONE))
    desk.bring(record, "live")
    told = [message for _, message in desk.sent if isinstance(message, VersionStatus)]
    assert [(status.state, status.stream) for status in told] == [("staged", 1), ("pushing", 0), ("live", 0)]


def test_nothing_is_told_to_a_trainer_that_has_not_shown_that_it_means_the_same(desk: Desk) -> None:
    record = desk.hold([[W]], [[ONE]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 1, 256))
    desk.say(ManifestPart(1, 0, [W]))
    desk.bring(record, "live")
    assert not [message for _, message in desk.sent if isinstance(message, VersionStatus)]


@pytest.mark.parametrize("state", ["failed", "evicted"])
def test_version_that_is_given_up_while_a_trainer_makes_digests_is_compared_all_the_same(
    desk: Desk, state: str
) -> None:
    record = desk.hold([[W]], [[ONE]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 1, 256))
    desk.say(ManifestPart(1, 0, [W]))
    desk.bring(record, state)
    assert record.state == state
    (status,) = desk.say(Seal(1, ONE))
    assert isinstance(status, VersionStatus)
    assert (status.state, status.stream) == (state, 1)
    assert (status.error is not None) == (state == "failed")


def test_other_bytes_are_refused_with_both_digests_and_change_nothing(desk: Desk) -> None:
    record = desk.hold([[W, B]], [[ONE, TWO]])
    desk.bring(record, "live")
    desk.greet()
    desk.say(OpenVersion(1, V1, 2, 512))
    desk.say(ManifestPart(1, 0, [W, B]))
    why = r"m@r#1 is held here \(live\) .* rank 0 .* digests of b \(020202020202, now 030303030303\); .* new number"
    with pytest.raises(VersionRefusedError, match=why):
        desk.say(Seal(1, ONE + THREE))
    assert (record.state, record.leases) == (VersionState.LIVE, 0)
    assert desk.say(Seal(1, ONE + TWO)) == []  # it is over
    assert desk.catalogue.live("m") is record


def test_many_other_bytes_are_counted(desk: Desk) -> None:
    shards = [Shard(f"w{n}", "uint8", (1,)) for n in range(9)]
    desk.hold([shards], [[ONE] * 9])
    desk.greet()
    desk.say(OpenVersion(1, V1, 9, 9 * 256))
    desk.say(ManifestPart(1, 0, shards))
    with pytest.raises(VersionRefusedError, match=r"w1 \(.*\), w2 \(.*\), w3 \(.*\) and 2 more"):
        desk.say(Seal(1, ONE + TWO * 5 + ONE * 3))


@pytest.mark.parametrize(
    "other",
    [
        Shard("c", "float32", (2,)),
        Shard("b", "int32", (2,)),
        Shard("b", "float32", (1, 2)),
        Shard("b", "float32", (2,), (0,), (1,)),
    ],
    ids=["name", "dtype", "shape", "part"],
)
def test_other_tensors_are_refused_before_anybody_makes_digests(desk: Desk, other: Shard) -> None:
    desk.hold([[W, B]], [[ONE, TWO]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 2, 512))
    with pytest.raises(VersionRefusedError, match=r"held here \(staged\).*it has b \(float32, \[2\]\) where now"):
        desk.say(ManifestPart(1, 0, [W, other]))
    assert desk.say(ManifestPart(1, 2, [W])) == []  # on its way when that was said


def test_other_number_of_tensors_is_refused_at_once(desk: Desk) -> None:
    desk.hold([[W, B]], [[ONE, TWO]])
    desk.greet()
    with pytest.raises(VersionRefusedError, match="2 tensors, not 3"):
        desk.say(OpenVersion(1, V1, 3, 512))
    assert desk.say(ManifestPart(1, 0, [W])) == []


def test_each_rank_is_compared_with_its_own_part(desk: Desk) -> None:
    record = desk.hold([[W], [B], []], [[ONE], [TWO], []])
    for rank, shards in enumerate([[W], [B], []]):
        desk.greet(peer := f"t{rank}".encode(), rank, 3)
        opened = desk.say(OpenVersion(1, V1, len(shards), 256 * len(shards)), peer)
        if shards:
            opened = desk.say(ManifestPart(1, 0, shards), peer)
        assert opened == [VersionOpened(1, held=True)]
    assert [m for m in desk.say(Seal(1, b""), b"t2") if isinstance(m, VersionStatus)]
    assert [m for m in desk.say(Seal(1, ONE), b"t0") if isinstance(m, VersionStatus)]
    with pytest.raises(VersionRefusedError, match="of rank 1 it has other digests of b"):
        desk.say(Seal(1, ONE), b"t1")
    assert record.state is VersionState.STAGED


def test_other_number_of_ranks_is_refused(desk: Desk) -> None:
    desk.hold([[W]], [[ONE]])
    desk.greet(world_size=2)
    with pytest.raises(VersionRefusedError, match="is held from 1 ranks; this one says 2"):
        desk.say(OpenVersion(1, V1, 1, 256))


def test_messages_out_of_place_are_refused_and_change_nothing(desk: Desk) -> None:
    desk.hold([[W, B]], [[ONE, TWO]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 2, 512))
    for wrong in (Seal(1, ONE + TWO), ManifestPart(1, 1, [B]), ManifestPart(1, 0, []), ManifestPart(1, 0, [W, B, B])):
        with pytest.raises(ProtocolError):
            desk.say(wrong)
    desk.say(ManifestPart(1, 0, [W, B]))
    for wrong in (ManifestPart(1, 2, [B]), Seal(1, ONE)):
        with pytest.raises(ProtocolError):
            desk.say(wrong)
    assert len(desk.say(Seal(1, ONE + TWO))) == 1


def test_bytes_that_come_all_the_same_are_dropped_and_their_credits_returned(desk: Desk) -> None:
    desk.hold([[W]], [[ONE]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 1, 256))
    desk.say(ManifestPart(1, 0, [W]))
    assert desk.say(Chunk(1, 0, 256, ring_offset=512)) == [ChunkDone(1, 512)]
    assert len(desk.say(Seal(1, ONE))) == 1


def test_comparison_may_be_given_up(desk: Desk) -> None:
    record = desk.hold([[W]], [[ONE]])
    desk.greet()
    desk.say(OpenVersion(1, V1, 1, 256))
    desk.say(Abandon(1, "interrupted"))
    assert desk.say(Seal(1, ONE)) == []
    assert record.state is VersionState.STAGED


def test_comparisons_count_as_publishes_in_flight_and_have_a_deadline(desk: Desk) -> None:
    desk.hold([[W]], [[ONE]])
    desk.greet()
    for stream in range(1, 5):
        desk.say(OpenVersion(stream, V1, 1, 256))
    with pytest.raises(BusyError, match="4 publishes in flight"):
        desk.say(OpenVersion(5, V1, 1, 256))
    limit = Config.model_validate({}).deadlines.receive_total_seconds
    desk.now = limit
    desk.ingest.fail_stalled()
    assert not [message for _, message in desk.sent if isinstance(message, ErrorReply)]
    desk.now = limit + 1
    desk.ingest.fail_stalled()
    late = [message for _, message in desk.sent if isinstance(message, ErrorReply)]
    assert [(reply.stream, reply.error.code) for reply in late] == [(n, "deadline") for n in range(1, 5)]
    desk.say(OpenVersion(6, V1, 1, 256))


def test_rank_that_comes_again_while_its_version_is_made_whole_is_told_to_wait(desk: Desk) -> None:
    """It must not fail the version: every rank of it has done its part."""
    record = desk.catalogue.open(V1, 1)
    desk.catalogue.contribute(record, 0, [W], 256).digests = [ONE]
    desk.greet()
    with pytest.raises(BusyError, match="rank 0 is contributing to m@r#1 already"):
        desk.say(OpenVersion(1, V1, 1, 256))
    assert record.state is VersionState.RECEIVING


# --- a version that does not come ------------------------------------------------------------------------------------


def receiving(desk: Desk, numbers: range) -> list[Version]:
    """Versions of which one rank of two has come."""
    return [desk.catalogue.open(VersionId("m", "r", number), 2) for number in numbers]


def test_version_that_stalls_fails_at_its_deadline(desk: Desk) -> None:
    limit = Config.model_validate({}).deadlines.receive_idle_seconds
    moving, still = receiving(desk, range(1, 3))
    for version in (moving, still):
        desk.ingest._touch(version)
    desk.now = limit
    desk.ingest.fail_stalled()
    desk.ingest._touch(moving)
    assert (moving.state, still.state) == (VersionState.RECEIVING, VersionState.RECEIVING)
    desk.now = limit + 0.1
    desk.ingest.fail_stalled()
    assert (moving.state, still.state) == (VersionState.RECEIVING, VersionState.FAILED)
    assert isinstance(still.error, DeadlineError)
    assert f"nothing came for {limit:g} s" in still.error.message


def test_version_that_takes_too_long_in_all_fails(desk: Desk) -> None:
    limits = Config.model_validate({}).deadlines
    (version,) = receiving(desk, range(1, 2))
    while desk.now < limits.receive_total_seconds:
        desk.ingest.fail_stalled()
        assert version.state is VersionState.RECEIVING
        desk.now += limits.receive_idle_seconds / 2
        desk.ingest._touch(version)
    desk.now += 0.1
    desk.ingest.fail_stalled()
    assert version.state is VersionState.FAILED
    assert isinstance(version.error, DeadlineError)
    assert f"after {limits.receive_total_seconds:g} s" in version.error.message
