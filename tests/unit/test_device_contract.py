"""What every device has to do, over each that this host has; and what is particular to shared memory.

`device_factory` makes one: a device that joins adds itself to `FACTORIES`, and passes the same tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cpe_daemon.core.needs import Needs, by_name, describe
from cpe_daemon.core.plan import HERE, Copy, Costs, PeerCopy, Wants, assign, cut
from cpe_daemon.core.rectangles import Rectangle
from cpe_daemon.core.types import ALIGNMENT_BYTES, TensorSpec, align
from cpe_daemon.devices import shm
from cpe_daemon.devices.cuda import device as cuda_device
from cpe_daemon.devices.cuda import slots as cuda_slots
from cpe_daemon.devices.cuda.device import CudaDevice
from cpe_daemon.devices.device import Device
from cpe_daemon.devices.memory import SharedMemory, copy
from cpe_daemon.devices.shm import ShmDevice
from cpe_daemon.devices.slots import Slots, open_slots
from cpe_daemon.errors import PeerError, ResourceError
from cpe_daemon.links.handoff import HandoffServer, claim
from cpe_daemon.wire.messages import SlotSet
from tests.unit.fake_cuda import FakeCudaSlots, FakeDriver
from tests.unit.planning import ARENA, make_plan, whole

A = ALIGNMENT_BYTES
SLOT_BYTES = 16 * A
ARENA_BYTES = 64 * A
WAIT_SECONDS = 20.0

DeviceFactory = Callable[[SharedMemory, int, HandoffServer], Device]
"""Called as factory(arena, gpus, handoff); slots have SLOT_BYTES."""


def shm_factory(arena: SharedMemory, gpus: int, handoff: HandoffServer) -> Device:
    return ShmDevice(gpus=gpus, slot_bytes=SLOT_BYTES, source=arena.address, handoff=handoff)


def cuda_factory(arena: SharedMemory, gpus: int, handoff: HandoffServer) -> Device:
    """Over a simulated driver, which `device_factory` has put in the real one's place."""
    uuids = [f"GPU-{index:08d}" for index in range(gpus)]
    return CudaDevice(uuids=uuids, slot_bytes=SLOT_BYTES, source=arena.address, source_bytes=ARENA_BYTES)


FACTORIES: dict[str, DeviceFactory] = {"shm": shm_factory, "cuda": cuda_factory}


@pytest.fixture(params=FACTORIES)
def device_factory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeviceFactory:
    if request.param == "cuda":
        driver = FakeDriver(3)
        monkeypatch.setattr(cuda_device, "driver", lambda: driver)
        monkeypatch.setattr(cuda_slots, "CudaSlots", functools.partial(FakeCudaSlots, driver))
    return FACTORIES[request.param]


@pytest.fixture
def arena() -> Iterator[SharedMemory]:
    """Random bytes, to copy from."""
    made = SharedMemory.create("cpe-test-arena", ARENA_BYTES)
    made.view[:] = random.Random(7).randbytes(ARENA_BYTES)
    yield made
    made.close()


@dataclass
class Node:
    """A device, and a worker's view of each of its GPUs' slots."""

    device: Device
    handoff: HandoffServer
    views: list[Slots]

    def held(self, gpu: int, slot: int) -> bytes:
        """What an engine finds in a slot."""
        return self.views[gpu].slot(slot).cpu().numpy().tobytes()

    async def opened(self, slots: SlotSet) -> Slots:
        return await asyncio.to_thread(open_slots, slots, str(self.handoff.path))


Made = Callable[..., "contextlib.AbstractAsyncContextManager[Node]"]


