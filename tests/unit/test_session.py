"""A trainer rank's link: credits, places of the landing ring, and streams that are open, were, or never have been."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpe_daemon.core.types import Shard, VersionId
from cpe_daemon.devices.memory import SharedMemory, address_of
from cpe_daemon.errors import ManifestError, ProtocolError
from cpe_daemon.ingest.session import Session
from cpe_daemon.ingest.stream import Stream
from cpe_daemon.versions import Version
from cpe_daemon.wire.messages import MOST_CHUNK_FRAMES, Chunk, ManifestPart, OpenVersion, TrainerHello

CHUNK = 4096
CREDITS = 3


@pytest.fixture
def inline() -> Session:
    """Over a socket alone."""
    return Session(b"peer", TrainerHello(1, "m", "r", 0, 1, pid=17), CREDITS, CHUNK, 0.0)


@pytest.fixture
def landing(no_leaks: None, inline: Session) -> Iterator[Session]:
    """With a landing ring."""
    inline.ring = SharedMemory.create("cpe-test-ring", CREDITS * CHUNK)
    ring = inline.ring
    yield inline
    ring.close()


def frame_of(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def described(session: Session) -> tuple[int, frozenset[int], str]:
    return session.in_flight, frozenset(session.busy_places), session.transport


def test_inline_chunk_is_read_where_its_frame_is(inline: Session) -> None:
    frame = frame_of(100)
    assert inline.take(Chunk(1, 0, 100), [frame]) == [(address_of(frame), 100)]
    assert inline.in_flight == 1
    inline.give_back(-1)
    assert inline.in_flight == 0


def test_chunk_in_several_frames_is_read_where_they_are(inline: Session) -> None:
    frames = [frame_of(nbytes) for nbytes in range(1, MOST_CHUNK_FRAMES + 1)]
    expected = [(address_of(frame), frame.nbytes) for frame in frames]
    assert inline.take(Chunk(1, 0, sum(nbytes for _, nbytes in expected)), frames) == expected
    assert inline.in_flight == 1


@pytest.mark.parametrize(
    ("chunk", "sizes", "says"),
    [
        (Chunk(1, 0, 100), [], "expected 100 bytes in 1 to 32 frames"),
        (Chunk(1, 0, 100), [99], "expected 100 bytes"),
        (Chunk(1, 0, 100), [100, 1], "expected 100 bytes"),
        (Chunk(1, 0, 100), [50, 49], "expected 100 bytes"),
        (Chunk(1, 0, 100), [100, 0], "expected 100 bytes"),
        (Chunk(1, 0, 100), [1] * 9, "expected 100 bytes"),
        (Chunk(1, 0, MOST_CHUNK_FRAMES + 1), [1] * (MOST_CHUNK_FRAMES + 1), "expected 33 bytes in 1 to 32 frames"),
        (Chunk(1, 0, 0), [0], "a chunk of 0 bytes; at most 4096"),
        (Chunk(1, 0, -1), [], "a chunk of -1 bytes"),
        (Chunk(1, 0, CHUNK + 1), [CHUNK + 1], "a chunk of 4097 bytes"),
        (Chunk(1, 0, 100, 0), [], "no chunk can lie at 0 of the landing ring"),
    ],
)
def test_chunk_that_does_not_lie_where_it_says_costs_no_credit(
    chunk: Chunk, sizes: list[int], says: str, inline: Session
) -> None:
    with pytest.raises(ProtocolError, match=says):
        inline.take(chunk, [frame_of(size) for size in sizes])
    assert described(inline) == (0, frozenset(), "inline")


def test_no_more_chunks_than_credits(inline: Session) -> None:
    for _ in range(CREDITS):
        inline.take(Chunk(1, 0, 1), [frame_of(1)])
    with pytest.raises(ProtocolError, match="without a credit: 3 are in flight"):
        inline.take(Chunk(1, 0, 1), [frame_of(1)])
    inline.give_back(-1)
    inline.take(Chunk(1, 0, 1), [frame_of(1)])


def test_landed_chunk_is_read_where_it_lies(landing: Session) -> None:
    assert landing.ring is not None
    for place in range(CREDITS):
        spans = landing.take(Chunk(1, 0, 100, place * CHUNK), [])
        assert spans == [(landing.ring.address + place * CHUNK, 100)]


@pytest.mark.parametrize("at", [1, CHUNK - 1, CREDITS * CHUNK, 1 << 62])
def test_place_outside_the_ring_s_grid_is_refused(at: int, landing: Session) -> None:
    with pytest.raises(ProtocolError, match="no chunk can lie at"):
        landing.take(Chunk(1, 0, 1, at), [])
    assert described(landing) == (0, frozenset(), "inline")


def test_landed_chunk_brings_no_frames(landing: Session) -> None:
    with pytest.raises(ProtocolError, match="no chunk can lie at"):
        landing.take(Chunk(1, 0, 1, 0), [frame_of(1)])


def test_place_that_is_still_read_is_refused(landing: Session) -> None:
    landing.take(Chunk(1, 0, 1, CHUNK), [])
    with pytest.raises(ProtocolError, match="still being read"):
        landing.take(Chunk(1, 0, 1, CHUNK), [])
    assert landing.in_flight == 1
    landing.give_back(CHUNK)
    landing.take(Chunk(1, 0, 1, CHUNK), [])


def test_ring_is_unmapped_when_the_last_copy_out_of_it_has_ended(landing: Session) -> None:
    landing.take(Chunk(1, 0, 1, 0), [])
    landing.free()
    assert landing.ring is not None
    landing.gone = True
    landing.free()
    assert landing.ring is not None
    landing.give_back(0)
    landing.free()
    assert landing.ring is None


def test_stream_that_was_is_none_and_one_that_never_was_is_refused(inline: Session) -> None:
    inline.last_stream = 5
    assert inline.stream(5) is None
    assert inline.stream(1) is None
    for number in (0, -1, 6, 1 << 62):
        with pytest.raises(ProtocolError, match=f"no stream {number} is open"):
            inline.stream(number)


# --- the manifest of a stream ----------------------------------------------------------------------------------------


@pytest.fixture
def stream() -> Stream:
    """Three shards are announced."""
    version = VersionId("m", "r", 1)
    return Stream(OpenVersion(1, version, 3, 768), Version(version, 1, 0.0), 0)


def shards(*names: str) -> list[Shard]:
    return [Shard(name, "uint8", (1,)) for name in names]


def test_manifest_comes_in_parts_in_order(stream: Stream) -> None:
    for part in (ManifestPart(1, 0, shards("a", "b")), ManifestPart(1, 2, []), ManifestPart(1, 2, shards("c"))):
        assert not stream.manifest_complete
        stream.add(part)
    assert stream.manifest_complete
    assert stream.shards == shards("a", "b", "c")


@pytest.mark.parametrize("first", [-1, 0, 2, 3, 1 << 62])
def test_part_that_is_not_the_next_is_refused(first: int, stream: Stream) -> None:
    stream.add(ManifestPart(1, 0, shards("a")))
    with pytest.raises(ProtocolError, match="1 of 3 shards are here"):
        stream.add(ManifestPart(1, first, shards("b")))
    assert stream.shards == shards("a")


def test_more_shards_than_announced_are_refused(stream: Stream) -> None:
    with pytest.raises(ManifestError, match="more than the 3 shards announced"):
        stream.add(ManifestPart(1, 0, shards("a", "b", "c", "d")))
    stream.add(ManifestPart(1, 0, shards("a", "b", "c")))
    with pytest.raises(ProtocolError):
        stream.add(ManifestPart(1, 3, []))


@pytest.mark.parametrize(
    "endless",
    [
        Shard("x" * 1025, "uint8", (1,)),
        Shard("w", "uint8", (1,) * 65),
        Shard("w", "uint8", (1,), (0,) * 65, (1,)),
        Shard("w", "uint8", (1,), (0,), (1,) * 1_000_000),
    ],
    ids=["name", "shape", "start", "local shape"],
)
def test_endless_shard_is_refused_as_it_comes(endless: Shard, stream: Stream) -> None:
    """A million of them would be held in memory until the last part allows a closer look."""
    with pytest.raises(ManifestError, match="characters and"):
        stream.add(ManifestPart(1, 0, [*shards("a"), endless]))
    assert stream.shards == []


def test_stream_takes_bytes_only_between_room_and_seal(stream: Stream) -> None:
    with pytest.raises(ProtocolError, match="stream 1 takes no bytes now"):
        stream.ready()
