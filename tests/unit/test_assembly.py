"""Tensors out of buckets: whole ones are views of the slot, split ones are put together, and order matters."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpe_daemon.core.dtypes import ITEMSIZE
from cpe_daemon.core.plan import Topology
from cpe_daemon.core.rectangles import Rectangle, strided
from cpe_daemon.core.topology import Gpu
from cpe_daemon.core.types import ALIGNMENT_BYTES, TensorSpec, align
from cpe_daemon.devices.rows import copying
from cpe_daemon.devices.slots import Replay
from cpe_daemon.errors import EngineError, ProtocolError, ResourceError
from cpe_daemon.wire.messages import TensorPart
from inference_plugins.assembly import Assembly, Place, Placement, dtype_of
from tests.unit.planning import make_plan, whole
from tests.unit.tensor_zoo import DTYPES, bytes_of, tensor_of

A = ALIGNMENT_BYTES


class Cpu:
    """As the slots of a CPU host."""

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        return copying(rectangles)


class Recording:
    """Copies nothing, and notes what it is asked for."""

    def __init__(self) -> None:
        self.prepared: list[list[Rectangle]] = []
        self.bases: list[int] = []

    def prepare(self, rectangles: Sequence[Rectangle]) -> Replay:
        self.prepared.append(list(rectangles))
        return self.bases.append


CPU = Cpu()


def slot_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def part(name: str, nbytes: int, offset: int, count: int, slot_offset: int = 0) -> TensorPart:
    return TensorPart(name, "uint8", (nbytes,), offset, count, slot_offset)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (0, 7), (2, 1, 2)], ids=str)
def test_whole_tensor_is_a_view_of_the_slot(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(dtype, *shape)
    content = bytes_of(tensor)
    slot = slot_of(bytes(A) + content + bytes(A))
    ((name, got),) = Assembly().take([TensorPart("w", dtype, shape, 0, len(content), A)], slot, [None], CPU)
    assert (name, got.dtype, tuple(got.shape)) == ("w", tensor.dtype, shape)
    assert bytes_of(got) == content
    assert got.untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()


def test_dtype_that_this_torch_has_not_is_an_engine_error() -> None:
    for name in ("float3", "nn", "float32.x", "", "Tensor", "frombuffer"):
        with pytest.raises(EngineError, match="no dtype"):
            dtype_of(name)
    assert all(dtype_of(name).itemsize == ITEMSIZE[name] for name in DTYPES)


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_planned_buckets_become_the_tensors_that_were_planned(data: st.DataObject) -> None:
    """Through a plan's own buckets, with slots that are too small for some of the tensors, some of which have places.

    A place takes any run of its tensor's bytes, as the ranks of an engine do, or some of its columns.
    """
    slot_bytes = A * data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(0, 20 * A), min_size=1, max_size=8))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    arena = rng.randbytes(sum(align(nbytes) for nbytes in sizes))
    at, tensors = 0, []
    memory, places = dict[str, torch.Tensor](), dict[str, Placement]()
    expected = dict[str, bytes]()
    for index, nbytes in enumerate(sizes):
        spec = TensorSpec(f"layers.{index // 2}.w{index}", "uint8", (nbytes,))
        tensors.append(whole(spec, at))
        start, end = 0, nbytes
        if data.draw(st.booleans()) and (
            width := data.draw(st.sampled_from([w for w in (2, 3, 7, 256) if w < nbytes] or [0]))
        ):
            first = data.draw(st.integers(0, width - 1))
            columns = torch.frombuffer(bytearray(arena[at : at + nbytes - nbytes % width]), dtype=torch.uint8).view(
                -1, width
            )[:, first:]
            here = memory[spec.name] = torch.zeros(columns.shape, dtype=torch.uint8)
            places[spec.name] = tuple(strided(here.shape, 1, here.data_ptr(), here.stride(), first, columns.stride()))
            expected[spec.name] = bytes_of(columns)
            at += align(nbytes)
            continue
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, nbytes))
            end = data.draw(st.integers(start, nbytes))
            memory[spec.name] = torch.zeros(end - start, dtype=torch.uint8)
            places[spec.name] = Place(memory[spec.name].data_ptr(), end - start, start)
        expected[spec.name] = arena[at : at + nbytes][start:end]
        at += align(nbytes)
    plan = make_plan(tensors, slot_bytes=slot_bytes, topology=Topology((Gpu("g"),), peer_access=False))
    assembly, got, placed = Assembly(), dict[str, bytes](), 0
    for bucket in plan.buckets:
        content = bytearray(slot_bytes)
        for item in bucket.pulls[0]:
            content[item.slot_offset : item.slot_offset + item.nbytes] = arena[
                item.address : item.address + item.nbytes
            ]
        specs = [tensors[p.tensor].spec for p in bucket.parts]
        parts = [
            TensorPart(spec.name, spec.dtype, spec.shape, p.tensor_offset, p.nbytes, p.slot_offset)
            for p, spec in zip(bucket.parts, specs, strict=True)
        ]
        slot = slot_of(bytes(content))
        begun = [places.get(part.name) for part in parts if part.tensor_offset == 0]
        for name, tensor in assembly.take(parts, slot, begun, CPU):
            assert name not in got
            got[name] = bytes_of(tensor)
        placed += assembly.placed
        slot.zero_()
    assert placed == len(places)
    assert got | {name: bytes_of(tensor) for name, tensor in memory.items()} == expected


def test_split_tensor_comes_with_its_last_part() -> None:
    assembly = Assembly()
    assert assembly.take([part("w", 10, 0, 6)], slot_of(b"abcdef"), [None], CPU) == []
    taken = assembly.take([part("w", 10, 6, 4), part("v", 2, 0, 2, 4)], slot_of(b"ghijkl"), [None], CPU)
    assert [(name, bytes_of(tensor)) for name, tensor in taken] == [("w", b"abcdefghij"), ("v", b"kl")]


def test_split_tensor_does_not_change_when_the_slot_is_filled_anew() -> None:
    assembly, slot = Assembly(), slot_of(b"abcd")
    assembly.take([part("w", 6, 0, 4)], slot, [None], CPU)
    slot[:] = torch.frombuffer(bytearray(b"efgh"), dtype=torch.uint8)
    ((_, tensor),) = assembly.take([part("w", 6, 4, 2)], slot, [], CPU)
    slot.zero_()
    assert bytes_of(tensor) == b"abcdef"


@pytest.mark.parametrize(("start", "count"), [(0, 10), (0, 3), (3, 4), (4, 2), (7, 3), (6, 4), (0, 0), (10, 0)])
@pytest.mark.parametrize("cuts", [(10,), (6, 4), (1, 2, 3, 4), (4, 2, 4)], ids=str)
def test_tensor_with_a_place_is_copied_there_as_it_comes(cuts: tuple[int, ...], start: int, count: int) -> None:
    """A place may be for some of the bytes only, wherever the tensor is parted; nothing around it is touched."""
    content, around = b"abcdefghij", torch.zeros(count + 2, dtype=torch.uint8)
    place = Place(around.data_ptr() + 1, count, start)
    assembly, offset = Assembly(), 0
    for nbytes in cuts:
        assert assembly.placed == 0
        slot = slot_of(b"__" + content[offset : offset + nbytes])
        places = [place] if offset == 0 else []
        assert assembly.take([part("w", 10, offset, nbytes, 2)], slot, places, CPU) == []
        offset += nbytes
    assert assembly.placed == 1
    assert bytes_of(around) == b"\0" + content[start : start + count] + b"\0"
    assert [name for name, _ in assembly.take([part("v", 2, 0, 2)], slot_of(b"kl"), [None], CPU)] == ["v"]
    assert assembly.placed == 0


def test_tensors_with_and_without_a_place_follow_one_another() -> None:
    memory = torch.zeros(6, dtype=torch.uint8)
    place, assembly = Place(memory.data_ptr(), 6), Assembly()
    assert assembly.take([part("placed", 6, 0, 4)], slot_of(b"abcd"), [place], CPU) == []
    both = [part("placed", 6, 4, 2), part("built", 4, 0, 2, 2)]
    assert assembly.take(both, slot_of(b"efgh"), [None], CPU) == []
    assert assembly.placed == 1
    ((name, tensor),) = assembly.take([part("built", 4, 2, 2)], slot_of(b"ij"), [], CPU)
    assert (name, bytes_of(tensor), bytes_of(memory)) == ("built", b"ghij", b"abcdef")


def test_nothing_is_copied_out_of_a_bucket_with_a_bad_part() -> None:
    memory = torch.zeros(4, dtype=torch.uint8)
    parts = [part("good", 4, 0, 4), part("bad", 9, 5, 4, 4)]
    with pytest.raises(ProtocolError, match="follows nothing"):
        Assembly().take(parts, slot_of(b"abcdefgh"), [Place(memory.data_ptr(), 4)], CPU)
    assert not memory.any()


def test_copies_are_left_to_the_device_of_the_slot_and_none_of_nothing() -> None:
    """They may be done later: it is the bytes' addresses that count, not what is there by then."""
    asked = Recording()
    memory, slot = torch.zeros(4, dtype=torch.uint8), slot_of(b"..abcdef")
    parts = [part("all", 4, 0, 4, 2), part("none", 2, 0, 2, 6), part("split", 9, 0, 2, 6)]
    places = [Place(memory.data_ptr(), 4), Place(0, 0), Place(memory.data_ptr() + 1, 1, 1)]
    assembly = Assembly()
    assert assembly.take(parts, slot, places, asked) == []
    assert asked.prepared == [[Rectangle(memory.data_ptr(), 2, 4), Rectangle(memory.data_ptr() + 1, 7, 1)]]
    assert asked.bases == [slot.data_ptr()]
    assert assembly.placed == 2
    assert not memory.any()


