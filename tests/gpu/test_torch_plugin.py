"""The torch plugin on a GPU: slots of another process, opened by a raw handle, and what becomes of a version in them.

Everything runs on the last GPU that there is, so that on a host with several it is not the thread's current one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpe_daemon.core.plan import Bucket, Gpu, Topology
from cpe_daemon.core.types import TensorSpec, VersionId, align
from cpe_daemon.devices.cuda.slots import CudaSlots, device_index, gpu_uuid
from cpe_daemon.devices.slots import Slots, open_slots
from cpe_daemon.errors import DeadlineError, MisuseError, PeerError
from cpe_daemon.wire.messages import Begin, Finish, Load, Pause, Resume, SlotSet, StepDone, TensorPart
from inference_plugins.steps import Answer, Step, Steps
from inference_plugins.torch.gpus import gpu_of
from inference_plugins.torch.learning import make_target
from inference_plugins.torch.loader import TorchLoader
from inference_plugins.torch.serving_lock import ServingLock
from inference_plugins.torch.targets import Slicer
from tests.gpu.slot_holder import SlotHolder
from tests.unit.planning import make_plan, whole
from tests.unit.tensor_zoo import bytes_of, tensor_of

pytestmark = pytest.mark.gpu

SLOT_BYTES = 2 << 20
SECONDS = 30.0

# Tensors of every way to get in: whole, rows, columns; each small, and larger than a slot.
SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("embed.weight", "bfloat16", (3000, 512)),
        TensorSpec("layers.0.norm.weight", "float32", (513,)),
        TensorSpec("layers.0.up.weight", "bfloat16", (258, 130)),
        TensorSpec("layers.0.down.weight", "bfloat16", (130, 258)),
        TensorSpec("layers.0.wide.weight", "bfloat16", (700, 2048)),
        TensorSpec("layers.0.table.weight", "int8", (5, 500_001)),
        TensorSpec("layers.0.quantised.weight", "float8_e4m3fn", (64, 96)),
        TensorSpec("layers.0.scale", "float32", ()),
        TensorSpec("layers.0.none", "bfloat16", (0, 4)),
    )
}
SLICING = {
    "embed.weight": 0,
    "layers.0.up.weight": 0,
    "layers.0.down.weight": 1,
    "layers.0.wide.weight": 1,
    "layers.0.quantised.weight": -1,
}


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture(scope="module")
def holder(gpu: torch.device) -> Iterator[SlotHolder]:
    with SlotHolder(gpu.index, 2, SLOT_BYTES) as started:
        yield started


@pytest.fixture
def slots(holder: SlotHolder) -> Iterator[Slots]:
    opened = open_slots(holder.slots, "no hand-off is needed")
    yield opened
    opened.close()


def version_of(number: int) -> dict[str, Tensor]:
    """Random bits."""
    return {
        name: tensor_of(spec.dtype, *spec.shape, seed=1000 * number + at)
        for at, (name, spec) in enumerate(SPECS.items())
    }


def part_of(name: str, tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """What a rank holds of a tensor, found by another way than the product's."""
    if name not in SLICING or world_size == 1:
        return tensor
    return tensor.chunk(world_size, SLICING[name])[rank]


def parameters(rank: int, world_size: int, device: torch.device | str) -> dict[str, Tensor]:
    """Zeros to be updated."""
    return {n: torch.zeros_like(part_of(n, t, rank, world_size), device=device) for n, t in version_of(0).items()}