@pytest.fixture
def node(no_leaks: None, runtime_dir: Path, arena: SharedMemory, device_factory: DeviceFactory) -> Made:
    """Makes nodes: ``async with node(gpus=2, slots=3) as made``."""

    @contextlib.asynccontextmanager
    async def make(gpus: int = 1, slots: int = 2) -> AsyncIterator[Node]:
        async with asyncio.TaskGroup() as tasks:
            handoff = HandoffServer(runtime_dir / "handoff.sock", tasks)
            handoff.start()
            made = Node(device_factory(arena, gpus, handoff), handoff, [])
            try:
                await made.device.open(lambda done, total: None)
                for gpu in range(gpus):
                    await made.device.take(gpu, slots)
                    made.views.append(await made.opened(made.device.export(gpu)))
                yield made
            finally:
                for view in made.views:
                    view.close()
                await made.device.close()
                handoff.close()

    return make


def pull(address: int, slot_offset: int, nbytes: int) -> Copy:
    return Copy(HERE, address, slot_offset, nbytes)


# --- every device ----------------------------------------------------------------------------------------------------


async def test_device_says_what_it_has(node: Made) -> None:
    async with node(gpus=3, slots=2) as made:
        device = made.device
        assert (device.slot_count, device.slot_bytes, len(device.topology.gpus)) == (2, SLOT_BYTES, 3)
        assert [device.slots(gpu) for gpu in range(3)] == [2, 2, 2]
        exported = device.export(1)
        assert (exported.count, exported.slot_bytes, exported.kind) == (2, SLOT_BYTES, device.kind)
        assert exported.gpu == device.topology.gpus[1].uuid
        device.withdraw(exported)


async def test_fetch_brings_bytes_of_the_arena_into_one_slot(node: Made, arena: SharedMemory) -> None:
    async with node(gpus=2, slots=2) as made:
        await made.device.fetch(1, 1, [pull(3 * A, 0, A), pull(5, 2 * A, 7), pull(0, SLOT_BYTES - 1, 1)])
        expected = bytearray(SLOT_BYTES)
        expected[:A] = arena.view[3 * A : 4 * A]
        expected[2 * A : 2 * A + 7] = arena.view[5:12]
        expected[-1] = arena.view[0]
        assert made.held(1, 1) == expected
        for untouched in ((0, 0), (0, 1), (1, 0)):
            assert made.held(*untouched) == bytes(SLOT_BYTES)


async def test_fetch_of_nothing_is_nothing(node: Made) -> None:
    async with node() as made:
        await made.device.fetch(0, 0, [])
        await made.device.exchange(0, 0, [])
        assert made.held(0, 0) == bytes(SLOT_BYTES)


async def test_exchange_completes_a_slot_from_the_same_slot_of_others(node: Made, arena: SharedMemory) -> None:
    async with node(gpus=3, slots=2) as made:
        for gpu in range(3):
            await made.device.fetch(gpu, 1, [pull(gpu * A, gpu * A, A)])
        for gpu in range(3):
            others = [PeerCopy(other, other * A, A) for other in range(3) if other != gpu]
            await made.device.exchange(gpu, 1, others)
        for gpu in range(3):
            assert made.held(gpu, 1) == bytes(arena.view[: 3 * A]) + bytes(SLOT_BYTES - 3 * A)
            assert made.held(gpu, 0) == bytes(SLOT_BYTES)


async def test_copies_of_one_gpu_are_carried_out_in_their_order(node: Made, arena: SharedMemory) -> None:
    """What is asked for last stands, whatever is still in flight: a slot is filled anew as soon as it is free."""
    async with node(slots=1) as made:
        calls = [made.device.fetch(0, 0, [pull(n * A, 0, A)]) for n in range(30)]
        await asyncio.gather(*calls)
        assert made.held(0, 0)[:A] == bytes(arena.view[29 * A : 30 * A])


async def test_several_slots_are_filled_at_once(node: Made, arena: SharedMemory) -> None:
    async with node(gpus=2, slots=4) as made:
        async with asyncio.TaskGroup() as tasks:
            for gpu in range(2):
                for slot in range(4):
                    at = (gpu * 4 + slot) * 4 * A
                    tasks.create_task(made.device.fetch(gpu, slot, [pull(at, 0, 4 * A)]))
        for gpu in range(2):
            for slot in range(4):
                at = (gpu * 4 + slot) * 4 * A
                assert made.held(gpu, slot)[: 4 * A] == bytes(arena.view[at : at + 4 * A])