def test_tensor_that_cannot_be_put_together_for_want_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*size: object, **kind: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", exhausted)
    with pytest.raises(ResourceError, match="no memory to put w together, which has 10 bytes: out of memory"):
        Assembly().take([part("w", 10, 0, 4)], slot_of(bytes(4)), [None], CPU)


@pytest.mark.parametrize(
    "parts",
    [
        [part("w", 10, 4, 4)],
        [part("w", 10, 0, 4), part("w", 10, 6, 4)],
        [part("w", 10, 0, 4), part("w", 10, 2, 4)],
        [part("w", 10, 0, 4), part("v", 10, 4, 4)],
        [part("w", 10, 0, 4), part("v", 10, 0, 4), part("w", 10, 4, 4)],
        [part("w", 10, 0, 4), part("w", 10, 4, 6), part("w", 10, 4, 6)],
    ],
    ids=["no beginning", "a gap", "an overlap", "another", "interrupted", "once more"],
)
def test_parts_that_do_not_follow_one_another_are_refused(parts: list[TensorPart]) -> None:
    assembly, slot = Assembly(), slot_of(bytes(16))
    for one in parts[:-1]:
        assembly.take([one], slot, [None], CPU)
    with pytest.raises(ProtocolError, match="follows nothing"):
        assembly.take([parts[-1]], slot, [None], CPU)