def assert_holds(held: Mapping[str, Tensor], version: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    for name, tensor in held.items():
        assert bytes_of(tensor.cpu()) == bytes_of(part_of(name, version[name], rank, world_size)), name


class Engine:
    """A worker that is carried through rounds, in one thread that is not the test's and knows of no GPU before."""

    def __init__(self, target: Any, holder: SlotHolder, slots: Slots, rank: int = 0, world_size: int = 1) -> None:
        self.lock = ServingLock(0.0)
        self.target = make_target(target, Slicer(SLICING, rank, world_size), ())
        self.loader = TorchLoader(self.target, self.lock, threading.Condition())
        self._steps = Steps(self.loader)
        self._slots, self._holder = slots, holder
        self._thread = ThreadPoolExecutor(1)

    def do(self, step: Step) -> None:
        (answer,) = self._thread.submit(self._carry_out, step).result(SECONDS)
        assert isinstance(answer, StepDone), answer

    def _carry_out(self, step: Step) -> list[Answer]:
        return self._steps.carry_out(step, self._slots) or self._steps.settle_all()

    def update(self, number: int, names: Collection[str] = SPECS.keys()) -> None:
        """Push a version; each bucket's slot is overwritten as soon as the worker says that it may be."""
        tensors = {name: tensor for name, tensor in version_of(number).items() if name in names}
        version = VersionId("m", "r", number)
        self.do(Pause(number, SECONDS))
        self.do(Begin(number, version, len(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        for load, content in buckets(number, tensors):
            self._holder.fill(load.slot, content)
            self.do(load)
            self._holder.fill(load.slot, b"\xff" * SLOT_BYTES)
        self.do(Finish(number))
        self.do(Resume(number, version))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def buckets(round: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Load, bytes]]:
    """A version's buckets as they are planned, and what their slots hold."""
    arena, planned = bytearray(), []
    for name, tensor in tensors.items():
        planned.append(whole(SPECS[name], len(arena)))
        arena += bytes_of(tensor).ljust(align(tensor.nbytes), b"\0")
    plan = make_plan(planned, slot_bytes=SLOT_BYTES, topology=Topology((Gpu("g"),), peer_access=False))
    for bucket in plan.buckets:
        content = bytearray(SLOT_BYTES)
        for pull in bucket.pulls[0]:
            content[pull.slot_offset : pull.slot_offset + pull.nbytes] = arena[
                pull.address : pull.address + pull.nbytes
            ]
        yield Load(round, bucket.index, bucket.index % 2, _parts(bucket, [t.spec for t in planned])), bytes(content)


def _parts(bucket: Bucket, specs: list[TensorSpec]) -> list[TensorPart]:
    return [
        TensorPart(spec.name, spec.dtype, spec.shape, part.tensor_offset, part.nbytes, part.slot_offset)
        for part in bucket.parts
        for spec in [specs[part.tensor]]
    ]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_every_version_arrives_bit_by_bit(
    rank: int, world_size: int, gpu: torch.device, holder: SlotHolder, slots: Slots
) -> None:
    held = parameters(rank, world_size, gpu)
    with Engine(held, holder, slots, rank, world_size) as engine:
        for number in (1, 2, 3):
            engine.update(number)
            assert_holds(held, version_of(number), rank, world_size)


def test_most_tensors_are_copied_by_address(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    """All that has bytes: rows and columns of a tensor that is larger than a slot as well."""
    with Engine(parameters(1, 2, gpu), holder, slots, 1, 2) as engine:
        engine.target.begin()
        places = engine.target.place(list(SPECS.values()), slots.device)
    without = {name for name, place in zip(SPECS, places, strict=True) if place is None}
    assert without == {"layers.0.none"}


def test_module_is_updated_in_its_own_memory(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3000, 512, device=gpu, dtype=torch.bfloat16)

    model = Model()
    before = model.embed.weight.data_ptr()
    with Engine(model, holder, slots) as engine:
        engine.update(1, ["embed.weight"])
    assert model.embed.weight.data_ptr() == before
    assert_holds(model.state_dict(), version_of(1), 0, 1)


def test_tensors_in_host_memory_are_written_too(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    held = parameters(0, 2, gpu)
    for name in ("embed.weight", "layers.0.down.weight", "layers.0.scale"):
        held[name] = held[name].cpu()
    with Engine(held, holder, slots, 0, 2) as engine:
        engine.update(1)
    assert_holds(held, version_of(1), 0, 2)


def test_tensors_on_another_gpu_are_written_too(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    held = parameters(0, 2, "cuda:0")
    with Engine(held, holder, slots, 0, 2) as engine:
        engine.update(1)
    assert_holds(held, version_of(1), 0, 2)


# --- streams ---------------------------------------------------------------------------------------------------------


def keep_busy(gpu: torch.device) -> torch.cuda.Event:
    """Have the GPU do something for about half a second, on a stream of its own; returns the end of it."""
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        done: torch.cuda.Event = stream.record_event()
    return done


def test_pause_waits_for_the_forward_pass_that_was_issued(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    with Engine(parameters(0, 1, gpu), holder, slots) as engine:
        engine.loader.resume()
        done = keep_busy(gpu)
        assert not done.query()
        with pytest.raises(DeadlineError, match=f"{gpu} was still busy"):
            engine.loader.pause(0.01)
        assert engine.lock.shut_because is None
        engine.do(Pause(1, SECONDS))
        assert done.query()
        assert engine.lock.shut_because is not None


def test_what_a_callback_issues_is_waited_for(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    """It need not be done with a tensor when it returns; it is then given the next one."""
    held, where = parameters(0, 1, gpu), set[tuple[int, torch.cuda.Stream]]()

    def keep(name: str, tensor: Tensor) -> None:
        where.add((torch.cuda.current_device(), torch.cuda.current_stream()))
        torch.cuda._sleep(50_000_000)
        held[name].copy_(tensor)

    with Engine(keep, holder, slots) as engine:
        engine.update(1)
    assert_holds(held, version_of(1), 0, 1)
    ((device, stream),) = where
    assert device == gpu.index
    assert stream != torch.cuda.default_stream(gpu)


def test_load_does_not_wait_for_other_streams(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    """Another model's work on the same GPU is no part of an update."""
    held = parameters(0, 1, gpu)
    name = "layers.0.norm.weight"
    ((load, content),) = buckets(1, {name: version_of(1)[name]})
    with Engine(held, holder, slots) as engine:
        engine.do(Pause(1, SECONDS))
        engine.do(Begin(1, VersionId("m", "r", 1), 1, len(content)))
        holder.fill(load.slot, content)
        done = keep_busy(gpu)
        engine.do(load)
        assert not done.query()
        assert_holds({name: held[name]}, version_of(1), 0, 1)


# --- slots -----------------------------------------------------------------------------------------------------------


def test_gpu_has_one_name_everywhere(gpu: torch.device, holder: SlotHolder) -> None:
    """The daemon's, the driver's here, and torch's."""
    assert gpu_uuid(gpu.index) == holder.slots.gpu
    assert device_index(holder.slots.gpu) == gpu.index
    assert f"GPU-{torch.cuda.get_device_properties(gpu.index).uuid}" == holder.slots.gpu


def test_worker_s_gpu_is_told_from_its_tensors(gpu: torch.device, holder: SlotHolder) -> None:
    def found(**tensors: Tensor) -> str:
        return gpu_of(make_target(tensors, Slicer(None, 0, 1), ()).gpus())

    assert found(a=torch.zeros(1), b=torch.zeros(1, device=gpu)) == holder.slots.gpu
    assert found(a=torch.zeros(1)) == ""
    if gpu.index:
        with pytest.raises(MisuseError, match="cuda:0, cuda:1"):
            found(a=torch.zeros(1, device="cuda:0"), b=torch.zeros(1, device="cuda:1"))


def test_slots_are_views_of_the_other_process_s_memory(gpu: torch.device, holder: SlotHolder, slots: Slots) -> None:
    held = torch.cuda.memory_allocated(gpu)
    view = slots.slot(1)
    for content in (b"\x05" * SLOT_BYTES, b"\x09" * SLOT_BYTES):
        holder.fill(1, content)
        assert bytes_of(view.cpu()) == content
    assert (view.device, view.numel()) == (gpu, SLOT_BYTES)
    assert torch.cuda.memory_allocated(gpu) == held


def test_nothing_is_left_of_slots_that_were_closed(
    gpu: torch.device, holder: SlotHolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Opened and closed with an update between, as in every round."""
    held = parameters(1, 2, gpu)

    def one_round(number: int) -> None:
        opened = open_slots(holder.slots, "")
        with Engine(held, holder, opened, 1, 2) as engine:
            engine.update(number)
        opened.close()

    for number in (0, 1):  # CUDA loads kernels when they are first used, and keeps them
        one_round(number)
    torch.cuda.synchronize(gpu)
    free, kept = torch.cuda.mem_get_info(gpu)[0], torch.cuda.memory_reserved(gpu)
    for number in range(2, 12):
        one_round(number)
    assert torch.cuda.memory_reserved(gpu) == kept
    assert torch.cuda.mem_get_info(gpu)[0] == free
    assert caplog.records == []
    assert_holds(held, version_of(11), 1, 2)


def test_view_that_is_kept_against_the_rules_is_told_and_does_no_harm(
    gpu: torch.device, holder: SlotHolder, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_slots(holder.slots, "")
    holder.fill(0, b"\x03" * SLOT_BYTES)
    kept = opened.slot(0)[5:9]
    with caplog.at_level(logging.ERROR):
        opened.close()
    assert "somebody keeps a view of the slots" in caplog.text
    assert kept.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: SlotSet("cuda", s.gpu, s.count, s.slot_bytes, [bytes(64)]), "cannot open the slots"),
        (lambda s: SlotSet("cuda", s.gpu, s.count, s.slot_bytes, [b"short"]), "64 bytes"),
        (lambda s: SlotSet("cuda", s.gpu, s.count, s.slot_bytes, []), "0 handles"),
        (lambda s: SlotSet("cuda", "GPU-elsewhere", s.count, s.slot_bytes, s.handles), "is not visible"),
    ],
    ids=["a wrong handle", "a short handle", "no handle", "an unknown GPU"],
)
def test_slots_that_cannot_be_opened_are_refused(
    spoil: Callable[[SlotSet], SlotSet], says: str, holder: SlotHolder
) -> None:
    with pytest.raises(PeerError, match=says):
        open_slots(spoil(holder.slots), "")


def test_thread_is_left_on_the_gpu_that_it_was_on(gpu: torch.device, holder: SlotHolder) -> None:
    before = torch.cuda.current_device(), torch.cuda.current_stream()
    opened = open_slots(holder.slots, "")
    assert isinstance(opened, CudaSlots)
    with opened.loading():
        assert torch.cuda.current_device() == gpu.index
        assert torch.cuda.current_stream() != torch.cuda.default_stream(gpu)
    opened.close()
    assert (torch.cuda.current_device(), torch.cuda.current_stream()) == before