@pytest.mark.parametrize("gpus", [1, 2, 3])
async def test_planned_buckets_arrive_whole_at_every_gpu(gpus: int, node: Made, arena: SharedMemory) -> None:
    sizes = [3 * A, 1, A - 1, 0, 20 * A + 3, 7, 4 * A]
    at, tensors = 0, []
    for index, nbytes in enumerate(sizes):
        tensors.append(whole(TensorSpec(f"layers.{index}.w", "uint8", (nbytes,)), at))
        at += align(nbytes)
    async with node(gpus=gpus, slots=2) as made:
        device = made.device
        plan = make_plan(tensors, slot_bytes=SLOT_BYTES, topology=device.topology)
        for bucket in plan.buckets:
            slot = bucket.index % 2
            await asyncio.gather(*(device.fetch(gpu, slot, bucket.pulls[gpu]) for gpu in range(gpus)))
            await asyncio.gather(*(device.exchange(gpu, slot, bucket.exchanges[gpu]) for gpu in range(gpus)))
            for gpu in range(gpus):
                held = made.held(gpu, slot)
                for part in bucket.parts:
                    for run in tensors[part.tensor].runs:
                        source = run.offset + part.tensor_offset
                        there = held[part.slot_offset : part.slot_offset + part.nbytes]
                        assert there == bytes(arena.view[source : source + part.nbytes])


