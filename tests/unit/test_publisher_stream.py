"""Cutting into chunks, and staging: whatever the sizes, the same bytes and the same digests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from xxhash import xxh3_128_digest

from cpe_daemon.core.manifest import layout
from cpe_daemon.devices.memory import address_of
from cpe_daemon.errors import ManifestError
from cpe_daemon.publisher import stream
from cpe_daemon.publisher.gpus import Gpus
from cpe_daemon.publisher.reader import Reader
from cpe_daemon.publisher.sources import Contribution, Pairs
from cpe_daemon.publisher.staging import Staging
from cpe_daemon.publisher.stream import Pouring, pour
from cpe_daemon.publisher.window import Window
from tests.unit.tensor_zoo import DTYPES, bytes_of, tensor_of, zoo

ALONE = Pouring(Gpus(), threads=1)


class Chunks:
    """A sink that reuses one dirty place, as a landing ring does."""

    in_order = False

    def __init__(self, chunk_bytes: int) -> None:
        self.place = bytearray(b"\xee" * chunk_bytes)
        self.content = b""
        self.sizes: list[int] = []

    def window(self, offset: int, nbytes: int) -> Window:
        assert offset == len(self.content)
        view = memoryview(self.place)[:nbytes]
        return Window(address_of(view), view)

    def filled(self, offset: int, nbytes: int) -> None:
        assert offset == len(self.content)
        self.content += self.place[:nbytes]
        self.place[:] = b"\xee" * len(self.place)
        self.sizes.append(nbytes)


def expected(tensors: dict[str, Tensor]) -> tuple[bytes, bytes]:
    """The bytes of a contribution and its digests, found without the code under test."""
    content, digests = b"", b""
    for tensor in tensors.values():
        plain = bytes_of(tensor)
        content += plain + bytes(-len(plain) % 256)
        digests += xxh3_128_digest(plain)
    return content, digests


def check(tensors: dict[str, Tensor], chunk_bytes: int) -> None:
    contribution, sink = Contribution.of(tensors.items()), Chunks(chunk_bytes)
    digests = pour(contribution, sink, chunk_bytes, ALONE)
    content, wanted = expected(tensors)
    assert sink.content == content
    assert digests == wanted
    assert sink.sizes[:-1] == [chunk_bytes] * (len(sink.sizes) - 1)

    consumed = Staging().consume(Pairs(iter(tensors.items())), Gpus())
    assert (consumed.shards, consumed.layout) == (contribution.shards, contribution.layout)
    assert bytes(consumed.staged) == content
    assert consumed.digests == wanted


@pytest.mark.parametrize("chunk_bytes", [1, 100, 256, 1000, 4096, 1 << 20])
def test_pour_writes_every_kind_of_tensor(chunk_bytes: int) -> None:
    check(zoo(), chunk_bytes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1500), max_size=12), st.integers(1, 700))
def test_pour_writes_any_sizes(sizes: list[int], chunk_bytes: int) -> None:
    check({str(at): tensor_of("uint8", size, seed=at) for at, size in enumerate(sizes)}, chunk_bytes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [300, 1 << 20])
def test_digest_is_what_pour_returns(threads: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "piece_bytes", lambda threads: piece)
    tensors = {"a": tensor_of("uint8", 5000), **zoo(), "z": tensor_of("float64", 700).view(70, 10).t()}
    told: list[int] = []
    contribution = Contribution.of(tensors.items())
    assert stream.digest(contribution, Pouring(Gpus(), threads, told.append)) == expected(tensors)[1]
    assert sum(told) == contribution.layout.nbytes


def test_pour_copies_large_tensors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "piece_bytes", lambda threads: 300)
    check({"a": tensor_of("uint8", 5000), "b": tensor_of("float64", 7), "c": tensor_of("uint8", 300)}, 2048)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pour_gathers_strided_tensors_of_every_dtype(dtype: str) -> None:
    plain = tensor_of(dtype, 6, 4)
    bits = plain.view(torch.uint8).reshape(6, 4, -1)
    sink = Chunks(64)
    pour(Contribution.of({"t": plain.t()}.items()), sink, 64, ALONE)
    wanted = bits.transpose(0, 1).reshape(-1).numpy().tobytes()
    assert sink.content[: len(wanted)] == wanted


def test_contiguous_tensors_are_not_copied_first() -> None:
    tensor = torch.zeros(4)
    reader = Reader(Gpus())
    source = reader.find(tensor)
    tensor += 1
    place = bytearray(16)
    reader.copy(source, 0, 16, Window(address_of(memoryview(place)), memoryview(place)), 0)
    assert bytes(place) == bytes_of(tensor)


@pytest.mark.gpu
def test_pour_fetches_tensors_from_a_gpu() -> None:
    tensors = {name: tensor for name, tensor in zoo().items() if tensor.dtype is not torch.complex32}
    sink = Chunks(1000)
    moved = {name: tensor.cuda() for name, tensor in tensors.items()}
    digests = pour(Contribution.of(moved.items()), sink, 1000, ALONE)
    assert (sink.content, digests) == expected(tensors)


def test_staging_keeps_its_memory() -> None:
    staging = Staging()
    first = address_of(staging.reserve(4096))
    assert address_of(staging.reserve(8192)) == first
    assert staging.window(256, 512).address == first + 256


@pytest.mark.parametrize("somebody_looks", [False, True])
def test_staging_grows_under_an_iterator(monkeypatch: pytest.MonkeyPatch, somebody_looks: bool) -> None:
    monkeypatch.setattr("cpe_daemon.publisher.staging._GRAIN_BYTES", 1 << 16)
    staging = Staging()
    old = staging.reserve(256) if somebody_looks else None
    tensors = {str(at): tensor_of("uint8", 9000, seed=at) for at in range(40)}

    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield from tensors.items()

    consumed = staging.consume(Pairs(pairs()), Gpus())
    assert (bytes(consumed.staged), consumed.digests) == expected(tensors)
    assert consumed.layout == layout(consumed.shards)
    assert old is None or bytes(old[:12]) != b""


def test_staging_refuses_what_an_iterator_yields_wrong() -> None:
    with pytest.raises(ManifestError, match="is not a tensor"):
        Staging().consume(Pairs(iter([("a", torch.ones(1)), ("b", 2)])), Gpus())
