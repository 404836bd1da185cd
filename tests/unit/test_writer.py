"""Filling an extent: whatever order and thread the chunks come by, the digests are those of the arena's whole bytes."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from cpe_daemon.core.manifest import DIGEST_BYTES, layout
from cpe_daemon.core.types import ALIGNMENT_BYTES, Shard, align
from cpe_daemon.devices.memory import address_of, copy
from cpe_daemon.errors import DigestError, ProtocolError
from cpe_daemon.ingest import writer
from cpe_daemon.ingest.fold import ExtentFold
from cpe_daemon.ingest.writer import ExtentWriter, Span

A = ALIGNMENT_BYTES


def shards_of(sizes: Sequence[int]) -> list[Shard]:
    return [Shard(f"t{index}", "uint8", (nbytes,)) for index, nbytes in enumerate(sizes)]


@dataclass
class Contribution:
    """A rank's bytes at the sender's, and the extent that they go to, with some bytes around it."""

    sizes: Sequence[int]
    chunk_bytes: int
    seed: int = 0
    piece_bytes: int = 512 << 10
    digested: bool = True
    """If not, it is not folded either."""
    arena: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.shards = shards_of(self.sizes)
        self.layout = layout(self.shards)
        self.source = bytearray(random.Random(self.seed).randbytes(self.layout.nbytes))
        self.arena = bytearray(b"\xee" * (A + self.layout.nbytes + A))
        view = memoryview(self.arena)[A : A + self.layout.nbytes]
        address = address_of(memoryview(self.arena)) + A
        fold = ExtentFold(view, self.shards, self.layout) if self.digested else None
        self.writer = ExtentWriter(
            address,
            view,
            self.shards,
            self.layout,
            self.chunk_bytes,
            self.piece_bytes,
            fold,
            digested=self.digested,
        )

    @property
    def chunks(self) -> list[tuple[int, int]]:
        total, step = self.layout.nbytes, self.chunk_bytes
        return [(offset, min(step, total - offset)) for offset in range(0, total, step)]

    @property
    def digests(self) -> bytes:
        """What the sender says: each shard hashed whole."""
        return b"".join(
            xxh3_128_digest(self.source[offset : offset + nbytes])
            for offset, nbytes in zip(self.layout.offsets, self.sizes, strict=True)
        )

    @property
    def fold(self) -> int:
        """Of all bytes that the sender has, at once."""
        fold = ExtentFold(memoryview(self.source), self.shards, self.layout)
        chunk = fold.chunk(0, self.layout.nbytes)
        chunk.upto(self.layout.nbytes)
        chunk.end()
        return fold.total

    def accept_all(self) -> None:
        for offset, nbytes in self.chunks:
            self.writer.accept(offset, nbytes)

    def write(self, offset: int, nbytes: int, cuts: Sequence[int] = ()) -> None:
        """Write a chunk that comes in parts, cut at ``cuts``."""
        address = address_of(memoryview(self.source)) + offset
        places = sorted({0, *(cut for cut in cuts if cut < nbytes), nbytes})
        self.writer.write(offset, [Span(address + begin, end - begin) for begin, end in itertools.pairwise(places)])

    def check(self, digests: bytes) -> Sequence[bytes]:
        split = self.writer.check(digests)
        assert split is not None
        return split

    def send_all(self) -> None:
        self.accept_all()
        for chunk in self.chunks:
            self.write(*chunk)


SIZES = st.lists(st.integers(0, 5 * A) | st.sampled_from([0, 1, A - 1, A, A + 1, 4 * A]), max_size=12)
CHUNKS = st.integers(1, 7 * A)


@given(sizes=SIZES, chunk_bytes=CHUNKS, data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_digests_equal_hashing_whole_in_any_order(sizes: list[int], chunk_bytes: int, data: st.DataObject) -> None:
    sent = Contribution(sizes, max(chunk_bytes, sum(sizes) // 200 + 1))
    for chunk in data.draw(st.permutations(sent.chunks)):
        sent.writer.accept(*chunk)
        sent.write(*chunk)
    assert sent.writer.all_accepted
    split = sent.check(sent.digests)
    assert b"".join(split) == sent.digests
    assert [len(digest) for digest in split] == [DIGEST_BYTES] * len(sizes)
    assert sent.writer.fold == sent.fold
    assert sent.arena == b"\xee" * A + sent.source + b"\xee" * A


@given(
    sizes=SIZES,
    chunk_bytes=CHUNKS,
    cuts=st.lists(st.integers(0, 7 * A), max_size=8),
    piece_bytes=st.integers(1, 3 * A),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_chunk_in_several_parts_is_what_it_is_in_one(
    sizes: list[int], chunk_bytes: int, cuts: list[int], piece_bytes: int
) -> None:
    sent = Contribution(sizes, max(chunk_bytes, sum(sizes) // 200 + 1), piece_bytes=piece_bytes)
    sent.accept_all()
    for chunk in sent.chunks:
        sent.write(*chunk, cuts)
    assert b"".join(sent.check(sent.digests)) == sent.digests
    assert sent.writer.fold == sent.fold
    assert sent.arena == b"\xee" * A + sent.source + b"\xee" * A


@given(sizes=SIZES, chunk_bytes=CHUNKS, seed=st.integers(0, 1 << 30), threads=st.integers(2, 5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_digests_equal_hashing_whole_from_several_threads(
    sizes: list[int], chunk_bytes: int, seed: int, threads: int
) -> None:
    sent = Contribution(sizes, max(chunk_bytes, sum(sizes) // 200 + 1), seed)
    sent.accept_all()
    order = list(sent.chunks)
    random.Random(seed).shuffle(order)
    together = threading.Barrier(threads)

    def copy_share(share: int) -> None:
        together.wait()
        for chunk in order[share::threads]:
            sent.write(*chunk)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(copy_share, share) for share in range(threads)]:
            done.result()
    assert b"".join(sent.check(sent.digests)) == sent.digests
    assert sent.writer.fold == sent.fold
    assert sent.arena[A:-A] == sent.source


@pytest.mark.parametrize("chunks", [4, 3000])
def test_chunk_behind_a_gap_is_digested_when_the_gap_closes(chunks: int) -> None:
    sent = Contribution([chunks * A], A)
    sent.accept_all()
    for chunk in reversed(sent.chunks[1:]):
        sent.write(*chunk)
    sent.write(*sent.chunks[0])
    assert sent.writer.check(sent.digests) == [sent.digests]


def test_digest_is_of_what_the_arena_holds_not_of_what_was_sent() -> None:
    """A trainer on this host may overwrite its landing ring after the copy; its digest must not follow."""
    sent = Contribution([3 * A], A)
    promised = sent.digests
    sent.accept_all()
    sent.write(*sent.chunks[0])
    sent.source[A] ^= 1
    for chunk in sent.chunks[1:]:
        sent.write(*chunk)
    assert sent.digests != promised
    assert sent.writer.check(sent.digests) == [sent.digests]


@pytest.mark.parametrize("piece_bytes", [1, A - 1, A, 3 * A])
def test_chunk_is_digested_where_it_arrived_piece_by_piece(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece that was copied is overwritten at the sender's before it is digested."""
    sent = Contribution([2 * A + 7, 0, 1, 5 * A, 3], 4 * A, piece_bytes=piece_bytes)
    promised, content = sent.digests, bytes(sent.source)

    def copy_and_overwrite(destination: int, source: int, nbytes: int) -> None:
        copy(destination, source, nbytes)
        ctypes.memset(source, 0xFF, nbytes)

    monkeypatch.setattr(writer, "copy", copy_and_overwrite)
    sent.send_all()
    assert b"".join(sent.check(promised)) == promised
    assert sent.arena[A:-A] == content
    assert set(sent.source) == {0xFF}


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_contribution_without_bytes_is_whole_at_once(sizes: list[int]) -> None:
    sent = Contribution(sizes, A)
    assert sent.writer.all_accepted
    assert sent.writer.check(sent.digests) == [xxh3_128_digest(b"")] * len(sizes)