def test_more_bytes_than_a_tensor_has_are_refused() -> None:
    assembly, slot = Assembly(), slot_of(bytes(16))
    assembly.take([part("w", 10, 0, 4)], slot, [None], CPU)
    with pytest.raises(ProtocolError, match="12 bytes of w, which has 10"):
        assembly.take([part("w", 10, 4, 8)], slot, [], CPU)


def test_cleared_assembly_has_forgotten_what_was_begun() -> None:
    assembly, slot = Assembly(), slot_of(bytes(16))
    assembly.take([part("w", 10, 0, 4)], slot, [None], CPU)
    assembly.clear()
    with pytest.raises(ProtocolError):
        assembly.take([part("w", 10, 4, 6)], slot, [], CPU)
    assembly.take([part("w", 10, 0, 4)], slot, [None], CPU)
    assert len(assembly.take([part("w", 10, 4, 6)], slot, [], CPU)) == 1


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(
    "bad", [part("w", 4, 0, 4, 14), part("w", 4, 0, 4, -1), part("w", 99, 0, 99), part("w", 9, 0, -4, 8)], ids=str
)
def test_part_outside_the_slot_is_refused(bad: TensorPart, placed: bool) -> None:
    memory = torch.zeros(99, dtype=torch.uint8)
    with pytest.raises(ProtocolError, match="w lies outside of a slot of 16 bytes"):
        Assembly().take([bad], slot_of(bytes(range(16))), [Place(memory.data_ptr(), 99) if placed else None], CPU)
    assert not memory.any()


def test_bucket_that_comes_again_is_copied_as_it_was_prepared() -> None:
    """From wherever its slot is now, and to other places as soon as there are others; even a tensor that is split."""
    memory, asked, assembly = torch.zeros(8, dtype=torch.uint8), Recording(), Assembly()
    first, second = Place(memory.data_ptr(), 4), Place(memory.data_ptr() + 4, 4)
    buckets = {0: [part("w", 4, 0, 4), part("v", 4, 0, 2, 4)], 1: [part("v", 4, 2, 2)]}
    slots = [slot_of(b"abcdef"), slot_of(b"ghijkl")]

    def push(slot: torch.Tensor, *places: Place) -> int:
        placed = 0
        for seq, parts in buckets.items():
            assert assembly.take(list(parts), slot, places if seq == 0 else [], asked, seq) == []
            placed += assembly.placed
        return placed

    assert [push(slots[0], first, second), push(slots[1], first, second)] == [2, 2]
    assert asked.bases == [slots[0].data_ptr()] * 2 + [slots[1].data_ptr()] * 2
    assert len(asked.prepared) == 2
    assert push(slots[0], second, first) == 2
    assert len(asked.prepared) == 4
    assert asked.prepared[3] == [Rectangle(memory.data_ptr() + 2, 0, 2)]


def test_bucket_is_not_known_by_what_it_was_prepared_with_in_other_slots() -> None:
    memory, assembly = torch.zeros(4, dtype=torch.uint8), Assembly()
    recordings = [Recording(), Recording()]
    for recording in recordings:
        assembly.take([part("w", 4, 0, 4)], slot_of(b"abcd"), [Place(memory.data_ptr(), 4)], recording, 0)
    assert [len(recording.prepared) for recording in recordings] == [1, 1]


def test_known_bucket_in_which_something_does_not_follow_is_refused() -> None:
    memory, asked, assembly = torch.zeros(4, dtype=torch.uint8), Recording(), Assembly()
    assembly.take([part("w", 4, 0, 2)], slot_of(b"ab"), [Place(memory.data_ptr(), 4)], asked, 0)
    assembly.take([part("w", 4, 2, 2)], slot_of(b"cd"), [], asked, 1)
    with pytest.raises(ProtocolError, match="follows nothing"):
        assembly.take([part("w", 4, 2, 2)], slot_of(b"cd"), [], asked, 1)