@pytest.mark.parametrize("gpus", [1, 2, 3])
async def test_slices_arrive_and_nothing_else_does(gpus: int, node: Made, arena: SharedMemory) -> None:
    """Ranks need a third of each tensor, the last tensor in rows; every device carries it out as it is planned."""
    sizes = [6 * A, 3 * A, 30 * A, 9]
    at, tensors = 0, []
    for index, nbytes in enumerate(sizes):
        tensors.append(whole(TensorSpec(f"layers.{index}.w", "uint8", (nbytes,)), at))
        at += align(nbytes)
    needs: list[list[Needs | None]] = [
        [
            describe(
                {
                    tensor.spec.name: (tensor.spec, [Rectangle(0, gpu * part, part)])
                    for tensor in tensors
                    for part in [tensor.spec.nbytes // 3]
                }
            )
        ]
        for gpu in range(gpus)
    ]
    async with node(gpus=gpus, slots=2) as made:
        device = made.device
        specs = [tensor.spec for tensor in tensors]
        buckets = cut(specs, SLOT_BYTES)
        wants = Wants(buckets, by_name(specs), needs, Costs())
        plan = assign(buckets, tensors, ARENA, replace(device.topology, costs=Costs()), wants)
        assert all(bucket.sliced is not None for bucket in plan.buckets)
        for bucket in plan.buckets:
            if bucket.sliced is None:
                continue
            slot, sliced = bucket.index % 2, bucket.sliced
            before = [made.held(gpu, slot) for gpu in range(gpus)]
            await asyncio.gather(*(device.fetch(gpu, slot, sliced.pulls[gpu]) for gpu in range(gpus)))
            await asyncio.gather(*(device.exchange(gpu, slot, sliced.exchanges[gpu]) for gpu in range(gpus)))
            for gpu in range(gpus):
                expected = bytearray(before[gpu])
                written = [(copy.slot_offset, copy.nbytes) for copy in sliced.pulls[gpu]]
                written += [(copy.slot_offset, copy.nbytes) for copy in sliced.exchanges[gpu]]
                places = {at for start, nbytes in written for at in range(start, start + nbytes)}
                for part in bucket.parts:
                    tensor = tensors[part.tensor]
                    third = tensor.spec.nbytes // 3
                    address = tensor.runs[0].offset
                    for at in range(part.tensor_offset, part.tensor_offset + part.nbytes):
                        place = part.slot_offset + at - part.tensor_offset
                        needed = gpu * third <= at < (gpu + 1) * third
                        assert place in places or not needed
                        if place in places:
                            expected[place] = arena.view[address + at]
                assert made.held(gpu, slot) == expected


async def test_bytes_that_a_peer_has_are_refused(node: Made) -> None:
    async with node() as made:
        with pytest.raises(ResourceError, match="node-7"):
            await made.device.fetch(0, 0, [Copy("node-7", 0, 0, A)])


async def test_slots_are_given_back_and_taken_again_in_another_number(node: Made, arena: SharedMemory) -> None:
    async with node(gpus=2, slots=2) as made:
        device = made.device
        made.views.pop().close()
        await device.release(1)
        assert (device.slots(0), device.slots(1), device.slot_count) == (2, 0, 2)
        await device.take(1, 5)
        assert (device.slots(1), device.slot_count) == (5, 2)
        made.views.append(await made.opened(device.export(1)))
        await device.fetch(1, 4, [pull(0, 0, A)])
        assert made.held(1, 4)[:A] == bytes(arena.view[:A])


async def test_gpu_gets_as_many_slots_as_there_is_memory_for(node: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "available_bytes", lambda: 3 * SLOT_BYTES - 1)
    monkeypatch.setattr(FakeDriver, "total", 3 * SLOT_BYTES - 1, raising=False)
    async with node(gpus=1, slots=3) as made:
        assert made.device.slot_count == 2


async def test_gpu_without_memory_for_a_slot_is_told_of_and_may_get_one_later(
    node: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(gpus=1, slots=1) as made:
        made.views.pop().close()
        await made.device.release(0)
        with monkeypatch.context() as short:
            short.setattr(shm, "available_bytes", lambda: SLOT_BYTES - 1)
            short.setattr(FakeDriver, "total", SLOT_BYTES - 1)
            with pytest.raises(ResourceError, match=r"lower device\.slot_bytes"):
                await made.device.take(0, 3)
        assert made.device.slots(0) == 0
        await made.device.take(0, 1)
        assert made.device.slots(0) == 1


async def test_withdrawing_twice_is_withdrawing_once(node: Made) -> None:
    async with node() as made:
        exported = made.device.export(0)
        made.device.withdraw(exported)
        made.device.withdraw(exported)


async def test_slots_of_an_unknown_device_are_refused(node: Made) -> None:
    async with node() as made:
        with pytest.raises(PeerError, match="'tpu'"):
            open_slots(SlotSet("tpu", "TPU-0", 1, A, [b""]), str(made.handoff.path))


# --- shared memory ---------------------------------------------------------------------------------------------------


on_shm = pytest.mark.parametrize("device_factory", [shm_factory], ids=["shm"])
"""Of what is particular to it."""


@pytest.fixture
async def shared(node: Made) -> AsyncIterator[Node]:
    """A node whose device is shared memory, with two sets of two slots."""
    async with node(gpus=2, slots=2) as made:
        yield made


@on_shm
async def test_shm_worker_reads_on_after_the_device_is_closed(shared: Node, arena: SharedMemory) -> None:
    await shared.device.fetch(0, 0, [pull(0, 0, A)])
    await shared.device.close()
    assert shared.held(0, 0)[:A] == bytes(arena.view[:A])


@on_shm
async def test_shm_withdrawn_slots_cannot_be_opened(shared: Node) -> None:
    exported = shared.device.export(0)
    shared.device.withdraw(exported)
    with pytest.raises(PeerError):
        await shared.opened(exported)


@on_shm
async def test_shm_slots_are_opened_once(shared: Node) -> None:
    exported = shared.device.export(0)
    worker = await shared.opened(exported)
    with pytest.raises(PeerError):
        await shared.opened(exported)
    worker.close()


@on_shm
async def test_shm_slots_are_mapped_read_only(shared: Node) -> None:
    """An engine cannot spoil its neighbours' bytes: its mapping has no write permission, and none can be made."""
    exported = shared.device.export(0)
    fd, tether = await asyncio.to_thread(claim, str(shared.handoff.path), exported.handles[0])
    with pytest.raises(PeerError):
        SharedMemory.attach(os.dup(fd), exported.count * SLOT_BYTES, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    tether.close()
    permissions = [line.split()[1] for line in mappings() if "cpe-slots-shm-0" in line]
    assert sorted(permissions) == ["r--s", "rw-s"]  # the worker's and the daemon's own


def mappings() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


@on_shm
async def test_shm_tensor_kept_too_long_still_has_memory_behind_it(shared: Node, arena: SharedMemory) -> None:
    """A callback that keeps a view against the rules must not take its engine down with it."""
    await shared.device.fetch(0, 0, [pull(0, 0, A)])
    worker = await shared.opened(shared.device.export(0))
    kept = worker.slot(0)
    before = sum("cpe-slots-shm-0" in line for line in mappings())
    worker.close()
    assert sum("cpe-slots-shm-0" in line for line in mappings()) == before
    assert kept[:A].numpy().tobytes() == bytes(arena.view[:A])
    del kept, worker
    async with asyncio.timeout(WAIT_SECONDS):
        while sum("cpe-slots-shm-0" in line for line in mappings()) == before:
            await asyncio.sleep(0)  # loop and thread hold what they returned last
            gc.collect()
    assert sum("cpe-slots-shm-0" in line for line in mappings()) == before - 1


@on_shm
@pytest.mark.parametrize("handles", [[], [bytes(32), bytes(32)], [bytes(32)]])
async def test_shm_slots_with_wrong_handles_are_refused(handles: list[bytes], shared: Node) -> None:
    with pytest.raises(PeerError):
        await shared.opened(SlotSet("shm", "shm-0", 2, SLOT_BYTES, handles))


@on_shm
async def test_shm_slots_larger_than_the_memory_are_refused(shared: Node) -> None:
    exported = shared.device.export(0)
    with pytest.raises(PeerError, match="not a sealed region"):
        await shared.opened(SlotSet("shm", "shm-0", 3, SLOT_BYTES, exported.handles))


@on_shm
@pytest.mark.parametrize("times", [1, 3])
async def test_shm_copy_that_is_cancelled_has_ended_before_its_caller_goes_on(
    times: int, shared: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that went on would fill the slot of the next round with the last one's bytes."""
    begun, go_on = threading.Event(), threading.Event()
    copied: list[int] = []

    def slow_copy(destination: int, source: int, nbytes: int) -> None:
        begun.set()
        assert go_on.wait(WAIT_SECONDS)
        copy(destination, source, nbytes)
        copied.append(nbytes)

    monkeypatch.setattr(shm, "copy", slow_copy)
    running = asyncio.create_task(shared.device.exchange(0, 0, [PeerCopy(1, 0, 64)]))
    waiting = asyncio.create_task(shared.device.exchange(0, 1, [PeerCopy(1, 0, 65)]))
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    waiting.cancel()
    await asyncio.wait([waiting])
    for _ in range(times):
        running.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not running.done()
    go_on.set()
    await asyncio.wait([running])
    assert (running.cancelled(), waiting.cancelled()) == (True, True)
    assert copied == [64]  # what had not begun never does


@on_shm
async def test_shm_copy_that_fails_after_being_cancelled_is_nobodys_error(
    shared: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fail(destination: int, source: int, nbytes: int) -> None:
        begun.set()
        assert go_on.wait(WAIT_SECONDS)
        raise ResourceError("too late")

    monkeypatch.setattr(shm, "copy", fail)
    running = asyncio.create_task(shared.device.fetch(0, 0, [pull(0, 0, A)]))
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    running.cancel()
    asyncio.get_running_loop().call_soon(go_on.set)
    await asyncio.wait([running])
    assert running.cancelled()