def test_empty_tensors_anywhere_have_the_digest_of_nothing() -> None:
    sent = Contribution([0, 5, 0, 0, A, 0], A)
    sent.send_all()
    assert b"".join(sent.check(sent.digests)) == sent.digests


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "nbytes", "why"),
    [
        (1, A, "off the grid"),
        (A - 1, A, "off the grid"),
        (-A, A, "off the grid"),
        (3 * A, A, "off the grid"),
        (1 << 63, A, "off the grid"),
        (0, A - 1, "has"),
        (0, A + 1, "has"),
        (0, 0, "has"),
        (0, -1, "has"),
        (2 * A, 2 * A, "has"),
        (0, 3 * A, "has"),
    ],
)
def test_accept_refuses_a_chunk_off_the_grid_and_changes_nothing(offset: int, nbytes: int, why: str) -> None:
    sent = Contribution([2 * A, 7], A)
    with pytest.raises(ProtocolError, match=why):
        sent.writer.accept(offset, nbytes)
    sent.send_all()
    assert b"".join(sent.check(sent.digests)) == sent.digests


def test_accept_refuses_a_chunk_that_came_before() -> None:
    sent = Contribution([4 * A], 2 * A)
    sent.writer.accept(0, 2 * A)
    with pytest.raises(ProtocolError, match="twice"):
        sent.writer.accept(0, 2 * A)
    assert not sent.writer.all_accepted


