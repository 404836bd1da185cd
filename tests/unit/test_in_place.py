"""A chunk's bytes where they lie: the same as a copy of them would hold, with the same digests."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from cpe_daemon.devices.digests import Digests
from cpe_daemon.devices.memory import address_of
from cpe_daemon.publisher import in_place
from cpe_daemon.publisher.in_place import InPlace, find_in_place
from cpe_daemon.publisher.sources import Contribution
from tests.unit.tensor_zoo import bytes_of, tensor_of, zoo


def found(contribution: Contribution, chunk_bytes: int, most: int) -> list[InPlace | None]:
    """Every chunk, in order."""
    digests, total = Digests(contribution.layout, chunk_bytes, lasting=False), contribution.layout.nbytes
    return [
        find_in_place(contribution, digests.first_shard(start), start, min(chunk_bytes, total - start), most)
        for start in range(0, total, chunk_bytes)
    ]


def content(chunk: InPlace) -> bytes:
    return b"".join(chunk.parts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 1500) | st.sampled_from([0, 1, 255, 256, 257]), min_size=1, max_size=12),
    chunk_bytes=st.integers(1, 2000),
    most=st.integers(1, 9),
    small=st.sampled_from([1, 100, 1 << 16]),
)
def test_any_layout_has_the_bytes_and_digests_of_a_copy(
    sizes: list[int], chunk_bytes: int, most: int, small: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "SMALL_BYTES", small)
        tensors = {f"t{at}": tensor_of("uint8", size, seed=at) for at, size in enumerate(sizes)}
        contribution = Contribution.of(tensors.items())
        copied = b"".join(bytes_of(tensor) + bytes(-tensor.nbytes % 256) for tensor in tensors.values())
        digests = Digests(contribution.layout, chunk_bytes, lasting=False)
        for index, chunk in enumerate(found(contribution, chunk_bytes, most)):
            expected = copied[index * chunk_bytes : (index + 1) * chunk_bytes]
            if chunk is None:
                place = memoryview(expected)
                digests.chunk(index, place).end()
                continue
            assert content(chunk) == expected
            assert len(chunk) == len(expected)
            assert len(chunk.parts) <= most
            assert all(part.nbytes for part in chunk.parts)
            place = memoryview(bytearray(len(chunk)))
            chunk.copy_to(address_of(place))
            assert place == expected
            digests.chunk(index, chunk).end()
        assert digests.found == [xxh3_128_digest(bytes_of(tensor)) for tensor in tensors.values()]


def test_large_tensors_are_not_copied() -> None:
    tensors = {"a": tensor_of("uint8", 300_000), "b": tensor_of("float32", 50_000, seed=1)}
    (chunk,) = found(Contribution.of(tensors.items()), 1 << 20, 8)
    assert chunk is not None
    for tensor in tensors.values():
        tensor.zero_()
    assert content(chunk) == bytes(len(chunk))


def test_parts_that_are_too_many_are_not_found() -> None:
    tensors = {str(at): tensor_of("uint8", 1 << 17, seed=at) for at in range(8)}
    for most, there in ((7, False), (8, True)):
        (chunk,) = found(Contribution.of(tensors.items()), 1 << 20, most)
        assert (chunk is not None) is there


def test_small_tensors_are_joined_up_to_a_limit() -> None:
    few = {str(at): tensor_of("uint8", 300, seed=at) for at in range(100)}
    (chunk,) = found(Contribution.of(few.items()), 1 << 20, 1)
    assert chunk is not None
    assert len(chunk.parts) == 1
    many = {str(at): tensor_of("uint8", 300) for at in range(2000)}
    assert found(Contribution.of(many.items()), 1 << 20, 8) == [None]


def test_what_is_no_run_of_bytes_in_host_memory_is_not_found() -> None:
    for name in ("transposed", "strided", "expanded", "conjugated", "negated"):
        assert found(Contribution.of({name: zoo()[name]}.items()), 1 << 20, 8) == [None]


def test_views_keep_the_tensor_s_memory() -> None:
    tensor = torch.ones(100_000, dtype=torch.uint8)
    alive = weakref.ref(tensor)
    (chunk,) = found(Contribution.of({"a": tensor}.items()), 1 << 20, 8)
    assert chunk is not None
    part = chunk.parts[0][7:9]
    del tensor, chunk
    gc.collect()
    assert alive() is not None
    assert bytes(part) == b"\1\1"
    del part
    gc.collect()
    assert alive() is None