def test_accept_refuses_everything_of_an_empty_extent() -> None:
    writer = Contribution([0], A).writer
    for offset, nbytes in ((0, 0), (0, 1), (A, A)):
        with pytest.raises(ProtocolError):
            writer.accept(offset, nbytes)


def test_last_chunk_reaches_to_the_aligned_end() -> None:
    sent = Contribution([A + 1], A)
    assert sent.layout.nbytes == align(A + 1) == 2 * A
    sent.writer.accept(A, A)
    with pytest.raises(ProtocolError):
        Contribution([A + 1], A).writer.accept(A, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_check_wants_one_digest_a_shard(count: int) -> None:
    sent = Contribution([A, A], A)
    sent.send_all()
    with pytest.raises(ProtocolError, match="digests for 2 tensors"):
        sent.writer.check(bytes(DIGEST_BYTES * count))
    with pytest.raises(ProtocolError, match="digests"):
        sent.writer.check(sent.digests[:-1])


@given(sizes=SIZES, chunk_bytes=CHUNKS, cuts=st.lists(st.integers(0, 7 * A), max_size=8))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_not_digested_is_copied_all_the_same_and_compared_with_nothing(
    sizes: list[int], chunk_bytes: int, cuts: list[int]
) -> None:
    sent = Contribution(sizes, max(chunk_bytes, sum(sizes) // 200 + 1), digested=False)
    sent.accept_all()
    for chunk in sent.chunks:
        sent.write(*chunk, cuts)
    assert sent.arena == b"\xee" * A + sent.source + b"\xee" * A
    assert sent.writer.check(b"") is None
    assert sent.writer.fold is None


def test_what_is_not_digested_is_copied_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(writer, "copy", lambda destination, source, nbytes: copied.append(nbytes))
    Contribution([9 * A], 8 * A, piece_bytes=A, digested=False).send_all()
    assert copied == [8 * A, A]


def test_check_names_the_tensors_that_differ() -> None:
    sent = Contribution([A, 5, 3 * A], A)
    digests = bytearray(sent.digests)
    digests[DIGEST_BYTES] ^= 1
    sent.send_all()
    with pytest.raises(DigestError, match="the bytes of t1 differ"):
        sent.writer.check(bytes(digests))


@pytest.mark.parametrize("bit", [0, 8 * A + 3, 8 * (2 * A + 100), 8 * 4 * A - 1])
def test_one_flipped_bit_on_the_way_names_its_tensor(bit: int) -> None:
    sent = Contribution([A] * 4, 3 * A)
    digests = sent.digests
    sent.source[bit // 8] ^= 1 << bit % 8
    sent.send_all()
    with pytest.raises(DigestError, match=f"the bytes of t{bit // 8 // A} differ"):
        sent.writer.check(digests)


def test_check_names_ten_tensors_and_counts_the_rest() -> None:
    sent = Contribution([1] * 14, A)
    sent.send_all()
    with pytest.raises(DigestError, match=r"t0, t1, .*, t9 and 4 more differ"):
        sent.writer.check(bytes(DIGEST_BYTES * 14))


def test_padding_between_tensors_belongs_to_no_digest() -> None:
    sent = Contribution([10, 10], A)
    digests = sent.digests
    for at in (10, A - 1, A + 10, 2 * A - 1):
        sent.source[at] ^= 0xFF
    sent.send_all()
    assert b"".join(sent.check(digests)) == digests
